"""One rank of a test: gloo ranks that share one device, which NCCL refuses, so that real processes and their overlap are tried with one GPU.

    torchrun --nproc-per-node 2 -m tests.dist.shared_worker cuda

What travels passes through the memory of the host. Prints one line per cell that is wrong, and how many were right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.distributed import mesh
from cpbench.distributed.collectives import ProcessGroup, start_process_groups, stop_process_groups
from cpbench.distributed.flight import Handle
from cpbench.kernels import pick_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.models.held import Models
from cpbench.numerics import check
from cpbench.strategies import STRATEGIES

CONFIG = ModelConfig("test", 512, 2, 8, 2, 128, 512, 1024)
LENGTHS, PREFIXES, CHUNK, PAGE = (600, 333, 700), (70, 0, 0), 256, 256


class HostGroup(ProcessGroup):
    """gloo for tensors of any device: each is copied to the host and back."""

    def _transfer(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Handle:
        sent = {peer: tensor.cpu() for peer, tensor in send.items()}
        arrived = {peer: torch.empty_like(tensor, device="cpu") for peer, tensor in receive.items()}
        handle = super()._transfer(sent, arrived)

        def wait() -> None:
            handle.wait()
            for peer, tensor in receive.items():
                tensor.copy_(arrived[peer])
            sent.clear()

        return Handle(wait)

    def _send(self, tensor: Tensor, to: int) -> Handle:
        return self._transfer({to: tensor}, {})

    def _receive(self, tensor: Tensor, source: int) -> Handle:
        return self._transfer({}, {source: tensor})

    def _all_reduce(self, tensor: Tensor) -> Handle:
        summed = tensor.cpu()
        handle = super()._all_reduce(summed)
        tensor.copy_(summed)
        return handle


def cells(size: int, device: str) -> Iterator[Cell]:
    """Every strategy and partition, dense and in pages, and tensor parallelism."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    named = [(name, part) for name, one in STRATEGIES.items() if name != "none" and not one.brings_collectives for part in one.partitions]
    layouts = [(Layout(cp=size, ulysses=size if name == "usp" else 1), name, part) for name, part in named]
    for layout, name, partition in [*layouts, (Layout(tp=size), "none", "contiguous"), (Layout.parse(f"tp{size}sp"), "none", "contiguous")]:
        for prefixes, chunk, page in (((), None, None), (PREFIXES, CHUNK, PAGE)):
            cell = Cell("prefill", CONFIG, 2, layout, name, partition, "auto", dtype, device, LENGTHS, 0, "keep", prefixes, chunk, page)
            assert STRATEGIES[name].check(cell) is None
            yield cell


def main(kind: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    start_process_groups(torch.device("cpu"))
    mesh.ProcessGroup = HostGroup  # type: ignore[misc]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world, models, right = mesh.Mesh(rank, size, "cpu"), Models(), 0
    for cell in cells(size, kind):
        kernel = pick_kernel(kind, cell.dtype, CONFIG.head_dim, CONFIG.head_dim)
        verdict = check(cell, world.groups(cell.layout), kernel, device, models)
        if rank == 0:
            right += verdict.passed
            if not verdict.passed:
                sys.stdout.write(f"wrong: {cell.id}: {verdict.reason}\n")
    if rank == 0:
        sys.stdout.write(f"right: {right}\n")
    stop_process_groups()


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
