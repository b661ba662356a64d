"""Libraries that bring their own collectives, projected: what they start and await is on the tape, as if the others were there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from cpbench.distributed.collectives import Recorder
from cpbench.distributed.fake import fake_group, leave
from cpbench.distributed.null import NullGroup
from cpbench.distributed.traffic import Transfer
from cpbench.errors import CpbenchError
from cpbench.measure.device import open_device
from cpbench.measure.memory import LiveTensors
from cpbench.projection.projecting import Target, project
from cpbench.projection.simulated import classes, simulate
from tests.unit.test_simulated import KERNEL, make, on_shapes, on_tape

SIZE, ROWS = 4, 6
WHOLE = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed them and warns on the old names
GATHER = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
SCATTER = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
LIBRARIES = ["torch-cp", "torch-cp-ring", "local-map"]


@dataclass
class Noted:
    """A tape on which starts and waits are words."""

    fills: bool = False
    events: list[str] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)

    def start(self, transfer: Transfer) -> int:
        self.transfers.append(transfer)
        self.events.append(f"start {len(self.transfers)}")
        return len(self.transfers)

    def wait(self, number: int) -> None:
        self.events.append(f"wait {number}")


@pytest.fixture(autouse=True)
def _leave():
    yield
    leave()
    assert not dist.is_initialized()


def under(library: Callable[[dist.ProcessGroup], object], rank: int = 1, world: int = 2 * SIZE, fills: bool = False) -> Noted:
    """What is noted of a library on the second four ranks of eight."""
    tape = Noted(fills)
    group = NullGroup("cp", range(SIZE, 2 * SIZE), rank, Recorder(), tape, False, world)
    handle = group.process_group
    with group.foreign():
        library(handle)
    return tape


def test_a_ring_of_sends_and_receives() -> None:
    arrived = torch.zeros(ROWS)

    def library(group: dist.ProcessGroup) -> None:
        here, size = dist.get_rank(group), dist.get_world_size(group)
        assert (here, size, dist.get_rank()) == (1, SIZE, SIZE + 1)
        after, before = (dist.get_global_rank(group, (here + step) % size) for step in (1, -1))
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(ROWS), after, group), dist.P2POp(dist.irecv, arrived, before, group)])
        for work in works:
            work.wait()

    tape = under(library, fills=True)
    assert tape.transfers == [
        Transfer("cp", SIZE, "send_recv", ROWS * 4, (1,), ()),
        Transfer("cp", SIZE, "send_recv", ROWS * 4, (), (SIZE - 1,)),
    ]
    assert tape.events == ["start 1", "start 2", "wait 1", "wait 2"]
    assert arrived.abs().min() > 0, "received rows are as good as real ones"


def test_collectives_of_c10d() -> None:
    block, whole = torch.ones(ROWS, 2), torch.full((SIZE * ROWS, 2), 7.0)
    everybody = tuple(range(1, SIZE))

    def library(group: dist.ProcessGroup) -> None:
        first = WHOLE(whole, block, group=group, async_op=True)
        second = dist.all_to_all_single(torch.empty(3, 2), torch.empty(5, 2), [0, 1, 0, 2], [3, 2, 0, 0], group=group, async_op=True)
        second.wait()
        first.wait()
        dist.all_reduce(block, group=group)
        dist.all_gather([torch.empty_like(block) for _ in range(SIZE)], block, group=group)
        dist.broadcast(block, group=group, group_src=dist.get_rank(group))

    tape = under(library)
    assert tape.transfers == [
        Transfer("cp", SIZE, "all_gather", 3 * ROWS * 8, everybody, everybody),
        Transfer("cp", SIZE, "send_recv", 2 * 8, (SIZE - 1,), (2,)),
        Transfer("cp", SIZE, "all_reduce", 2 * ROWS * 8 * 3 // 4, everybody, everybody),
        Transfer("cp", SIZE, "all_gather", 3 * ROWS * 8, everybody, everybody),
        Transfer("cp", SIZE, "broadcast", ROWS * 8, everybody, everybody),
    ]
    assert tape.events == ["start 1", "start 2", "wait 2", "wait 1", *(f"{what} {number}" for number in (3, 4, 5) for what in ("start", "wait"))]
    assert bool((whole == 7).all()), "nothing is copied, which would take time"


def test_functional_collectives_have_their_window_and_the_size_of_their_answer() -> None:
    def library(group: dist.ProcessGroup) -> None:
        gathered = GATHER(torch.ones(ROWS, 2), 0, group)
        passed = functional.permute_tensor(torch.ones(ROWS), [1, 2, 3, 0], group)
        assert gathered.shape == (SIZE * ROWS, 2)
        assert passed.sum().shape == ()  # which awaits it
        summed = SCATTER(torch.ones(SIZE * ROWS), "sum", 0, group)
        assert summed.shape == (ROWS,)
        functional.wait_tensor(gathered)

    tape = under(library)
    assert [(one.operation, one.travels, one.to, one.source) for one in tape.transfers] == [
        ("all_gather", 3 * ROWS * 8, (1, 2, 3), (1, 2, 3)),
        ("send_recv", ROWS * 4, (1,), (3,)),
        ("reduce_scatter", 3 * ROWS * 4, (1, 2, 3), (1, 2, 3)),
    ]
    assert tape.events == ["start 1", "start 2", "wait 2", "start 3", "wait 1", "wait 3"], "what is never awaited ends with the library"


def test_what_is_under_way_is_kept_until_it_is_awaited() -> None:
    """As NCCL and gloo do, and unlike the fake group: the memory of a library that forgets its inputs is that of a real pass."""
    size = 1 << 20

    def peak(wait_first: bool) -> int:
        def library(group: dist.ProcessGroup) -> None:
            block = torch.ones(size)
            gathered = GATHER(block, 0, group)
            if wait_first:
                functional.wait_tensor(gathered)
            del block, gathered
            torch.ones(8 * size)

        tracker = LiveTensors(torch.device("cpu"), list)
        with tracker:
            under(library)
        return tracker.peak

    assert peak(wait_first=True) == 8 * size * 4
    assert peak(wait_first=False) == (8 + 1 + SIZE) * size * 4


def test_an_operator_that_is_not_known_is_refused() -> None:
    with pytest.raises(CpbenchError, match=r"gather_? is not known"):
        under(lambda group: dist.gather(torch.ones(2), [torch.ones(2)] * SIZE if dist.get_rank(group) == 0 else None, group=group, group_dst=0), rank=0)


def test_a_process_with_neighbours_makes_no_world(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="needs one without"):
            fake_group((0, 1), 0, 2)
        leave()
        assert dist.is_initialized(), "which is left alone"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_strategies_that_bring_collectives(name: str, kind: str) -> None:
    """A layer gathers K and V once, or passes them on in a step for each other rank."""
    cell = make("cp4", name, lengths=(256, 256))
    local = 2 * 64 * 2 * cell.kv_heads * cell.config.head_dim * 4
    calls, operation = {"torch-cp-ring": (3, "send_recv")}.get(name, (1, "all_gather"))
    assert len(classes(cell)) == cell.world_size, "libraries know their place, and do what they like with it"
    for rank in range(cell.world_size):
        found = on_tape(on_shapes(cell, rank, kind))
        assert found.pop(("cp", "all_reduce"))[0] == 1, "of the last token of each sequence"
        assert found == {("cp", operation): (calls * 3, 3 * local * 3)}
        assert not dist.is_initialized()


@pytest.mark.parametrize("name", LIBRARIES)
def test_on_real_tensors_it_is_the_same(name: str) -> None:
    cell, device = make("cp2tp2" if name == "local-map" else "cp2", name), open_device("cpu", 0)
    for rank in (0, cell.world_size - 1):
        real = simulate(cell, rank, KERNEL, device, device.torch_device, each=2)
        assert on_tape(real) == on_tape(on_shapes(cell, rank))


def test_a_ring_hides_behind_work_what_it_starts_before_it() -> None:
    script = on_shapes(make("cp4", "torch-cp-ring"), 0)
    steps = next(section.steps for section in script.sections if section.layer is not None)
    ring = [step for step in steps if step.transfer is None or step.transfer.axis == "cp"]
    assert [step.transfer is not None for step in ring] == [True, False] * 3, "one under way at a time"
    real = project(make("cp4", "torch-cp-ring", lengths=(8192,), dtype="bfloat16", device="cuda"), Target("h200")).metrics
    assert 0 <= real["projected_exposed_comm_s"].median < real["projected_comm_s"].median


@pytest.mark.parametrize("name", LIBRARIES)
def test_they_are_projected_with_what_is_taken_for_granted(name: str) -> None:
    found = project(make("cp4", name), Target("cpu", gpus_per_node=8))
    assert found.status == "ok"
    assert "collectives of a library are taken to cost what those of cpbench do" in found.warnings


def test_what_is_compiled_is_projected_as_it_is_before() -> None:
    found = project(make("cp2", "local-map", compile="inductor"), Target("cpu"))
    assert any("compiled" in text for text in found.warnings)
