"""What two variants whose passes alternated say about each other: the ratio of their times, block by block.

A block is A B B A. Its ratio is the time of its two passes of B over that of its two of A: what changes steadily over a block, a clock or
somebody else's load, is in both alike and cancels. Blocks of one process group are repetitions of this run and not of the next one: for
that there are rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cpbench.records import rounds_done, time_of
from cpbench.results import Alternation, CellResult
from cpbench.stats import median, median_interval

if TYPE_CHECKING:
    from cpbench.pairing import Pair

PASSES = 2  # of each variant in a block


def alternations(pairs: Iterable[Pair]) -> dict[str, Alternation]:
    """By cell: which variant it is, and of what."""
    found: dict[str, Alternation] = {}
    for pair in pairs:
        found[pair.a.id] = Alternation(variant="A", setting=pair.settings[0], other=pair.b.id)
        found[pair.b.id] = Alternation(variant="B", setting=pair.settings[1], other=pair.a.id)
    return found


def with_rounds(result: CellResult, known: Alternation, round_number: int | None) -> CellResult:
    """The cell as the variant that is `known` of it; samples that are new are from this round, in which the variants alternated (None: not)."""
    done = rounds_done(result)
    rounds = [*known.rounds, *[round_number] * (done - len(known.rounds))][:done]
    return result.model_copy(update={"ab": known.model_copy(update={"rounds": rounds})})


def with_ratio(b: CellResult, a: CellResult | None) -> CellResult:
    """B with the ratio of its time to that of A, from all rounds in which both alternated; without one where there is none."""
    if b.ab is None:
        return b
    ratios = _ratios(a, b) if a and a.status == b.status == "ok" else []
    compared = {"ratio": median(ratios) if ratios else None, "ratio_ci95": median_interval(ratios), "blocks": len(ratios)}
    return b.model_copy(update={"ab": b.ab.model_copy(update=compared)})


def _ratios(a: CellResult, b: CellResult) -> list[float]:
    """Of the blocks of all rounds."""
    times = [dict(zip(cell.ab.rounds, time.rounds, strict=False)) if cell.ab and (time := time_of(cell)) else {} for cell in (a, b)]
    return [ratio for number, samples in times[0].items() if number is not None and number in times[1] for ratio in block_ratios(samples, times[1][number])]


def block_ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """B over A of every block, from the samples of each variant in order: as many of both, whole blocks."""
    return [sum(b[start : start + PASSES]) / sum(a[start : start + PASSES]) for start in range(0, len(a), PASSES)]
