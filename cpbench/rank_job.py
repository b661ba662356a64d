"""What one rank was told to do, and how it reports: the job that the driver wrote, events of the first rank, the failure of any.

What is done with a cell is trial.py's affair, and how the process begins and ends worker.py's.
"""

from __future__ import annotations

import faulthandler
import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpbench.measure.out_of_memory import OutOfMemory, ran_out
from cpbench.measure.peaks import Peak
from cpbench.models.held import Models

STACKS_BEFORE_DEADLINE = 2.0  # seconds; where every thread is goes to the log before the driver kills a hanging group


@dataclass
class Job:
    """What the driver wrote for one world size and round, the models that its cells share, and the cell that is at work (its index)."""

    data: dict[str, Any]
    rank: int
    models: Models
    index: int | None = None
    peaks: dict[str, Peak | None] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Job:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(data, int(os.environ["RANK"]), Models(data.get("weights"), data.get("prompt")))

    def emit(self, event: str, **fields: Any) -> None:
        """Append an event, on the first rank only."""
        if self.rank == 0:
            with Path(self.data["events"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **fields}) + "\n")

    def start(self, variants: Sequence[dict[str, Any]]) -> None:
        """From here on these cells are measured together, and a failure is that of the first."""
        self.index = variants[0]["index"]
        self.emit("start", index=self.index)
        faulthandler.dump_traceback_later(max(0.1, len(variants) * self.data["cell_timeout"] - STACKS_BEFORE_DEADLINE))

    def turn(self, index: int) -> None:
        """From here on a failure is this cell's."""
        if index != self.index:
            self.index = index
            self.emit("turn", index=index)

    def fail(self, error: BaseException) -> None:
        """Leave this rank's failure for the driver."""
        lines, known = traceback.format_exception(error), isinstance(error, OutOfMemory)
        named = f"rank {self.rank} ran out of memory" if known else type(error).__name__
        reason = f"{named}: {error}".splitlines()[0] if str(error) else named
        status = "oom" if ran_out(error) else "crash"
        failure: dict[str, Any] = {"index": self.index, "rank": self.rank, "status": status, "reason": reason, "log_tail": "".join(lines).splitlines()[-20:]}
        if isinstance(error, OutOfMemory):
            failure |= {"owners": [vars(owner) for owner in error.owners], "history": error.history and error.history.to_dict()}
        path = Path(f"{self.data['events']}.rank{self.rank}.json")
        path.with_suffix(".part").write_text(json.dumps(failure), encoding="utf-8")
        path.with_suffix(".part").replace(path)
