"""The search for the longest sequence that fits: doubling until one does not, then bisection. Which lengths are tried, and nothing else.

A state and the answer to its next length make the next state, so a search can be looked ahead: `chain` is what will be tried as long as
everything fits, and one group of ranks can try all of it. Trying is maxseq.py's part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_CHAIN = 6  # doublings that one group is given: more would rarely all fit


@dataclass(frozen=True)
class Search:
    """`fits` is the longest length known to fit (0: none yet), `fails` the shortest known not to (None: none yet).

    All lengths are multiples of `step`. The search is over when the two are `precision` of the length apart, or neighbours.
    """

    start: int
    step: int
    precision: float
    fits: int = 0
    fails: int | None = None

    @property
    def next(self) -> int | None:
        """The length to try, or None where the answer is known."""
        if self.fails is None:
            return 2 * self.fits or self._multiple(self.start + self.step - 1)
        if not self.fits:
            return self._multiple(self.fails // 2) or (self.step if self.fails > self.step else None)
        if self.fails - self.fits <= max(self.step, self.precision * self.fits):
            return None
        return self._multiple((self.fits + self.fails) // 2)

    def after(self, length: int, *, fitted: bool) -> Search:
        """What is known once a length was tried."""
        if fitted:
            return replace(self, fits=max(self.fits, length))
        return replace(self, fails=length if self.fails is None else min(self.fails, length))

    @property
    def chain(self) -> tuple[int, ...]:
        """The lengths that will be tried one after the other as long as all of them fit."""
        lengths: list[int] = []
        search = self
        while len(lengths) < MAX_CHAIN and (length := search.next) is not None:
            lengths.append(length)
            search = search.after(length, fitted=True)
        return tuple(lengths)

    def _multiple(self, length: int) -> int:
        return length // self.step * self.step
