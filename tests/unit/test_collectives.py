"""The local backend moves what the process-group backend moves, and wire bytes are counted as received."""

import pytest
import torch

from cpbench.distributed.collectives import Recorder
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.traffic import Traffic


def on_every_rank(size, program):
    world = LocalWorld(size)

    def rank_program(rank):
        group = world.group("cp", range(size), rank, Recorder())
        return program(group), group.recorder.reset()

    return world.run(rank_program)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_gather(size):
    def program(group):
        out = torch.empty(size * 2, 3)
        group.all_gather(out, torch.full((2, 3), float(group.rank))).wait()
        return out[:, 0].tolist()

    for out, traffic in on_every_rank(size, program):
        assert out == [float(rank) for rank in range(size) for _ in range(2)]
        assert traffic.bytes == (size - 1) * 2 * 3 * 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_to_all_with_uneven_rows(size):
    """Rank r sends r + 1 rows to everybody."""

    def program(group):
        rows = [rank + 1 for rank in range(size)]
        out = torch.empty(sum(rows), 1)
        block = torch.arange(size, dtype=torch.float32).repeat_interleave(group.rank + 1)[:, None] + 10 * group.rank
        group.all_to_all(out, block, rows, [group.rank + 1] * size).wait()
        return group.rank, out.flatten().tolist()

    for (rank, out), traffic in on_every_rank(size, program):
        assert out == [float(10 * source + rank) for source in range(size) for _ in range(source + 1)]
        assert traffic.bytes == 4 * (sum(range(1, size + 1)) - rank - 1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_reduce_and_share(size):
    def program(group):
        tensor = torch.full((4,), float(group.rank + 1))
        group.all_reduce(tensor)
        return tensor.tolist(), group.share([group.rank, 0.5])

    for (total, shared), traffic in on_every_rank(size, program):
        assert total == [size * (size + 1) / 2] * 4
        assert shared == [[rank, 0.5] for rank in range(size)]
        assert traffic.bytes == 2 * 16 * (size - 1) // size, "sharing numbers is not payload"


def test_shift_goes_to_the_next_rank():
    def program(group):
        received = torch.empty(1)
        handle = group.shift(torch.tensor([float(group.rank)]), received)
        handle.wait()
        return group.rank, received.item()

    assert [out for out, _ in on_every_rank(3, program)] == [(0, 2.0), (1, 0.0), (2, 1.0)]


def test_an_exception_on_one_rank_releases_the_others_and_is_raised():
    def program(group):
        if group.rank == 1:
            raise ValueError("planted")
        group.barrier()

    with pytest.raises(ValueError, match="planted"):
        on_every_rank(3, program)


def test_traffic_adds_and_prints():
    traffic = Traffic()
    traffic.add("cp", "all_gather", 10)
    traffic.add("cp", "all_gather", 5, calls=2)
    traffic.add("tp", "all_reduce", 1)
    assert (traffic + traffic) == traffic.times(2)
    assert traffic.times(2).to_dict() == {"cp": {"all_gather": {"calls": 6, "bytes": 30}}, "tp": {"all_reduce": {"calls": 2, "bytes": 2}}}


@pytest.mark.parametrize("rows", [[3], [2, 2], [2, 5], [0, 4, 1], [4, 0]])
def test_all_gather_of_blocks_of_different_lengths(rows):
    def program(group):
        mine = rows[group.rank]
        out = torch.empty(sum(rows), 2)
        group.all_gather_rows(out, torch.full((mine, 2), float(group.rank)), rows).wait()
        return mine, out[:, 1].tolist()

    for (mine, out), traffic in on_every_rank(len(rows), program):
        assert out == [float(rank) for rank, count in enumerate(rows) for _ in range(count)]
        assert traffic.bytes == 4 * 2 * (sum(rows) - mine), "nothing is padded"


@pytest.mark.parametrize("rows", [[3], [2, 2], [2, 5], [0, 4, 1], [4, 0]])
def test_reduce_scatter_of_blocks_of_different_lengths(rows):
    def program(group):
        partial = (torch.arange(sum(rows), dtype=torch.float64) + 100 * group.rank)[:, None]
        return group.rank, group.reduce_scatter_rows(partial, rows).flatten().tolist()

    size, others = len(rows), sum(100 * rank for rank in range(len(rows)))
    for (rank, out), traffic in on_every_rank(size, program):
        first = sum(rows[:rank])
        assert out == [float(size * row + others) for row in range(first, first + rows[rank])]
        assert traffic.bytes == 8 * rows[rank] * (size - 1)


def test_what_is_sent_comes_in_order_and_may_change_once_it_has_left():
    def program(group):
        received = []
        for value in range(3):
            tensor = torch.tensor([float(value)])
            if group.rank == 0:
                group.send(tensor, 1).wait()
                tensor.fill_(-1)
            else:
                group.receive(tensor, 0).wait()
                received.append(tensor.item())
        return received

    (first, _), (second, traffic) = on_every_rank(2, program)
    assert (first, second) == ([], [0.0, 1.0, 2.0])
    assert traffic == Traffic({("cp", "send_recv"): (3, 12)})


def test_who_waits_for_a_message_is_released_too():
    def program(group):
        if group.rank == 1:
            raise ValueError("planted")
        group.receive(torch.empty(1), 1).wait()

    with pytest.raises(ValueError, match="planted"):
        on_every_rank(2, program)


def test_a_message_that_never_comes_is_given_up():
    world = LocalWorld(2, timeout=0.2)

    def program(rank):
        group = world.group("pp", range(2), rank, Recorder())
        if rank == 1:
            group.receive(torch.empty(1), 0).wait()

    with pytest.raises(RuntimeError, match="rank 1 over pp"):
        world.run(program)
