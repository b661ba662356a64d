"""What the observer reads off collectives of torch.distributed, between two processes: every operation, called both ways, by hand."""

import json
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.multiprocessing import spawn

from cpbench.distributed.observe import OPERATIONS, Observation, Observer

ROW = 4  # bytes of a value


def collectives(rank):
    """(operation, bytes that this rank receives, call), for two ranks and tensors of 10 values."""
    x, two, other = torch.ones(10), [torch.ones(10), torch.ones(10)], 1 - rank
    rows = [3, 7] if rank == 0 else [3, 3]  # rank 0 sends 3 and 3 rows, rank 1 sends 7 and 3
    sent = [3, 3] if rank == 0 else [7, 3]
    uneven, source = torch.ones(sum(rows), 2), torch.ones(sum(sent), 2)
    group = dist.group.WORLD
    gather_single = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return [
        ("all_gather", 10, lambda: into(torch.empty(20), x)),
        ("all_gather", 10, lambda: dist.all_gather(two, x)),
        ("all_gather", 10, lambda: gather_single(x, 0, group).wait()),
        ("all_to_all", 5, lambda: dist.all_to_all_single(torch.empty(10), x)),
        ("all_to_all", 2 * rows[other], lambda: dist.all_to_all_single(uneven, source, rows, sent)),
        ("all_to_all", 2 * rows[other], lambda: functional.all_to_all_single(source, rows, sent, group).wait()),
        ("all_to_all", 10, lambda: functional.permute_tensor(x, [1, 0], group).wait()),
        ("all_reduce", 10, lambda: dist.all_reduce(x)),
        ("all_reduce", 10, lambda: functional.all_reduce(x, "sum", group).wait()),
        ("reduce_scatter", 5, lambda: scatter(torch.empty(5), x)),
        ("broadcast", 0 if rank == 1 else 10, lambda: dist.broadcast(x, 1)),
        ("send_recv", 10, lambda: both_ways(x, torch.empty(10), other)),
    ]


def both_ways(send, receive, other):
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, send, other), dist.P2POp(dist.irecv, receive, other)]):
        work.wait()


def observe(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = []
    for operation, values, call in collectives(rank):
        observation = Observation()
        with torch.inference_mode(), Observer("cp", observation):
            call()
        seen.append([operation, values * ROW, observation.traffic.to_dict(), sorted(observation.unread)])
    observation = Observation()
    with Observer("cp", observation):
        dist.reduce(torch.ones(10), 0)  # no reader: nothing here uses it
        dist.barrier()
    seen.append(["", 0, observation.traffic.to_dict(), sorted(observation.unread)])
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    with suppress(RuntimeError):
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("observe")
    spawn(observe, (folder,), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_bytes_received_are_read_off_every_operation(seen):
    for rank in seen:
        assert {operation for operation, *_ in rank[:-1]} == set(OPERATIONS)
        for operation, received, traffic, unread in rank[:-1]:
            assert traffic == {"cp": {operation: {"calls": 1, "bytes": received}}}, operation
            assert unread == []


def test_an_operation_that_cannot_be_read_is_named_and_a_barrier_is_nothing(seen):
    for rank in seen:
        assert rank[-1][2:] == [{}, ["reduce_"]]
