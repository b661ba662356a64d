"""Kernels that take many sequences in one launch, and keys in pages: FlashAttention's family and PyTorch's copy of it.

A kernel of this kind says how one varlen call and one paged call are made; here a plan of segments becomes launches, and requests in
pages become lengths and tables. Lengths are small tensors on the device; they are made once per plan and kept, because copying them
anew would make the host wait for the device in every layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpbench.kernels.base import Kernel, require_pages
from cpbench.kernels.launches import launches
from cpbench.segments import Request, Segment

if TYPE_CHECKING:
    from cpbench.kernels.accumulate import Accumulator

KEPT_LENGTHS = 4096


class VarlenKernel(Kernel):
    """A kernel whose own call is the varlen one, with a causal mask aligned to the bottom right of each sequence."""

    @abstractmethod
    def varlen_block(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """As Kernel.varlen_block, in one launch."""

    @abstractmethod
    def paged_block(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_RP: Tensor, cu_q: Sequence[int], keys: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """One launch: request i has the query rows cu_q[i] to cu_q[i + 1] and the first keys[i] tokens of the pages tables_RP[i]."""

    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return self.varlen_block(q_THD, k_SGD, v_SGE, (0, q_THD.shape[0]), (0, k_SGD.shape[0]), scale, causal)

    def attend(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, segments: Sequence[Segment], scale: float, into: Accumulator) -> None:
        for launch in launches(tuple(segments)):
            q = q_THD[launch.queries.start : launch.queries.stop]
            k, v = (x[launch.keys.start : launch.keys.stop] for x in (k_SGD, v_SGE))
            into.add(launch.queries, *self.varlen_block(q, k, v, launch.cu_q, launch.cu_k, scale, launch.causal))

    def attend_pages(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_BP: Tensor, requests: Sequence[Request], scale: float
    ) -> tuple[Tensor, Tensor]:
        page_size = k_PpGD.shape[1]
        if not self.reads_pages(page_size, q_THD.shape[2], v_PpGE.shape[3]):
            return super().attend_pages(q_THD, k_PpGD, v_PpGE, tables_BP, requests, scale)
        require_pages(requests, q_THD.shape[0], page_size * tables_BP.shape[1])
        sequences = [request.sequence for request in requests]
        tables_RP = tables_BP
        if sequences != list(range(tables_BP.shape[0])):
            tables_RP = tables_BP.index_select(0, on_device(sequences, q_THD.device))
        cu_q = [0, *(request.queries.stop for request in requests)]
        return self.paged_block(q_THD, k_PpGD, v_PpGE, tables_RP, cu_q, [request.keys for request in requests], scale)


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers as an int32 tensor that is made once and must not be written to."""
    return _kept(tuple(numbers), device)


@lru_cache(maxsize=KEPT_LENGTHS)
def _kept(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be used outside of it
        return torch.tensor(numbers, dtype=torch.int32, device=device)


def longest(cu: Sequence[int]) -> int:
    """The longest of the sequences with these boundaries."""
    return max(stop - start for start, stop in pairwise(cu))


def with_lse(out_THE: Tensor, lse_HT: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The pair, if the log-sum-exp is laid out [heads, rows]. Raises RuntimeError if this version of a library returns another layout."""
    if lse_HT.shape != (heads, out_THE.shape[0]):
        raise RuntimeError(f"the log-sum-exp is {tuple(lse_HT.shape)}, not [heads, rows] = {(heads, out_THE.shape[0])}: another version of the library?")
    return out_THE, lse_HT
