"""One rank of a test: random batches on real process groups, every strategy, held against one device in fp64 by the first rank.

    torchrun --nproc-per-node 3 -m tests.dist.batch_worker SEED BATCHES

Prints one line per cell that is wrong, and how many were right.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import torch

from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Mesh
from cpbench.formulas import traffic
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.numerics import relative_rmse
from cpbench.one_device import OneDevice
from cpbench.models.held import Models
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
    mesh, right = Mesh(rank, size, "cpu"), 0
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
    (answer,) = solve(cell, mesh.groups(cell.layout), load_kernel("cpu_flash"), CPU, Models())
    if mesh.rank:
        return None
    truth = OneDevice(CPU).truth(cell).rows
    error = max(relative_rmse(rows, truth) for rows in answer.copies.values())
    if not error < 1e-6:  # also where tokens are on no rank: their rows are NaN
        return f"relative RMSE {error:.2e}"
    right = [received == traffic(cell, rank) for rank, received in enumerate(answer.received)]
    return None if all(right) else "traffic differs from its formula"


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]), int(sys.argv[2]))
