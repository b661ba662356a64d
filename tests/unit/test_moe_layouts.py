"""Mixtures of experts on every layout: the answer of one device, the traffic of the formula, the same experts for the same token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpbench import formulas
from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.fitting import layout_reason
from cpbench.kernels import load_kernel
from cpbench.layout import Layout, all_layouts
from cpbench.measure.memory import LiveTensors
from cpbench.models.config import Experts, ModelConfig
from cpbench.models.held import Models
from cpbench.numerics import judge
from cpbench.one_device import OneDevice
from cpbench.program import Program
from cpbench.sharding import TokenRows, unit_of, unit_pieces, unit_reach

CPU = torch.device("cpu")
ONE_DEVICE = OneDevice(CPU)
QWEN3 = ModelConfig("qwen3", 64, 4, 8, 2, 16, 96, 128, experts=Experts(8, 3, 64))
V3_EXPERTS = Experts(16, 4, 32, shared=1, first=1, groups=4, top_groups=2, scoring="sigmoid", correction=True, scale=2.5)
V3 = ModelConfig("v3", 64, 4, 8, 2, 16, 96, 128, experts=V3_EXPERTS)
V2 = replace(V3, name="v2", experts=Experts(8, 3, 32, shared=2, first=1, groups=4, top_groups=2, normalised=False, scale=4.0))


def cell_of(layout: Layout, config: ModelConfig, dtype: str = "float32", lengths: tuple[int, ...] = (41, 30, 3), **fields) -> Cell:
    strategy, partition = ("allgather", "zigzag") if layout.cp > 1 else ("none", "contiguous")
    return Cell("prefill", config, max(2, layout.pp), layout, strategy, partition, "auto", dtype, "cpu", lengths, **fields)


def run(cell: Cell):
    """The answers of all ranks, as the first one has them."""
    kernel, world = load_kernel("reference" if cell.dtype == "float64" else "cpu_flash"), LocalWorld(cell.world_size, 60)
    return world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), kernel, CPU, Models()))[0], kernel


def proved(cell: Cell) -> None:
    answers, kernel = run(cell)
    check = judge(answers, kernel, ONE_DEVICE)
    assert check.passed, f"{cell.id}: {check.reason}"
    assert check.collectives.difference is None
    if cell.dtype == "float64":
        assert check.relative_rmse < 1e-12


def layouts(ranks: int) -> list[tuple[Layout, str]]:
    """Every layout of some ranks whose experts are divided, with every way to them."""
    found = []
    for layout in all_layouts(ranks, experts=True):
        found += [(layout, dispatch) for dispatch in (("gather", "alltoall") if layout.ep > 1 else ("gather",))]
    return found


@pytest.mark.parametrize("config", [QWEN3, V3], ids=["qwen3", "v3"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_gives_the_answer_of_one_device(ranks, config):
    for layout, dispatch in layouts(ranks):
        proved(cell_of(layout, config, "float64", dispatch=dispatch))


@pytest.mark.parametrize("config", [QWEN3, V3], ids=["qwen3", "v3"])
def test_every_layout_of_the_hazard_gives_the_answer_of_one_device(config):
    """Ranks of all three attention axes at once, with every division of the experts: tokens of two ranks never land in the same rows."""
    for layout, dispatch in layouts(8):
        if (layout.dp, layout.cp, layout.tp) == (2, 2, 2):
            proved(cell_of(layout, config, "float32", dispatch=dispatch))


@pytest.mark.parametrize("name", ["dp4cp2/ep8", "cp4tp2/dp2ep2tp2", "dp8/ep4tp2", "tp8/ep8", "cp8/ep2tp4", "pp2dp2cp2/ep2tp2", "dp2tp4/dp4ep2", "cp2tp4/dp8"])
@pytest.mark.parametrize("batch", [((67,), (0,)), ((90, 3), (0, 20)), ((101, 67, 130), (12, 0, 50))], ids=["one", "short", "cached"])
@pytest.mark.parametrize("chunk", [None, 48])
def test_idle_groups_replicated_tokens_and_chunks(name, batch, chunk):
    """One sequence leaves groups idle; a sequence of 3 tokens switches context parallelism off, so that tokens are replicated."""
    layout = Layout.parse(name)
    for dispatch in ("gather", "alltoall") if layout.ep > 1 else ("gather",):
        proved(cell_of(layout, V2, lengths=batch[0], prefixes=batch[1], chunk=chunk, dispatch=dispatch))


@pytest.mark.parametrize("router", ["uniform", "zipf:1.2"])
def test_drawn_experts_are_the_same_in_every_layout(router):
    seen = set()
    for name in ("dp2cp2tp2/ep4tp2", "cp4tp2/ep8", "tp8", "pp2cp2tp2/dp2ep2", "dp4tp2/dp4tp2"):
        for dispatch in ("gather", "alltoall") if "ep" in name else ("gather",):
            cell = cell_of(Layout.parse(name), QWEN3, router=router, dispatch=dispatch)
            proved(cell)
            seen.add(run(cell)[0][-1].experts.chosen_LNK.numpy().tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("dispatch", ["gather", "alltoall"])
def test_narrow_types_round_as_one_device_does(dispatch):
    for name in ("cp4/ep4", "tp4/ep4", "dp2cp2/ep2tp2"):
        proved(cell_of(Layout.parse(name), QWEN3, "bfloat16", (101, 67, 40), dispatch=dispatch))


def test_a_choice_that_rounding_does_not_excuse_is_named():
    cell = cell_of(Layout.parse("cp2/ep2"), QWEN3)
    answers, kernel = run(cell)
    used = answers[-1].experts.chosen_LNK.clone()
    used[1, 7] = torch.tensor([value for value in range(8) if value not in used[1, 7].tolist()][:3])
    check = judge([replace(answers[-1], experts=replace(answers[-1].experts, chosen_LNK=used))], kernel, ONE_DEVICE)
    assert not check.passed  # the answer is not the one of these experts
    wrong = replace(answers[-1], experts=replace(answers[-1].experts, disagreed=3))
    assert judge([wrong], kernel, ONE_DEVICE).reason == "ranks choose different experts for 3 tokens"


def test_experts_in_a_router_that_goes_wrong_are_named(monkeypatch):
    """A router that takes the worst experts: rows and experts agree, so that only the choices tell."""
    from cpbench.models import router

    right = router.choose
    with monkeypatch.context() as patch:
        patch.setattr(router, "choose", lambda ranked, experts: right(-ranked, experts))
        answers, kernel = run(cell_of(Layout.parse("cp2/ep2"), QWEN3))
    check = judge(answers, kernel, OneDevice(CPU))
    assert not check.passed and "has the experts" in check.reason and "which lead by" in check.reason


def test_a_flip_of_nearly_equal_scores_is_no_error(monkeypatch):
    """Routers of the ranks see scores that are off in the last bits; the answer with the other experts is right."""
    from cpbench.models.router import Router

    right = Router.scores

    def rounded(self, x_nM):
        scores = right(self, x_nM)
        return scores if x_nM.dtype == torch.float64 else (scores * 64).round() / 64 + 1e-3 * scores.flip(1)

    with monkeypatch.context() as patch:
        patch.setattr(Router, "scores", rounded)
        answers, kernel = run(cell_of(Layout.parse("cp2/ep2"), QWEN3, "bfloat16"))
        check = judge(answers, kernel, OneDevice(CPU))
    own = ONE_DEVICE.truth(answers[-1].cell).experts.chosen_LNK
    assert bool((own != answers[-1].experts.chosen_LNK).any()), "nothing was flipped"
    assert check.passed, check.reason


@pytest.mark.parametrize(
    "name", ["dp2cp2tp2/ep4tp2", "cp4tp2/dp2ep2tp2", "dp2tp4/dp4ep2", "tp8/ep8", "dp8/tp8", "cp2tp4/ep4tp2", "cp2tp4sp/ep4tp2", "tp8sp/ep8", "dp2tp4sp/dp4ep2"]
)
@pytest.mark.parametrize("dispatch", ["gather", "alltoall"])
def test_each_token_is_computed_in_one_unit(name, dispatch):
    layout = Layout.parse(name)
    counts = tuple(tuple(5 + 3 * dp + cp for cp in range(layout.cp)) for dp in range(layout.dp))
    rows = TokenRows(counts, (False,) * layout.dp, layout.tp if layout.sp else 1)
    units: dict[int, set[tuple[int, int, int]]] = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        unit = unit_of(layout, place, dispatch)
        seen = [(dp, cp, row) for dp, cp, piece in unit_pieces(unit, place, rows) for row in piece]
        taken = {seen[index] for index in unit.rows(len(seen))}
        assert units.setdefault(rank // unit.ranks, taken) == taken, "ranks of a unit see different rows"
    together = [token for taken in units.values() for token in taken]
    assert sorted(together) == [(dp, cp, row) for dp in range(layout.dp) for cp in range(layout.cp) for row in range(rows.rows[dp][cp])]


def test_a_unit_that_straddles_attention_groups_has_no_reach():
    assert unit_reach(Layout(cp=3, tp=2, moe_dp=2, ep=3, moe_tp=1), "gather") is None
    assert unit_reach(Layout(cp=3, tp=2, moe_dp=2, ep=3, moe_tp=1), "alltoall") == (1, 1, 1)
    assert unit_reach(Layout(dp=2, cp=3, moe_dp=3, ep=2), "gather") is None
    assert unit_reach(Layout(dp=2, cp=3, moe_dp=2, ep=3), "gather") == (1, 3, 1)


@pytest.mark.parametrize("config", [QWEN3, V2, V3], ids=["qwen3", "v2", "v3"])
def test_operations_of_all_ranks_are_those_of_the_cell(config):
    for ranks in (4, 8):
        for layout, dispatch in layouts(ranks):
            for lengths in ((64, 32, 128, 32, 64, 96, 16, 80), (3, 256)):
                cell = cell_of(layout, config, lengths=lengths, dispatch=dispatch)
                assert formulas.flops(cell) == pytest.approx(sum(formulas.flops_of_rank(cell, rank) for rank in range(ranks)), rel=1e-3), cell.id


@pytest.mark.parametrize("name", ["cp1", "cp2/ep2", "cp4/ep4", "cp4/dp2ep2", "dp2cp2/ep4"])
@pytest.mark.parametrize("dispatch", ["gather", "alltoall"])
@pytest.mark.parametrize("config", [QWEN3, V3], ids=["qwen3", "v3"])
def test_live_bytes_are_those_of_the_formula(name, dispatch, config):
    """Without tensor-parallel ranks: the local backend needs memory for a sum that process groups do not."""
    layout = Layout.parse(name)
    config = replace(config, hidden=256, heads=8, head_dim=32, experts=replace(config.experts, intermediate=128))
    cell = cell_of(layout, config, lengths=(2048, 2048), dispatch=dispatch if layout.ep > 1 else None, router="uniform")
    world = LocalWorld(layout.world_size, 60)

    def peak(rank: int) -> int:
        program = Program(cell, local_groups(layout, world, rank), load_kernel("cpu_flash"), CPU)
        program.run()  # buffers grow
        if rank:
            program.run()
            return 0
        tracker = LiveTensors(CPU, program.tensors)
        with tracker:
            program.run()
        return tracker.peak

    assert world.run(peak)[0] == pytest.approx(formulas.live_bytes(cell, 0), rel=0.05)


def test_what_does_not_divide_names_the_nearest_layout():
    def reason(name: str, config: ModelConfig = QWEN3, **fields) -> str | None:
        return layout_reason(cell_of(Layout.parse(name), config, lengths=(128,), **fields))

    assert reason("cp8/ep8") is None and reason("cp4tp2/ep4tp2") is None
    assert reason("cp3/ep3") == "8 experts of qwen3 do not divide over ep=3; the nearest valid layout is cp3/dp3"
    assert reason("cp3") == "64 columns of an expert of qwen3 do not divide over /tp=3; the nearest valid layout is cp3/dp3"
    assert reason("tp8/ep2tp4", replace(V3, experts=replace(V3_EXPERTS, intermediate=36))) == (
        "36 FFN columns of v3 do not divide over tp=8; the nearest valid layout is tp4/ep2tp2"
    )
    straddling = reason("cp3tp2/dp2ep3", replace(QWEN3, experts=replace(QWEN3.experts, count=12)), dispatch="gather")
    assert straddling is not None and "3 ranks of cp3tp2/dp2ep3 must see the same tokens" in straddling
    nearest = Layout.parse(straddling.rpartition(" ")[2])
    assert unit_reach(nearest, "gather") is not None and nearest.world_size == 6
    assert reason("cp2", dispatch="alltoall").endswith("the nearest valid value is dispatch=gather")
    assert layout_reason(replace(cell_of(Layout.parse("cp3"), QWEN3), target="attention")) is None
