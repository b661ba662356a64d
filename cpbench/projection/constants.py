"""What a device profile is made of: constants and curves, each with its unit and where it is from. What they price is in profile.py and links.py."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import log
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["datasheet", "measured", "fitted", "derived", "assumed"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Source = Annotated[str, Field(min_length=8)]


class Part(BaseModel):
    """Anything in a profile: frozen, nothing unknown in it, and no number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def require_ascending(points: Sequence[tuple[float, float]]) -> None:
    """Raise ValueError unless each point is at a larger size than the one before."""
    sizes = [size for size, _ in points]
    if sizes != sorted(set(sizes)):
        raise ValueError("the sizes of its points do not ascend")


class Number(Part):
    """One constant. `low` and `high` are the ends of a band, where sources disagree."""

    value: NotNegative
    unit: str
    kind: Kind
    source: Source
    low: NotNegative | None = None
    high: NotNegative | None = None

    @model_validator(mode="after")
    def _within_band(self) -> Number:
        if not (self.value if self.low is None else self.low) <= self.value <= (self.value if self.high is None else self.high):
            raise ValueError(f"{self.value:g} is not between its low and high ends")
        return self

    def scaled(self, factor: float, kind: Kind, source: str) -> Number:
        """The constant and its band times a factor, which is from somewhere else."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Number(value=self.value * factor, unit=self.unit, kind=kind, source=source, low=low, high=high)


class Curve(Part):
    """A quantity over a size: (size, value) in ascending order of size; one point is a constant.

    `low` and `high`: the sizes between which it was measured. `mean_error` and `worst_error`: how far measurements are from it, as a part.
    """

    unit: str
    size_unit: str
    kind: Kind
    source: Source
    low: Positive
    high: Positive
    points: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)]
    mean_error: NotNegative | None = None
    worst_error: NotNegative | None = None

    @model_validator(mode="after")
    def _ascending(self) -> Curve:
        require_ascending(self.points)
        return self

    def at(self, size: float) -> float:
        """The value at a size: linear in its logarithm between two points, flat outside of all."""
        place = bisect_left(self.points, size, key=lambda point: point[0])
        if place == 0 or place == len(self.points):
            return self.points[min(place, len(self.points) - 1)][1]
        (below, least), (above, most) = self.points[place - 1 : place + 1]
        return least + (most - least) * log(size / below) / log(above / below)
