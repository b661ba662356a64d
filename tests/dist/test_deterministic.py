"""Deterministic cells through real sweeps on gloo: right, and with the traffic and the memory of their formulas."""

from __future__ import annotations

import pytest

from tests.dist.sweeps import sweep


@pytest.mark.parametrize(
    ("model", "layouts", "options"),
    [
        ("qwen3-tiny", ["cp1", "tp2", "tp2sp", "cp2", "cp2tp2"], {"seq": "1k"}),
        ("qwen3-tiny", ["tp2", "cp2"], {"batches": [{"lengths": [700, 500, 101], "prefixes": [0, 100, 40]}], "dtype": "bfloat16"}),
        ("qwen3-moe-tiny", ["tp2/ep2", "cp2tp2/ep4"], {"seq": "1k"}),
    ],
)
def test_answers_traffic_and_memory(tmp_path, model, layouts, options):
    result = sweep(tmp_path / "r.json", model=model, layers=2, layouts=layouts, strategies=["allgather", "ulysses"], deterministic=True, **options)
    assert {cell.key["layout"] for cell in result.cells} >= set(layouts)
    for cell in result.cells:
        assert (cell.status, cell.kernel, cell.key["options"]["deterministic"]) == ("ok", "fixed_blocks", True), (cell.id, cell.reason)
        assert cell.numerics.passed
        assert cell.memory.peak_live_bytes == pytest.approx(cell.memory.predicted_live_bytes, rel=0.05), cell.id
