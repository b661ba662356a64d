"""Sequence-parallel norms (`sp`): the answers and first tokens of plain tensor parallelism, its wire bytes, fewer rows, and sums done once."""

from dataclasses import replace

import pytest
import torch

from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.communicator import Communicator, Partial
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.errors import CpbenchError
from cpbench.fitting import layout_reason
from cpbench.formulas import held_rows, new_rows, traffic
from cpbench.kernels import load_kernel
from cpbench.layout import Layout, all_layouts
from cpbench.models.held import Models
from cpbench.models.presets import PRESETS
from cpbench.numerics import judge
from cpbench.one_device import OneDevice
from cpbench.plan import unsupported
from cpbench.program import run_locally
from cpbench.sharding import ATTENTION, TokenRows

CPU, KERNEL = torch.device("cpu"), load_kernel("cpu_flash")
ONE_DEVICE = OneDevice(CPU)
MODELS = ["qwen3-tiny", "qwen3-moe-tiny", "deepseek-v3.2-tiny"]
LENGTHS = (101, 67, 130)


def make(layout, model="qwen3-tiny", dtype="float32", lengths=LENGTHS, target="prefill", **options):
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    strategy, partition = ("none", "contiguous") if layout.cp == 1 else ("allgather", "zigzag")
    return Cell(target, PRESETS[model], 2 if target == "prefill" else 1, layout, strategy, partition, "auto", dtype, "cpu", lengths, **options)


def answers_of(cell):
    world = LocalWorld(cell.world_size, 60)
    return world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), KERNEL, CPU, Models()))[0]


def check_of(cell):
    assert unsupported(cell) is None
    return judge(answers_of(cell), KERNEL, ONE_DEVICE)


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_of_two_and_four_ranks_is_right(model):
    """Also with the traffic of the formulas, and the first tokens of fp64, which are those without sp."""
    seen = 0
    for ranks in (2, 4):
        for layout in all_layouts(ranks, PRESETS[model].experts is not None):
            if layout.tp > 1 and not unsupported(cell := make(replace(layout, sp=True), model)):
                check = check_of(cell)
                assert check.passed, (str(layout), check.reason)
                seen += 1
    assert seen >= (5 if PRESETS[model].experts is None else 20)


@pytest.mark.parametrize("name", ["tp2sp", "tp4sp/ep4", "cp2tp2sp/ep2tp2"])
@pytest.mark.parametrize("model", ["deepseek-v2-tiny", "deepseek-v3-tiny"])
def test_latent_attention(name, model):
    for mla in ("expanded", "absorbed"):
        check = check_of(make(name, model, mla=mla))
        assert check.passed, check.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tp4sp", "dp2cp2tp2sp", "pp2tp2sp", "cp2tp2sp"])
def test_chunks_prefixes_idle_groups_and_fewer_rows_than_ranks(name, dtype):
    for options in ({"chunk": 48, "prefixes": (0, 40, 17)}, {"lengths": (67,)}, {"lengths": (9, 5), "chunk": 4}):
        check = check_of(make(name, dtype=dtype, **options))
        assert check.passed, check.reason


@pytest.mark.parametrize("name", ["tp2", "cp2tp2", "dp2tp2"])
@pytest.mark.parametrize("model", ["qwen3-tiny", "deepseek-v3-tiny"])
def test_a_sum_of_two_is_the_same_bits_and_of_four_the_same_but_for_rounding(name, model):
    plain, cut = (answers_of(make(layout, model))[-1] for layout in (name, f"{name}sp"))
    assert torch.equal(next(iter(plain.copies.values())), next(iter(cut.copies.values())))
    assert torch.equal(plain.logits, cut.logits)
    plain, cut = (answers_of(make(layout, model))[-1] for layout in ("tp4", "tp4sp"))
    one, other = next(iter(plain.copies.values())), next(iter(cut.copies.values()))
    assert float((one - other).norm() / one.norm()) < 1e-6
    assert plain.first_tokens == cut.first_tokens


@pytest.mark.parametrize("model", ["qwen3-tiny", "qwen3-moe-tiny", "deepseek-v3-tiny", "deepseek-v3.2-tiny"])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_wire_bytes_of_a_layer_are_those_of_tensor_parallelism(model, tp):
    """An all-reduce is a gather and a scattered sum; and a layer that is cut may move rows of more than one block only once."""
    lengths = (128, 64, 8 * 37)
    for rank in range(tp):
        plain, cut = (traffic(make(f"tp{tp}{sp}", model, target="layer", lengths=lengths), rank) for sp in ("", "sp"))
        assert cut.bytes == plain.bytes
        assert {operation for _, operation in plain.counts} == {"all_reduce"}
        assert {operation for _, operation in cut.counts} == {"all_gather", "reduce_scatter"}


def test_rows_stay_scattered_on_their_way_to_the_experts():
    """With all-to-all only shared experts and attention see gathered rows; without shared ones attention alone."""
    cell = make("tp4sp/ep4", "qwen3-moe-tiny", target="layer", lengths=(256,))
    counts = traffic(cell, 0).counts
    row = cell.config.hidden * 4
    assert counts["tp", "all_gather"] == counts["tp", "reduce_scatter"] == (1, 192 * row)
    assert counts["ep", "all_to_all"][0] == 3


@pytest.mark.parametrize("name", ["tp4sp", "cp2tp2sp", "dp2tp2sp"])
def test_a_rank_holds_its_part_of_the_rows_between_blocks(name):
    cell = make(name)
    plain = replace(cell, layout=replace(cell.layout, sp=False))
    outputs, whole = run_locally(cell, KERNEL, CPU), run_locally(plain, KERNEL, CPU)
    tp = cell.layout.tp
    for rank, ((tokens, output), (all_tokens, _)) in enumerate(zip(outputs, whole, strict=True)):
        assert len(tokens) == len(output.rows) == held_rows(cell, rank)
        assert abs(len(tokens) - len(all_tokens) / tp) < 1
        assert new_rows(cell, rank) == new_rows(plain, rank) == len(all_tokens)
    assert sorted(token for tokens, _ in outputs for token in tokens.tolist()) == list(range(sum(LENGTHS)))


def one_rank():
    return Communicator(local_groups(Layout(), LocalWorld(1), 0), TokenRows(((4,),), (False,)))


def test_partial_sums_cannot_be_added_before_they_are_completed_nor_completed_twice():
    partial = Partial(torch.ones(4, 2), ATTENTION)
    with pytest.raises(TypeError):
        torch.zeros(4, 2).add_(partial)
    with pytest.raises(TypeError):
        torch.zeros(4, 2) + partial
    done = one_rank().complete(partial)
    assert torch.equal(done, torch.ones(4, 2))
    with pytest.raises(TypeError, match="complete already"):
        one_rank().complete(partial)
    with pytest.raises(TypeError, match="is complete already"):
        one_rank().complete(done)


def test_the_input_of_a_block_is_used_once():
    x = one_rank().incoming(torch.ones(4, 2), ATTENTION)
    x.cut(lambda rows: rows)
    with pytest.raises(TypeError, match="used once"):
        x.whole(lambda rows: rows)


@pytest.mark.parametrize("options", [{"sp_chunks": 3}, {"sp_gather": "latent"}, {"sp_chunks": 4, "lengths": (9, 5)}])
@pytest.mark.parametrize("name", ["tp2sp", "tp4sp", "dp2tp2sp"])
@pytest.mark.parametrize("model", ["qwen3-tiny", "deepseek-v3-tiny", "deepseek-v3.2-tiny"])
def test_rows_in_pieces_and_behind_low_rank_projections(model, name, options):
    cell = make(name, model, **options)
    if model == "qwen3-tiny" and "sp_gather" in options:
        assert unsupported(cell).endswith("the nearest valid value is sp_gather=hidden")
        return
    check = check_of(cell)
    assert check.passed, check.reason
    assert traffic(replace(cell, sp_chunks=1), 0) == traffic(cell, 0)


@pytest.mark.parametrize("name", ["tp2sp", "tp4sp", "cp2tp2sp", "dp2tp2sp"])
@pytest.mark.parametrize("model", ["qwen3-tiny", "deepseek-v3-tiny", "qwen3-moe-tiny"])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_come_together_inside_products(model, name, bias):
    """The plan, by products that a group of threads makes; PyTorch's own operators are called in tests/dist/test_fused.py."""
    config = replace(PRESETS[model], qkv_bias=bias)
    cell = replace(make(name, model, lengths=(64, 32)), config=config, sp_fused=True)
    check = judge(answers_of(cell), KERNEL, ONE_DEVICE)
    assert check.passed, check.reason
    assert traffic(replace(cell, sp_fused=False), 0) == traffic(cell, 0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"device": "cpu"}, "needs CUDA"),
        ({"quant": "fp8", "dtype": "bfloat16"}, "quant=fp8"),
        ({"sp_chunks": 4}, "sp_chunks=4"),
        ({"sp_gather": "latent"}, "sp_gather=latent"),
        ({"lengths": (4095,)}, "4,095 do not divide"),
    ],
)
def test_why_products_cannot_be_fused(options, what):
    cell = replace(make("tp2sp", "deepseek-v3-tiny", lengths=(4096,)), device="cuda", sp_fused=True)
    assert layout_reason(cell) is None
    reason = layout_reason(replace(cell, **options))
    assert what in reason and reason.endswith("; the nearest valid value is sp_fused=false")


def test_low_rank_rows_are_three_tenths_of_hidden_states():
    """DeepSeek V3: 1536 + 576 of 7168 values; and in V3.2 the keys and gates of the indexer beside them."""
    for model, values in (("deepseek-v3", 2112), ("deepseek-v3.2", 2112 + 128 + 64)):
        plain = make("tp4sp", model, target="layer", lengths=(4096,))
        low = replace(plain, sp_gather="latent")
        saved = traffic(plain, 0).counts["tp", "all_gather"][1] - traffic(low, 0).counts["tp", "all_gather"][1]
        assert saved == 3072 * (7168 - values) * 4


@pytest.mark.parametrize(("method", "planted"), [("complete", lambda self, partial: partial.values()[: len(self._rows.held(self._groups.place))])])
def test_a_sum_that_is_left_out_is_found(monkeypatch, method, planted):
    cell = make("tp2sp")
    with monkeypatch.context() as patched:
        patched.setattr(Communicator, method, planted)
        answers = answers_of(cell)
    check = judge(answers, KERNEL, OneDevice(CPU))
    assert not check.passed and "times that of one device" in check.reason and "reduce_scatter over tp" in check.reason


def test_attention_alone_has_no_rows_between_blocks():
    assert unsupported(replace(make("tp2sp"), target="attention", layers=1)).endswith("the nearest valid layout is tp2")


@pytest.mark.parametrize(("name", "canonical"), [("tp4sp", "tp4sp"), ("tp2spcp4", "cp4tp2sp"), ("pp2cp2tp2sp/ep4", "pp2cp2tp2sp/ep4")])
def test_names_of_layouts(name, canonical):
    layout = Layout.parse(name)
    assert layout.sp and str(layout) == canonical and Layout.parse(canonical) == layout


def test_sp_needs_ranks_to_cut_rows_over():
    with pytest.raises(CpbenchError, match="sp in cp2sp cuts rows over tp, and tp is 1") as raised:
        Layout.parse("cp2sp")
    assert "cp2 and cp2tp2sp" in raised.value.hint
