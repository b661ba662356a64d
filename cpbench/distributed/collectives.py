"""Collectives over one axis of a layout, behind one interface with two backends; the only module that calls torch.distributed.

`Group` checks, records and shortcuts; a backend moves the bytes. The *process group* backend is gloo or NCCL. The *local* backend runs
every rank of a layout as a thread of one process, in lockstep, so that thousands of plans can be verified without starting processes.
Every call is recorded (axis, operation, wire bytes received). What is sent, and when, is decided by strategies and the communicator.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpbench.distributed.observe import Observation, Observer
from cpbench.distributed.traffic import Traffic

# torch 2.13 renamed this call and warns on the old name; 2.11 has only the old name
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass
class Recorder:
    """What one rank received: counted by every `Group` that shares the recorder, and observed where a library communicates by itself."""

    traffic: Traffic = field(default_factory=Traffic)
    observation: Observation | None = None  # None: nobody looks, as in timed passes

    @contextmanager
    def observing(self) -> Iterator[Observation]:
        """Look at what libraries receive."""
        self.observation = Observation()
        try:
            yield self.observation
        finally:
            self.observation = None

    def reset(self) -> Traffic:
        """Return what was counted since the last reset, and start again from nothing."""
        counted, self.traffic = self.traffic, Traffic()
        return counted


class Handle:
    """A collective in flight. `wait()` returns when its output may be read and its input reused."""

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        if self._wait is not None:
            self._wait()
            self._wait = None


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
        self._record("all_gather", _bytes(block) * (self.size - 1))
        return self._all_gather(output, block)

    def all_gather_rows(self, output: Tensor, block: Tensor, rows: Sequence[int]) -> Handle:
        """Gather blocks of different lengths: `output` [sum(rows), ...] in rank order from `block` [rows[rank], ...]; both contiguous.

        Nothing is padded: where the lengths differ, blocks travel from rank to rank, straight to where they belong.
        """
        if len(set(rows)) == 1:
            return self.all_gather(output, block)
        self._record("all_gather", _bytes(output) - _bytes(block))
        pieces = list(torch.split(output, list(rows)))
        pieces[self.rank].copy_(block)
        peers = [peer for peer in range(self.size) if peer != self.rank]
        return self._transfer({peer: block for peer in peers if rows[self.rank]}, {peer: pieces[peer] for peer in peers if rows[peer]})

    def reduce_scatter_rows(self, output: Tensor, partial: Tensor, rows: Sequence[int]) -> None:
        """Sum `partial` [sum(rows), ...] over the ranks and keep one's own rows: `output` [rows[rank], ...]; both contiguous.

        An all-to-all and a local sum in rank order: it takes blocks of different lengths, rounds alike on every backend, and receives
        size - 1 times the output, as a ring does.
        """
        if self.size == 1:
            output.copy_(partial)
            return
        self._record("reduce_scatter", _bytes(output) * (self.size - 1))
        mine = rows[self.rank]
        received = partial.new_empty(self.size * mine, *partial.shape[1:])
        self._all_to_all(received, partial, [mine] * self.size, list(rows)).wait()
        torch.sum(received.unflatten(0, (self.size, mine)), 0, out=output)

    def all_to_all(self, output: Tensor, block: Tensor, output_rows: Sequence[int], block_rows: Sequence[int]) -> Handle:
        """Send `block_rows[r]` leading rows to each rank r in turn; receive `output_rows[r]` from it. Both tensors contiguous."""
        if self.size == 1:
            output.copy_(block)
            return Handle()
        row = _bytes(output[:1]) if output.shape[0] else 0
        self._record("all_to_all", row * (sum(output_rows) - output_rows[self.rank]))
        return self._all_to_all(output, block, list(output_rows), list(block_rows))

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place. A ring all-reduce receives 2 (size - 1) / size of the tensor; that is what is recorded."""
        if self.size == 1:
            return
        self._record("all_reduce", 2 * _bytes(tensor) * (self.size - 1) // self.size)
        self._all_reduce(tensor)

    def shift(self, send: Tensor, receive: Tensor) -> Handle:
        """Send to the next rank and receive from the previous one, around the ring."""
        if self.size == 1:
            receive.copy_(send)
            return Handle()
        self._record("send_recv", _bytes(receive))
        peers = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self._transfer({peers[0]: send}, {peers[1]: receive})

    def send(self, tensor: Tensor, to: int) -> Handle:
        """Send a contiguous tensor to a rank of the group, which receives it. It must not change before `wait()` has returned."""
        return self._send(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Handle:
        """Receive into a contiguous tensor what a rank of the group sends; several from one rank come in order."""
        self._record("send_recv", _bytes(tensor))
        return self._receive(tensor, source)

    @property
    def process_group(self) -> Any:
        """What torch.distributed calls this group, for libraries that communicate by themselves; None where there is none."""
        return None

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

    @abstractmethod
    def _all_gather(self, output: Tensor, block: Tensor) -> Handle: ...

    @abstractmethod
    def _all_to_all(self, output: Tensor, block: Tensor, output_rows: list[int], block_rows: list[int]) -> Handle: ...

    @abstractmethod
    def _all_reduce(self, tensor: Tensor) -> None: ...

    @abstractmethod
    def _transfer(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Handle:
        """One tensor to each of some ranks of the group, and one from each of some, at the same time."""

    @abstractmethod
    def _send(self, tensor: Tensor, to: int) -> Handle: ...

    @abstractmethod
    def _receive(self, tensor: Tensor, source: int) -> Handle: ...

    def _record(self, operation: str, received: int) -> None:
        self.recorder.traffic.add(self.axis, operation, received)


class ProcessGroup(Group):
    """gloo or NCCL."""

    def __init__(self, axis: str, ranks: Sequence[int], rank: int, recorder: Recorder, group: dist.ProcessGroup | None) -> None:
        super().__init__(axis, ranks, rank, recorder)
        self._group = group

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """None for a group of one rank within a larger world: no process group is made for it."""
        whole = self.size == dist.get_world_size()
        return dist.group.WORLD if self._group is None and whole else self._group

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self._group)

    def share(self, values: Sequence[float]) -> list[list[float]]:
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        mine = torch.tensor(list(values), dtype=torch.float64, device=device)
        everyone = mine.repeat(self.size)
        if self.size > 1:
            self._all_gather(everyone, mine).wait()
        shared: list[list[float]] = everyone.view(self.size, -1).tolist()
        return shared

    def _all_gather(self, output: Tensor, block: Tensor) -> Handle:
        return Handle(_all_gather_single(output, block, group=self._group, async_op=True).wait)

    def _all_to_all(self, output: Tensor, block: Tensor, output_rows: list[int], block_rows: list[int]) -> Handle:
        return Handle(dist.all_to_all_single(output, block, output_rows, block_rows, group=self._group, async_op=True).wait)

    def _all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self._group)

    def _transfer(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Handle:
        operations = [dist.P2POp(dist.isend, tensor, self.ranks[peer], self._group) for peer, tensor in send.items()]
        operations += [dist.P2POp(dist.irecv, tensor, self.ranks[peer], self._group) for peer, tensor in receive.items()]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Handle(lambda: [work.wait() for work in works])

    def _send(self, tensor: Tensor, to: int) -> Handle:
        return _work(dist.isend(tensor, self.ranks[to], self._group))

    def _receive(self, tensor: Tensor, source: int) -> Handle:
        return _work(dist.irecv(tensor, self.ranks[source], self._group))


class LocalWorld:
    """The ranks of a layout as threads of this process. `run(program)` calls program(rank) on each and returns the results.

    `timeout`: seconds after which a rank gives up on others that do not come to a collective; None: it waits for ever.
    """

    def __init__(self, size: int, timeout: float | None = None) -> None:
        self.size = size
        self._timeout = timeout
        self._meetings: dict[tuple[str, tuple[int, ...]], _Meeting] = {}
        self._lock = threading.Lock()

    def group(self, axis: str, ranks: Sequence[int], rank: int, recorder: Recorder) -> LocalGroup:
        """This rank's view of a group; ranks of equal (axis, ranks) meet each other."""
        with self._lock:
            meeting = self._meetings.setdefault((axis, tuple(ranks)), _Meeting(len(ranks), self._timeout))
        return LocalGroup(axis, ranks, rank, recorder, meeting)

    def run(self, program: Callable[[int], Any]) -> list[Any]:
        """Run to the end on every rank. An exception on one rank releases the others and is raised here.

        Raises RuntimeError where ranks gave up on others.
        """
        results: list[Any] = [None] * self.size
        failures: list[BaseException] = []
        waiting: dict[int, str] = {}

        def thread(rank: int) -> None:
            try:
                with torch.inference_mode():
                    results[rank] = program(rank)
            except BaseException as error:
                if isinstance(error, threading.BrokenBarrierError):
                    waiting[rank] = str(error)
                else:
                    failures.append(error)
                for meeting in list(self._meetings.values()):
                    meeting.abort()

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(self.size)]
        for started in threads:
            started.start()
        for started in threads:
            started.join()
        if failures:
            raise failures[0]
        if waiting:
            places = ", ".join(f"rank {rank} over {waiting[rank]}" for rank in sorted(waiting))
            raise RuntimeError(f"the ranks do not call the same collectives: in vain waited {places}")
        return results


class _Meeting:
    """Where the threads of one group exchange tensors: a board with one place per rank and a barrier, and a letter box for each pair."""

    def __init__(self, size: int, timeout: float | None) -> None:
        self.board: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.timeout = timeout
        self.letters: dict[tuple[int, int], queue.SimpleQueue[Tensor | None]] = {
            (source, to): queue.SimpleQueue() for source in range(size) for to in range(size) if source != to
        }

    def abort(self) -> None:
        """Let everybody go who waits."""
        self.barrier.abort()
        for box in self.letters.values():
            box.put(None)


class LocalGroup(Group):
    """The local backend: every rank sees the others' tensors, and copies what it would have received."""

    def __init__(self, axis: str, ranks: Sequence[int], rank: int, recorder: Recorder, meeting: _Meeting) -> None:
        super().__init__(axis, ranks, rank, recorder)
        self._meeting = meeting

    def _meet(self, mine: Any, read: Callable[[list[Any]], Any]) -> Any:
        """Show `mine`, read everybody's, and leave together, so that nobody's tensors change while they are read."""
        self._meeting.board[self.rank] = mine
        self.barrier()
        result = read(self._meeting.board)
        self.barrier()
        self._meeting.board[self.rank] = None  # a reference left here would keep the tensor alive
        return result

    def barrier(self) -> None:
        try:
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise threading.BrokenBarrierError(self.axis) from None

    def share(self, values: Sequence[float]) -> list[list[float]]:
        shared: list[list[float]] = self._meet([float(value) for value in values], list)
        return shared

    def _all_gather(self, output: Tensor, block: Tensor) -> Handle:
        return Handle(lambda: self._meet(block, lambda blocks: torch.cat(blocks, out=output)))

    def _all_to_all(self, output: Tensor, block: Tensor, output_rows: list[int], block_rows: list[int]) -> Handle:
        pieces = torch.split(block, block_rows)
        return Handle(lambda: self._meet(pieces, lambda board: torch.cat([theirs[self.rank] for theirs in board], out=output)))

    def _all_reduce(self, tensor: Tensor) -> None:
        total = self._meet(tensor, lambda tensors: torch.stack(tensors).sum(0, dtype=tensor.dtype))
        tensor.copy_(total)

    def _transfer(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Handle:
        def read(board: list[Any]) -> None:
            for peer, tensor in receive.items():
                tensor.copy_(board[peer][self.rank])

        return Handle(lambda: self._meet(send, read))

    def _send(self, tensor: Tensor, to: int) -> Handle:
        self._meeting.letters[self.rank, to].put(tensor.clone())
        return Handle()

    def _receive(self, tensor: Tensor, source: int) -> Handle:
        return Handle(lambda: tensor.copy_(self._letter(source)))

    def _letter(self, source: int) -> Tensor:
        try:
            letter = self._meeting.letters[source, self.rank].get(timeout=self._meeting.timeout)
        except queue.Empty:
            letter = None
        if letter is None:
            raise threading.BrokenBarrierError(self.axis)
        return letter


def backend_available(kind: str) -> bool:
    """Whether this torch build has the backend of a kind of device: NCCL for `cuda`, gloo for everything else."""
    return dist.is_available() and (dist.is_nccl_available() if kind == "cuda" else dist.is_gloo_available())


def start_process_groups(device: torch.device) -> None:
    """Join the process group that torchrun described in the environment: NCCL for CUDA, gloo for everything else."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)


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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
