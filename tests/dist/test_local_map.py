"""`local-map` over real gloo processes, as it is and compiled: the checks of every strategy, what the observer saw, and memory."""

import pytest

from tests.dist.sweeps import sweep

LAYOUTS = ("tp2", "cp2", "tp4", "cp4", "cp2tp2")  # qwen3-tiny has 2 kv heads: tp4 repeats them
ROW = 2 * 2 * 32 * 4  # K and V of 2 heads of 32 values, fp32
LENGTH, LAYERS = 320, 2


@pytest.mark.timeout(900)  # inductor compiles C++ on every rank
@pytest.mark.parametrize("mode", ["none", "eager", "inductor"])
def test_every_layout_is_right_and_has_the_first_tokens_of_one_device(tmp_path, mode):
    fields = {"seq": LENGTH, "batch": 2, "layouts": ",".join(LAYOUTS), "strategies": "local-map", "layers": LAYERS, "compile": mode}
    result = sweep(tmp_path / "r.json", **fields)
    ours = {cell.key["layout"]: cell for cell in result.cells if cell.key["strategy"] == "local-map"}
    assert set(ours) == set(LAYOUTS)
    for cell in result.cells:
        assert cell.status == "ok", (cell.id, cell.status, cell.reason)
        assert cell.numerics.passed and cell.numerics.relative_rmse < 1e-5
    assert len({tuple(first.token for first in cell.first_tokens) for cell in result.cells}) == 1
    for layout, cell in ours.items():
        assert cell.key["options"] == ({} if mode == "none" else {"compile": mode})
        assert (cell.first_call_s is not None) == (mode != "none")
        cp, tp = (cell.ranks[-1].coordinates[axis] + 1 for axis in ("cp", "tp"))
        traffic = cell.traffic
        assert traffic["recorded"] == traffic["predicted"]
        if cp == 1:
            assert traffic["source"] == "recorded" and "observed" not in traffic, layout
            continue
        assert cell.numerics.remote_tokens_used is True
        assert traffic["source"] == "observed"
        received = LAYERS * (cp - 1) * (2 * LENGTH // cp) * ROW // tp
        assert traffic["observed"] == {"cp": {"all_gather": {"calls": LAYERS, "bytes": received}}}, layout


@pytest.mark.parametrize("mode", ["none", "eager"])
@pytest.mark.parametrize(("batch", "seq"), [(1, "4k"), (2, "2k")])
def test_bf16_attention_and_its_memory(tmp_path, batch, seq, mode):
    fields = {"target": "attention", "seq": seq, "batch": batch, "cp": "2", "strategies": "local-map", "dtype": "bfloat16", "compile": mode}
    cell = next(cell for cell in sweep(tmp_path / "r.json", **fields).cells if cell.key["strategy"] == "local-map")
    assert cell.status == "ok", (cell.id, cell.reason)
    assert cell.numerics.ratio <= 1.3
    assert cell.memory.peak_live_bytes == pytest.approx(cell.memory.predicted_live_bytes, rel=0.15)
    assert any("before it is compiled" in warning for warning in cell.warnings) == (mode != "none")


def test_contiguous_parts_are_right_too(tmp_path):
    result = sweep(tmp_path / "r.json", seq=LENGTH, cp="2", strategies="local-map", partition="contiguous", target="attention")
    assert [(cell.status, cell.key["strategy"]) for cell in result.cells] == [("ok", "none"), ("ok", "local-map")]
