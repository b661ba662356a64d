"""One layer of a projected cell, stretch by stretch: which layer is shown, in which run of it, and of which ranks.

The layer is of the kind that there are most of, and the run is its second in a row, by which time ranks have the distance that they keep.
How stretches come about is decided in replay.py; how they look in report/timeline.py and plot/timeline.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.cell import Cell
from cpbench.errors import CpbenchError
from cpbench.projection.projecting import Target, looked_up, of_all_ranks
from cpbench.projection.replay import replay
from cpbench.projection.simulated import classes
from cpbench.projection.stretch import Stretch
from cpbench.projection.tape import Script, Section

MOST_RANKS = 3


@dataclass(frozen=True)
class Explanation:
    """`layer` stands for `layers` like it. `alike`: the ranks that are shown, and with each the ranks of equal programs, itself among them."""

    title: str
    subject: str
    layer: int
    layers: int
    alike: dict[int, list[int]]
    stretches: tuple[Stretch, ...]

    def notes(self) -> list[str]:
        """Whom the ranks that are shown stand for: `rank 0 stands for 4 ranks: 0, 2, 4, 6`."""
        return [f"rank {rank} stands for {len(ranks)} ranks: {_listed(ranks)}" for rank, ranks in self.alike.items() if len(ranks) > 1]

    def to_dict(self) -> dict[str, Any]:
        """What is shown, without the stretches, as JSON."""
        return {
            "title": self.title,
            "subject": self.subject,
            "layer": self.layer,
            "layers": self.layers,
            "alike": {str(rank): ranks for rank, ranks in self.alike.items()},
        }


def require_layers(cell: Cell, target: Target) -> None:
    """Raise CpbenchError where no layer can be explained."""
    if cell.target == "attention":
        raise CpbenchError("--explain shows a layer, and the attention target has none.", "Leave --target out, or choose --target layer.")
    if target.compute == "measured":
        raise CpbenchError("--explain names the parts of a layer, which are looked up and not measured.", "Leave --compute out.")


def explain(cell: Cell, target: Target) -> Explanation:
    """The layer of a cell on the devices of a target. Raises CpbenchError where their profile lacks what the cell needs."""
    profile = target.profile()
    scripts, _ = looked_up(cell, profile, detailed=True)
    section = _commonest(scripts)
    assert section.layer is not None, "a section of layers"
    outcome = replay(cell.layout, of_all_ranks(cell, scripts), target.links(profile, cell.world_size), watched=section.layer)
    busy = {stretch.rank for stretch in outcome.stretches}
    alike = _some({rank: ranks for rank, ranks in classes(cell).items() if rank in busy})
    many = f"one of {section.times} layers like layer {section.layer}" if section.times > 1 else f"layer {section.layer}"
    chunk = f", first of {cell.step_count} chunks" if cell.step_count > 1 else ""
    shown = tuple(stretch for stretch in outcome.stretches if stretch.rank in alike)
    return Explanation(f"Projected {cell.label} on {profile.title}", f"{many}{chunk}", section.layer, section.times, alike, shown)


def _commonest(scripts: Mapping[int, Script]) -> Section:
    """The first of the layers that run most often in a row."""
    return max((section for script in scripts.values() for section in script.sections if section.layer is not None), key=lambda section: section.times)


def _some(alike: dict[int, list[int]]) -> dict[int, list[int]]:
    """As many kinds of ranks as a table has room for, from the first to the last."""
    ranks = list(alike)
    if len(ranks) > MOST_RANKS:
        ranks = [ranks[number * (len(ranks) - 1) // (MOST_RANKS - 1)] for number in range(MOST_RANKS)]
    return {rank: alike[rank] for rank in ranks}


def _listed(ranks: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, ranks[:most])) + (", ..." if len(ranks) > most else "")
