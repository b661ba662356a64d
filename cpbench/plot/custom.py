"""Any metric against any field or metric, in series and panels by fields: what `--x --y --by --facet` ask for."""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.errors import NOTHING_COMPARABLE, CpbenchError, unknown
from cpbench.plot.canvas import Chart
from cpbench.plot.entries import Entry
from cpbench.plot.lines import draw as draw_lines
from cpbench.plot.panels import arrange
from cpbench.plot.scales import scale_of
from cpbench.plot.time import TIMES

KINDS = ("", "derived_", "projected_")


def draw(entries: Sequence[Entry], x: str = "seq", y: str | None = None, by: Sequence[str] = (), facet: Sequence[str] | None = None) -> Chart:
    """`y`: None for the time that the target is about. Raises CpbenchError for unknown names (exit code 2), and where no cell has both (3)."""
    fields, metrics = {name for entry in entries for name in entry.fields}, {name for entry in entries for name in entry.metrics}
    for kind, names, valid in (("field", [*by, *(facet or ())], fields), ("field or metric", [x], fields | metrics), ("metric", [y] if y else [], metrics)):
        for name in names:
            if name not in valid:
                raise unknown(kind, name, valid)
    wanted = [f"{kind}{y}" for kind in KINDS] if y else [name for name in TIMES if name in metrics]
    sheet_of = arrange(entries, x, wanted, by=by, facet=facet)
    if not any(point.value for point in sheet_of.points):
        raise CpbenchError(f"No cell has {x} and {y or 'a time'}.", "cpbench show says which cells there are, and why they failed.", NOTHING_COMPARABLE)
    found = next(name for name in wanted if any(name in entry.metrics for entry in sheet_of.entries))
    across, up = scale_of(x, entries), scale_of(found, entries)
    return draw_lines(sheet_of, across, up, f"{up.title[0].upper()}{up.title[1:]} against {across.title}")
