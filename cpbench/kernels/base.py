"""What a kernel is: attention on one device over a plan of segments, with the log-sum-exp that merging needs.

A kernel implements `block`, one dense or causal-square call. From it this class makes everything else: a plan of segments (`attend`),
several sequences (`varlen_block`), and keys in pages (`attend_pages`), one call after the other and with pages copied out. A kernel that
takes many sequences in one launch, or reads pages where they lie, is a VarlenKernel (varlen.py). Which rows see which is decided in
segments.py, and how partial results merge in accumulate.py.

    T query rows   S key rows   H query heads   G kv heads (H % G == 0)   D head size of q and k   E head size of v
    P pages   p rows of a page   B sequences (rows of the block tables)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from cpbench.segments import Request, Segment, Span

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.kernels.accumulate import Accumulator


class Kernel(ABC):
    """One attention implementation on one device.

    `page_multiple`: pages are read where they lie if their rows are a multiple of it; None:
    never.
    """

    name: str
    summary: str
    page_multiple: int | None = None
    takes_all_keys: bool = False  # of a query, in one call and in the order of rows; `block` then takes fewer queries than keys also if causal

    @abstractmethod
    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        """None where the kernel can run, else the reason. `device` is `cpu` or `cuda`, `dtype` a name such as `bfloat16`."""

    def dispatched(self, dtype: str, dim_qk: int, dim_v: int) -> str:
        """What really runs for these inputs, where that is more than the name says: the backend that was chosen, heads that are padded."""
        return self.name

    def reads_pages(self, page_size: int, dim_qk: int, dim_v: int) -> bool:
        """Whether `attend_pages` is one launch that reads pages of this size where they lie; if not, it copies them out first."""
        return self.page_multiple is not None and page_size % self.page_multiple == 0

    @abstractmethod
    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """Softmax attention: (out [T, H, E] in q's dtype, lse [H, T] in fp32). `causal` needs T == S."""

    def attend(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, segments: Sequence[Segment], scale: float, into: Accumulator) -> None:
        """Run every segment and add its result to `into`. Rows that no segment covers are left alone."""
        for segment in segments:
            q = q_THD[segment.queries.start : segment.queries.stop]
            if self.takes_all_keys:
                k, v = (rows_of(x, segment.keys) for x in (k_SGD, v_SGE))
                into.add(segment.queries, *self.block(q, k, v, scale, segment.causal is not None))
                continue
            pieces = [(segment.causal, True)] if segment.causal else []
            for span, causal in [*pieces, *((span, False) for span in segment.full)]:
                keys = slice(span.start, span.stop)
                into.add(segment.queries, *self.block(q, k_SGD[keys], v_SGE[keys], scale, causal))

    def varlen_block(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Attention of several sequences that lie one after the other: (out [T, H, E], lse [H, T] in fp32).

        Sequence i has the query rows cu_q[i] to cu_q[i + 1] and the key rows cu_k[i] to cu_k[i + 1], at least one of each. `causal` is
        aligned to the bottom right: the last query of a sequence sees all of its keys.
        """
        import torch

        parts = []
        for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
            q, k, v = q_THD[q0:q1], k_SGD[k0:k1], v_SGE[k0:k1]
            parts.append(self._bottom_right(q, k, v, scale) if causal else self.block(q, k, v, scale, False))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def attend_pages(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_BP: Tensor, requests: Sequence[Request], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of every request to the keys in its sequence's pages: (out [T, H, E] in q's dtype, lse [H, T] in fp32).

        The pages may be a strided view with a contiguous last axis. Rows of a page behind the last key must hold finite numbers: kernels
        load whole pages and multiply what they mask by zero. `tables_BP` (int32) holds the pages of each sequence in order. Raises
        ValueError if the requests do not cover the query rows in order, or need more pages than a table has.
        """
        import torch

        page_size = k_PpGD.shape[1]
        require_pages(requests, q_THD.shape[0], page_size * tables_BP.shape[1])
        parts = []
        for request in requests:
            pages = tables_BP[request.sequence, : -(-request.keys // page_size)]
            k, v = (x.index_select(0, pages).flatten(0, 1)[: request.keys] for x in (k_PpGD, v_PpGE))
            parts.append(self._bottom_right(q_THD[request.queries.start : request.queries.stop], k, v, scale))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def _bottom_right(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Causal attention of the last T of S tokens, as a prefix that all see and a causal square."""
        from cpbench.buffers import Buffers
        from cpbench.kernels.accumulate import Accumulator

        rows, keys = q_THD.shape[0], k_SGD.shape[0]
        if rows == keys or self.takes_all_keys:
            return self.block(q_THD, k_SGD, v_SGE, scale, True)
        result = Accumulator(rows, Buffers())
        segment = Segment(Span(0, rows), (Span(0, keys - rows),), Span(keys - rows, keys))
        Kernel.attend(self, q_THD, k_SGD, v_SGE, [segment], scale, result)
        out, lse = result.running()
        return out.to(q_THD.dtype), lse


def require_pages(requests: Sequence[Request], rows: int, table_rows: int) -> None:
    """Raises ValueError unless the requests cover `rows` query rows in order and none has more keys than a block table holds."""
    at = 0
    for request in requests:
        if request.queries.start != at:
            raise ValueError(f"query rows {request.queries} do not follow row {at}")
        if request.keys > table_rows:
            raise ValueError(f"{request.keys} keys of sequence {request.sequence} do not fit into a block table of {table_rows} tokens")
        at = request.queries.stop
    if at != rows:
        raise ValueError(f"requests cover {at} of {rows} query rows")


def rows_of(x_SGD: Tensor, spans: Sequence[Span]) -> Tensor:
    """The rows of some spans one after the other: a view where there is one."""
    import torch

    parts = [x_SGD[span.start : span.stop] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def same_head_size(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies padded with zeros to one head size (the last axis), for kernels that know only one; those that have it already as they are.

    Zeros add nothing to a score and give columns of the output that the caller cuts off. The scale must come from the unpadded size.
    """
    from torch.nn.functional import pad

    dim = max(q.shape[-1], v.shape[-1])
    padded = [x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1])) for x in (q, k, v)]
    return padded[0], padded[1], padded[2]


def padding(dim_qk: int, dim_v: int) -> str | None:
    """How `same_head_size` changes these head sizes, in words; None if it does not."""
    if dim_qk == dim_v:
        return None
    return f"v padded from {dim_v} to {dim_qk}" if dim_v < dim_qk else f"q and k padded from {dim_qk} to {dim_v}"
