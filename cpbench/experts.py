"""How tokens find their experts: which rule a cell's router follows, and which way a layout lets tokens take to them. Pure data.

`trained` is the model's own router. The others replace its choice, and nothing else, by one that is a function of seed, layer, token and
number of experts, the same in every layout: `uniform`, where all experts are as likely, and `zipf:S`, where the k-th most popular expert of
a layer is chosen k^-S as often as the first, so that load is skewed on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from cpbench.errors import CpbenchError, unknown

TRAINED = "trained"
RULES = (TRAINED, "uniform", "zipf:1.2")
MAX_EXPONENT = 8.0
GATHER, ALLTOALL = "gather", "alltoall"


@dataclass(frozen=True)
class RouterRule:
    """`exponent` None: the model's own router; 0: uniform; above: Zipf's law."""

    exponent: float | None = None

    @classmethod
    def parse(cls, text: str) -> RouterRule:
        """Read `trained`, `uniform` or `zipf:1.2`. Raises CpbenchError."""
        name, colon, value = text.partition(":")
        if not colon and name in (TRAINED, "uniform"):
            return cls(None if name == TRAINED else 0.0)
        if name != "zipf":
            raise unknown("router", text, RULES)
        try:
            exponent = float(value)
        except ValueError:
            exponent = float("nan")
        if not isfinite(exponent) or not 0 <= exponent <= MAX_EXPONENT:
            near = MAX_EXPONENT if exponent > MAX_EXPONENT else 0.0 if exponent < 0 else 1.2
            raise CpbenchError(f"router={text[:40]} has no exponent from 0 to {MAX_EXPONENT:g}.", f"The nearest valid value is router=zipf:{near:g}.")
        return cls(exponent)
