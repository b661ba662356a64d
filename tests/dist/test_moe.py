"""Mixtures of experts through real sweeps on gloo: traffic, memory and the load of the experts as the formulas and the ranks have them."""

from __future__ import annotations

import pytest

from tests.dist.sweeps import sweep


def test_a_sweep_over_expert_axes_is_right_and_says_who_computed_what(tmp_path):
    layouts = ["cp1", "cp2", "cp2/ep2", "cp2tp2/ep2tp2", "dp2cp2/ep4", "cp2tp2/dp2ep2"]
    result = sweep(tmp_path / "moe.json", model="qwen3-moe-tiny", layers=2, layouts=layouts, strategies=["allgather"], seq="2k", batch=2)
    assert [(cell.key["layout"], cell.status, cell.reason) for cell in result.cells] == [(name, "ok", None) for name in layouts]
    pairs = 2 * 2 * 2048 * 2  # sequences, layers, tokens, experts of a token
    one = result.cells[0].experts
    for cell in result.cells:
        experts, memory = cell.experts, cell.memory
        assert sum(experts["tokens_per_expert"]) == pairs and len(experts["tokens_per_expert"]) == 8
        assert len(experts["tokens_per_rank"]) == cell.world_size
        columns = 2 if cell.key["layout"] in ("cp2", "cp2tp2/ep2tp2") else 1  # ranks that compute a part of the same rows
        assert sum(experts["tokens_per_rank"]) == columns * pairs
        assert experts["dispatch"] == ("alltoall" if "ep" in cell.key["layout"] else "gather")
        assert sum(abs(a - b) for a, b in zip(experts["tokens_per_expert"], one["tokens_per_expert"], strict=True)) <= 8  # nearly equal scores may flip
        assert experts["max_over_mean_rank"] <= experts["max_over_mean_expert"] < 3
        assert memory is not None and memory.peak_live_bytes == pytest.approx(memory.predicted_live_bytes, rel=0.05), cell.id
        assert cell.numerics is not None and cell.numerics.passed
