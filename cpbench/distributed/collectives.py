"""Collectives over one axis of a layout, behind one interface with two backends; the only module that calls torch.distributed.

`Group` checks, records and shortcuts; a backend moves the bytes. The *process group* backend, gloo or NCCL, is here, the *local* one in
local.py. Every call is recorded (axis, operation, wire bytes received), and where somebody asks also when it flew (flight.py). What is
sent, and when, is decided by strategies and the communicator.
"""

from __future__ import annotations

import importlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpbench.distributed.flight import FlightLog, Handle, started
from cpbench.distributed.observe import Observation, Observer
from cpbench.distributed.store import await_listener
from cpbench.distributed.traffic import Traffic, summed_parts
from cpbench.partition import cut

# torch 2.13 renamed these calls and warns on the old names; 2.11 has only the old names
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

LET_GO_S = 1e-3


@dataclass
class Recorder:
    """What one rank received: counted by every `Group` that shares the recorder, and observed where a library communicates by itself."""

    traffic: Traffic = field(default_factory=Traffic)
    observation: Observation | None = None  # None: nobody looks, as in timed passes
    flights: FlightLog | None = None  # None: nobody asks when

    @contextmanager
    def observing(self) -> Iterator[Observation]:
        """Look at what libraries receive."""
        self.observation = Observation()
        try:
            yield self.observation
        finally:
            self.observation = None

    @contextmanager
    def marking(self, flights: FlightLog | None) -> Iterator[None]:
        """Log when collectives fly; None: nobody asks."""
        self.flights = flights
        try:
            yield
        finally:
            self.flights = None

    def reset(self) -> Traffic:
        """Return what was counted since the last reset, and start again from nothing."""
        counted, self.traffic = self.traffic, Traffic()
        return counted


class Group(ABC):
    """The ranks of one axis, as seen by one of them. `rank` is the position within the group."""

    def __init__(self, axis: str, ranks: Sequence[int], rank: int, recorder: Recorder) -> None:
        self.axis = axis
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = rank
        self.recorder = recorder

    def all_gather(self, output: Tensor, block: Tensor) -> Handle:
        """Gather equal blocks: `output` [size * n, ...] in rank order from `block` [n, ...]; both contiguous."""
        if self.size == 1:
            output.copy_(block)
            return Handle()
        received = _bytes(block) * (self.size - 1)
        return self._call("all_gather", received, partial(self._all_gather, output, block))

    def all_gather_rows(self, output: Tensor, block: Tensor, rows: Sequence[int]) -> Handle:
        """Gather blocks of different lengths: `output` [sum(rows), ...] in rank order from `block` [rows[rank], ...]; both contiguous.

        Nothing is padded: where the lengths differ, blocks travel from rank to rank, straight to where they belong.
        """
        if len(set(rows)) == 1:
            return self.all_gather(output, block)
        received = _bytes(output) - _bytes(block)
        return self._call("all_gather", received, partial(self._gather_blocks, torch.split(output, list(rows)), block))

    def reduce_scatter_rows(self, partial: Tensor, rows: Sequence[int]) -> Tensor:
        """Sum `partial` [sum(rows), ...], contiguous, over the ranks and keep one's own rows [rows[rank], ...].

        NCCL does it where lengths are equal. Else rows travel straight to whom they belong, a piece at a time while the one before is summed,
        in rank order: that takes blocks of different lengths, receives size - 1 times the output as a ring does (gloo's own receives as much as
        an all-reduce), and needs space for two pieces.
        """
        row = _bytes(partial) // max(1, len(partial))
        self._record("reduce_scatter", rows[self.rank] * row * (self.size - 1))
        return self._reduce_scatter(partial, rows, summed_parts(max(rows) * row))

    def reduce_scatter_pieces(self, rows_nX: Tensor, last: Callable[[Tensor], Tensor], rows: Sequence[int], parts: int) -> Tensor:
        """`reduce_scatter_rows` of last(rows_nX), a function of each row by itself that is computed a piece at a time: one's own rows.

        While a piece is on its way, the next one is computed.
        """
        blocks = torch.split(rows_nX, list(rows))

        def computed(pieces: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
            values = last(torch.cat([block[first:end] for block, (first, end) in zip(blocks, pieces, strict=True)]))
            return torch.split(values, [end - first for first, end in pieces])

        output = self._summed(computed, rows, parts)
        self._record("reduce_scatter", _bytes(output) * (self.size - 1))
        return output

    def _summed(self, pieces_of: Callable[[Sequence[tuple[int, int]]], Sequence[Tensor]], rows: Sequence[int], parts: int) -> Tensor:
        """One's own rows of what `pieces_of` gives of the rows of each rank, summed over the ranks; `parts` is one at least."""
        cuts = [cut(count, parts) for count in rows]
        output: Tensor | None = None
        arriving: tuple[Handle, Tensor, Tensor] | None = None
        for spans in zip(*cuts, strict=True):
            first, end = spans[self.rank]
            pieces = pieces_of(spans)
            if output is None:
                output = pieces[0].new_empty(rows[self.rank], *pieces[0].shape[1:])
            received = output.new_empty(self.size, end - first, *output.shape[1:])
            handle = self._start("reduce_scatter", _bytes(received[1:]), partial(self._exchange, received.unbind(), pieces))
            del pieces
            if arriving is not None:
                _sum_arrived(*arriving)
            arriving = handle, received, output[first:end]
        assert output is not None and arriving is not None, "rows go in one part at least"
        _sum_arrived(*arriving)
        return output

    def all_gather_pieces(self, block: Tensor, rows: Sequence[int], parts: int) -> Iterator[tuple[Tensor, list[tuple[slice, slice]]]]:
        """`all_gather_rows` a piece at a time, the next one under way: the piece of all ranks, and where the rows of each lie in it and in the whole."""
        self._record("all_gather", (sum(rows) - rows[self.rank]) * _bytes(block) // max(1, len(block)))
        cuts, starts = [cut(count, parts) for count in rows], [sum(rows[:rank]) for rank in range(self.size)]
        coming: tuple[Handle, Tensor, list[tuple[slice, slice]]] | None = None
        for index in range(parts):
            spans = [one[index] for one in cuts]
            sizes = [last - first for first, last in spans]
            ends = list(accumulate(sizes))
            piece = block.new_empty(ends[-1], *block.shape[1:])
            mine = block[slice(*spans[self.rank])]
            handle = self._start("all_gather", _bytes(piece) - _bytes(mine), partial(self._gather_blocks, list(torch.split(piece, sizes)), mine))
            places = [
                (slice(end - size, end), slice(start + first, start + last)) for (first, last), size, end, start in zip(spans, sizes, ends, starts, strict=True)
            ]
            if coming is not None:
                coming[0].wait()
                yield coming[1], coming[2]
            coming = handle, piece, places
        if coming is not None:
            coming[0].wait()
            yield coming[1], coming[2]

    def gather_products(self, block: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """x W^T for each weight [N, K], where x [size * n, K] are the equal blocks [n, K] of all ranks, in rank order.

        On NCCL the block of one rank is multiplied while that of the next is on its way (PyTorch's symmetric memory).
        """
        self._record("all_gather", _bytes(block) * (self.size - 1))
        return self._gather_products(block, weights)

    def product_scatter(self, rows_nK: Tensor, weight_NK: Tensor) -> Tensor:
        """x W^T summed over the ranks, of which each keeps an equal share [n / size, N]; a share is computed while the one before is on its way."""
        output = self._product_scatter(rows_nK, weight_NK)
        self._record("reduce_scatter", _bytes(output) * (self.size - 1))
        return output

    def products_refusal(self) -> str | None:
        """Why these two cannot be called here; None if they can."""
        return None

    def _gather_blocks(self, pieces: Sequence[Tensor], block: Tensor) -> Handle:
        """Every rank's block into its piece."""
        return self._exchange(pieces, [block] * self.size)

    def _exchange(self, pieces: Sequence[Tensor], blocks: Sequence[Tensor]) -> Handle:
        """A block for each rank, and a piece from each, straight from rank to rank."""
        pieces[self.rank].copy_(blocks[self.rank])
        peers = [peer for peer in range(self.size) if peer != self.rank]
        return self._transfer({peer: blocks[peer] for peer in peers if len(blocks[peer])}, {peer: pieces[peer] for peer in peers if len(pieces[peer])})

    def all_to_all(self, output: Tensor, block: Tensor, output_rows: Sequence[int], block_rows: Sequence[int]) -> Handle:
        """Send `block_rows[r]` leading rows to each rank r in turn; receive `output_rows[r]` from it. Both tensors contiguous."""
        if self.size == 1:
            output.copy_(block)
            return Handle()
        row = _bytes(output[:1]) if output.shape[0] else 0
        received = row * (sum(output_rows) - output_rows[self.rank])
        return self._call("all_to_all", received, partial(self._all_to_all, output, block, list(output_rows), list(block_rows)))

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place. A ring all-reduce receives 2 (size - 1) / size of the tensor; that is what is recorded."""
        if self.size == 1:
            return
        received = 2 * _bytes(tensor) * (self.size - 1) // self.size
        self._call("all_reduce", received, partial(self._all_reduce, tensor)).wait()

    def shift(self, send: Tensor, receive: Tensor) -> Handle:
        """Send to the next rank and receive from the previous one, around the ring."""
        if self.size == 1:
            receive.copy_(send)
            return Handle()
        peers = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self._call("send_recv", _bytes(receive), partial(self._transfer, {peers[0]: send}, {peers[1]: receive}))

    def send(self, tensor: Tensor, to: int) -> Handle:
        """Send a contiguous tensor to a rank of the group, which receives it. It must not change before `wait()` has returned."""
        return self._start("send_recv", _bytes(tensor), partial(self._send, tensor, to))

    def receive(self, tensor: Tensor, source: int) -> Handle:
        """Receive into a contiguous tensor what a rank of the group sends; several from one rank come in order."""
        return self._call("send_recv", _bytes(tensor), partial(self._receive, tensor, source))

    @property
    def process_group(self) -> Any:
        """What torch.distributed calls this group, for libraries that communicate by themselves; None where there is none."""
        return None

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at what libraries receive, which inside of what they compiled cannot be seen."""
        return self.recorder.observation is not None

    def foreign(self) -> AbstractContextManager[object]:
        """Around a library's code that communicates over this group: what it receives is observed while the recorder looks."""
        observation = self.recorder.observation
        return nullcontext() if observation is None else Observer(self.axis, observation)

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called. Not recorded: it moves no payload."""

    @abstractmethod
    def share(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers (equally many on each), in rank order. Control plane: not recorded."""

    def _all_gather(self, output: Tensor, block: Tensor) -> Handle:
        return self._gather_blocks(output.view(self.size, *block.shape).unbind(), block)

    def _all_to_all(self, output: Tensor, block: Tensor, output_rows: list[int], block_rows: list[int]) -> Handle:
        return self._exchange(torch.split(output, output_rows), torch.split(block, block_rows))

    @abstractmethod
    def _all_reduce(self, tensor: Tensor) -> Handle: ...

    def _gather_products(self, block: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        rows = block.new_empty(self.size * len(block), block.shape[1])
        self._start("all_gather", _bytes(block) * (self.size - 1), partial(self._all_gather, rows, block)).wait()
        return [rows @ weight.T for weight in weights]

    def _product_scatter(self, rows_nK: Tensor, weight_NK: Tensor) -> Tensor:
        return self._reduce_scatter(rows_nK @ weight_NK.T, [len(rows_nK) // self.size] * self.size, 1)

    def _reduce_scatter(self, partial: Tensor, rows: Sequence[int], parts: int) -> Tensor:
        blocks = torch.split(partial, list(rows))
        return self._summed(lambda pieces: [block[first:end] for block, (first, end) in zip(blocks, pieces, strict=True)], rows, parts)

    @abstractmethod
    def _transfer(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Handle:
        """One tensor to each of some ranks of the group, and one from each of some, at the same time."""

    @abstractmethod
    def _send(self, tensor: Tensor, to: int) -> Handle: ...

    @abstractmethod
    def _receive(self, tensor: Tensor, source: int) -> Handle: ...

    def _record(self, operation: str, received: int) -> None:
        self.recorder.traffic.add(self.axis, operation, received)

    def _call(self, operation: str, received: int, begin: Callable[[], Handle]) -> Handle:
        """Count a collective in which this rank receives so many bytes, and start it."""
        self._record(operation, received)
        return self._start(operation, received, begin)

    def _start(self, operation: str, travels: int, begin: Callable[[], Handle]) -> Handle:
        """Start a collective, or a piece of one, in which so many bytes travel to (or from) this rank, under the eyes of who looks on."""
        return started(self.axis, self.size, operation, travels, begin, self.recorder.flights)


class ProcessGroup(Group):
    """gloo or NCCL."""

    def __init__(self, axis: str, ranks: Sequence[int], rank: int, recorder: Recorder, group: dist.ProcessGroup | None) -> None:
        super().__init__(axis, ranks, rank, recorder)
        self._group = group
        self._is_nccl = self.size > 1 and dist.get_backend(group) == "nccl"

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """None for a group of one rank within a larger world: no process group is made for it."""
        whole = self.size == dist.get_world_size()
        return dist.group.WORLD if self._group is None and whole else self._group

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self._group)

    def share(self, values: Sequence[float]) -> list[list[float]]:
        device = "cuda" if self._is_nccl else "cpu"
        mine = torch.tensor(list(values), dtype=torch.float64, device=device)
        everyone = mine.repeat(self.size)
        if self.size > 1:
            self._all_gather(everyone, mine).wait()
        shared: list[list[float]] = everyone.view(self.size, -1).tolist()
        return shared

    def _all_gather(self, output: Tensor, block: Tensor) -> Handle:
        if self._is_nccl:
            return Handle(_all_gather_single(output, block, group=self._group, async_op=True).wait)
        return super()._all_gather(output, block)  # gloo's own takes up to three times as long for large blocks

    def _reduce_scatter(self, partial: Tensor, rows: Sequence[int], parts: int) -> Tensor:
        if not self._is_nccl or len(set(rows)) > 1:
            return super()._reduce_scatter(partial, rows, parts)
        output = partial.new_empty(rows[0], *partial.shape[1:])

        def begin() -> Handle:
            _reduce_scatter_single(output, partial, group=self._group)
            return Handle()

        self._start("reduce_scatter", _bytes(output) * (self.size - 1), begin).wait()
        return output

    def _all_to_all(self, output: Tensor, block: Tensor, output_rows: list[int], block_rows: list[int]) -> Handle:
        if self._is_nccl:
            return Handle(dist.all_to_all_single(output, block, output_rows, block_rows, group=self._group, async_op=True).wait)
        return super()._all_to_all(output, block, output_rows, block_rows)  # a thread of gloo's own keeps what was sent alive after wait() has returned

    def products_refusal(self) -> str | None:
        if not self._is_nccl:
            return None
        node = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if not hasattr(_fused(), "fused_all_gather_matmul"):
            return f"PyTorch {torch.__version__} has no products that are fused with collectives; the nearest valid value is sp_fused=false"
        devices = [rank % node for rank in self.ranks]
        reach = all(a == b or torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices)
        if reach and len({rank // node for rank in self.ranks}) == 1:
            return None
        return f"the GPUs of {self.axis} cannot read each other's memory, which fused products do; the nearest valid value is sp_fused=false"

    def _gather_products(self, block: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        if not self._is_nccl:
            return super()._gather_products(block, weights)
        _, outputs = _fused().fused_all_gather_matmul(block, [weight.t() for weight in weights], 0, self._name, return_A=False)
        return list(outputs)

    def _product_scatter(self, rows_nK: Tensor, weight_NK: Tensor) -> Tensor:
        if not self._is_nccl:
            return super()._product_scatter(rows_nK, weight_NK)
        output: Tensor = _fused().fused_matmul_reduce_scatter(rows_nK, weight_NK.t(), "sum", 0, self._name)
        return output

    @property
    def _name(self) -> str:
        """What operators of PyTorch know the process group by."""
        group = self.process_group
        assert group is not None, "a group of several ranks"
        return str(group.group_name)

    def _all_reduce(self, tensor: Tensor) -> Handle:
        dist.all_reduce(tensor, group=self._group)
        if self.recorder.observation is not None and not self._is_nccl:
            time.sleep(LET_GO_S)  # gloo's thread drops the tensor a moment after the call: until then memory that is free looks held
        return Handle()

    def _transfer(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Handle:
        operations = [dist.P2POp(dist.isend, tensor, self.ranks[peer], self._group) for peer, tensor in send.items()]
        operations += [dist.P2POp(dist.irecv, tensor, self.ranks[peer], self._group) for peer, tensor in receive.items()]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Handle(lambda: [work.wait() for work in works])

    def _send(self, tensor: Tensor, to: int) -> Handle:
        return _work(dist.isend(tensor, self.ranks[to], self._group))

    def _receive(self, tensor: Tensor, source: int) -> Handle:
        return _work(dist.irecv(tensor, self.ranks[source], self._group))


def backend_available(kind: str) -> bool:
    """Whether this torch build has the backend of a kind of device: NCCL for `cuda`, gloo for everything else."""
    return dist.is_available() and (dist.is_nccl_available() if kind == "cuda" else dist.is_gloo_available())


def start_process_groups(device: torch.device) -> None:
    """Join the process group that torchrun described in the environment: NCCL for CUDA, gloo for everything else.

    Raises ConnectionError where rank 0 cannot be reached.
    """
    if os.environ.get("RANK", "0") != "0":
        await_listener(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)


def _fused() -> Any:
    """PyTorch's operators over symmetric memory, which importing the module registers."""
    with suppress(ImportError):
        importlib.import_module("torch.distributed._symmetric_memory")
    return torch.ops.symm_mem


def _work(work: dist.Work | None) -> Handle:
    assert work is not None, "only ranks of the group send and receive"
    return Handle(work.wait)


def new_process_group(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """The process group of these global ranks; every rank of the world must call, in the same order."""
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    group: dist.ProcessGroup | None = dist.new_group(list(ranks))
    return group


def device_mesh(device_type: str, sizes: Sequence[int], axes: Sequence[str], groups: Sequence[Any]) -> DeviceMesh:
    """The ranks of the world as a mesh, the last axis varying fastest, from this rank's process group of every axis."""
    ranks = torch.arange(dist.get_world_size()).view(*sizes)
    return DeviceMesh.from_group(list(groups), device_type, ranks, mesh_dim_names=tuple(axes))


def stop_process_groups() -> None:
    """Leave the process group; after a failure this is not called, because peers may never answer."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _sum_arrived(handle: Handle, received: Tensor, output: Tensor) -> None:
    """The sum of a piece that every rank has sent [ranks, rows, ...]."""
    handle.wait()
    torch.sum(received, 0, out=output)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
