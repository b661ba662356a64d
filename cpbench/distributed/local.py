"""The local backend of collectives: every rank of a layout is a thread of one process, in lockstep.

So thousands of plans can be verified, and a cell's answer proved, without starting processes. What a collective means and how it is
counted is decided in collectives.py.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cpbench.distributed.collectives import Group, Recorder
from cpbench.distributed.flight import Handle


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


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Ranks that are threads compute at the same time, and their small operators are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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

    def _all_reduce(self, tensor: Tensor) -> Handle:
        total = self._meet(tensor, lambda tensors: torch.stack(tensors).sum(0, dtype=tensor.dtype))
        tensor.copy_(total)
        return Handle()

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
