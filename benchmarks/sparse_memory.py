"""What DeepSeek sparse attention on one device needs: bytes by length, and how near its arithmetic comes to one large product.

    python benchmarks/sparse_memory.py --tokens 4096,8192,16384,32768
    python benchmarks/sparse_memory.py --speed

Memory: peak live bytes of a causal pass besides its inputs, and the bytes that each further token adds to selection and attention
together. Where lengths double, their growth is 1 if memory is linear and 2 if it is quadratic. Heads are few, so that 32k tokens take two
minutes.
Speed, at the sizes of DeepSeek V3.2: the last queries of each length, against the FLOP/s of one large product that is measured between
them, on one thread and in its CPU time, so that other work on the machine says little. Counted are 2 * heads * size operations per pair
of the indexer, and 2 * heads * (576 + 512) per selected pair of the attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpbench.kernels.selection import select
from cpbench.kernels.sparse_latent import attend_selected
from cpbench.measure.memory import LiveTensors
from cpbench.segments import Span
from cpbench.visible import Visible

DIM, KV_RANK, ROW, TOP_K, SCALE = 128, 512, 576, 2048, 0.07
FEW_HEADS = (4, 2)  # of the indexer and of the attention
INDEXER_HEADS, SPEED_QUERIES, MATRIX = 64, 256, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,8192,16384,32768")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--heads", default="128,16", help="attention heads of the speed runs: all, and those of a tensor-parallel rank")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, dtype = [int(part) for part in options.tokens.split(",")], getattr(torch, options.dtype)
    with torch.inference_mode():
        if options.speed:
            speed(tokens, [int(part) for part in options.heads.split(",")], dtype, options.repeats)
        else:
            memory(tokens, dtype)


def memory(lengths: list[int], dtype: torch.dtype) -> None:
    print(f"{'tokens':>8} {'selection':>12} {'attention':>12} {'bytes/token of both':>20} {'growth':>8}")
    index_heads, heads = FEW_HEADS
    totals, slopes = [], []
    for tokens in lengths:
        blocks = [Visible(Span(0, tokens), Span(0, tokens), 1)]
        q, gates, keys = torch.randn(tokens, index_heads, DIM, dtype=dtype), torch.randn(tokens, index_heads), torch.randn(tokens, DIM, dtype=dtype)
        ids, selecting = peak(partial(select, q, gates, keys, blocks, TOP_K), q, gates, keys)
        q, rows = torch.randn(tokens, heads, ROW, dtype=dtype), torch.randn(tokens, ROW, dtype=dtype)
        _, attending = peak(partial(attend_selected, q, rows, ids, blocks, SCALE, KV_RANK), q, rows, ids)
        totals.append((tokens, selecting + attending))
        if len(totals) > 1:
            (shorter, less), (longer, more) = totals[-2:]
            slopes.append((more - less) / (longer - shorter))
        slope, growth = f"{slopes[-1]:.0f}" if slopes else "", f"{slopes[-1] / slopes[-2]:.3f}" if len(slopes) > 1 else ""
        print(f"{tokens:>8} {selecting / 2**20:>8.1f} MiB {attending / 2**20:>8.1f} MiB {slope:>20} {growth:>8}", flush=True)


def peak(run: Callable[[], Any], *given: Tensor) -> tuple[Any, int]:
    """What a call returns, and its peak of live bytes besides its inputs."""
    tracker = LiveTensors(torch.device("cpu"), lambda: [("given", tensor) for tensor in given])
    with tracker:
        result = run()
    return result, tracker.by_category["activations"]


def speed(lengths: list[int], attention_heads: list[int], dtype: torch.dtype, repeats: int) -> None:
    print(f"{'tokens':>8} {'what':<22} {'ms/query':>9} {'GFLOP/s':>8} {'of one large product':>21}")
    n = SPEED_QUERIES
    for tokens in lengths:
        blocks = [Visible(Span(0, n), Span(0, tokens), tokens - n + 1)]
        q, gates, keys = torch.randn(n, INDEXER_HEADS, DIM, dtype=dtype), torch.randn(n, INDEXER_HEADS), torch.randn(tokens, DIM, dtype=dtype)
        pairs = sum(range(tokens - n + 1, tokens + 1))
        report(tokens, f"select, {INDEXER_HEADS} heads", partial(select, q, gates, keys, blocks, TOP_K), 2 * INDEXER_HEADS * DIM * pairs, repeats)
        ids, rows = select(q, gates, keys, blocks, TOP_K), torch.randn(tokens, ROW, dtype=dtype)
        for heads in attention_heads:
            queries = torch.randn(n, heads, ROW, dtype=dtype)
            work = 2 * heads * (ROW + KV_RANK) * min(TOP_K * n, pairs)
            report(tokens, f"attend, {heads} heads", partial(attend_selected, queries, rows, ids, blocks, SCALE, KV_RANK), work, repeats)


def report(tokens: int, what: str, run: Callable[[], object], work: int, repeats: int) -> None:
    """Median time, and the median ratio of the rates of a call and of the product that follows it."""
    matrix = torch.randn(MATRIX, MATRIX)
    times = [(seconds(run), seconds(lambda: matrix @ matrix)) for _ in range(repeats + 1)][1:]
    rate = np.median([work / own for own, _ in times]) / 1e9
    share = np.median([work / own / (2 * MATRIX**3 / product) for own, product in times])
    own = np.median([own for own, _ in times])
    print(f"{tokens:>8} {what:<22} {own / SPEED_QUERIES * 1e3:>9.2f} {rate:>8.0f} {share:>21.2f}", flush=True)


def seconds(run: Callable[[], object]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
