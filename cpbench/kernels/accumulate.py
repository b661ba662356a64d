"""Merging partial attention results of the same query rows, by their log-sum-exp, in fp32.

A result that nothing is merged into is passed through untouched, so attention that is one kernel call costs one kernel call. Merging
walks over a few hundred rows at a time, because a pass over a whole fp32 output is bound by memory while one block of rows stays in
cache (measured on CPU: 8 ms instead of 104 ms for 8192 x 8 x 128 in bf16).

    out = out_a + (out_b - out_a) * sigmoid(lse_b - lse_a),   lse = logaddexp(lse_a, lse_b)

The sigmoid form cannot overflow; it is the one that ring-flash-attention and PyTorch's context parallelism settled on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cpbench.device_kind import kind_of
from cpbench.segments import MERGE_BLOCK, Span, joined
from cpbench.tracing.spans import MERGE

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.buffers import Buffers


class Accumulator:
    """The running (out, lse) of `rows` query rows. Merge buffers come from `buffers` and are reused by the next accumulator of that name."""

    def __init__(self, rows: int, buffers: Buffers, name: str = "merge") -> None:
        self._rows = Span(0, rows)
        self._buffers = buffers
        self._name = name
        self._whole: tuple[Tensor, Tensor] | None = None  # a result for all rows that is still in the kernel's dtype
        self._out: Tensor | None = None  # fp32 [T, H, E]
        self._lse: Tensor | None = None  # fp32 [H, T]
        self._dtype = torch.float32
        self._covered: list[Span] = []

    def add(self, rows: Span, out_THE: Tensor, lse_HT: Tensor) -> None:
        """Merge the result of some rows. The first result of a row is taken as it is."""
        if self._whole is None and self._out is None and rows == self._rows:
            self._whole = (out_THE, lse_HT)
            return
        with MERGE():
            self._merged(rows, out_THE, lse_HT)

    def _merged(self, rows: Span, out_THE: Tensor, lse_HT: Tensor) -> None:
        self._open(out_THE)
        assert self._out is not None and self._lse is not None
        for part, known in _cover(self._covered, rows):
            here, there = slice(part.start, part.stop), slice(part.start - rows.start, part.stop - rows.start)
            if known:
                _merge(self._out[here], self._lse[:, here], out_THE[there], lse_HT[:, there], self._buffers)
            else:
                self._out[here].copy_(out_THE[there])
                self._lse[:, here].copy_(lse_HT[:, there])

    def result(self) -> Tensor:
        """out [T, H, E] in the kernel's dtype. Raises ValueError if a row was never covered."""
        if self._whole is not None:
            return self._whole[0]
        if self._out is None or self._covered != [self._rows]:
            raise ValueError(f"rows {self._rows} are not all covered: {self._covered}")
        return self._out if self._dtype == torch.float32 else self._out.to(self._dtype)

    def running(self) -> tuple[Tensor, Tensor]:
        """(out [T, H, E], lse [H, T]) as they are; rows that no result covered are undefined. Raises ValueError before the first result."""
        if self._whole is not None:
            return self._whole
        if self._out is None or self._lse is None:
            raise ValueError("no result has been added")
        return self._out, self._lse

    def _open(self, out_THE: Tensor) -> None:
        """Make the fp32 buffers on the first result that has to be merged, or that covers a part of the rows."""
        if self._out is not None:
            return
        self._dtype = out_THE.dtype
        rows, (heads, dim) = self._rows.rows, out_THE.shape[1:]
        working = torch.float64 if out_THE.dtype == torch.float64 else torch.float32
        if self._whole is not None and self._whole[0].dtype == working:
            self._out, self._lse = self._whole  # merging in place: the kernel's output is ours
        else:
            self._out = self._buffers.get(f"{self._name}_out", (rows, heads, dim), out_THE, working)
            self._lse = self._buffers.get(f"{self._name}_lse", (heads, rows), out_THE, working)
            if self._whole is not None:
                self._out.copy_(self._whole[0])
                self._lse.copy_(self._whole[1])
        if self._whole is not None:
            self._covered, self._whole = [self._rows], None
        else:
            self._covered = []


def _merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, buffers: Buffers) -> None:
    """Merge in place. out [T, H, E] and lse [H, T] are wide; new_out may be narrower."""
    weight_TH1 = torch.sigmoid(new_lse - lse).t().contiguous().unsqueeze(-1)
    lse.copy_(torch.logaddexp(lse, new_lse))
    if kind_of(out) != "cpu":
        out.lerp_(new_out.to(out.dtype), weight_TH1.to(out.dtype))
        return
    rows, heads, dim = out.shape
    step = max(1, MERGE_BLOCK // (heads * dim))
    narrow = new_out.dtype != out.dtype
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        new = new_out[block]
        if narrow:
            new = buffers.get("merge_scratch", tuple(new.shape), out).copy_(new)
        out[block].lerp_(new, weight_TH1[block])


def _cover(covered: list[Span], rows: Span) -> list[tuple[Span, bool]]:
    """Cut `rows` into parts that are covered or not, and add them to `covered` (sorted, joined)."""
    parts: list[tuple[Span, bool]] = []
    at = rows.start
    for span in covered:
        if span.stop <= at or span.start >= rows.stop:
            continue
        if span.start > at:
            parts.append((Span(at, span.start), False))
            at = span.start
        stop = min(span.stop, rows.stop)
        parts.append((Span(at, stop), True))
        at = stop
    if at < rows.stop:
        parts.append((Span(at, rows.stop), False))
    covered[:] = joined([*covered, *(part for part, known in parts if not known)])
    return parts
