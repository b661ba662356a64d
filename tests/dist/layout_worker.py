"""One rank of a test: every layout of all ranks on real process groups, held against one device in fp64 by the first rank.

    torchrun --nproc-per-node 8 -m tests.dist.layout_worker

Prints one line per cell that is wrong, how many were right, and what the process groups cost.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Mesh
from cpbench.kernels import load_kernel
from cpbench.layout import Layout, all_layouts
from cpbench.models.presets import PRESETS
from cpbench.numerics import judge
from cpbench.one_device import OneDevice
from cpbench.plan import unsupported
from cpbench.models.held import Models
from cpbench.strategies import STRATEGIES

CPU = torch.device("cpu")
CONFIG = replace(PRESETS["qwen3-tiny"], layers=8, vocab=512)  # 8 heads and 8 layers: every axis may have 8 ranks
BATCH = ((101, 67, 40, 130), (0, 40, 0, 17))
STRATEGY_NAMES = ("allgather", "ring", "ulysses", "usp")
MAX_LOGITS_ERROR = 1e-4


def cells(ranks: int) -> Iterator[Cell]:
    """Every layout, whole and in chunks, with every strategy that has ranks to talk to."""
    for layout in all_layouts(ranks):
        for name in STRATEGY_NAMES if layout.cp > 1 else ("none",):
            mine = replace(layout, ulysses=2) if name == "usp" and layout.cp > 2 else layout
            cell = Cell("prefill", CONFIG, 8, mine, name, STRATEGIES[name].partitions[0], "auto", "float32", "cpu", BATCH[0], prefixes=BATCH[1])
            yield from (cell, replace(cell, chunk=64))
    short = Cell("prefill", CONFIG, 8, Layout(dp=ranks), "none", "contiguous", "auto", "float32", "cpu", (67,))
    yield from (short, replace(short, layout=Layout(dp=ranks // 2, cp=2), strategy="ring", partition="zigzag"))  # groups without a sequence


def main() -> None:
    torch.set_num_threads(1)
    start_process_groups(CPU)
    created: list[tuple[int, ...]] = []
    new_group = dist.new_group

    def counted(ranks: list[int], **options: Any) -> Any:
        created.append(tuple(ranks))
        return new_group(ranks, **options)

    dist.new_group = counted
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh, one_device, kernel, right = Mesh(rank, size, "cpu"), OneDevice(CPU), load_kernel("cpu_flash"), 0
    for cell in cells(size):
        reason = unsupported(cell)
        answers = solve(cell, mesh.groups(cell.layout), kernel, CPU, Models()) if reason is None else []
        if rank == 0 and reason is None:
            check = judge(answers, kernel, one_device)
            truth = one_device.truth(cell)
            same = answers[-1].first_tokens == truth.tokens and check.logits_max_error is not None and check.logits_max_error < MAX_LOGITS_ERROR
            right += check.passed and same
            reason = check.reason or (None if same else f"first tokens {answers[-1].first_tokens}, logits off by {check.logits_max_error}")
        if rank == 0 and reason:
            sys.stdout.write(f"wrong: {cell.id}: {reason}\n")
    if rank == 0:
        sys.stdout.write(f"right: {right}\ngroups: {len(created)} created, {len(set(created))} distinct, smallest {min(map(len, created), default=size)} ranks\n")
    stop_process_groups()
    sys.stdout.flush()
    os._exit(0)  # as ranks of a sweep do: torch aborts now and then where process groups are taken down with the interpreter


if __name__ == "__main__":
    with torch.inference_mode():
        main()
