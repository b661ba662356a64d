"""From axes to cells: crossed or paired, hybrids by name, and options that belong to one strategy."""

from __future__ import annotations

from typing import Any

import pytest

from cpbench.axes import cells_of, left_out, runs_as
from cpbench.cell import Cell
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.models.presets import load_config
from cpbench.scenario import parse_scenario, resolve
from cpbench.strategies import STRATEGIES
from cpbench.strategies.usp import default_degree, hybrid_degrees

CPU = Machine("cpu", 0, 2, 8 << 30, "a CPU")


def cells(**fields: Any) -> list[Cell]:
    scenario = resolve(parse_scenario({"seq": "2k", "baseline": False, "strategies": "ring", **fields}), CPU)[0]
    return list(cells_of(scenario, load_config(scenario.model or "")))


def labels(**fields: Any) -> list[str]:
    return [cell.label for cell in cells(**fields)]


def test_batches_are_an_axis_with_prefixes_of_their_own() -> None:
    made = cells(seq=None, batches=[{"lengths": "1003,517,36k", "prefixes": "500,0,32k"}, {"lengths": [5]}], cp=2)
    assert [(cell.lengths, cell.prefixes) for cell in made] == [((1003, 517, 36864), (500, 0, 32768)), ((5,), (0,))]


def test_a_prefix_is_that_of_every_sequence() -> None:
    made = cells(prefix="0,1k", batch=2, cp=2)
    assert [(cell.lengths, cell.prefixes) for cell in made] == [((2048, 2048), (0, 0)), ((2048, 2048), (1024, 1024))]


def test_pairs_instead_of_the_cross_product() -> None:
    assert labels(seq="36k,128k", cp="2,8", pair=True) == ["cp2 ring 36k", "cp8 ring 128k"]
    assert labels(seq="36k,128k", cp="2,8", pair=True, strategies="ring,allgather", baseline=True) == [
        "cp1 none 36k",
        "cp2 ring 36k",
        "cp2 allgather 36k",
        "cp1 none 128k",
        "cp8 ring 128k",
        "cp8 allgather 128k",
    ]
    assert labels(seq="1k,2k,4k", batch="1,2,3", prefix="0,1k,2k", tp="1,2,1", cp=2, pair=True) == ["cp2 ring 1k", "cp2tp2 ring 2k@1k b2", "cp2 ring 4k@2k b3"]
    assert labels(seq=None, batches=[{"lengths": "5,6"}, {"lengths": 7}], cp="2,4", pair=True) == ["cp2 ring 5+6", "cp4 ring 7"]
    assert len(labels(seq="36k,128k", cp="2,8")) == 4


def test_hybrids_run_at_the_degree_that_they_name() -> None:
    assert labels(cp="2,4,8", strategies="u4r2,u2r2,u1r8") == ["cp4u2 usp 2k", "cp8u4 usp 2k", "cp8 usp 2k"]
    assert labels(cp="2,8", strategies="usp,ring") == ["cp2u2 usp 2k", "cp2 ring 2k", "cp8u2 usp 2k", "cp8 ring 2k"]
    made = cells(cp="8", strategies="u4r2,u2r4,ring")
    assert [[runs_as(name, cell) for cell in made] for name in ("u4r2", "usp", "ring")] == [[True, False, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize(
    ("name", "cp", "message", "hint"),
    [
        ("u4r2", "2,4", "strategy=u4r2 needs cp=8, which is not among cp=2, 4.", "Add cp=8, or use u4r1, the nearest."),
        ("u3r2", "2,8", "strategy=u3r2 needs cp=6, which is not among cp=2, 8.", "Add cp=6, or use u2r4, the nearest."),
        ("u4r2", "1", "strategy=u4r2 needs cp=8, which is not among cp=1.", "Add --cp 8."),
        ("u1r1", "1,2", "strategy=u1r1 is one rank", "u1r2"),
    ],
)
def test_a_hybrid_without_room(name: str, cp: str, message: str, hint: str) -> None:
    with pytest.raises(CpbenchError) as caught:
        cells(cp=cp, strategies=name)
    assert caught.value.message.startswith(message)
    assert hint in caught.value.hint


def test_names_of_hybrids() -> None:
    assert [hybrid_degrees(name) for name in ("u4r2", "u16r1", "usp", "u0r2", "u4", "u4r2x", "ring")] == [(4, 2), (16, 1), None, None, None, None, None]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "cp", "degree"),
    [
        (8, 2, 2, 2),
        (7, 7, 2, 1),
        (8, 2, 4, 2),
        (8, 2, 8, 2),  # 4 would hold each kv head twice
        (32, 8, 8, 4),
        (32, 8, 16, 8),
        (8, 1, 8, 4),  # every degree repeats the kv head
        (6, 6, 4, 2),
        (9, 3, 4, 1),
        (8, 8, 3, 1),
        (12, 4, 6, 3),
    ],
)
def test_the_default_degree(heads: int, kv_heads: int, cp: int, degree: int) -> None:
    assert default_degree(heads, kv_heads, cp) == degree


def test_every_default_degree_can_run() -> None:
    for heads, kv_heads in ((8, 2), (32, 8), (28, 4), (7, 7)):
        for cp in range(2, 65):
            degree = default_degree(heads, kv_heads, cp)
            assert cp % degree == 0 and heads % degree == 0


def test_head_groups_are_for_allgather_only() -> None:
    made = cells(cp=2, strategies="allgather,ring", head_groups=2, baseline=True)
    assert [(cell.strategy, cell.head_groups) for cell in made] == [("none", 1), ("allgather", 2), ("ring", 1)]


def test_what_shards_heads_stands_beside_none_where_cp1_was_asked_for() -> None:
    asked = {"strategies": "ring,local-map", "tp": "1,2"}
    made = [(str(cell.layout), cell.strategy, cell.partition) for cell in cells(cp="1", baseline=True, **asked)]
    assert made == [("cp1", "none", "contiguous"), ("tp2", "none", "contiguous"), ("tp2", "local-map", "contiguous")]
    assert [cell.strategy for cell in cells(layouts="tp2", strategies="local-map")] == ["none", "local-map"]
    added = [cell.strategy for cell in cells(cp="2", baseline=True, **asked) if cell.layout.cp == 1]
    assert added == ["none", "none"], "a baseline that was added is one cell"


def test_a_baseline_is_never_compiled() -> None:
    made = cells(cp=2, strategies="local-map,ring", compile="inductor", baseline=True)
    assert [(cell.strategy, cell.compile) for cell in made] == [("none", "none"), ("local-map", "inductor"), ("ring", "inductor")]


def test_all_is_every_strategy_but_none() -> None:
    made = cells(cp=4, strategies="all", baseline=False)
    assert [cell.strategy for cell in made] == [name for name in STRATEGIES if name != "none"]


def test_the_cache_is_described_in_every_cell() -> None:
    made = cells(cp=2, baseline=True, chunk="512", page_size=16, cache_tokens="4k")
    assert {(cell.chunk, cell.page_size, cell.cache_tokens) for cell in made} == {(512, 16, 4096)}


def test_every_degree_is_an_axis_and_the_baseline_keeps_all_but_cp() -> None:
    assert labels(cp="2", dp="1,2", pp="1,2", tp="2", baseline=True) == [
        *("tp2 none 2k", "cp2tp2 ring 2k", "dp2tp2 none 2k", "dp2cp2tp2 ring 2k"),
        *("pp2tp2 none 2k", "pp2cp2tp2 ring 2k", "pp2dp2tp2 none 2k", "pp2dp2cp2tp2 ring 2k"),
    ]
    assert labels(cp="2,4", dp="1,2", pp="2,1", pair=True) == ["pp2cp2 ring 2k", "dp2cp4 ring 2k"]


def test_named_layouts_run_as_they_are_without_a_baseline() -> None:
    made = labels(layouts="tp2cp4,cp8u4,dp2,cp8", strategies="ring,usp,u4r2,u8r1", baseline=True)
    assert made == ["cp4tp2 ring 2k", "cp4u2tp2 usp 2k", "cp8u4 usp 2k", "dp2 none 2k", "cp8 ring 2k", "cp8u2 usp 2k", "cp8u4 usp 2k", "cp8u8 usp 2k"]
    assert labels(seq="1k,2k", layouts="cp2,tp2", pair=True) == ["cp2 ring 1k", "tp2 none 2k"]


def test_all_layouts_of_some_ranks() -> None:
    assert labels(gpus="4", baseline=True) == [
        *("tp4 none 2k", "cp2tp2 ring 2k", "cp4 ring 2k", "dp2tp2 none 2k", "dp2cp2 ring 2k"),
        *("dp4 none 2k", "pp2tp2 none 2k", "pp2cp2 ring 2k", "pp2dp2 none 2k", "pp4 none 2k"),
    ]
    assert len(labels(gpus="1,2")) == 5
    assert labels(seq="1k,2k", gpus="1,2", pair=True)[:2] == ["cp1 none 1k", "tp2 none 2k"]


def test_what_is_no_layout_of_the_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(**fields: Any) -> list[tuple[str, str, str]]:
        scenario = resolve(parse_scenario({"seq": "2k,4k", "strategies": "ring", **fields}), CPU)[0]
        return [(entry.name, entry.reason, str(entry.nearest)) for entry in left_out(scenario, load_config("qwen3-tiny"))]

    assert left(cp="1,2,1024", tp="2", ep="1,2") == [
        ("tp2/ep2", "qwen3-tiny has no experts to divide", "tp2"),
        ("cp2tp2/ep2tp2", "qwen3-tiny has no experts to divide", "cp2tp2"),
        ("cp1024tp2", "more than 1024 ranks", "cp512tp2"),
        ("cp1024tp2/ep2", "more than 1024 ranks", "cp512tp2"),
    ]
    assert left(layouts="cp8u4/ep8,cp2") == [("cp8u4/ep8", "qwen3-tiny has no experts to divide", "cp8u4")]
    monkeypatch.setattr("cpbench.axes.has_experts", lambda config: True)
    assert left(cp="4", tp="1,2", ep="3,8", baseline=True) == [
        ("cp4/ep3", "ep=3 does not divide the ranks of a stage", "cp4/ep2tp2"),
        ("cp4/ep8", "ep=8 does not divide the ranks of a stage", "cp4/ep4"),
        ("cp4tp2/ep3", "ep=3 does not divide the ranks of a stage", "cp4tp2/ep2tp4"),
    ]
    assert labels(cp="4", tp="1,2", ep="3,8", baseline=True) == ["tp2/ep2 none 2k", "cp4tp2/ep8 ring 2k"]
    assert "dp2/ep2 none 2k" in labels(gpus="2")


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"gpus": "4,6"}, "strategy=u4r2 needs cp=8, which is not among cp=1, 2, 3, 4, 6.", "Add gpus=8, or use u3r2, the nearest."),
        ({"layouts": "cp4,tp8"}, "strategy=u4r2 needs cp=8, which is not among the layouts cp4, tp8.", "Add layouts=cp8, or use u4r1, the nearest."),
        ({"layouts": "cp8u2"}, "strategy=u4r2 needs cp=8, which is not among the layouts cp8u2.", "Add --layouts cp8."),
    ],
)
def test_a_hybrid_without_a_layout(fields: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(CpbenchError) as caught:
        cells(strategies="u4r2", **fields)
    assert (caught.value.message, caught.value.hint) == (message, hint)
