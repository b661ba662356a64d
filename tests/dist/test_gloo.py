"""Every registered strategy, partition and tensor-parallel degree over real gloo processes: answers, collectives, memory, tokens.

A cell is `ok` only if its numerics held against fp64 on one device and every rank's counted collectives equalled the formulas, so the
sweep itself is the test; what it stores is checked here.
"""

from dataclasses import replace

import pytest

from cpbench.layout import Layout
from cpbench.strategies import STRATEGIES
from tests.dist.sweeps import sweep

NAMES = [name for name, strategy in STRATEGIES.items() if name != "none" and not strategy.brings_collectives]
PARTITIONS = sorted({partition for name in NAMES for partition in STRATEGIES[name].partitions})
BATCHES = {"zigzag": {}, "contiguous": {"prefix": "40"}, "interleave": {"chunk": "100"}, "replicated": {"prefix": "40", "chunk": "100"}}
TOKENS = 3 * 221


def names_of(partition):
    return [name for name in NAMES if partition in STRATEGIES[name].partitions]


@pytest.fixture(scope="module", params=PARTITIONS)
def prefill(request, tmp_path_factory):
    """All strategies of one partition at cp x tp of 1, 2 and 4 ranks, three sequences with a remainder, two layers, fp32."""
    folder = tmp_path_factory.mktemp("gloo")
    fields = {"seq": "221", "batch": "3", "cp": "1,2,4", "tp": "1,2", "strategies": ",".join(names_of(request.param)), "layers": 2}
    return sweep(folder / "r.json", partition=request.param, **fields, **BATCHES[request.param])


def partition_of(result):
    return next(cell.key["partition"] for cell in result.cells if cell.key["strategy"] != "none")


def test_every_cell_that_can_run_is_right(prefill):
    partition = partition_of(prefill)
    for cell in prefill.cells:
        assert cell.status == "ok", (cell.id, cell.status, cell.reason)
        assert cell.cp_active
        assert cell.numerics.passed
        assert cell.numerics.relative_rmse < 1e-5
        if cell.key["strategy"] != "none" and partition != "replicated":
            assert cell.numerics.remote_tokens_used is True
    layouts = {str(replace(Layout.parse(cell.key["layout"]), ulysses=1)) for cell in prefill.cells}
    assert layouts == {"cp1", "tp2", "cp2", "cp4", "cp2tp2", "cp4tp2"}
    assert {cell.key["strategy"] for cell in prefill.cells} == {"none", *names_of(partition)}


def test_every_layout_has_the_same_first_tokens(prefill):
    tokens = {tuple(first.token for first in cell.first_tokens) for cell in prefill.cells}
    assert len(tokens) == 1
    assert len(next(iter(tokens))) == 3


def test_collectives_are_counted_exactly(prefill):
    """Two layers: per layer one all-gather, cp - 1 exchanges, or three all-to-alls; two tensor-parallel sums, and one after embedding."""
    calls = {"allgather": ("all_gather", lambda cp: 1), "ring": ("send_recv", lambda cp: cp - 1), "ulysses": ("all_to_all", lambda cp: 3)}
    for cell in prefill.cells:
        recorded, cp, tp = cell.traffic["recorded"], cell.ranks[-1].coordinates["cp"] + 1, cell.ranks[-1].coordinates["tp"] + 1
        assert recorded == cell.traffic["predicted"]
        if cell.key["strategy"] in calls and "chunk" not in cell.key["options"]:
            operation, per_layer = calls[cell.key["strategy"]]
            assert recorded["cp"][operation]["calls"] == 2 * per_layer(cp)
        assert ("tp" in recorded) == (tp > 1)
        if tp > 1:
            chunks = 3 if "chunk" in cell.key["options"] else 1
            assert recorded["tp"]["all_reduce"]["calls"] == chunks * (2 * 2 + 1)


def test_every_rank_says_how_it_spent_a_pass(prefill):
    """Of the marked pass: own work and what is exposed make the whole, for every rank; the collectives are those that were counted."""
    for cell in prefill.cells:
        split = cell.split
        assert split is not None, (cell.id, cell.status, cell.reason)
        assert [len(split.ranks), split.reason] == [cell.world_size, None]
        for rank in split.ranks:
            assert rank.compute_s + rank.exposed_comm_s == pytest.approx(rank.step_s)
            assert rank.step_s >= rank.comm_s >= rank.exposed_comm_s >= 0
        assert split.compute_s == max(rank.compute_s for rank in split.ranks)
        found = {(one.axis, one.operation) for one in split.collectives}
        counted = {(axis, operation) for axis, kinds in cell.traffic["recorded"].items() for operation, kind in kinds.items() if kind["calls"]}
        assert found == counted, cell.id
        assert all(one.bytes_per_s > 0 and one.alone_s > 0 for one in split.collectives if one.bytes)
        assert [cell.metrics[name].median for name in ("compute_s", "comm_s", "exposed_comm_s")] == [split.compute_s, split.comm_s, split.exposed_comm_s]
        assert cell.metrics["peak_fraction"].median == pytest.approx(cell.metrics["tflops_per_rank"].median * 1e12 / cell.peak.flops)
        assert 0 < cell.metrics["light_fraction"].median <= 1.000001 * cell.metrics["peak_fraction"].median, cell.id


def test_ranks_and_memory_are_recorded(prefill):
    for cell in prefill.cells:
        copies = cell.ranks[-1].coordinates["cp"] + 1 if cell.key["partition"] == "replicated" else 1
        assert sum(rank.tokens for rank in cell.ranks if rank.coordinates["tp"] == 0) == copies * TOKENS
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
