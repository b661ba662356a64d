"""What compiling attention through `local_map` changes: numbers and time, eager against torch.compile's backends, on two CPU ranks.

    python benchmarks/local_map.py --shape cp2:4096:8:2:64:bfloat16 --shape tp2:4096:8:2:64:float32 --pairs 20

Each shape is a layout, tokens, query heads, kv heads, head size and dtype. Ranks have one thread each. All variants run on the same q, K and V
within one process group. Numbers: relative RMSE and largest difference against the same attention in fp64 on one device from the same inputs,
and against eager; over all ranks. Time: variants alternate, so that drift of the machine cancels in the ratio of each pair; the control is
eager over itself. Printed: the median ratio to eager, its 95% bootstrap interval, the median time, the time of the first call, which
compiles, and how many graphs a longer batch adds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Groups, Mesh
from cpbench.kernels import load_kernel
from cpbench.launch import rank_environment
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.one_device import OneDevice
from cpbench.program import Program

CPU = torch.device("cpu")
VARIANTS = {"none": "none", "control": "none", "eager": "eager", "inductor": "inductor"}  # name -> the option compile
DEFAULT_SHAPES = tuple(f"{layout}:4096:8:2:64:{dtype}" for layout, dtype in product(("tp2", "cp2"), ("float32", "bfloat16")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="LAYOUT:S:H:G:D:DTYPE", help="layout of 2 ranks, tokens, query heads, kv heads, head size, dtype")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *sys.argv]
        raise SystemExit(subprocess.run(command, env=rank_environment(os.environ, threads=1), check=False).returncode)
    with torch.inference_mode():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    start_process_groups(CPU)
    torch.set_num_threads(1)
    mesh = Mesh(int(os.environ["RANK"]), 2, "cpu")
    for shape in options.shape or DEFAULT_SHAPES:
        cells = {name: cell(shape, compile_) for name, compile_ in VARIANTS.items()}
        groups = mesh.groups(cells["none"].layout)
        programs = {name: program(work, groups) for name, work in cells.items()}
        first = {name: once(run.run, groups) for name, run in programs.items()}
        rows = {name: whole(run, groups) for name, run in programs.items()}
        graphs = {name: graphs_of_two_lengths(work, groups) for name, work in cells.items()}
        times: dict[str, list[float]] = {name: [] for name in programs}
        for pair in range(options.pairs):
            for name in list(programs) if pair % 2 else list(programs)[::-1]:
                times[name].append(once(programs[name].run, groups))
        if groups.rank == 0:
            report(shape, cells["none"], rows, times, first, graphs)
        groups.world.barrier()
    stop_process_groups()


def cell(shape: str, compile_: str) -> Cell:
    name, tokens, heads, kv_heads, dim, dtype = shape.split(":")
    config, layout = ModelConfig("benchmark", 64, 1, int(heads), int(kv_heads), int(dim), 64, 64), Layout.parse(name)
    partition = "zigzag" if layout.cp > 1 else "contiguous"
    return Cell("attention", config, 1, layout, "local-map", partition, "cpu_flash", dtype, "cpu", (int(tokens),), compile=compile_)


def program(work: Cell, groups: Groups) -> Program:
    return Program(work, groups, load_kernel("cpu_flash"), CPU)


def once(run: Callable[[], object], groups: Groups) -> float:
    """Seconds of one pass: from a rendezvous to the end of the slower rank."""
    groups.world.barrier()
    start = time.perf_counter()
    run()
    return max(seconds for (seconds,) in groups.world.share([time.perf_counter() - start]))


def whole(run: Program, groups: Groups) -> Tensor:
    """The output [N, H * D] in packed order, on every rank."""
    mine = run.run().rows.flatten(1).contiguous()
    by_rank = mine.new_empty(2, *mine.shape)
    groups.world.all_gather(by_rank.flatten(0, 1), mine).wait()
    if groups.layout.tp == 2:
        return torch.cat([*by_rank], 1)
    order = torch.cat([torch.cat([torch.arange(r.start, r.stop) for r in run.cell.tokens_of(0, rank)]) for rank in range(2)])
    return torch.empty_like(by_rank.flatten(0, 1)).index_copy_(0, order, by_rank.flatten(0, 1))


def graphs_of_two_lengths(work: Cell, groups: Groups) -> int:
    """Graphs that a new length adds; asked after the first call."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    program(replace(work, lengths=(work.lengths[0] + 128,)), groups).run()
    return int(counters["stats"]["unique_graphs"] - before)


def report(shape: str, work: Cell, rows: dict[str, Tensor], times: dict[str, list[float]], first: dict[str, float], graphs: dict[str, int]) -> None:
    """A line per variant."""
    truth = OneDevice(CPU).truth(work).rows
    print(f"\n{shape}   {len(times['none'])} pairs, relative RMSE and largest difference")
    print(f"{'compile':<9} {'against fp64':>21} {'against none':>21}   {'time over none':<23} {'median':>9} {'first call':>11} {'new graphs':>11}")
    for name, seconds in times.items():
        fp64, none = difference(rows[name], truth), difference(rows[name], rows["none"])
        print(f"{name:<9} {fp64} {none}   {ratio(seconds, times['none'])} {np.median(seconds):>7.4f} s {first[name]:>9.2f} s {graphs[name]:>11}", flush=True)


def difference(found: Tensor, expected: Tensor) -> str:
    distance = found.double() - expected.double()
    return f"{float(distance.norm() / expected.double().norm()):10.3e} {float(distance.abs().max()):10.3e}"


def ratio(seconds: list[float], base: list[float]) -> str:
    """The median of the paired ratios and its 95% bootstrap interval."""
    ratios = np.array(seconds) / np.array(base)
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return f"{np.median(ratios):.3f}  [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
