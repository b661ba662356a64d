"""The timeline of a layer: its lanes, what of it is exposed, and how the table and the figure show it."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator

import pytest
from matplotlib.patches import Rectangle
from rich.console import Console

from cpbench.plot import timeline as figure
from cpbench.plot.canvas import svg
from cpbench.plot.style import COLOURS
from cpbench.projection.lanes import exposed_seconds, laid_out
from cpbench.projection.stretch import COMPUTE, Stretch
from cpbench.report.timeline import timeline_json, timeline_view

LAYER = [
    Stretch(0, "cp", "send_recv", 2.0, 6.0),  # hidden from 2 to 3 and from 3 to 4, then exposed
    Stretch(0, COMPUTE, "layer/attention/kernel", 1.0, 3.0),
    Stretch(0, COMPUTE, "layer/attention/kernel", 3.0, 4.0),
    Stretch(0, COMPUTE, "layer/attention", 0.0, 1.0),
    Stretch(0, COMPUTE, "layer/mlp", 6.0, 9.0),
    Stretch(0, "tp", "all_reduce", 5.0, 7.0),
    Stretch(1, COMPUTE, "layer/mlp", 0.0, 9.0),
    Stretch(1, "tp", "all_reduce", 5.0, 7.0),
]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning of matplotlib's is a mistake of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def printed(stretches: list[Stretch], width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for item in timeline_view(stretches, console):
        console.print(item)
    return console.export_text()


def test_lanes_stand_by_rank_with_work_first_and_work_of_one_name_goes_on() -> None:
    laid = [(one.stretch.rank, one.stretch.lane, one.stretch.name, one.stretch.start, one.stretch.end) for one in laid_out(LAYER)]
    assert laid == [
        (0, COMPUTE, "layer/attention", 0.0, 1.0),
        (0, COMPUTE, "layer/attention/kernel", 1.0, 4.0),
        (0, COMPUTE, "layer/mlp", 6.0, 9.0),
        (0, "cp", "send_recv", 2.0, 6.0),
        (0, "tp", "all_reduce", 5.0, 7.0),
        (1, COMPUTE, "layer/mlp", 0.0, 9.0),
        (1, "tp", "all_reduce", 5.0, 7.0),
    ]
    apart = [Stretch(0, COMPUTE, "a", 0.0, 1.0), Stretch(0, COMPUTE, "a", 1.5, 2.0)]
    assert [one.stretch for one in laid_out(apart)] == apart


def test_a_transfer_is_exposed_while_its_own_rank_does_no_work() -> None:
    laid = laid_out(LAYER)
    exposed = {(one.stretch.rank, one.stretch.lane): one.exposed for one in laid if one.stretch.lane != COMPUTE}
    assert exposed == {(0, "cp"): ((4.0, 6.0),), (0, "tp"): ((5.0, 6.0),), (1, "tp"): ()}
    assert not any(one.exposed for one in laid if one.stretch.lane == COMPUTE)
    assert (exposed_seconds(laid, 0), exposed_seconds(laid, 1)) == (2.0, 0.0)  # from 5 to 6 both are
    around = laid_out([Stretch(0, COMPUTE, "a", 1.0, 2.0), Stretch(0, COMPUTE, "b", 3.0, 4.0), Stretch(0, "cp", "x", 0.0, 5.0)])
    assert around[-1].exposed == ((0.0, 1.0), (2.0, 3.0), (4.0, 5.0)) and around[-1].exposed_s == 3.0


def test_the_table_has_a_row_for_each_and_a_line_for_each_rank() -> None:
    out = printed(LAYER)
    rows = [line.split() for line in out.splitlines()]
    assert ["0", "cp", "send_recv", "2.00", "s", "4.00", "s", "2.00", "s"] in rows
    assert ["1", "tp", "all_reduce", "5.00", "s", "2.00", "s", "-"] in rows
    assert ["0", "compute", "layer/attention", "0", "s", "1.00", "s"] in rows
    assert "rank 0: 9.00 s, of which 2.00 s (22%) are exposed communication" in out
    assert "rank 1: 9.00 s, and no communication is exposed" in out
    assert "starts" not in printed(LAYER, 50) and "exposed" in printed(LAYER, 50)
    assert "\x1b" not in printed([Stretch(0, "cp", "[bold]\x1b[31mx", 0.0, 1.0)])
    assert printed([]) == "Nothing happens in this layer.\n"


def test_the_data_is_that_of_the_table() -> None:
    data = json.loads(json.dumps(timeline_json(LAYER)))
    assert data["stretches"][3] == {"rank": 0, "lane": "cp", "name": "send_recv", "start": 2.0, "end": 6.0, "exposed_s": 2.0}
    assert data["ranks"] == [{"rank": 0, "ends_s": 9.0, "exposed_s": 2.0}, {"rank": 1, "ends_s": 9.0, "exposed_s": 0.0}]


def test_the_figure_has_a_row_for_each_lane_of_each_rank() -> None:
    chart = figure.draw(LAYER, "one layer")
    assert chart is not None
    axes = chart.axes[0]
    chart.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0  compute", "rank 0  cp", "rank 0  tp", "rank 1  compute", "rank 1  tp"]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    hatched = sorted((bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in bars if bar.get_hatch())
    assert hatched == [(4.0, 2.0, 1), (5.0, 1.0, 2)]
    assert len(bars) - len(hatched) == len(laid_out(LAYER))
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("layer/mlp") == 2 and "layer/attention/kernel" in texts and "attention" in texts
    assert [text.get_text() for legend in chart.legends for text in legend.get_texts()][:3] == ["own work", "cp", "tp"]
    assert COLOURS[0].lower() in svg(chart).lower()
    assert figure.draw([], "nothing") is None


def test_names_that_do_not_fit_are_left_out_and_hostile_ones_are_text() -> None:
    narrow = figure.draw([Stretch(0, COMPUTE, "layer/attention/kernel", 0.0, 0.01), Stretch(0, COMPUTE, "$\\frac{1}$", 0.01, 9.0)], "a $title$")
    assert narrow is not None
    assert [text.get_text() for text in narrow.axes[0].texts] == ["$\\frac{1}$"]
    assert "<svg" in svg(narrow)


def test_of_many_ranks_the_first_are_drawn_and_it_is_said() -> None:
    many = [Stretch(rank, lane, "x", 0.0, 1.0) for rank in range(64) for lane in (COMPUTE, "cp")]
    chart = figure.draw(many, "a layer")
    assert chart is not None
    assert len(chart.axes[0].get_yticks()) == figure.MOST_ROWS
    assert "the first 12 of 64 ranks" in str(chart.get_suptitle())
    crowded = figure.draw([Stretch(0, f"axis{number}", "x", 0.0, 1.0) for number in range(figure.MOST_ROWS + 6)], "a layer")
    assert crowded is not None and len(crowded.axes[0].get_yticks()) == figure.MOST_ROWS + 6  # one rank is always whole
