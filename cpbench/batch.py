"""A batch as data: the new and the cached tokens of each sequence, and how both are written in tables and messages.

Which batches a sweep has is decided in axes.py; which tokens of one a rank holds, in partition.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cpbench.errors import CpbenchError
from cpbench.units import format_count

MAX_SHOWN = 4  # sequences that a label lists one by one


@dataclass(frozen=True)
class Batch:
    """`lengths` are the new tokens of each sequence, `prefixes` its cached ones: as many, or none at all."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", self.prefixes or (0,) * len(self.lengths))

    @property
    def is_even(self) -> bool:
        """All sequences are alike."""
        return len(set(zip(self.lengths, self.prefixes, strict=True))) == 1

    @property
    def label(self) -> str:
        """`36k`; `36k@32k` behind 32k cached tokens; `1003@500+517+36k`; a longer mixed batch by its extremes, `517-36k@0-32k`."""
        if not self.lengths:
            return "?"
        if self.is_even or len(self.lengths) <= MAX_SHOWN:
            pairs = list(zip(self.lengths, self.prefixes, strict=True))[: 1 if self.is_even else None]
            return "+".join(format_count(length) + (f"@{format_count(prefix)}" if prefix else "") for length, prefix in pairs)
        return _extremes(self.lengths) + (f"@{_extremes(self.prefixes)}" if any(self.prefixes) else "")

    @property
    def name(self) -> str:
        """The label, with the number of sequences where it does not list them: `36k b3`."""
        listed = len(self.lengths) <= (1 if self.is_even else MAX_SHOWN)
        return self.label if listed else f"{self.label} b{len(self.lengths)}"

    @property
    def exact(self) -> str:
        """The label and what it stands for: `36k = 36,864 tokens`, `36k@32k = 36,864 tokens behind 32,768 cached`."""
        tokens, cached = (sum(values) if not self.is_even else values[0] for values in (self.lengths, self.prefixes))
        number = f"{tokens:,} tokens" + (f" behind {cached:,} cached" if cached else "")
        return number if self.label == str(tokens) else f"{self.label} = {number}"


def flag_batches(lengths: Sequence[str], prefixes: Sequence[str]) -> list[dict[str, Any]]:
    """The scenario field `batches` from repeated --lengths and --prefix, paired in order; one single prefix is that of every sequence.

    The values stay text. Raises CpbenchError where there are fewer or more --prefix than --lengths.
    """
    if len(prefixes) == 1 and "," not in prefixes[0]:
        prefixes = [prefixes[0]] * len(lengths)
    if prefixes and len(prefixes) != len(lengths):
        times = [f"{len(values)} time{'s' if len(values) > 1 else ''}" for values in (lengths, prefixes)]
        hint = f"Give --prefix {times[0]}, in the order of --lengths, or one number for every sequence."
        raise CpbenchError(f"--lengths is given {times[0]} and --prefix {times[1]}.", hint)
    if not prefixes:
        return [{"lengths": new} for new in lengths]
    return [{"lengths": new, "prefixes": cached} for new, cached in zip(lengths, prefixes, strict=True)]


def _extremes(values: Sequence[int]) -> str:
    return "-".join(format_count(value) for value in sorted({min(values), max(values)}))


@lru_cache(maxsize=4096)
def spread(lengths: tuple[int, ...], groups: int) -> tuple[tuple[int, ...], ...]:
    """Which sequences each of `groups` gets, in the order of the batch: the longest is given away first, always to the group with fewest tokens."""
    loads = [0] * groups
    shares: list[list[int]] = [[] for _ in range(groups)]
    for sequence in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        group = loads.index(min(loads))
        loads[group] += lengths[sequence]
        shares[group].append(sequence)
    return tuple(tuple(sorted(share)) for share in shares)
