"""What is exposed and what hides: on a link that is as slow as a test wants, and with marks from a script."""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpbench.distributed.collectives import Recorder
from cpbench.distributed.flight import Flight, FlightLog, Handle
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.intervals import joined
from cpbench.kernels.base import Kernel
from cpbench.layout import Layout
from cpbench.measure.device import Cpu
from cpbench.measure.peaks import data_sheet, measured
from cpbench.measure.split import Alone, shared_split, split, time_links
from cpbench.program import Program
from tests.unit.test_strategies import make

CPU = torch.device("cpu")


class SlowLink:
    """Transfers of a rank go one after the other, each over when `seconds_per_byte` times its bytes have passed on the link."""

    def __init__(self, group, seconds_per_byte):
        self.transfer, self.seconds_per_byte, self.free = group._transfer, seconds_per_byte, 0.0

    def __call__(self, send, receive):
        travels = sum(tensor.numel() * tensor.element_size() for tensor in receive.values())
        self.free = arrives = max(self.free, time.perf_counter()) + travels * self.seconds_per_byte
        handle = self.transfer(send, receive)

        def wait():
            time.sleep(max(0.0, arrives - time.perf_counter()))
            handle.wait()

        return Handle(wait)


class SleepingKernel(Kernel):
    """Attention that takes as long as it is told, per block of a segment; the answer is of no interest."""

    name, summary = "sleeping", "sleeps"

    def __init__(self, seconds_per_pair):
        self.seconds_per_pair = seconds_per_pair

    def available(self, device, dtype, dim_qk, dim_v):
        return None

    def block(self, q, k, v, scale, causal):
        time.sleep(self.seconds_per_pair * q.shape[0] * k.shape[0] * q.shape[1] / (2 if causal else 1))
        return q.new_ones(*q.shape[:2], v.shape[2]), q.new_zeros(q.shape[1], q.shape[0])


def exposed_of(cell, kernel, seconds_per_byte):
    """Of each rank of a marked pass: (exposed, bytes that it received, own seconds)."""
    world = LocalWorld(cell.world_size)

    def rank_program(rank):
        groups, device = local_groups(cell.layout, world, rank), Cpu()
        for group in groups.several():
            group._transfer = SlowLink(group, seconds_per_byte)
        program = Program(cell, groups, kernel, CPU)
        program.prepare()
        program.run()
        groups.recorder.reset()
        groups.world.barrier()
        groups.recorder.flights = log = FlightLog(device.mark)
        seconds = device.time(program.run)
        found = split(log.flights, seconds, {}, device)
        return found.exposed_comm_s, groups.recorder.reset().bytes, found.compute_s

    return world.run(rank_program)


def test_what_a_slow_link_takes_longer_is_exposed_in_a_ring():
    """The attention is far too short to hide it, so it rises by what was injected, within 10%."""
    cell, kernel = make("ring", "zigzag", (64,), cp=4), SleepingKernel(0.0)
    fast = exposed_of(cell, kernel, 0.0)
    delay = 0.6
    for (before, received, _), (after, _, own) in zip(fast, exposed_of(cell, kernel, delay / fast[0][1]), strict=True):
        assert received == fast[0][1], "every rank of a ring receives the same"
        assert own < 0.1 * delay, "what could hide it"
        assert after - before == pytest.approx(delay, rel=0.1)


def test_a_ring_hides_a_link_that_is_faster_than_its_attention():
    cell = make("ring", "zigzag", (64,), cp=2)
    pairs = 64 * 64 / 4 * cell.heads  # about those of one step of a rank
    kernel = SleepingKernel(0.3 / pairs)
    (exposed, received, _), _ = exposed_of(cell, kernel, 0.0)
    for after, _, own in exposed_of(cell, kernel, 0.15 / received):
        assert own > 0.3
        assert after - exposed < 0.05, "0.15 s of transfer behind 0.3 s of attention"


def test_groups_of_heads_hide_all_gathers_but_the_first():
    """K and V take 0.4 s to arrive. In groups, attention to the own rows of each hides a part of it, and the rest of a group the next one."""
    whole = make("allgather", "zigzag", (64,), replace(make().config, kv_heads=4, heads=4), cp=2)
    seconds, received = 0.4, whole.max_rows * whole.shape.row_values * whole.element_bytes
    pairs = 64 * 64 / 4 * whole.heads  # of a rank and one call, about: half of what it computes

    def exposed(attention_seconds, groups):
        cell = replace(whole, head_groups=groups)
        return max(one for one, _, _ in exposed_of(cell, SleepingKernel(attention_seconds / pairs), seconds / received))

    assert exposed(1.0, 4) < 0.1 * seconds, "attention to the own rows of a group takes longer than a group's quarter of the gather"
    together, apart = exposed(0.15, 1), exposed(0.15, 4)
    assert apart < together - 0.1 * seconds, "in one collective nothing hides but what is computed before it arrives"
    assert exposed(0.01, 4) > 0.8 * seconds, "a link that is slower than all attention cannot hide"


class Script:
    """Marks are seconds."""

    torch_device = CPU

    def between(self, first, second):
        return second - first


def flight(begin, started, waiting, done, travels=100, operation="all_gather"):
    return Flight("cp", 2, operation, travels, begin, started, waiting, done)


LINK = {("cp", 2, "all_gather"): Alone(((100, 2.0),))}


@pytest.mark.parametrize(
    ("flights", "exposed", "comm"),
    [
        ([], 0, 0),
        ([flight(0, 0, 0, 3)], 3, 3),  # nothing between start and wait
        ([flight(0, 1, 1, 3)], 3, 3),  # starting takes time too
        ([flight(0, 0, 6, 6)], 0, 2),  # six seconds of work hide a transfer that takes two
        ([flight(0, 0, 1, 2)], 1, 2),  # half of it
        ([flight(0, 0, 1, 9)], 8, 9),  # a peer that is late
        ([flight(0, 0, 3, 3), flight(0, 0, 3, 3)], 0, 3),  # four seconds on the link cannot hide behind three of work
        ([flight(0, 0, 1, 9), flight(0, 0, 9, 9)], 8, 9),  # waiting for one hides nothing of the other
    ],
)
def test_exposed_and_hidden(flights, exposed, comm):
    found = split(flights, 10.0, LINK, Script())
    assert (found.exposed_comm_s, found.comm_s, found.compute_s) == (exposed, comm, 10.0 - exposed)


def test_rows_are_summed_by_kind():
    found = split([flight(0, 0, 0, 1), flight(1, 1, 1, 3, 50), flight(4, 4, 4, 5, 7, "all_reduce")], 10.0, LINK, Script())
    assert found.rows == {("cp", 2, "all_gather"): [2, 150, 3, 3.0], ("cp", 2, "all_reduce"): [1, 7, 1, 0.0]}


def test_time_alone_is_on_the_line_through_two_sizes():
    line = Alone(((100, 1.0), (300, 2.0)))
    assert [line.seconds(travels) for travels in (100, 200, 500)] == [1.0, 1.5, 3.0]
    assert line.bytes_per_s == 150
    assert Alone(((100, 2.0),)).seconds(50) == 1.0
    assert Alone(((100, 5.0), (1000, 1.0))).seconds(5000) == 0.0, "a line that falls ends at nothing"


@pytest.mark.parametrize(
    ("windows", "union"), [([], []), ([(2, 4), (0, 1)], [(0, 1), (2, 4)]), ([(0, 3), (1, 2), (2, 5)], [(0, 5)]), ([(0, 1), (1, 2)], [(0, 2)])]
)
def test_union_of_windows(windows, union):
    assert joined(windows) == union


@given(st.data())
def test_what_hides_is_own_work_and_counts_once(data):
    """Flights that are all started, and then awaited in any order, by one thread."""
    count = data.draw(st.integers(1, 6))
    order, stretches, now = data.draw(st.permutations(range(count))), [], 0.0
    for _ in range(2 * count):
        begin = now + data.draw(st.floats(0, 1))
        now = begin + data.draw(st.floats(0, 1))
        stretches.append((begin, now))
    flights = [flight(*stretches[number], *stretches[count + order[number]]) for number in range(count)]
    found = split(flights, now, {("cp", 2, "all_gather"): Alone(((100, data.draw(st.floats(0, 10))),))}, Script())
    assert found.exposed_comm_s <= found.comm_s <= now + 1e-9
    assert found.compute_s + found.exposed_comm_s == pytest.approx(now)


def test_ranks_time_the_same_sizes_whatever_they_received():
    """Rank 0 received less than rank 1, rank 2 nothing at all."""
    world, layout = LocalWorld(3, timeout=20), Layout(cp=3)

    def rank_program(rank):
        groups = local_groups(layout, world, rank)
        mine = [Flight("cp", 3, "all_to_all", 1000 * rank, 0.0, 0.0, 0.0, 0.0)] if rank < 2 else []
        mine += [Flight("cp", 3, "all_reduce", 64, 0.0, 0.0, 0.0, 0.0)]
        return time_links(groups, mine, Cpu())

    links = world.run(rank_program)
    assert set(links[0]) == {("cp", 3, "all_to_all"), ("cp", 3, "all_reduce")}
    assert all([size for size, _ in found["cp", 3, "all_to_all"].points] == [1000] for found in links)
    assert all(seconds > 0 for found in links for alone in found.values() for _, seconds in alone.points)


def test_the_split_is_that_of_the_rank_with_most_work():
    world, layout = LocalWorld(2, timeout=20), Layout(cp=2)

    def rank_program(rank):
        groups = local_groups(layout, world, rank)
        waited = [0.5, 0.1][rank]
        return shared_split([Flight("cp", 2, "all_gather", 4096, 0.0, 0.0, 0.0, waited)], [1.0, 1.0], groups, Cpu())

    first, second = world.run(rank_program)
    assert first["rank"] == second["rank"] == 1
    assert (first["compute_s"], first["exposed_comm_s"]) == (0.9, 0.1)
    assert first["compute_skew"] == pytest.approx(0.9 / 0.7)
    assert [rank["exposed_comm_s"] for rank in first["ranks"]] == [0.5, 0.1]
    (row,) = first["collectives"]
    assert (row["axis"], row["operation"], row["calls"], row["bytes"]) == ("cp", "all_gather", 1, 4096)
    assert row["bytes_per_s"] > 0


def test_handles_are_marked_only_where_somebody_asks():
    world = LocalWorld(2, timeout=20)

    def rank_program(rank):
        group = world.group("cp", range(2), rank, Recorder())
        group.all_reduce(torch.ones(4))
        group.recorder.flights = log = FlightLog(Cpu().mark)
        group.all_reduce(torch.ones(4))
        out = torch.empty(8)
        handle = group.all_gather(out, torch.ones(4))
        assert len(log.flights) == 1, "in flight until somebody has waited"
        handle.wait()
        handle.wait()
        return [(flight.operation, flight.size, flight.travels) for flight in log.flights]

    assert world.run(rank_program) == [[("all_reduce", 2, 16), ("all_gather", 2, 16)]] * 2


def test_data_sheets():
    assert data_sheet("NVIDIA H200", "bfloat16", "none").flops == 989.4e12
    assert data_sheet("NVIDIA H100 PCIe", "float16", "none").flops == 756e12
    assert data_sheet("NVIDIA H100 80GB HBM3", "bfloat16", "fp8").flops == 1978.9e12
    assert data_sheet("NVIDIA A100-SXM4-80GB", "float32", "none").flops == 19.5e12
    assert data_sheet("NVIDIA A100-SXM4-80GB", "bfloat16", "fp8") is None, "an A100 has no FP8"
    assert data_sheet("Unheard of 9000", "bfloat16", "none") is None


def test_a_measured_peak_says_so():
    peak = measured(torch.float32)
    assert peak.flops > 1e9
    assert not peak.is_limit
    assert peak.source.startswith("the fastest float32 GEMM of")
