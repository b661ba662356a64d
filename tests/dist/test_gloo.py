"""Every registered strategy, partition and tensor-parallel degree over real gloo processes: answers, collectives, memory, tokens.

A cell is `ok` only if its numerics held against fp64 on one device and every rank's counted collectives equalled the formulas, so the
sweep itself is the test; what it stores is checked here.
"""

import pytest

from cpbench.strategies import STRATEGIES
from tests.dist.sweeps import sweep

NAMES = [name for name, strategy in STRATEGIES.items() if name != "none" and not strategy.brings_collectives]
PARTITIONS = sorted({partition for name in NAMES for partition in STRATEGIES[name].partitions})


@pytest.fixture(scope="module", params=PARTITIONS)
def prefill(request, tmp_path_factory):
    """All strategies with one partition at cp x tp of 1, 2 and 4 ranks, two sequences with a remainder, two layers, fp32."""
    folder = tmp_path_factory.mktemp("gloo")
    fields = {"seq": "331", "batch": "2", "cp": "1,2,4", "tp": "1,2", "strategies": ",".join(NAMES), "layers": 2}
    return sweep(folder / "r.json", partition=request.param, **fields)


def test_every_cell_that_can_run_is_right(prefill):
    for cell in prefill.cells:
        assert cell.status == "ok", (cell.id, cell.status, cell.reason)
        assert cell.numerics.passed
        assert cell.numerics.relative_rmse < 1e-5
        whole_sequences_per_rank = cell.key["partition"] == "contiguous" and cell.key["layout"].startswith("cp2")
        if cell.key["strategy"] != "none" and not whole_sequences_per_rank:
            assert cell.numerics.remote_tokens_used is True
    layouts = {cell.key["layout"] for cell in prefill.cells}
    assert layouts == {"cp1", "tp2", "cp2", "cp4", "cp2tp2", "cp4tp2"}
    assert {cell.key["strategy"] for cell in prefill.cells} == {"none", *NAMES}


def test_every_layout_has_the_same_first_tokens(prefill):
    tokens = {tuple(first.token for first in cell.first_tokens) for cell in prefill.cells}
    assert len(tokens) == 1
    assert len(next(iter(tokens))) == 2


def test_collectives_are_counted_exactly(prefill):
    """Two layers: per layer one all-gather, cp - 1 exchanges, or three all-to-alls; two tensor-parallel sums, and one after embedding."""
    calls = {"allgather": ("all_gather", lambda cp: 1), "ring": ("send_recv", lambda cp: cp - 1), "ulysses": ("all_to_all", lambda cp: 3)}
    for cell in prefill.cells:
        recorded, cp, tp = cell.traffic["recorded"], cell.ranks[-1].coordinates["cp"] + 1, cell.ranks[-1].coordinates["tp"] + 1
        assert recorded == cell.traffic["predicted"]
        if cell.key["strategy"] in calls:
            operation, per_layer = calls[cell.key["strategy"]]
            assert recorded["cp"][operation]["calls"] == 2 * per_layer(cp)
        assert ("tp" in recorded) == (tp > 1)
        if tp > 1:
            assert recorded["tp"]["all_reduce"]["calls"] == 2 * 2 + 1


def test_ranks_and_memory_are_recorded(prefill):
    for cell in prefill.cells:
        assert sum(rank.tokens for rank in cell.ranks if rank.coordinates["tp"] == 0) == 662
        assert cell.memory.peak_live_bytes == max(rank.peak_live_bytes for rank in cell.ranks)
        assert cell.memory.peak_live_bytes == pytest.approx(cell.memory.predicted_live_bytes, rel=0.05)
        assert sum(cell.memory.by_category.values()) == pytest.approx(cell.memory.peak_live_bytes, rel=0.02)
        assert cell.memory.peak_rss_bytes > cell.memory.peak_live_bytes
        assert cell.memory.peak_allocator_bytes >= cell.memory.by_category["weights"]
        assert cell.oversubscribed == (cell.world_size > 2) or cell.threads_per_rank > 0


@pytest.mark.parametrize(("target", "metric"), [("attention", "attention_s"), ("layer", "layer_s")])
def test_other_targets_and_bf16(tmp_path, target, metric):
    result = sweep(tmp_path / "r.json", target=target, seq="256", cp="2", tp="1", strategies=",".join(NAMES), dtype="bfloat16")
    for cell in result.cells:
        assert cell.status == "ok", (cell.id, cell.reason)
        assert cell.numerics.ratio <= 1.3
        assert cell.metrics[metric].median > 0
        assert cell.first_tokens == []
