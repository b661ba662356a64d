"""One rank of a test: random batches on real process groups, every strategy, held against one device in fp64 by the first rank.

    torchrun --nproc-per-node 3 -m tests.dist.batch_worker SEED BATCHES

Prints one line per cell that is wrong, and how many were right.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Mesh
from cpbench.formulas import traffic
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.program import Program, run_locally
from cpbench.strategies import STRATEGIES

CPU = torch.device("cpu")


def cells(choose: random.Random, cp: int) -> Iterator[Cell]:
    """One random batch, for every strategy and partition that can run it."""
    shortest = choose.choice([1, 2 * cp])
    batch = [(choose.randint(shortest, 299), choose.choice([0, choose.randint(1, 200)])) for _ in range(choose.randint(1, 4))]
    lengths, prefixes = zip(*batch, strict=True)
    heads = choose.choice([(8, 8), (8, 2), (24, 4), (24, 8)])
    config = ModelConfig("test", 64, 1, *heads, 16, 64, 64)
    chunk, page_size = choose.choice([None, choose.randint(2 * cp, 150)]), choose.choice([None, 16])
    degrees = [degree for degree in range(1, cp + 1) if cp % degree == 0]
    for name, strategy in STRATEGIES.items():
        if name == "none" or strategy.brings_collectives:
            continue
        layout = Layout(cp=cp, ulysses=choose.choice(degrees) if name == "usp" else 1)
        for partition in strategy.partitions:
            cell = Cell("attention", config, 1, layout, name, partition, "auto", "float32", "cpu", lengths, 0, "keep", prefixes, chunk, page_size)
            if strategy.check(cell) is None:
                yield cell


def main(seed: int, batches: int) -> None:
    torch.set_num_threads(1)
    start_process_groups(CPU)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh, right = Mesh(rank, size), 0
    choose = random.Random(seed)
    for _ in range(batches):
        for cell in cells(choose, size):
            wrong = problem(cell, mesh)
            if rank == 0:
                right += wrong is None
                if wrong:
                    sys.stdout.write(f"wrong: {cell.id}: {wrong}\n")
    if rank == 0:
        sys.stdout.write(f"right: {right}\n")
    stop_process_groups()


def problem(cell: Cell, mesh: Mesh) -> str | None:
    """What is wrong with a cell; None on ranks that do not judge."""
    groups = mesh.groups(cell.layout)
    program = Program(cell, groups, load_kernel("cpu_flash"), CPU)
    program.keeps_rows = True
    rows = program.run().rows.flatten(1)
    counted = groups.recorder.reset() == traffic(cell, groups.rank)
    everyone = groups.world.share([float(counted)])
    padded = torch.zeros(cell.max_rows, rows.shape[1])
    padded[: len(rows)] = rows
    index = torch.full((cell.max_rows,), -1)
    index[: len(rows)] = program.tokens
    gathered, indices = torch.empty(groups.world.size * cell.max_rows, rows.shape[1]), torch.empty(groups.world.size * cell.max_rows, dtype=torch.int64)
    groups.world.all_gather(gathered, padded).wait()
    groups.world.all_gather(indices, index).wait()
    groups.recorder.reset()
    if groups.rank:
        return None
    answer = torch.full((cell.tokens, rows.shape[1]), float("nan"))
    answer[indices[indices >= 0]] = gathered[indices >= 0]
    single = replace(cell, layout=Layout(), strategy="none", partition="contiguous", dtype="float64", chunk=None)
    truth = run_locally(single, load_kernel("reference"), CPU, torch.float32)[0][1].rows.flatten(1)
    error = float((answer.double() - truth).norm() / truth.norm())
    if not error < 1e-6:
        return f"relative RMSE {error:.2e}"
    return None if all(equal for (equal,) in everyone) else "traffic differs from its formula"


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]), int(sys.argv[2]))
