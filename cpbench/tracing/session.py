"""The files of a profile, on the driver's side: the folder for the ranks' traces, and what is made of them when the cell is done.

`x.json` has `x.traces/` beside it, with one file per rank and nothing else (TensorBoard's plugin and HolisticTraceAnalysis read all that is
in a folder), `x.timeline.json.gz` for Perfetto, and `x.memory/` with memory over time. A trace that cannot be used becomes a warning: the
times of the cell are right without it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.errors import CpbenchError
from cpbench.measure.history import History, history_file
from cpbench.memory_record import keep
from cpbench.results import CellResult
from cpbench.tracing import nsys
from cpbench.tracing.chrome import SUFFIX, events_of, read_trace, write_trace
from cpbench.tracing.merge import merged, unaligned
from cpbench.tracing.profile import Peaks, profile_of
from cpbench.tracing.spans import TRACED
from cpbench.tracing.timeline import Step, steps_of

CHOOSE = "Choose another file with -o, in a folder that you can write."


@dataclass(frozen=True)
class Session:
    """The profile of the one cell of a sweep whose result goes to `output`. `by_nsys`: under Nsight Systems instead of the torch profiler."""

    output: Path
    by_nsys: bool = False
    memory_limit: int | None = None

    @property
    def folder(self) -> Path:
        return self.output.with_suffix(".traces").resolve()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The folder for the traces, gone afterwards if nothing came. Raises CpbenchError where it cannot be made, or has files."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise CpbenchError(f"{self.output.with_suffix('.traces')} has files of another profile.", "Choose another file with -o, or remove the folder.")
            (self.folder / ".writable").touch()
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise CpbenchError(f"{self.output.with_suffix('.traces')} cannot be written: {error.strerror}.", CHOOSE) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it has files
                self.folder.rmdir()

    def finished(self, result: CellResult, record: dict[str, Any]) -> CellResult:
        """The result of the cell with its profile and the names of the files, or with a warning why there is none."""
        if result.status != "ok" or not record.get("traced_s"):
            return result
        result, peaks = self._memory(result)
        try:
            return self._by_nsys(result) if self.by_nsys else self._by_torch(result, record["traced_s"], peaks)
        except CpbenchError as error:
            return _with(result, warnings=[f"no profile: {error.message.removesuffix('.')}"])

    def _memory(self, result: CellResult) -> tuple[CellResult, Peaks]:
        """Memory over time, out of the folder of the traces into files of its own; and the peaks by rank and phase."""
        left = {rank: history_file(self.folder, rank) for rank in range(result.world_size)}
        try:
            histories = {rank: History.from_dict(json.loads(file.read_text(encoding="utf-8"))) for rank, file in left.items()}
            for file in left.values():
                file.unlink()
            files = keep(histories, self.output, capacity=self.memory_limit)
        except OSError as error:
            return _with(result, warnings=[f"no memory over time: {error.strerror}"]), {}
        peaks = {rank: history.peak_by_phase() | {TRACED.name: history.peak} for rank, history in histories.items()}
        return _with(result, files=files), peaks

    def _by_torch(self, result: CellResult, seconds: Sequence[Sequence[float]], peaks: Peaks) -> CellResult:
        files = [self.folder / f"rank{rank}{SUFFIX}" for rank in range(result.world_size)]
        traces = [read_trace(file) for file in files]
        steps = [_steps(file, trace, len(seconds), _alone(result)) for file, trace in zip(files, traces, strict=True)]
        result = _with(result, files=[f"{self.folder.name}/{file.name}" for file in files])
        result = result.model_copy(update={"profile": profile_of(steps, seconds, peaks)})
        if apart := unaligned(traces, steps):
            return _with(result, warnings=[f"no timeline of all ranks: {apart}"])
        timeline = self.output.with_suffix(".timeline.json.gz")
        write_trace(timeline, merged(traces))
        return _with(result, files=[timeline.name])

    def _by_nsys(self, result: CellResult) -> CellResult:
        ranges = [found for rank in range(result.world_size) for found in nsys.ranges_of(nsys.report(self.folder, rank), rank, result.key["device"])]
        files = [f"{self.folder.name}/{nsys.report(self.folder, rank).name}" for rank in range(result.world_size)]
        return _with(result.model_copy(update={"profile": nsys.profile_of(ranges)}), files=files)


def _alone(result: CellResult) -> dict[str, float]:
    """What a collective of each kind takes alone, in seconds, as far as the split of the cell says."""
    collectives = result.split.collectives if result.split else []
    return {f"{one.axis}.{one.operation}": one.alone_s / one.calls for one in collectives if one.alone_s}


def _steps(file: Path, trace: dict[str, Any], count: int, alone: dict[str, float]) -> list[Step]:
    steps = steps_of(events_of(trace), alone)
    if len(steps) != count:
        raise CpbenchError(f"{file.name} has {len(steps)} of {count} traced steps")
    return steps


def _with(result: CellResult, *, files: Sequence[str] = (), warnings: Sequence[str] = ()) -> CellResult:
    return result.model_copy(update={"artifacts": [*result.artifacts, *files], "warnings": [*result.warnings, *warnings]})
