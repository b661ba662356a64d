"""Peak memory of one pass on one rank, and memory over time: live tensors by category, the allocator's peak, and the resident set.

`LiveTensors` counts the storages that are alive, from a dispatch mode: what formulas and projections are held against, and a limit where
no allocator enforces one. The profiler adds what kernels allocate inside an operator. Both run in a pass that is not timed. On CPU that
pass computes one block of rows per attention call and leaves the rest of the output zero: a kernel's workspace depends on its block, not
on how many there are, and the arithmetic would take as long as a timed pass.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cpbench.dispatch import Watching
from cpbench.kernels.base import Kernel
from cpbench.measure.allocator import allocator_history
from cpbench.measure.device import Device
from cpbench.measure.history import History, Owner, largest_first
from cpbench.measure.out_of_memory import Held, OutOfMemory, OverLimit, cause, ran_out
from cpbench.segments import MIN_ROWS_TO_COPY
from cpbench.tracing.phases import PhaseLog
from cpbench.tracing.spans import using
from cpbench.units import format_bytes

BLOCK_ROWS = MIN_ROWS_TO_COPY  # fewer rows would spare the kernel its copies of K and V


class _Made(NamedTuple):
    """What made a storage: the span it was made in, the operator, and the shape that was seen first."""

    path: str
    operator: Any
    shape: tuple[int, ...]

    def __str__(self) -> str:
        name = self.operator._schema.name if self.operator is not None else ""
        return " ".join(part for part in (self.path, name, str(list(self.shape))) if part)


class _Change(NamedTuple):
    """A storage, by its serial number, that came or went."""

    number: int
    bytes: int
    seconds: float


class LiveTensors(Watching):
    """Bytes of the storages alive on a device, and the moment they were most.

    What `held` lists at the end (weights, caches, reused buffers) outlives the pass and is counted as alive all along, also where
    this pass was the one that made it: so the peak is that of every later pass. With a `limit` in bytes, more than that raises OverLimit:
    while the pass runs, or where it ends for what every later pass would need. `phases`: whose spans say where a storage was made.
    """

    def __init__(self, device: torch.device, held: Held, limit: int | None = None, phases: PhaseLog | None = None) -> None:
        super().__init__()
        self._device, self._held, self._limit = device, held, limit
        self._phases = phases or PhaseLog(time.perf_counter)
        self._alive: dict[int, tuple[int, int]] = {}  # address -> (serial number, bytes); addresses are used again, numbers are not
        self._made: dict[int, _Made] = {}  # by serial number
        self._changes: list[_Change] = []
        self._level, self._start = 0, time.perf_counter()
        self._lasting: dict[int, str] = {}  # serial numbers of what is held in the end, with categories
        self.peak = 0
        self.by_category: dict[str, int] = {}
        for _, tensor in held():
            self._see(tensor, None)
        self.started_with, self._before = self._level, len(self._changes)

    def __enter__(self) -> LiveTensors:
        if self._limit is not None and self._level > self._limit:
            raise OverLimit(f"{format_bytes(self._level)} are held before the pass, more than the limit of {format_bytes(self._limit)}")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, before = func(*args, **(kwargs or {})), self._level
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, func)
        if self._level > before:
            self._require(self._level - before)
        return result

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        if kind is not None:
            return
        for _, tensor in self._held():
            self._see(tensor, None)
        self._lasting = self._categories()
        categories: Counter[str] = Counter()
        for number, category in self._lasting.items():
            categories[category] += self._changes[number].bytes
        categories["activations"] += max(level for _, level in self._levels()) - sum(categories.values())
        self.by_category, self.peak = dict(categories), sum(categories.values())
        if self._limit is not None and self.peak > self._limit:
            raise OverLimit(f"every later pass needs {format_bytes(self.peak)}, more than the limit of {format_bytes(self._limit)}")

    def history(self) -> History:
        """Levels over time, as in every later pass, and the owners at the highest; after an exception as they were, and the owners at its end."""
        levels = self._levels()
        moment = max(range(len(levels)), key=lambda index: levels[index][1]) if self._lasting else len(levels) - 1
        return History.of("live tensors", levels, self._phases.until(levels[-1][0]), self._owners(moment))

    def _levels(self) -> list[tuple[float, int]]:
        """(seconds, bytes alive) at the start and after every change: what lasts is alive from the start."""
        begun = set(self._lasting) | set(range(self._before))
        level = sum(self._changes[number].bytes for number in begun)
        levels = [(self._start, level)]
        for number, change, seconds in self._changes:
            if number not in self._lasting and (number not in begun or change < 0):
                level += change
            levels.append((seconds, level))
        return levels

    def _owners(self, changes: int) -> list[Owner]:
        """Who was alive after so many changes, the largest first: categories of what is held, else makers and shapes."""
        alive = set(self._lasting)
        for number, _, _ in self._changes[:changes]:
            if number not in self._lasting:
                alive ^= {number}  # it came, or it went
        categories = self._lasting or self._categories()
        sizes: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for number in alive:
            name = categories.get(number) or str(self._made[number])
            sizes[name] += self._changes[number].bytes
            counts[name] += number not in categories
        return largest_first({f"{counts[name]} x {name}" if counts[name] > 1 else name: size for name, size in sizes.items()})

    def _categories(self) -> dict[int, str]:
        """The serial numbers of what is held now, with its category."""
        found: dict[int, str] = {}
        for category, tensor in self._held():
            known = self._alive.get(tensor.untyped_storage()._cdata)
            if known is not None:
                found.setdefault(known[0], category)
        return found

    def _require(self, tried: int) -> None:
        """Raise OverLimit if the last `tried` bytes were too many."""
        if self._limit is not None and self._level > self._limit:
            used, limit = format_bytes(self._level - tried), format_bytes(self._limit)
            raise OverLimit(f"tried to allocate {format_bytes(tried)} with {used} of the limit of {limit} in use")

    def _see(self, tensor: Tensor, func: Any) -> None:
        if tensor.device != self._device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            number, size = len(self._changes), storage.nbytes()
            self._alive[key] = (number, size)
            self._made[number] = _Made(self._phases.path, func, tuple(tensor.shape))
            self._note(number, size)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        number, size = self._alive.pop(key)
        self._note(number, -size)

    def _note(self, number: int, size: int) -> None:
        self._changes.append(_Change(number, size, time.perf_counter()))
        self._level += size


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


def measure_peaks(run: Callable[[], object], device: Device, held: Held, limit: int | None = None) -> dict[str, Any]:
    """Run once and return the fields of `results.Memory` that exist on this device.

    Raises OutOfMemory with owners and history where memory runs out, or live tensors exceed `limit` bytes.
    """
    gc.collect()
    allocated = _AllocatorPeak() if device.torch_device.type == "cpu" else None
    device.reset_peaks()
    phases = PhaseLog(time.perf_counter)
    tracker = LiveTensors(device.torch_device, held, limit, phases)
    before = tracker.started_with
    try:
        with using(phases), tracker, allocated or nullcontext():
            run()
    except Exception as error:
        if not ran_out(error):
            raise
        history = tracker.history()
        raise OutOfMemory(cause(error), history.owners, history) from error
    peaks: dict[str, Any] = {"peak_live_bytes": tracker.peak, "by_category": tracker.by_category, **device.peaks()}
    if allocated is not None:
        peaks["peak_allocator_bytes"] = before + allocated.peak()
    return peaks


def memory_history(run: Callable[[], object], device: Device, held: Held) -> History:
    """The history of one pass that is not timed: of the allocator on CUDA, of live tensors elsewhere. Spans are its phases."""
    gc.collect()
    if device.torch_device.type == "cuda":
        return allocator_history(run, held)
    phases = PhaseLog(time.perf_counter)
    tracker = LiveTensors(device.torch_device, held, phases=phases)
    with using(phases), tracker:
        run()
    return tracker.history()


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
