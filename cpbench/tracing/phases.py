"""A tool that notes when spans were open: the phases of a memory history. What was alive in them is measured in measure/."""

from __future__ import annotations

from collections.abc import Callable

from cpbench.measure.history import Phase
from cpbench.tracing.spans import Category


class PhaseLog:
    """Notes every span of one thread that ends, in seconds of `clock`; those that an exception or the end of the history cut short are in `until`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: list[tuple[str, float]] = []
        self._closed: list[Phase] = []

    @property
    def path(self) -> str:
        """The innermost open span; empty outside of all."""
        return self._open[-1][0] if self._open else ""

    def enter(self, path: str, category: Category, payload: float | None) -> None:
        self._open.append((path, self._clock()))

    def exit(self) -> None:
        path, start = self._open.pop()
        self._closed.append(Phase(path, start, self._clock()))

    def until(self, end: float) -> list[Phase]:
        """All phases, those that are still open as if they ended now."""
        return [*self._closed, *(Phase(path, start, end) for path, start in self._open)]
