"""A clock that prices advance: what each operator of a program would take on a device that is described by a profile.

The program runs on tensors without storage, so nothing is computed. A matrix product costs what the profile says for its shape, attention
what it says for its rows and pairs, everything else the bytes that it reads and writes, and each of them a launch; a view costs nothing.
What the numbers are is the profile's affair (profile.py), and which operators run is the program's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cpbench.dispatch import Watching
from cpbench.kernels.varlen import VarlenKernel
from cpbench.projection.profile import DeviceProfile, side

FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view", "aten::lift_fresh", "aten::detach"}
LIKE_FIRST = {"aten::logaddexp", "aten::sigmoid", "aten::sub"}  # of shapes that PyTorch would make out of a dozen operators
FP8 = {torch.float8_e4m3fn}
COUNTS = 0.01  # of the time


class PricedClock(Watching):
    """Seconds that the operators seen so far would take. `mark` and `between` are those of a `Clock`."""

    def __init__(self, profile: DeviceProfile) -> None:
        super().__init__()
        self.profile = profile
        self.seconds = 0.0
        self._kinds: dict[Any, str] = {}
        self._beyond: dict[tuple[str, str, bool], dict[float, float]] = defaultdict(dict)  # kind, dtype, whether it is above the range -> seconds by size

    def mark(self) -> float:
        return self.seconds

    def between(self, first: float, second: float) -> float:
        return second - first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kinds.get(func) or self._kinds.setdefault(func, _kind(func))
        result = _shaped(kind, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        if kind == "free":
            return result
        if kind in ("gemm", "grouped"):
            self._product(func, args, result)
        elif kind == "attention":
            q, k, v = args[:3]
            pairs = q.shape[2] * k.shape[2] // (2 if True in args[4:5] else 1)  # PyTorch leaves out arguments that are as by default
            self.attention(q.shape[2], k.shape[2], pairs, (q.shape[1], k.shape[1]), (q.shape[3], v.shape[3]), q.dtype)
            self.seconds += self.profile.launch_s
        else:
            self._moved([*args, result])
        return result

    def _product(self, func: Any, args: Any, result: Any) -> None:
        """x W, of one matrix or several."""
        name = func._schema.name
        first, second = args[1:3] if name.endswith(("addmm", "baddbmm", "addbmm")) else args[:2]
        if not isinstance(result, Tensor) or not result.is_meta or not result.numel():
            return
        inner = first.shape[-1]
        dtype = _name(first.dtype)
        if first.dim() == 3 or second.dim() == 3:
            many = second.shape[0] if second.dim() == 3 else first.shape[0]
            rows = -(-result.numel() // result.shape[-1] // many)
            self.seconds += many * (self._gemm(rows, result.shape[-1], inner, dtype) - self.profile.launch_s) + self.profile.launch_s
        else:
            self.seconds += self._gemm(result.numel() // result.shape[-1], result.shape[-1], inner, dtype)

    def _gemm(self, m: int, n: int, k: int, dtype: str) -> float:
        seconds = self.profile.gemm(m, n, k, dtype)
        self._look("gemm", side(m, n, k), dtype, seconds)
        return seconds

    def attention(self, q_rows: int, k_rows: int, pairs: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> None:
        """One sequence of a launch: `heads` of queries and of keys, `dims` of q and v."""
        name = _name(dtype)
        seconds = self.profile.attention(q_rows, k_rows, pairs, *heads, *dims, name)
        self._look("attention", k_rows, name, seconds)
        self.seconds += seconds

    def _look(self, kind: str, size: float, dtype: str, seconds: float) -> None:
        """Note a size that the profile was not measured at, and what it takes."""
        low, high, _ = self.profile.range_of(kind, dtype)
        if not low <= size <= high:
            known = self._beyond[kind, dtype, size > high]
            known[size] = known.get(size, 0.0) + seconds

    def outside(self) -> list[str]:
        """Of each kind, where such sizes take a part of the time that counts: in words the largest above what the profile was measured in, and
        below it the one that takes most."""
        phrases = []
        for (kind, dtype, above), seconds in self._beyond.items():
            if sum(seconds.values()) > COUNTS * self.seconds:
                phrases.append(self.profile.outside(kind, max(seconds) if above else max(seconds, key=lambda size: seconds[size]), dtype))
        return [phrase for phrase in phrases if phrase]

    def _moved(self, tensors: Any) -> None:
        """Everything else is bound by memory."""
        moved = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor) and leaf.is_meta)
        if moved:
            self.seconds += self.profile.moved(moved) + self.profile.launch_s


def _name(dtype: torch.dtype) -> str:
    """As profiles have it."""
    return "fp8" if dtype in FP8 else str(dtype).removeprefix("torch.")


def _shaped(kind: str, args: Any) -> Tensor | None:
    """What an operator gives out, where nothing has to be asked of PyTorch, which takes most of the time; None where it has."""
    if kind == "in place":
        return args[0] if args[0].is_meta else None
    if kind == "like":
        return torch.empty_like(args[0]) if _alike(args, 0) else None
    if kind == "cat" and args[1:] in ((), (0,)) and _alike(args[0], 1):
        first: Tensor = args[0][0]
        return first.new_empty(sum(len(x) for x in args[0]), *first.shape[1:])
    return None


def _alike(values: Sequence[Any], above: int) -> bool:
    """Whether these are tensors without storage that have one dtype and one shape, from the side `above` on."""
    first = values[0]
    return all(
        isinstance(x, Tensor) and x.is_meta and x.dtype == first.dtype and x.dim() == first.dim() and x.shape[above:] == first.shape[above:] for x in values
    )


def _kind(func: Any) -> str:
    """What is paid for: nothing, a product, attention, or bytes; of bytes also what they are shaped like."""
    name = func._schema.name
    if name in FREE or func.is_view:
        return "free"
    short = name.removeprefix("aten::")
    if short in ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "matmul", "_grouped_mm", "_scaled_grouped_mm"):
        return "gemm"
    if "scaled_dot_product" in short:
        return "attention"
    if short.endswith("_") and func._schema.is_mutable and torch.Tag.inplace_view not in func.tags:
        return "in place"
    return "cat" if short == "cat" else "like" if name in LIKE_FIRST else "bytes"


class PricedKernel(VarlenKernel):
    """Stands for a varlen kernel of the device: allocates what it returns, and has it priced."""

    name = "priced"
    summary = "a stand-in, in a projection"

    def __init__(self, clock: PricedClock) -> None:
        self._clock = clock

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        return None

    def varlen_block(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        self._price(q_THD, (k_SGD.shape[1], v_SGE.shape[2]), [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)], causal)
        rows, heads = q_THD.shape[:2]
        return q_THD.new_empty(rows, heads, v_SGE.shape[2]), q_THD.new_empty(heads, rows, dtype=torch.float32)

    def reads_pages(self, page_size: int, dim_qk: int, dim_v: int) -> bool:
        return True

    def paged_block(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_RP: Tensor, cu_q: Sequence[int], keys: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        self._price(q_THD, (k_PpGD.shape[2], v_PpGE.shape[3]), [(b - a, seen) for (a, b), seen in zip(pairwise(cu_q), keys, strict=True)], True)
        rows, heads = q_THD.shape[:2]
        return q_THD.new_empty(rows, heads, v_PpGE.shape[3]), q_THD.new_empty(heads, rows, dtype=torch.float32)

    def _price(self, q_THD: Tensor, kv: tuple[int, int], sequences: Sequence[tuple[int, int]], causal: bool) -> None:
        """Sequences of (query rows, key rows) in one launch; `kv`: kv heads, and the head size of v."""
        for rows, seen in sequences:
            pairs = rows * seen - (rows * (rows - 1) // 2 if causal else 0)
            self._clock.attention(rows, seen, pairs, (q_THD.shape[1], kv[0]), (q_THD.shape[2], kv[1]), q_THD.dtype)
        self._clock.seconds += self._clock.profile.launch_s
