"""What sequence-parallel norms and a deterministic order cost on two CPU cores: times over those of plain tp2, with one thread per rank.

    python benchmarks/tensor_parallel.py --contender tp2sp --tokens 8192 --layers 2
    python benchmarks/tensor_parallel.py --contender deterministic --tokens 2048 --model qwen3-0.6b --target layer

Both run alternately within one process group, so drift of the machine cancels in the ratio of each pair. The control is tp2 over itself.
Printed: median times, the median ratio and its 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import torch

from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Groups, Mesh
from cpbench.kernels import kernel_of
from cpbench.launch import rank_environment
from cpbench.layout import Layout
from cpbench.models.presets import PRESETS
from cpbench.program import Program

CONTENDERS = {"tp2sp": "tp2sp", "deterministic": "tp2"}
REPORT_EVERY = 10  # pairs: a long run that is cut has said something


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=list(CONTENDERS), required=True)
    parser.add_argument("--model", default="qwen3-tiny")
    parser.add_argument("--target", choices=["prefill", "layer"], default="prefill")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *sys.argv]
        raise SystemExit(subprocess.run(command, env=rank_environment(os.environ, threads=1), check=False).returncode)
    with torch.inference_mode():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    device = torch.device("cpu")
    start_process_groups(device)
    torch.set_num_threads(1)
    rank, config = int(os.environ["RANK"]), PRESETS[options.model]
    mesh = Mesh(rank, 2, "cpu")
    programs = {}
    for name, layout in {"tp2": "tp2", "control": "tp2", options.contender: CONTENDERS[options.contender]}.items():
        parallel = Layout.parse(layout)
        cell = Cell(options.target, config, options.layers, parallel, "none", "contiguous", "auto", options.dtype, "cpu", (options.tokens,))
        cell = replace(cell, deterministic=name == "deterministic")
        programs[name] = Program(cell, mesh.groups(parallel), kernel_of(cell), device), mesh.groups(parallel)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for pair in range(options.pairs + 1):
        for name in list(programs) if pair % 2 else list(programs)[::-1]:
            seconds = once(*programs[name])
            if pair:
                times[name].append(seconds)
        if rank == 0 and pair and (pair % REPORT_EVERY == 0 or pair == options.pairs):
            report(times)
    stop_process_groups()


def once(program: Program, groups: Groups) -> float:
    """Seconds of a pass on the slowest rank."""
    program.prepare()
    groups.world.barrier()
    start = time.perf_counter()
    program.run()
    return max(row[0] for row in groups.world.share([time.perf_counter() - start]))


def report(times: dict[str, list[float]]) -> None:
    reference = np.array(times["tp2"])
    random = np.random.default_rng(0)
    for name, seconds in times.items():
        ratios = np.array(seconds) / reference
        draws = np.median(random.choice(ratios, (10_000, len(ratios))), axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        print(f"{name:<13} {np.median(seconds):7.3f} s  {np.median(ratios):6.3f} [{low:.3f}, {high:.3f}]  n={len(ratios)}", flush=True)


if __name__ == "__main__":
    main()
