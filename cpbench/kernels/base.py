"""What a kernel is: attention on one device over a plan of segments, with the log-sum-exp that merging needs.

A kernel implements `block`, one dense or causal-square call; `attend` runs a plan of segments with it. A kernel that takes many
segments in one launch overrides `attend`. Which rows see which is decided in segments.py, and how partial results merge in
accumulate.py.

    T query rows   S key rows   H query heads   G kv heads (H % G == 0)   D head size of q and k   E head size of v
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.segments import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.kernels.accumulate import Accumulator


class Kernel(ABC):
    """One attention implementation on one device."""

    name: str
    summary: str

    @abstractmethod
    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        """None where the kernel can run, else the reason. `device` is `cpu` or `cuda`, `dtype` a name such as `bfloat16`."""

    @abstractmethod
    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """Softmax attention: (out [T, H, E] in q's dtype, lse [H, T] in fp32). `causal` needs T == S."""

    def attend(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, segments: Sequence[Segment], scale: float, into: Accumulator) -> None:
        """Run every segment and add its result to `into`. Rows that no segment covers are left alone."""
        for segment in segments:
            q = q_THD[segment.queries.start : segment.queries.stop]
            pieces = [(segment.causal, True)] if segment.causal else []
            for span, causal in [*pieces, *((span, False) for span in segment.full)]:
                keys = slice(span.start, span.stop)
                into.add(segment.queries, *self.block(q, k_SGD[keys], v_SGE[keys], scale, causal))
