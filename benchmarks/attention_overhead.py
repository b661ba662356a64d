"""What context parallelism costs on two CPU cores: each strategy at cp=2 with one thread per rank, over one process with two threads.

    python benchmarks/attention_overhead.py --pairs 30 --shape 16384:8:2:128:bfloat16 --shape 16384:8:8:64:float32

The reference does the same causal work with the same kernel: 4 query blocks (8 from 32k tokens on), each a full call on its prefix and a
causal call on itself. It is no floor: half of the work in each of two processes without communication takes 0.94 to 0.96 of it.
Reference and strategies alternate within one process group, so drift of the machine cancels in the ratio of each pair. The control is
the reference over itself. Printed: the median ratio, its 95% bootstrap interval, and the median times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Groups, Mesh
from cpbench.kernels import load_kernel
from cpbench.launch import rank_environment
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.program import Program, alone
from cpbench.segments import Segment, Span
from cpbench.strategies import STRATEGIES

DEFAULT_SHAPES = ("16384:8:2:128:bfloat16", "16384:8:8:64:float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="S:H:G:D:DTYPE", help="tokens, query heads, kv heads, head size, dtype")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--strategies", default="ring,allgather,ulysses")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        environment = rank_environment(os.environ, threads=2)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *sys.argv]
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)
    with torch.inference_mode():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    start_process_groups(torch.device("cpu"))
    rank = int(os.environ["RANK"])
    groups = Mesh(rank, 2).groups(Layout(cp=2))
    for shape in options.shape or DEFAULT_SHAPES:
        contenders = {"reference": reference(shape, groups), "control": reference(shape, groups)}
        contenders |= {name: strategy(shape, name, groups) for name in options.strategies.split(",")}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for pair in range(options.pairs + 1):
            order = list(contenders) if pair % 2 else list(contenders)[::-1]
            for name in order:
                seconds = once(contenders[name], groups)
                if pair:  # the first pass of each is warm-up
                    times[name].append(seconds)
        if rank == 0:
            report(shape, times)
    stop_process_groups()


def once(run: Callable[[], None], groups: Groups) -> float:
    """Seconds of one pass: from a rendezvous to the end of the slower rank."""
    groups.world.barrier()
    start = time.perf_counter()
    run()
    return max(seconds for (seconds,) in groups.world.share([time.perf_counter() - start]))


def reference(shape: str, groups: Groups) -> Callable[[], None]:
    """Rank 0 does everything with two threads, while rank 1 waits."""
    if groups.rank:
        return lambda: None
    program = Program(cell(shape, "none", "contiguous", Layout()), alone(), load_kernel("cpu_flash"), torch.device("cpu"))
    tokens = program.cell.tokens
    blocks = 8 if tokens >= 32768 else 4
    ends = [tokens * index // blocks for index in range(blocks + 1)]
    plan = tuple(Segment(Span(a, b), (Span(0, a),) if a else (), Span(a, b)) for a, b in pairwise(ends))
    program.attention = replace(program.attention, plan=plan)

    def run() -> None:
        torch.set_num_threads(2)
        program.run()
        torch.set_num_threads(1)

    return run


def strategy(shape: str, name: str, groups: Groups) -> Callable[[], None]:
    """Both ranks, one thread each."""
    torch.set_num_threads(1)
    work = cell(shape, name, STRATEGIES[name].partitions[0], Layout(cp=2))
    program = Program(work, groups, load_kernel("cpu_flash"), torch.device("cpu"))

    def run() -> None:
        torch.set_num_threads(1)
        program.run()

    return run


def cell(shape: str, name: str, partition: str, layout: Layout) -> Cell:
    tokens, heads, kv_heads, dim, dtype = shape.split(":")
    config = ModelConfig("benchmark", 64, 1, int(heads), int(kv_heads), int(dim), 64, 64)
    return Cell("attention", config, 1, layout, name, partition, "cpu_flash", dtype, "cpu", (int(tokens),))


def report(shape: str, times: dict[str, list[float]]) -> None:
    base = np.array(times["reference"])
    generator = np.random.default_rng(0)
    print(f"\n{shape}   reference {np.median(base):.3f} s, {len(base)} pairs")
    for name, seconds in times.items():
        if name == "reference":
            continue
        ratios = np.array(seconds) / base
        medians = np.median(generator.choice(ratios, (10_000, len(ratios))), axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        print(f"  {name:<12} {np.median(ratios):.3f}  [{low:.3f}, {high:.3f}]   {np.median(seconds):.3f} s", flush=True)


if __name__ == "__main__":
    main()
