"""Peak memory of one pass on one rank: live tensors by category, the allocator's peak, and the resident set.

`LiveTensors` counts the storages that are alive, from a dispatch mode: what formulas and projections are held against. The profiler adds
what kernels allocate inside an operator. Both run in a pass that is not timed. On CPU that pass computes one block of rows per attention
call and leaves the rest of the output zero: a kernel's workspace depends on its block, not on how many there are, and the arithmetic would
take as long as a timed pass.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench.kernels.base import Kernel
from cpbench.measure.device import Device
from cpbench.segments import MIN_ROWS_TO_COPY

BLOCK_ROWS = MIN_ROWS_TO_COPY  # fewer rows would spare the kernel its copies of K and V


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages alive on a device, and the moment they were most.

    What `held` lists at the end (weights, caches, reused buffers) outlives the pass and is counted as alive all along, also where
    this pass was the one that made it: so the peak is that of every later pass.
    """

    def __init__(self, device: torch.device, held: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._held = held
        self._alive: dict[int, tuple[int, int]] = {}  # address -> (serial number, bytes); addresses are used again, numbers are not
        self._changes: list[tuple[int, int]] = []  # (serial number, bytes that came or went), in order
        self.peak = 0
        self.by_category: dict[str, int] = {}
        for _, tensor in held():
            self._see(tensor)
        self.started_with = sum(size for _, size in self._alive.values())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that guards against compilation imports torch._dynamo: 2 seconds per rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        lasting: set[int] = set()
        categories: Counter[str] = Counter()
        for category, tensor in self._held():
            self._see(tensor)
            number, size = self._alive.get(tensor.untyped_storage()._cdata, (-1, 0))
            if number >= 0 and number not in lasting:
                lasting.add(number)
                categories[category] += size
        level = passing = 0
        for number, change in self._changes:
            level += 0 if number in lasting else change
            passing = max(passing, level)
        categories["activations"] += passing
        self.by_category = dict(categories)
        self.peak = sum(categories.values())

    def _see(self, tensor: Tensor) -> None:
        if tensor.device != self._device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = (len(self._changes), storage.nbytes())
            self._changes.append((len(self._changes), storage.nbytes()))
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        number, size = self._alive.pop(key)
        self._changes.append((number, -size))


class OneBlock(Kernel):
    """A kernel that allocates what `inner` allocates and computes the first rows of one query head per kv head only (see above)."""

    def __init__(self, inner: Kernel) -> None:
        self.name, self.summary, self._inner, self.takes_all_keys = inner.name, inner.summary, inner, inner.takes_all_keys

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        return self._inner.available(device, dtype, dim_qk, dim_v)

    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        rows, heads = q_THD.shape[:2]
        if rows <= BLOCK_ROWS:
            return self._inner.block(q_THD, k_SGD, v_SGE, scale, causal)
        group = heads // k_SGD.shape[1]
        out = q_THD.new_zeros(rows, heads, v_SGE.shape[2])
        first, first_lse = self._inner.block(q_THD[:BLOCK_ROWS, ::group], k_SGD, v_SGE, scale, False)
        lse = first_lse.new_zeros(heads, rows)
        out[:BLOCK_ROWS, ::group].copy_(first)
        lse[::group, :BLOCK_ROWS].copy_(first_lse)
        return out, lse


def measure_peaks(run: Callable[[], object], device: Device, held: Callable[[], Iterable[tuple[str, Tensor]]]) -> dict[str, Any]:
    """Run once and return the fields of `results.Memory` that exist on this device."""
    gc.collect()
    on_cpu = device.torch_device.type == "cpu"
    allocated = _AllocatorPeak() if on_cpu else None
    device.reset_peaks()
    tracker = LiveTensors(device.torch_device, held)
    before = tracker.started_with
    with tracker:
        if allocated is not None:
            with allocated:
                run()
        else:
            run()
    peaks: dict[str, Any] = {"peak_live_bytes": tracker.peak, "by_category": tracker.by_category, **device.peaks()}
    if allocated is not None:
        peaks["peak_allocator_bytes"] = before + allocated.peak()
    return peaks


class _AllocatorPeak:
    """The peak of CPU allocations above the start, from the profiler's allocation events: kernel workspace included."""

    def __init__(self) -> None:
        self._profile = torch.autograd.profiler.profile(profile_memory=True)

    def __enter__(self) -> None:
        self._profile.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)

    def peak(self) -> int:
        results: Any = self._profile.kineto_results
        level = peak = 0
        events = [event for event in results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak
