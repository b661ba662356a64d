"""Two variants of a sweep that are measured against each other: what `--ab 'strategy=ring' 'strategy=allgather'` stands for.

Each side is the scenario with its settings, and gives cells as any scenario does. Cells that both have are measured once and alone; the
others are joined with the cell of the other side that equals them in all that the sides have in common. How a pair is measured is decided
in measure/timing.py, what its times say in ab.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from cpbench.cell import Cell
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.fields import settings_of
from cpbench.scenario import Scenario, override, parse_scenario, resolve, without_replaced

OF_THE_RUN = ("name", "device", "ab", "baseline", "rounds", "threads", "timing", "limits")  # what holds for both variants, or for none


@dataclass(frozen=True)
class Pair:
    """Cells whose passes alternate in one process group, and the settings that told them apart."""

    a: Cell
    b: Cell
    settings: tuple[str, str]


def sides(scenario: Scenario, machine: Machine) -> tuple[Scenario, ...]:
    """The scenarios of A and B, resolved. Raises CpbenchError for a setting that is none, or that is not one of cells."""
    return tuple(_side(scenario, text, machine) for text in scenario.ab or ())


def _side(scenario: Scenario, text: str, machine: Machine) -> Scenario:
    settings = settings_of(text)
    data = {**scenario.model_dump(mode="json"), "ab": None}
    data = without_replaced(data, dict(settings))
    for name, value in settings:
        if name.partition(".")[0] in OF_THE_RUN:
            raise CpbenchError(
                f"ab: {name} is not of a cell, so that both variants have the same.", f"Leave {name} out, or set it for both: --set {name}={value}."
            )
        data = override(data, f"{name}={value}")
    return resolve(parse_scenario(data), machine)[0]


def pair_up(a: Sequence[Cell], b: Sequence[Cell], settings: tuple[str, str]) -> tuple[Pair, ...]:
    """The cells that only one side has, in pairs, in the order of A. Raises CpbenchError where that is not possible."""
    both = {cell.id for cell in a} & {cell.id for cell in b}
    only_a, only_b = ([cell for cell in side if cell.id not in both] for side in (a, b))
    if not only_a and not only_b:
        raise CpbenchError(f"ab: {settings[0]} and {settings[1]} give the same cells.", "Give each variant another value of a field that changes the work.")
    shared = _shared(only_a, only_b)
    places: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in only_b:
        places.setdefault(_key(cell, shared), []).append(cell)
    keys = [_key(cell, shared) for cell in only_a]
    if len(set(keys)) < len(keys) or set(keys) != set(places) or any(len(found) > 1 for found in places.values()):
        counts = f"{settings[0]} gives {_count(only_a)} that the other does not, {settings[1]} {_count(only_b)}"
        raise CpbenchError(f"ab: the variants do not pair up: {counts}.", "Give each side one value for each of its fields.")
    pairs = tuple(Pair(cell, places[key][0], settings) for cell, key in zip(only_a, keys, strict=True))
    for pair in pairs:
        if pair.a.world_size != pair.b.world_size:
            sizes = f"{pair.a.layout} is of {pair.a.world_size} ranks and {pair.b.layout} of {pair.b.world_size}"
            raise CpbenchError(f"ab: {sizes}, and variants alternate in one group of ranks.", f"The nearest is a layout of {pair.a.world_size} ranks for both.")
    return pairs


def _shared(a: Sequence[Cell], b: Sequence[Cell]) -> list[str]:
    """What both sides have the same values of: by these cells are joined, in all else they may differ."""
    facts = [[_facts(cell) for cell in side] for side in (a, b)]
    names = list(facts[0][0]) if a else []
    return [name for name in names if {fact[name] for fact in facts[0]} == {fact[name] for fact in facts[1]}]


def _facts(cell: Cell) -> dict[str, Any]:
    """Everything that tells cells apart, the layout by its axes."""
    return {field.name: getattr(cell, field.name) for field in fields(cell) if field.name != "layout"} | vars(cell.layout)


def _key(cell: Cell, names: Sequence[str]) -> tuple[Any, ...]:
    facts = _facts(cell)
    return tuple(facts[name] for name in names)


def _count(cells: Sequence[Cell]) -> str:
    return "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
