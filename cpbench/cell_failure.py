"""A group that ended early as the record of the cell it was in: status, reason, who had the memory, and the history that the rank left."""

from __future__ import annotations

from pathlib import Path

from cpbench.cell import Cell
from cpbench.group import GroupFailed
from cpbench.measure.history import History
from cpbench.memory_record import keep
from cpbench.records import not_measured
from cpbench.results import CellResult, Failure, MemoryOwner

MAX_OWNERS = 10


def failed(cell: Cell, failure: GroupFailed, previous: CellResult | None = None) -> CellResult:
    """The record of a cell; what earlier rounds measured is kept."""
    owners = [MemoryOwner(name=owner.name, bytes=owner.bytes) for owner in failure.owners[:MAX_OWNERS]]
    details = Failure(rank=failure.rank, log_tail=list(failure.log_tail), owners=owners)
    return not_measured(cell, failure.status, failure.reason, previous, details)


def with_history(result: CellResult, failure: GroupFailed, output: Path, name: str, limit: int | None) -> CellResult:
    """The record with the memory history of the rank that failed beside the result file, if it left one. Raises OSError."""
    if failure.history is None or failure.rank is None:
        return result
    try:
        history = History.from_dict(failure.history)
    except (KeyError, IndexError, TypeError, ValueError):
        return result  # written by a rank that ran out of memory
    files = keep({failure.rank: history}, output, name, limit)
    return result.model_copy(update={"artifacts": [*result.artifacts, *(file for file in files if file not in result.artifacts)]})
