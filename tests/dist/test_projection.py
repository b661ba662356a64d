"""Projections held against real sweeps on gloo: what they say of memory and of bytes, which no load of the machine changes."""

from __future__ import annotations

import pytest

from cpbench.cell import Cell
from cpbench.projection.projecting import Target, project
from tests.dist.sweeps import planned, sweep

FIELDS = (
    {"model": "qwen3-tiny", "layouts": ["cp2", "tp2", "tp2sp"], "strategies": ["ring", "allgather", "ulysses"], "seq": "256,1k"},
    {"model": "deepseek-v3-tiny", "layouts": ["cp2", "tp2"], "strategies": ["ring"], "seq": "512", "chunk": "256"},
    {"model": "qwen3-moe-tiny", "layouts": ["cp2/ep2", "tp2/ep2"], "strategies": ["allgather"], "seq": "1k", "router": "uniform"},
    {"model": "qwen3-tiny", "layouts": ["cp2"], "strategies": ["torch-cp", "torch-cp-ring", "local-map"], "seq": "256,1k"},
)


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: f"{fields['model']}-{fields['strategies'][0]}")
def test_the_projected_peak_and_bytes_are_those_of_a_sweep(tmp_path, fields):
    asked = {**fields, "seq": fields["seq"].split(","), "layers": 4}
    result = sweep(tmp_path / "measured.json", **asked)
    cells: dict[str, Cell] = {found.cell.id: found.cell for found in planned(**asked)[1].cells}
    assert len(result.cells) > 1
    for measured in result.cells:
        assert measured.status == "ok" and measured.memory is not None, measured.reason
        projected = project(cells[measured.id], Target("cpu"))
        assert projected.metrics["projected_peak_live_bytes"].median == pytest.approx(measured.memory.peak_live_bytes, rel=0.01), measured.id
        if cells[measured.id].config.experts is None:  # routers send what they choose
            assert projected.metrics["projected_comm_bytes"].median == measured.traffic["bytes"], measured.id
