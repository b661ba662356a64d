"""Which cells are compared with each other: those with one key in two files, or those that differ in one field, or variants that alternated.

Pure. By a field, cells stand in groups that are alike in everything else, and each is compared with the reference of its group: the value
that was named, else the smallest layout, or the strategy that comes first. Cells without context parallelism have no algorithm, so they
are in the group of every one. What the difference is worth is decided in verdicts.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from cpbench.cell import VARIANTS
from cpbench.errors import CpbenchError, unknown
from cpbench.layout import Layout
from cpbench.report.rows import OWN, batch_of, layout_of, strategy_of
from cpbench.results import ComparedCell

FIELDS = ("strategy", "layout", "cp")
NO_ALGORITHM = "none"
SHARED = ("target", "model", "layers", "dtype", "device", "kernel", "seed")


class Naming(NamedTuple):
    """What the names of matches must tell: nothing of `field`, which changes, and all that is not the same everywhere."""

    field: str = ""
    varying: tuple[str, ...] = ()
    partitioned: frozenset[tuple[str, str]] = frozenset()  # layouts and strategies with several partitions


class Match(NamedTuple):
    """Two cells, or one that the other side does not have. `change` says what differs where it is not the file: `ring -> allgather`."""

    old: ComparedCell | None
    new: ComparedCell | None
    change: str = ""
    alternated: bool = False
    naming: Naming = Naming()

    @property
    def name(self) -> str:
        """Layout, strategy and batch but for what changes, options, and shared fields that vary; of variants only what both have in common."""
        parts = _parts(self.cell, self.naming)
        other = _parts(self.old, self.naming) if self.alternated and self.old else parts
        return " ".join(part for part in parts if part in other)

    @property
    def cell(self) -> ComparedCell:
        """One of the two, for what both have in common."""
        cell = self.new or self.old
        assert cell is not None, "a match has a cell"
        return cell


def by_key(old: Sequence[ComparedCell], new: Sequence[ComparedCell]) -> list[Match]:
    """Cells of the same key, in the order of the old file; then those of the new one alone. A key that is there twice counts as it was last."""
    mine, theirs = ({canonical(cell): cell for cell in cells} for cells in (old, new))
    matches = [Match(cell, theirs.get(key)) for key, cell in mine.items()]
    return _named([*matches, *(Match(None, cell) for key, cell in theirs.items() if key not in mine)])


def canonical(cell: ComparedCell) -> tuple[tuple[str, ...], str, str]:
    """Names of the key in one order, and values as text: quicker than as JSON, of which there are thousands."""
    names, values_of = _ordered(tuple(cell.key))
    options = cell.key.get("options")
    return names, repr(values_of(cell.key)), repr(sorted(options.items())) if options else ""


@lru_cache(maxsize=256)
def _ordered(names: tuple[str, ...]) -> tuple[tuple[str, ...], Callable[[dict[str, Any]], object]]:
    """All but the options, and what takes their values from a key."""
    known = tuple(sorted(name for name in names if name != "options"))
    return known, itemgetter(*known) if known else lambda key: ()


def by_variant(cells: Sequence[ComparedCell]) -> list[Match]:
    """Both variants of every pair whose passes alternated (--ab)."""
    known = {cell.id: cell for cell in cells}
    found = []
    for b in cells:
        a = known.get(b.ab.other) if b.ab and b.ab.variant == "B" else None
        if a and a.ab and b.ab:
            found.append(Match(a, b, change=f"{a.ab.setting} -> {b.ab.setting}", alternated=True))
    return _named(found)


def by_field(asked: str, old: Sequence[ComparedCell], new: Sequence[ComparedCell] | None) -> list[Match]:
    """Cells that differ in `strategy`, `layout` or `cp`; `strategy=ring` names the reference. `new` is another file's, None: the same one's.

    Raises CpbenchError for another field, and for a reference that no old cell is.
    """
    field, _, reference = (part.strip() for part in asked.partition("="))
    if field not in FIELDS:
        raise unknown("field of --by", field, FIELDS)
    value_of = VALUES[field]
    values = dict.fromkeys(value_of(cell) for cell in old)
    if reference and reference not in values:
        raise unknown(field, reference, values)
    groups: dict[str, tuple[list[ComparedCell], list[ComparedCell]]] = {}
    others = old if new is None else new
    for side, cells in enumerate((old, others)):
        algorithms = dict.fromkeys(strategy_of(cell) for cell in (*old, *others) if not _without_cp(cell)) or {NO_ALGORITHM: None}
        for cell in cells:
            for rest in _rests(cell, field, algorithms):
                groups.setdefault(rest, ([], []))[side].append(cell)
    found: dict[tuple[int, int], Match] = {}
    for mine, theirs in groups.values():
        base = _reference(field, [cell for cell in mine if not reference or value_of(cell) == reference])
        for cell in theirs if base else []:
            if base is not None and (new is not None or value_of(cell) != value_of(base)):
                found.setdefault((id(base), id(cell)), Match(base, cell, change=f"{value_of(base)} -> {value_of(cell)}"))
    return _named(list(found.values()), field)


def differing(old: Iterable[ComparedCell], new: Iterable[ComparedCell]) -> list[str]:
    """`dtype float32 and bfloat16`: fields of which two files have no value in common."""
    sides = [list(old), list(new)]
    found = []
    for name in (*SHARED, "lengths", "prefixes", "layout", "strategy", "partition"):
        mine, theirs = (dict.fromkeys(_shown(cell, name) for cell in cells) for cells in sides)
        if not mine.keys() & theirs.keys():
            found.append(f"{name} {', '.join(list(mine)[:3])} and {', '.join(list(theirs)[:3])}")
    return found


def _shown(cell: ComparedCell, name: str) -> str:
    return batch_of(cell).name if name == "lengths" else str(cell.key.get(name))


def _reference(field: str, cells: Sequence[ComparedCell]) -> ComparedCell | None:
    """One that ended well, if there is any; of layouts the smallest."""
    well = [cell for cell in cells if cell.status == "ok"] or list(cells)
    return min(well, key=lambda cell: (0, 0) if field == "strategy" else (cell.world_size, _degree(cell)), default=None)


def _rests(cell: ComparedCell, field: str, algorithms: Iterable[str]) -> list[str]:
    """What the groups of a cell have in common, as text; several for a cell that stands beside every algorithm."""
    dropped = ("strategy", "partition", "options", "lengths", "prefixes", "layout")
    options = {name: value for name, value in (cell.key.get("options") or {}).items() if name not in VARIANTS and (field != "layout" or name not in OWN)}
    rest = {name: value for name, value in cell.key.items() if name not in dropped} | {"options": options, "batch": batch_of(cell).name}
    rest["lengths"], rest["prefixes"] = cell.key.get("lengths"), cell.key.get("prefixes")
    if field == "strategy":
        return [json.dumps(rest | {"layout": _trimmed(cell, with_cp=True)}, sort_keys=True)]
    rest |= {"layout": _trimmed(cell, with_cp=False)} if field == "cp" else {}
    own = list(algorithms) if _without_cp(cell) else [strategy_of(cell)]
    return [json.dumps(rest | {"algorithm": name}, sort_keys=True) for name in own]


def _without_cp(cell: ComparedCell) -> bool:
    return strategy_of(cell) == NO_ALGORITHM


def _trimmed(cell: ComparedCell, with_cp: bool) -> str:
    """The name of a layout without its hybrid, or without cp; as it is where this cpbench cannot read it."""
    name = str(cell.key.get("layout"))
    try:
        layout = Layout.parse(name)
        attention = replace(layout, cp=layout.cp if with_cp else 1, ulysses=1, moe_dp=1, ep=1, moe_tp=0)
        return str(attention) + name[len(name.partition("/")[0]) :]
    except CpbenchError:
        return name


def _degree(cell: ComparedCell) -> int:
    try:
        return Layout.parse(str(cell.key.get("layout"))).cp
    except CpbenchError:
        return cell.world_size


VALUES: dict[str, Callable[[ComparedCell], str]] = {"strategy": strategy_of, "layout": layout_of, "cp": lambda cell: f"cp{_degree(cell)}"}


def _named(matches: Sequence[Match], field: str = "") -> list[Match]:
    """Matches that know what their names must tell."""
    keys = [match.cell.key for match in matches]
    varying = tuple(name for name in SHARED if not _alike([key.get(name) for key in keys]))
    triples = {(str(key.get("layout")), str(key.get("strategy")), str(key.get("partition"))) for key in keys}
    several = Counter((layout, strategy) for layout, strategy, _ in triples)
    naming = Naming(field, varying, frozenset(pair for pair, count in several.items() if count > 1))
    return [match._replace(naming=naming) for match in matches]


def _alike(values: list[Any]) -> bool:
    return values.count(values[0]) == len(values) if values else True


def _parts(cell: ComparedCell, naming: Naming) -> list[str]:
    key, field = cell.key, naming.field
    options = {name: value for name, value in (key.get("options") or {}).items() if name not in (*VARIANTS, *OWN)}
    layout = "" if field == "layout" else _trimmed(cell, with_cp=False) if field == "cp" else layout_of(cell)
    layout = "" if field == "cp" and layout == "cp1" else layout
    strategy = "" if field == "strategy" else strategy_of(cell)
    partition = str(key.get("partition")) if (str(key.get("layout")), str(key.get("strategy"))) in naming.partitioned else ""
    shown = [layout, strategy, batch_of(cell).name, partition, *(f"{name}={value}" for name, value in sorted(options.items()))]
    return [part for part in [*shown, *(f"{name} {key.get(name)}" for name in naming.varying)] if part]
