"""Which layer of a projection is explained, in which run, and of which ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpbench.errors import CpbenchError
from cpbench.projection.explained import MOST_RANKS, explain, require_layers
from cpbench.projection.projecting import Target
from tests.unit.test_simulated import make

CPU = Target("cpu", gpus_per_node=16)


def test_the_commonest_kind_of_layer_is_shown_with_names_of_its_parts() -> None:
    found = explain(make("cp2tp2", "ring", "deepseek-v3-tiny", layers=7), CPU)
    assert found.layers == 6  # one is dense
    assert found.subject == f"one of 6 layers like layer {found.layer}"
    assert found.title.startswith("Projected cp2tp2 ring 256 on CPU")
    assert {stretch.lane for stretch in found.stretches} == {"compute", "cp", "tp"}
    assert all(stretch.name.startswith("layer") for stretch in found.stretches if stretch.lane == "compute")
    assert min(stretch.start for stretch in found.stretches) == 0.0
    assert found.alike == {0: [0, 1], 2: [2, 3]}
    assert found.notes() == ["rank 0 stands for 2 ranks: 0, 1", "rank 2 stands for 2 ranks: 2, 3"]
    assert found.to_dict()["alike"] == {"0": [0, 1], "2": [2, 3]}


def test_of_many_ranks_that_differ_some_are_shown_from_the_first_to_the_last() -> None:
    found = explain(make("cp8", "ring", partition="contiguous"), CPU)
    assert len(found.alike) == MOST_RANKS
    assert (min(found.alike), max(found.alike)) == (0, 7)
    assert {stretch.rank for stretch in found.stretches} == set(found.alike)
    assert found.notes() == []


def test_of_a_pipeline_the_ranks_of_one_stage_and_its_first_chunk() -> None:
    found = explain(make("pp2cp2", "ring", layers=6, chunk=64), CPU)
    assert set(found.alike) == {0, 1}
    assert found.subject == "one of 3 layers like layer 0, first of 4 chunks"


def test_a_layer_alone_is_itself() -> None:
    assert explain(make("tp2", target="layer", layers=1), CPU).subject == "layer 0"


def test_what_has_no_layers_or_no_names_is_refused() -> None:
    cell = make("cp2", "ring")
    require_layers(cell, CPU)
    with pytest.raises(CpbenchError, match="the attention target has none"):
        require_layers(replace(cell, target="attention", layers=1), CPU)
    with pytest.raises(CpbenchError, match="looked up and not measured"):
        require_layers(cell, replace(CPU, compute="measured"))
