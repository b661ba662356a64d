"""The speed of light against tables that were worked out by hand, and what must hold for every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpbench import formulas
from cpbench.cell import Cell
from cpbench.layout import Layout, all_layouts
from cpbench.models.presets import PRESETS
from cpbench.projection.light import Light, Limits, least_bytes, least_flops, light, received
from cpbench.strategies import STRATEGIES

H200 = Limits(flops=989e12, fp8_flops=1979e12, memory=4.8e12, link=450e9, network=50e9, gpus_per_node=8)
SEQ = {"36k": 36_864, "128k": 131_072, "1M": 1 << 20}
# model, length: PFLOP of GEMMs and of attention, GB of weights, of K and V; milliseconds on one H200
TABLE = [
    ("qwen3-8b", "36k", 0.51 + 0.40, 22, 5.4, 923),
    ("qwen3-8b", "128k", 1.82 + 5.07, 36, 19.3, 6_960),
    ("qwen3-8b", "1M", 14.6 + 324, 171, 154.6, 343_000),
    ("qwen3-32b", "36k", 2.30 + 1.42, 75, 9.7, 3_770),
    ("qwen3-32b", "128k", 8.18 + 18.0, 100, 34.4, 26_500),
    ("qwen3-32b", "1M", 65.4 + 1153, 340, 274.9, 1_232_000),
    ("deepseek-v3", "36k", 2.62 + 3.40, 674, 2.6, 4_760),
    ("deepseek-v3", "128k", 9.33 + 42.9, 680, 9.2, 48_100),
    ("deepseek-v3", "1M", 74.6 + 2747, 745, 73.7, 2_815_000),
]
# model, length, ranks: seconds of an all-gather of K and V, of a ring, of Ulysses (None: too few heads). Latent rows travel as they are
WIRES = [
    ("qwen3-8b", "36k", 8, 0.011, 0.011, 0.007),
    ("qwen3-8b", "36k", 16, 0.011, 0.102, 0.020),
    ("qwen3-8b", "36k", 64, 0.012, 0.107, None),
    ("qwen3-8b", "128k", 8, 0.038, 0.038, 0.024),
    ("qwen3-8b", "128k", 16, 0.040, 0.362, 0.073),
    ("qwen3-8b", "128k", 64, 0.042, 0.381, None),
    ("qwen3-8b", "1M", 8, 0.30, 0.30, 0.19),
    ("qwen3-8b", "1M", 16, 0.32, 2.9, 0.58),
    ("qwen3-8b", "1M", 64, 0.34, 3.0, None),
    ("qwen3-32b", "128k", 8, 0.067, 0.067, 0.075),
    ("qwen3-32b", "128k", 16, 0.072, 0.644, 0.215),
    ("qwen3-32b", "128k", 64, 0.075, 0.677, 0.150),
    ("deepseek-v3", "128k", 8, 0.018, 0.018, 0.177),
    ("deepseek-v3", "128k", 16, 0.019, 0.173, 0.501),
    ("deepseek-v3", "128k", 64, 0.020, 0.181, 0.340),
]


def cell(model: str, seq: int, layout: str = "cp1", strategy: str = "none", target: str = "prefill", **changes: object) -> Cell:
    config, partition = PRESETS[model], STRATEGIES[strategy].partitions[0]
    layers = config.layers if target == "prefill" else 1
    made = Cell(target, config, layers, Layout.parse(layout), strategy, partition, "auto", "bfloat16", "cuda", (seq,))
    return replace(made, **({"prefixes": ()} | changes))  # type: ignore[arg-type]


def quant_of(model: str) -> str:
    return "fp8" if model.startswith("deepseek") else "none"


@pytest.mark.parametrize(("model", "seq", "petaflop", "gigabytes", "kv", "milliseconds"), TABLE)
def test_operations_bytes_and_seconds_are_those_worked_out_by_hand(
    model: str, seq: str, petaflop: float, gigabytes: float, kv: float, milliseconds: float
) -> None:
    """The table has DeepSeek-V3 in FP8 throughout. Here kv_b_proj, routers, the embedding and the head stay in bf16: up to 1% more of all."""
    one = cell(model, SEQ[seq], quant=quant_of(model))
    found = light(one, H200)
    assert found.flops / 1e15 == pytest.approx(petaflop, rel=0.006)
    assert found.bytes / 1e9 == pytest.approx(gigabytes, rel=0.009)
    assert (found.bytes - formulas.weights_bytes(one)) / 1e9 == pytest.approx(kv, rel=0.015)
    assert found.seconds * 1e3 == pytest.approx(milliseconds, rel=0.01)
    for ranks in (2, 8, 64):
        spread = light(cell(model, SEQ[seq], f"cp{ranks}", "ring", quant=quant_of(model)), H200)
        assert spread.compute_s == pytest.approx(found.seconds / ranks)
        assert (spread.flops, spread.bytes) == (found.flops, found.bytes)


@pytest.mark.parametrize(("model", "seq", "ranks", "gather", "ring", "ulysses"), WIRES)
def test_wire_floors_are_those_worked_out_by_hand(model: str, seq: str, ranks: int, gather: float, ring: float, ulysses: float | None) -> None:
    """Of all layers' attention. What comes in over a rank's own network port does not cross its links, on which the table counts it: up to 8%."""
    for strategy, seconds in (("allgather", gather), ("ring", ring), ("ulysses", ulysses)):
        if seconds is not None:
            found = light(cell(model, SEQ[seq], f"cp{ranks}", strategy, "attention"), H200)
            tolerance = 0.08 if strategy == "allgather" and ranks > 8 else 0.015
            assert (found.wire_s or 0) * PRESETS[model].layers == pytest.approx(seconds, rel=tolerance, abs=0.0006), strategy


def test_the_highest_floor_binds() -> None:
    ring, gathered = (light(cell("qwen3-8b", 36_864, "cp64", strategy), H200) for strategy in ("ring", "allgather"))
    assert (ring.binds, ring.seconds) == ("wire", ring.wire_s)  # a flat ring over nodes cannot reach the speed of light
    assert (gathered.binds, gathered.seconds) == ("compute", gathered.compute_s)
    few = light(cell("qwen3-30b-a3b", 64), H200)
    assert (few.binds, few.seconds) == ("memory", few.memory_s)


def test_what_is_not_known_limits_nothing() -> None:
    found = light(cell("qwen3-8b", 36_864, "cp64", "ring"), Limits(989e12))
    assert found.floors == {"compute": found.compute_s}
    assert (found.memory_s, found.wire_s, found.wire_bytes) == (None, None, None)
    library = light(cell("qwen3-8b", 36_864, "cp8", "torch-cp"), H200)
    assert (library.wire_s, library.wire_bytes) == (None, None) and library.memory_s is not None
    inside = light(cell("qwen3-8b", 36_864, "cp64", "ring", "attention"), replace(H200, network=None))
    assert inside.wire_s == 0 and inside.wire_bytes is not None  # the slowest rank receives from another node only


def test_on_one_node_a_rank_receives_what_the_formulas_count_but_for_sums() -> None:
    for layout in all_layouts(8, experts=True):
        if layout.tp > 2 or layout.pp > 4 or layout.dp > 4:
            continue
        part = cell("qwen3-moe-tiny", 4096, str(layout), "ring" if layout.cp > 1 else "none", lengths=(1024,) * 4)
        counts = formulas.traffic(part, 0).counts
        sums = sum(count for (_, operation), (_, count) in counts.items() if operation == "all_reduce")
        found = received(part, 0)
        assert found.between == 0
        assert sum(count for _, count in counts.values()) - sums <= found.inside <= sum(count for _, count in counts.values())


def test_a_sum_reaches_a_rank_once_and_a_network_port_once_per_node() -> None:
    """Of 64 layers an all-reduce behind attention and one behind the feed-forward block, one behind the embedding, and 32 bytes per other rank."""
    rows = (2 * 64 + 1) * 36_864 * 5120 * 2
    tp8, tp16 = (received(cell("qwen3-32b", 36_864, layout), 0, 8) for layout in ("tp8", "tp16"))
    assert tp8 == (rows + 7 * 32, 0)
    assert tp16 == (pytest.approx(rows * 7 / 8, rel=1e-6), pytest.approx(rows / 8, rel=1e-6))
    scattered = received(cell("qwen3-32b", 36_864, "tp16sp"), 0, 8)
    assert scattered.between == pytest.approx(2 * rows / 16, rel=0.01)  # gathered and scattered rows: half of them from the other node, over 8 ports


def test_stages_and_rings_receive_from_the_rank_before() -> None:
    hidden = 36_864 * 5120 * 2
    two = cell("qwen3-32b", 36_864, "pp2tp8")
    assert received(two, 8, 8).between == hidden and received(two, 0, 8).between == 0
    assert received(two, 8, 16).between == 0
    crossing = cell("qwen3-32b", 36_864, "cp2tp8", "ring", "attention")
    assert received(crossing, 3, 8) == (0, 36_864 // 2 * 2 * 128 * 2)
    found = light(two, H200)
    assert found.wire_bytes == pytest.approx(hidden + 64 * hidden, rel=0.01)  # the second stage: its sums, and what comes from the first


def test_all_to_all_is_bound_by_a_ranks_own_port() -> None:
    wire = received(cell("qwen3-32b", 36_864, "cp16", "ulysses", "attention"), 0, 8)
    assert wire.between / wire.inside == pytest.approx(8 / 7)


@pytest.mark.parametrize("model", ["qwen3-tiny", "qwen3-moe-tiny", "deepseek-v2-tiny", "deepseek-v3.2-tiny"])
@pytest.mark.parametrize("target", ["prefill", "layer", "attention"])
def test_no_layout_does_less(model: str, target: str) -> None:
    """The ranks' operations sum up to at least those of the problem, and their weights and K/V to at least its bytes."""
    for layout in ("cp1", "tp2", "cp2", "dp2cp2", "cp2tp2/ep4", "pp2cp2"):
        parsed = Layout.parse(layout)
        one = cell(model, 300, layout, "allgather" if parsed.cp > 1 else "none", target, lengths=(300, 200), prefixes=(40, 0))
        ranks = range(parsed.world_size)
        assert sum(formulas.flops_of_rank(one, rank) for rank in ranks) >= least_flops(one)
        if target == "prefill":
            held = sum(formulas.weights_bytes(one, rank) for rank in ranks) + (540 * one.shape.row_values * parsed.tp) * 2 * one.layers
            assert held >= least_bytes(one)


def test_latent_attention_counts_the_cheaper_way() -> None:
    """Long prompts are cheaper with K and V of every head, a few new tokens behind many cached ones in the latent's width."""
    long, short = cell("deepseek-v3", 36_864), cell("deepseek-v3", 16, prefixes=(131_072,))
    for one in (long, short):
        assert least_flops(one) == least_flops(replace(one, mla="absorbed"))
    assert least_flops(long) == formulas.flops(long)
    assert least_flops(short) == formulas.flops(replace(short, mla="absorbed")) < formulas.flops(short)


def test_fp8_products_run_at_their_own_peak() -> None:
    plain, quantised = cell("deepseek-v3", 36_864), cell("deepseek-v3", 36_864, quant="fp8")
    gemms = 2 * 36_864 * 35.6e9  # active parameters but for the embedding
    saved = light(plain, H200).compute_s - light(quantised, H200).compute_s
    assert saved == pytest.approx(gemms * (1 / 989e12 - 1 / 1979e12), rel=0.04)  # kv_b_proj is not quantised: 3% of them
    assert light(quantised, replace(H200, fp8_flops=None)).compute_s == light(plain, H200).compute_s


def test_bytes_of_a_layer_and_of_attention_count_what_goes_in_and_out() -> None:
    row, kv = 4096 * 2, 2 * 8 * 128 * 2
    assert least_bytes(cell("qwen3-8b", 1000, target="attention")) == 1000 * (2 * row + kv)
    layer = cell("qwen3-8b", 1000, target="layer")
    assert least_bytes(layer) == formulas.weights_bytes(layer) + 1000 * (2 * row + kv)
    assert least_bytes(layer) - least_bytes(replace(layer, kv_cache="drop")) == 1000 * kv
    assert least_bytes(replace(layer, prefixes=(500,))) - least_bytes(layer) == 500 * kv
    latent = cell("deepseek-v3", 1000, target="attention")
    assert least_bytes(latent) == 2 * (1000 * (576 + 128 * (192 + 128)) + 512 * 128 * 256)


def test_batches_of_data_parallel_groups_are_all_looked_at() -> None:
    """The second group has the long sequence, whose rows are what a rank receives most of."""
    one = cell("qwen3-8b", 0, "dp2cp2", "ring", "attention", lengths=(64, 4096))
    most = max(received(one, rank).inside for rank in range(4))
    assert light(one, H200).wire_bytes == most > min(received(one, rank).inside for rank in range(4))


def test_a_light_names_its_floors() -> None:
    found = Light(1, 1, None, 2.0, 3.0, None)
    assert (found.binds, found.seconds) == ("memory", 3.0)
