"""What is said when memory runs out on a rank: what was tried, who owns the most, and the history of the pass where one was recorded.

Every way in which PyTorch reports it becomes one exception. What becomes of the cell is the driver's decision.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cpbench.measure.history import History, Owner, largest_first, named
from cpbench.units import format_bytes

Held = Callable[[], Iterable[tuple[str, Tensor]]]  # (category, tensor) of everything that outlives a pass


class OutOfMemory(RuntimeError):  # noqa: N818 - it says what happened
    """Memory ran out. `owners`: the largest first; `history`: of the pass in which it happened, where one was recorded."""

    def __init__(self, cause: str, owners: Sequence[Owner], history: History | None = None) -> None:
        super().__init__(f"{cause}; {named(owners)}")
        self.owners, self.history = tuple(owners), history


class OverLimit(torch.OutOfMemoryError):
    """Live tensors exceed the limit that was set for them."""


def ran_out(error: BaseException) -> bool:
    """Whether an exception is one of the ways in which memory runs out."""
    text = str(error)
    known = isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in text or "out of memory" in text


def cause(error: BaseException) -> str:
    """What was tried, in one line: the bytes where the message has them, else its first line."""
    if isinstance(error, OverLimit):
        return str(error)
    found = re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]?i?B)", str(error), re.IGNORECASE)
    if found is None:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return f"tried to allocate {format_bytes(float(found[1])) if found[2] == 'bytes' else f'{found[1]} {found[2]}'}"


def held_by_category(held: Held) -> dict[str, int]:
    """Bytes of what is held, each storage once."""
    sizes: Counter[str] = Counter()
    storages: set[int] = set()
    for category, tensor in held():
        storage = tensor.untyped_storage()
        sizes[category] += 0 if storage._cdata in storages else storage.nbytes()
        storages.add(storage._cdata)
    return dict(sizes)


@contextmanager
def owners_named(held: Held) -> Iterator[None]:
    """Say what is held where memory runs out inside: all that is known where nothing tracks tensors."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(cause(error), largest_first(held_by_category(held))) from error
