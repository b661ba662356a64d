"""Programs of single ranks on the null backend: what they move is what formulas say, which ranks are alike, and how much memory they need."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpbench import formulas
from cpbench.cell import Cell
from cpbench.device_kind import kind_of
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.distributed.traffic import Traffic
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.measure.device import open_device
from cpbench.measure.memory import LiveTensors, OneBlock
from cpbench.models.presets import PRESETS
from cpbench.plan import unsupported
from cpbench.program import Program
from cpbench.projection.pricing import PricedClock, PricedKernel
from cpbench.projection.projecting import Target, looked_up, of_all_ranks
from cpbench.projection.replay import replay
from cpbench.projection.simulated import META, classes, peak_of, simulate, stand_ins, without_storage
from cpbench.projection.tape import Script
from cpbench.strategies import STRATEGIES

KERNEL = load_kernel("cpu_flash")
UNEVEN: dict[str, Any] = {"lengths": (101, 67, 130), "prefixes": (0, 40, 17)}
CHUNKED: dict[str, Any] = {"lengths": (150, 64), "prefixes": (21, 0), "chunk": 48, "page_size": 16}
OURS = [name for name, strategy in STRATEGIES.items() if not strategy.brings_collectives and name != "none"]


class Nothing:
    """A clock on which nothing takes time."""

    def mark(self) -> float:
        return 0.0

    def between(self, first: float, second: float) -> float:
        return second - first


def make(layout: str, strategy: str = "none", model: str = "qwen3-tiny", layers: int = 3, partition: str | None = None, **options: Any) -> Cell:
    config = PRESETS[model]
    partition = partition or STRATEGIES[strategy].partitions[0]
    options = {"lengths": (256,), "target": "prefill", "dtype": "float32", "device": "cpu"} | options
    cell = Cell(config=config, layers=layers, layout=Layout.parse(layout), strategy=strategy, partition=partition, kernel="auto", **options)
    assert unsupported(cell) is None, unsupported(cell)
    return cell


Counts = dict[tuple[str, str], tuple[int, int]]


def bytes_of(counts: Counts) -> dict[tuple[str, str], int]:
    return {name: received for name, (_, received) in counts.items()}


def on_tape(script: Script) -> Counts:
    """Calls and bytes received by axis and operation, of transfers in which something is received."""
    found = Traffic()
    for transfer, times in script.transfers:
        if transfer.source and transfer.travels:
            found.add(transfer.axis, transfer.operation, transfer.travels * times, times)
    return found.counts


def expected(cell: Cell, rank: int) -> Counts:
    return {name: counts for name, counts in formulas.traffic(cell, rank).counts.items() if counts[1]}


def on_shapes(cell: Cell, rank: int, kind: str = "cpu") -> Script:
    with without_storage(kind):
        return simulate(cell, rank, KERNEL, Nothing(), META, is_nccl=kind == "cuda")


PARTITIONED = [(name, partition) for name in OURS for partition in STRATEGIES[name].partitions]
CELLS = {
    **{f"{name}-{partition}": make("cp8u4" if name == "usp" else "cp4", name, partition=partition, **UNEVEN) for name, partition in PARTITIONED},
    **{f"{name}-chunks": make("cp4u2" if name == "usp" else "cp2", name, **CHUNKED) for name in OURS},
    "tp": make("tp4"),
    "tp-sp": make("tp2sp", **UNEVEN),
    "tp-sp-pieces": make("tp2sp", sp_chunks=2, **UNEVEN),
    "cp-tp-sp": make("cp2tp2sp", "ring", **UNEVEN),
    "dp": make("dp2cp2", "allgather", **UNEVEN),
    "pp": make("pp2", layers=5),
    "pp-chunks": make("pp2cp2", "ring", layers=4, **CHUNKED),
    "layer": make("cp2tp2", "ulysses", target="layer", layers=1),
    "attention": make("cp4", "ring", target="attention", layers=1),
    "latent": make("cp2tp2", "allgather", "deepseek-v2-tiny", layers=4, **UNEVEN),
    "latent-absorbed": make("cp2", "ring", "deepseek-v2-tiny", mla="absorbed", **UNEVEN),
    "selected": make("cp2", "allgather", "deepseek-v3.2-tiny", **UNEVEN),
    "experts": make("cp2tp2/ep4", "ring", "qwen3-moe-tiny", lengths=(512,)),
    "experts-tp": make("tp2", "none", "deepseek-v3-tiny", layers=4, **UNEVEN),
    "experts-sp": make("tp4sp/ep4", "none", "qwen3-moe-tiny", lengths=(512,)),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_a_rank_starts_is_what_formulas_say_on_shapes_alone(name: str, kind: str) -> None:
    cell = CELLS[name]
    for rank in list(classes(cell))[:3]:
        found, predicted = on_tape(on_shapes(cell, rank, kind)), expected(cell, rank)
        if cell.sp_chunks == 1:
            assert found == predicted
        else:  # a collective goes in pieces
            assert bytes_of(found) == bytes_of(predicted)
            assert found["tp", "all_gather"][0] > predicted["tp", "all_gather"][0]


@pytest.mark.parametrize("name", ["allgather-zigzag", "ring-zigzag", "tp-sp", "pp-chunks", "latent", "experts", "experts-tp"])
def test_on_real_tensors_it_is_the_same(name: str) -> None:
    cell, device = CELLS[name], open_device("cpu", 0)
    rank = max(classes(cell))
    real = simulate(cell, rank, KERNEL, device, device.torch_device, each=2)
    assert on_tape(real) == expected(cell, rank)
    assert 0 < real.work_s < 60


def test_one_layer_of_a_kind_stands_for_all_and_two_share_them() -> None:
    cell = make("pp2tp2", model="deepseek-v3-tiny", layers=8)  # of which the first is dense
    stages = [cell.stage_layers(stage) for stage in (0, 1)]
    assert sum(len(stage) for stage in stages) == 8
    for each in (1, 2):
        for stage in stages:
            counts = stand_ins(cell, stage, each)
            assert sum(counts.values()) == len(stage)
            assert {cell.config.is_sparse(layer) for layer in counts} == {cell.config.is_sparse(layer) for layer in stage}
            assert all(layer in stage for layer in counts)
    times = [section.times for section in on_shapes(cell, 0).sections if section.layer is not None]
    assert sum(times) == len(stages[0])


@pytest.mark.parametrize(("layout", "count"), [("cp4", 4), ("cp4tp2", 4), ("tp4", 1), ("dp2tp2", 2), ("pp2", 2), ("pp4", 3)])
def test_ranks_that_differ(layout: str, count: int) -> None:
    """Without zigzag every context-parallel rank has work of its own, tensor-parallel ranks have equal programs, and stages in the middle too."""
    cell = make(layout, "ring" if "cp" in layout else "none", partition="contiguous", layers=8, lengths=(256, 128))
    found = classes(cell)
    assert len(found) == count
    assert sorted(rank for ranks in found.values() for rank in ranks) == list(range(cell.world_size))
    assert all(first == ranks[0] for first, ranks in found.items())


@pytest.mark.parametrize("name", ["allgather-zigzag", "ulysses-contiguous", "cp-tp-sp", "dp", "pp-chunks", "experts"])
def test_ranks_that_are_alike_are_worth_one_run(name: str) -> None:
    """Every rank simulated by itself comes to the same as those that differ."""
    cell, target = CELLS[name], Target("cpu", gpus_per_node=8)
    profile = target.profile()
    scripts, _ = looked_up(cell, profile)
    links = target.links(profile, cell.world_size)
    shared = replay(cell.layout, of_all_ranks(cell, scripts), links)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cpbench.projection.projecting.classes", lambda cell: {rank: [rank] for rank in range(cell.world_size)})
        each, _ = looked_up(cell, profile)
    assert len(each) == cell.world_size
    alone = replay(cell.layout, [each[rank] for rank in range(cell.world_size)], links)
    for one, other in zip(alone.ranks, shared.ranks, strict=True):
        assert list(vars(one).values()) == pytest.approx(list(vars(other).values()), rel=1e-3)  # the row of a last token is copied where it is


@pytest.mark.parametrize("name", ["allgather-zigzag", "ring-zigzag", "ulysses-contiguous", "allgather-chunks", "ring-chunks", "attention"])
def test_the_peak_is_that_of_real_tensors(name: str) -> None:
    cell = CELLS[name]
    kernel, world = OneBlock(KERNEL), LocalWorld(cell.world_size)

    def program(rank: int) -> int:
        program = Program(cell, local_groups(cell.layout, world, rank), kernel, torch.device("cpu"))
        program.prepare()
        program.run()  # buffers grow from chunk to chunk in the first pass, and in no other
        program.prepare()
        with LiveTensors(torch.device("cpu"), program.tensors) as tracker:
            program.run()
        return tracker.peak

    measured = world.run(program)
    with without_storage("cpu"):
        peaks = [peak_of(cell, rank, kernel)[0] for rank in range(cell.world_size)]
    assert peaks == pytest.approx(measured, rel=0.01)


MEMORY = ["allgather-zigzag", "ring-chunks", "usp-chunks", "tp-sp", "dp", "pp", "pp-chunks", "layer", "latent", "selected", "experts", "experts-tp"]


@pytest.mark.parametrize("name", MEMORY)
def test_the_peak_is_about_that_of_the_formula(name: str) -> None:
    cell = CELLS[name]
    with without_storage("cpu"):
        for rank in list(classes(cell))[:2]:
            peak, categories = peak_of(cell, rank, KERNEL)
            assert peak == pytest.approx(formulas.live_bytes(cell, rank), rel=0.05)
            assert sum(categories.values()) == peak


def test_a_model_of_any_size_has_a_peak_in_no_time() -> None:
    """All weights and K/V of 36 layers, a million tokens over eight ranks: nothing is allocated."""
    cell, profile = make("cp8", "allgather", "qwen3-8b", layers=36, lengths=(1 << 20,), dtype="bfloat16", device="cuda"), Target("h200").profile()
    with without_storage("cuda"):
        peak, categories = peak_of(cell, 0, PricedKernel(PricedClock(profile)))
    assert peak == pytest.approx(formulas.live_bytes(cell, 0), rel=0.01)
    assert categories["weights"] == formulas.weights_bytes(cell, 0)


def test_tensors_without_storage_stand_for_a_device_for_a_while() -> None:
    shaped, real = torch.empty(3, device=META), torch.empty(3)
    assert (kind_of(shaped), kind_of(real)) == ("meta", "cpu")
    with without_storage("cuda"):
        assert (kind_of(shaped), kind_of(real)) == ("cuda", "cpu")
        with without_storage("cpu"):
            assert kind_of(shaped) == "cpu"
        assert kind_of(shaped) == "cuda"
    with pytest.raises(ValueError, match="gone"), without_storage("cuda"):
        raise ValueError("gone")
    assert kind_of(shaped) == "meta"
