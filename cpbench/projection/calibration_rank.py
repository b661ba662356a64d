"""One rank of a calibration, started by torchrun: it times products, attention, copies and collectives while all other ranks do the same.

That is how programs run: on a CPU, ranks share caches and memory with busy siblings, and gloo's threads share cores with them. Of own work a time
is the median of all ranks'. Of a collective it is what the rank that comes last waits, the mean of many calls that each follow on some work: then
caches hold other things, threads sleep, and the few calls that find no core take their part, as in the sum that a pass is. Rows go to a file, one
JSON object a line. What is made of them is decided in calibrating.py, and which sizes are measured in calibration_sizes.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch

from cpbench.distributed.collectives import ProcessGroup, Recorder, start_process_groups, stop_process_groups
from cpbench.distributed.flight import Handle
from cpbench.kernels import pick_kernel
from cpbench.kernels.base import Kernel
from cpbench.measure.device import Device, open_device
from cpbench.measure.split import ELEMENT_BYTES, collective_call
from cpbench.models.linear import QuantisedWeight, quantise, refusal, scaled_product
from cpbench.projection.calibration_sizes import BEFORE, BEHIND, BEHIND_TRIALS, SIZES, Sizes
from cpbench.quantisation import FP8
from cpbench.rank_end import to_the_end
from cpbench.stats import median

STRETCH = 5e-3  # seconds of work between two readings of a clock; a single call may take microseconds
ROUNDS, REPEATS = 3, 5  # over all trials of a kind, and of a trial in each
BUDGET, LONG = 0.06, 0.2  # seconds of the repeats of a trial, and of a call from which on one must do
FEW, MANY, TOGETHER = 5, 30, 0.08  # calls of a collective in each round: many, but no more than take so many seconds or are few
WORK_SECONDS, TRANSFER_FACTOR = 0.02, 3.0  # of what runs beside a transfer, and how much longer that is
OPERATIONS = ("send_recv", "all_gather", "reduce_scatter", "all_to_all", "all_reduce")


def main(path: str) -> None:
    """Run the job at `path`. Exits with 1 after a failure, without waiting for peers."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    with to_the_end():
        torch.set_num_threads(job["threads"])
        device = open_device(job["device"], int(os.environ["LOCAL_RANK"]))
        start_process_groups(device.torch_device)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        group = ProcessGroup("world", range(size), rank, Recorder(), None)
        with torch.inference_mode():
            Calibration(job, group, device).run()
        stop_process_groups()


@dataclass(frozen=True)
class Trial:
    """Something to time: the row that says what, the call, which holds its tensors only as long as it is timed, and how its times are taken."""

    row: dict[str, Any]
    make: Callable[[], Callable[[], object]]
    times: Callable[[Callable[[], object]], list[float]]


@dataclass(frozen=True)
class Calibration:
    """What one world size measures. `job`: `rows` (the file), `compute` (or only collectives), `quick`, `device`, `threads`."""

    job: dict[str, Any]
    group: ProcessGroup
    device: Device

    def run(self) -> None:
        """All of it, in the same order on all ranks."""
        sizes = SIZES[self.device.torch_device.type, self.job["quick"]]
        if self.job["compute"]:
            self._write("environment", **_environment(self.device))
            one = torch.ones(1, device=self.device.torch_device)
            self._write("launch", seconds=median(self._times(lambda: one + one)))
            for trials in (self._moved(sizes), self._gemms(sizes), self._attentions(sizes)):
                self._measure(list(trials), median)
        if self.group.size > 1:
            self._measure(list(self._collectives(sizes)), mean)
            if self.job["compute"]:
                self._write("contention", **self._contention(sizes))
                if self.device.torch_device.type == "cpu":  # GPUs have a stream for it
                    self._measure(list(self._behind(sizes)), mean)

    def _write(self, what: str, **fields: Any) -> None:
        if self.group.rank == 0:
            with Path(self.job["rows"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"what": what, "ranks": self.group.size, **fields}) + "\n")

    def _measure(self, trials: Sequence[Trial], middle: Callable[[Sequence[float]], float]) -> None:
        """Write the times of some trials. Rounds go over all of them, so that what disturbs the machine for a while disturbs each a little."""
        taken: list[list[float]] = [[] for _ in trials]
        for _ in range(1 if self.job["quick"] else ROUNDS):
            for trial, seconds in zip(trials, taken, strict=True):
                if not seconds or seconds[0] < LONG:
                    seconds.extend(trial.times(trial.make()))
        for trial, seconds in zip(trials, taken, strict=True):
            self._write(**trial.row, seconds=middle(seconds))

    def _times(self, call: Callable[[], object]) -> list[float]:
        """Seconds of a call on any rank, several times: of many calls in a row."""
        first = self._first(call)
        if first >= LONG:
            return [first]
        loops = ceil(STRETCH / max(first, 1e-7))
        taken = []
        for _ in range(min(REPEATS, max(1, int(BUDGET / (loops * first))))):
            self.group.barrier()
            taken.append(self.device.time(lambda: [call() for _ in range(loops)]) / loops)
        return [seconds for times in self.group.share(taken) for seconds in times]

    def _waits(self, work: Callable[[], object], call: Callable[[], object]) -> list[float]:
        """Seconds of a collective on the rank that comes last, several times, each behind some work."""
        first = self._first(call)
        if first >= LONG:
            return [first]
        marks: list[tuple[Any, object, Any]] = []

        def calls() -> None:
            for _ in range(max(FEW, min(MANY, round(TOGETHER / first)))):
                work()
                marks.append((self.device.mark(), call(), self.device.mark()))

        self.device.time(calls)
        shared = self.group.share([self.device.between(begin, end) for begin, _, end in marks])
        return [min(ranks) for ranks in zip(*shared, strict=True)]

    def _first(self, call: Callable[[], object]) -> float:
        """Seconds of a call after one that is not counted, on the slowest rank."""
        call()
        return max(shared[0] for shared in self.group.share([self.device.time(call)]))

    def _moved(self, sizes: Sizes) -> Iterator[Trial]:
        """An element-wise kernel into fresh space."""
        for count in sizes.moved_bytes:
            yield Trial({"what": "moved", "bytes": count}, partial(self._doubled, count // (2 * ELEMENT_BYTES)), self._times)

    def _doubled(self, elements: int) -> Callable[[], object]:
        x = torch.ones(elements, device=self.device.torch_device)
        return lambda: x * 2.0

    def _gemms(self, sizes: Sizes) -> Iterator[Trial]:
        for dtype in sizes.dtypes:
            if dtype == FP8 and refusal(self.device.torch_device, FP8):
                continue
            for m, n, k in sizes.gemms:
                yield Trial({"what": "gemm", "dtype": dtype, "m": m, "n": n, "k": k}, partial(self._product, m, n, k, dtype), self._times)

    def _product(self, m: int, n: int, k: int, dtype: str) -> Callable[[], object]:
        """x W^T, of fp8 without quantising x."""
        narrow = dtype == FP8
        kind = torch.bfloat16 if narrow else getattr(torch, dtype)
        x, weight = (torch.randn(rows, k, device=self.device.torch_device).to(kind) for rows in (m, n))
        if not narrow:
            return lambda: torch.nn.functional.linear(x, weight)
        (values, scales), held = quantise(x), QuantisedWeight(*quantise(weight))
        return lambda: scaled_product(values, scales, held, kind)

    def _attentions(self, sizes: Sizes) -> Iterator[Trial]:
        """Causal squares and full rectangles by the kernel in use here."""
        for dtype in (dtype for dtype in sizes.dtypes if dtype != FP8):
            for heads, kv_heads, dim in sizes.heads:
                kernel = pick_kernel(self.device.torch_device.type, dtype, dim, dim)
                for q_rows, k_rows, causal in sizes.attentions:
                    shape = {"q_rows": q_rows, "k_rows": k_rows, "causal": causal, "heads": heads, "kv_heads": kv_heads, "dim": dim}
                    row = {"what": "attention", "dtype": dtype, **shape, "kernel": kernel.dispatched(dtype, dim, dim)}
                    yield Trial(row, partial(self._attention, kernel, row), self._times)

    def _attention(self, kernel: Kernel, row: dict[str, Any]) -> Callable[[], object]:
        like = {"device": self.device.torch_device, "dtype": getattr(torch, row["dtype"])}
        q = torch.randn(row["q_rows"], row["heads"], row["dim"], **like)
        k, v = (torch.randn(row["k_rows"], row["kv_heads"], row["dim"], **like) for _ in range(2))
        return lambda: kernel.block(q, k, v, row["dim"] ** -0.5, row["causal"])

    def _collectives(self, sizes: Sizes) -> Iterator[Trial]:
        """In the way that programs call them."""
        work = self._work(sizes, BEFORE)
        for operation in OPERATIONS:
            for travels in sizes.collective_bytes:
                yield self._collective({"what": "collective", "operation": operation, "bytes": travels}, work)

    def _behind(self, sizes: Sizes) -> Iterator[Trial]:
        """Some collectives behind less and more work."""
        works = {seconds: self._work(sizes, seconds) for seconds in BEHIND}
        for operation, travels in BEHIND_TRIALS:
            for seconds, work in works.items():
                yield self._collective({"what": "behind", "operation": operation, "bytes": travels, "work_s": seconds}, work)

    def _collective(self, row: dict[str, Any], work: Callable[[], object]) -> Trial:
        """The collective that a row names, each call of it behind some work."""
        make = partial(collective_call, self.group, row["operation"], row["bytes"] // ELEMENT_BYTES, self.device.torch_device)
        return Trial(row, make, partial(self._waits, work))

    def _work(self, sizes: Sizes, seconds: float) -> Callable[[], object]:
        """Products that take so long."""
        product = self._product(*sizes.work, sizes.dtypes[0])
        loops = ceil(seconds / median(self._times(product)))
        return lambda: [product() for _ in range(loops)]

    def _contention(self, sizes: Sizes) -> dict[str, float]:
        """Work of a rank, a transfer around the ring that takes longer, and both at once: how long the work took then, and both."""
        work, longest = self._work(sizes, WORK_SECONDS), sizes.collective_bytes[-1]
        rate = longest / mean(self._waits(work, collective_call(self.group, "send_recv", longest // ELEMENT_BYTES, self.device.torch_device)))
        message = torch.rand(int(TRANSFER_FACTOR * WORK_SECONDS * rate) // ELEMENT_BYTES, device=self.device.torch_device)

        def transfer() -> Handle:
            return self.group.shift(message, torch.empty_like(message))

        marks: list[Any] = []

        def together() -> None:
            handle = transfer()
            marks.append(self.device.mark())
            work()
            marks.append(self.device.mark())
            handle.wait()

        taken = []
        for _ in range(3 if self.job["quick"] else 9):  # in turn, so that all three have the same neighbours
            row = []
            for call in (work, lambda: transfer().wait(), together):
                self.group.barrier()
                row.append(self.device.time(call))
            taken += [*row, self.device.between(*marks[-2:])]
        slowest = [max(ranks) for ranks in zip(*self.group.share(taken), strict=True)]
        return {name: median(slowest[at::4]) for at, name in enumerate(("work_s", "transfer_s", "both_s", "work_during_s"))}


def _environment(device: Device) -> dict[str, Any]:
    """What only a running rank knows."""
    cuda = device.torch_device.type == "cuda"
    return {
        "device": device.torch_device.type,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "device_name": device.name,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    main(sys.argv[1])
