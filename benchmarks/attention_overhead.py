"""What context parallelism costs on two CPU cores: each strategy at cp=2 with one thread per rank, over one process with two threads.

    python benchmarks/attention_overhead.py --pairs 30 --shape 16384:8:2:128:bfloat16 --shape 16384:8:8:64:float32
    python benchmarks/attention_overhead.py --against ring-flash-attn,yunchang-ulysses

The reference does the same causal work with the same kernel: 4 query blocks (8 from 32k tokens on), each a full call on its prefix and a
causal call on itself. It is no floor: half of the work in each of two processes without communication takes 0.94 to 0.96 of it.
Reference and strategies alternate within one process group, so drift of the machine cancels in the ratio of each pair. The control is
the reference over itself. Printed: the median ratio, its 95% bootstrap interval, and the median times. Strategies are named as on the
command line: u2r1 is the hybrid of Ulysses 2 and ring 1.

With `--against`, other libraries run in the same loop on the same kernel (rivals.py), and each strategy is also divided by its rival pair
by pair: ulysses by yunchang's Ulysses, everything else by ring-flash-attn's zigzag ring.
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
from typing import Any

import numpy as np
import torch
from rivals import COUNTERPARTS, rival

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
from cpbench.strategies.usp import hybrid_degrees

REPORT_EVERY = 10  # pairs: a long run that is cut has said something
DEFAULT_SHAPES = ("36864:4:2:64:bfloat16", "16384:8:2:128:bfloat16", "16384:8:8:64:float32")
DEFAULT_STRATEGIES = "ring,allgather,ulysses,u2r1,u1r2"
RING, ULYSSES = COUNTERPARTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="S:H:G:D:DTYPE", help="tokens, query heads, kv heads, head size, dtype")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--strategies", default=DEFAULT_STRATEGIES)
    parser.add_argument("--against", default="", metavar="RIVALS", help=f"any of {','.join(COUNTERPARTS)}")
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
    mesh = Mesh(rank, 2, "cpu")
    groups = mesh.groups(Layout(cp=2))
    ours = options.strategies.split(",")
    rivals = [name for name in options.against.split(",") if name]
    for shape in options.shape or DEFAULT_SHAPES:
        contenders = {"reference": reference(shape, groups), "control": reference(shape, groups)}
        contenders |= {name: on_one_thread(strategy(shape, name, mesh).run) for name in ours}
        contenders |= {name: on_one_thread(rival(name, strategy(shape, COUNTERPARTS[name], mesh))) for name in rivals}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for pair in range(options.pairs + 1):
            order = list(contenders) if pair % 2 else list(contenders)[::-1]
            for name in order:
                seconds = once(contenders[name], groups)
                if pair:  # the first pass of each is warm-up
                    times[name].append(seconds)
            if rank == 0 and pair and (pair % REPORT_EVERY == 0 or pair == options.pairs):
                report(shape, times, [(name, other) for name in ours for other in rivals if other == (ULYSSES if name == "ulysses" else RING)])
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
    program.steps[0] = replace(program.steps[0], attention=replace(program.steps[0].attention, plan=plan))

    def run() -> None:
        torch.set_num_threads(2)
        program.run()
        torch.set_num_threads(1)

    return run


def strategy(shape: str, name: str, mesh: Mesh) -> Program:
    """A strategy at cp=2, ready to run."""
    torch.set_num_threads(1)
    degrees = hybrid_degrees(name)
    algorithm, layout = ("usp", Layout(cp=2, ulysses=degrees[0])) if degrees else (name, Layout(cp=2))
    work = cell(shape, algorithm, STRATEGIES[algorithm].partitions[0], layout)
    return Program(work, mesh.groups(layout), load_kernel("cpu_flash"), torch.device("cpu"))


def on_one_thread(run: Callable[[], Any]) -> Callable[[], None]:
    """Both ranks, one thread each."""

    def pass_() -> None:
        torch.set_num_threads(1)
        run()

    return pass_


def cell(shape: str, name: str, partition: str, layout: Layout) -> Cell:
    tokens, heads, kv_heads, dim, dtype = shape.split(":")
    config = ModelConfig("benchmark", 64, 1, int(heads), int(kv_heads), int(dim), 64, 64)
    return Cell("attention", config, 1, layout, name, partition, "cpu_flash", dtype, "cpu", (int(tokens),))


def report(shape: str, times: dict[str, list[float]], pairs: list[tuple[str, str]]) -> None:
    """Ratios to the reference, then those of strategies to their rivals."""
    print(f"\n{shape}   reference {np.median(times['reference']):.3f} s, {len(times['reference'])} pairs")
    for name, seconds in times.items():
        if name != "reference":
            print(f"  {name:<34} {ratio(seconds, times['reference'])}   {np.median(seconds):.3f} s", flush=True)
    for name, other in pairs:
        print(f"  {f'{name} / {other}':<34} {ratio(times[name], times[other])}", flush=True)


def ratio(seconds: list[float], base: list[float]) -> str:
    """The median of the paired ratios and its 95% bootstrap interval."""
    ratios = np.array(seconds) / np.array(base)
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return f"{np.median(ratios):.3f}  [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
