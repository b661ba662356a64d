"""PyTorch's own context parallelism over real gloo processes: the same checks as every strategy, and what the observer saw of it."""

import pytest

from tests.dist.sweeps import sweep

NAMES = {"torch-cp": ("all_gather", lambda cp: 1), "torch-cp-ring": ("all_to_all", lambda cp: cp - 1)}  # collectives of a layer
ROW = 2 * 2 * 32 * 4  # K and V of qwen3-tiny: 2 heads of 32 values, fp32


@pytest.fixture(scope="module")
def prefill(tmp_path_factory):
    """Two sequences at cp x tp of 2 and 4 ranks beside one rank, two layers, fp32."""
    fields = {"seq": "320", "batch": "2", "cp": "2,4", "tp": "1,2", "strategies": ",".join(NAMES), "layers": 2}
    return sweep(tmp_path_factory.mktemp("torch_cp") / "r.json", **fields)


def test_every_cell_is_right_and_has_the_first_tokens_of_one_rank(prefill):
    assert {(cell.key["strategy"], cell.key["layout"]) for cell in prefill.cells} >= {(name, layout) for name in NAMES for layout in ("cp4", "cp4tp2")}
    for cell in prefill.cells:
        assert cell.status == "ok", (cell.id, cell.status, cell.reason)
        assert cell.numerics.passed and cell.numerics.relative_rmse < 1e-5
        if cell.key["strategy"] in NAMES:
            assert cell.numerics.remote_tokens_used is True
    assert len({tuple(first.token for first in cell.first_tokens) for cell in prefill.cells}) == 1


def test_its_collectives_are_observed_and_ours_are_still_counted(prefill):
    for cell in prefill.cells:
        traffic, name = cell.traffic, cell.key["strategy"]
        assert traffic["recorded"] == traffic["predicted"]
        if name not in NAMES:
            assert traffic["source"] == "recorded" and "observed" not in traffic
            continue
        cp, tp = (cell.ranks[-1].coordinates[axis] + 1 for axis in ("cp", "tp"))
        operation, calls = NAMES[name]
        received = 2 * (cp - 1) * (640 // cp) * ROW // tp
        assert traffic["source"] == "observed"
        assert traffic["observed"] == {"cp": {operation: {"calls": 2 * calls(cp), "bytes": received}}}
        recorded = sum(counts["bytes"] for axis in traffic["recorded"].values() for counts in axis.values())
        assert traffic["bytes"] == received + recorded
        assert f"collectives of {name} are observed, not predicted" in cell.warnings


@pytest.mark.parametrize(("batch", "seq"), [("1", "4k"), ("2", "2k")])
def test_bf16_attention_and_its_memory(tmp_path, batch, seq):
    result = sweep(tmp_path / "r.json", target="attention", seq=seq, batch=batch, cp="2", tp="1", strategies=",".join(NAMES), dtype="bfloat16")
    for cell in result.cells:
        assert cell.status == "ok", (cell.id, cell.reason)
        assert cell.numerics.ratio <= 1.3
        assert cell.memory.peak_live_bytes == pytest.approx(cell.memory.predicted_live_bytes, rel=0.15)
