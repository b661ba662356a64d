"""The null backend of collectives: one rank alone in a world of any size. Nothing moves; what would have moved is put on a tape.

So the program that is priced is the program that is measured: a rank runs with its own shapes, plans and order of collectives. What it
receives stays what memory held, or is random where the tape asks for that. Integers are sizes and choices: those are taken to be what this rank
would have sent to itself. Libraries that communicate by themselves get a group of their own (fake.py). What a transfer takes is decided in projection/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from cpbench.distributed.collectives import Group, Recorder
from cpbench.distributed.fake import Stage, fake_group
from cpbench.distributed.flight import Handle
from cpbench.distributed.traffic import Transfer


class Tape(Protocol):
    """Where collectives are noted. `fills`: what would be received gets random values, which those of real rows are as good as."""

    fills: bool

    def start(self, transfer: Transfer) -> int: ...
    def wait(self, number: int) -> None: ...


class NullGroup(Group):
    """A group of which only this rank is there, of a world of so many.

    `is_nccl`: collectives are those of NCCL, with their own copies of own rows, and not pieces by hand.
    """

    def __init__(self, axis: str, ranks: Sequence[int], rank: int, recorder: Recorder, tape: Tape, is_nccl: bool, world_size: int) -> None:
        super().__init__(axis, ranks, rank, recorder)
        self._tape, self._is_nccl, self._world_size = tape, is_nccl, world_size
        self._to: tuple[int, ...] = ()
        self._source: tuple[int, ...] = ()

    @property
    def process_group(self) -> Any:
        return fake_group(self.ranks, self.ranks[self.rank], self._world_size)

    @property
    def is_watched(self) -> bool:
        return True

    def foreign(self) -> AbstractContextManager[object]:
        def start(operation: str, travels: int, to: tuple[int, ...], source: tuple[int, ...]) -> int:
            return self._tape.start(Transfer(self.axis, self.size, operation, travels, to, source))

        return Stage(start, self._tape.wait, self._fill)

    def barrier(self) -> None:
        """The others are always there."""

    def share(self, values: Sequence[float]) -> list[list[float]]:
        return [[float(value) for value in values]] * self.size

    def _start(self, operation: str, travels: int, begin: Callable[[], Handle]) -> Handle:
        self._to = self._source = tuple(range(1, self.size))
        begin()
        number = self._tape.start(Transfer(self.axis, self.size, operation, travels, self._to, self._source))
        return Handle(lambda: self._tape.wait(number))

    def _exchange(self, pieces: Sequence[Tensor], blocks: Sequence[Tensor]) -> Handle:
        mine = pieces[self.rank]
        if not (self._is_nccl and mine.is_floating_point()):
            mine.copy_(blocks[self.rank])
        if not mine.is_floating_point():
            for piece in pieces:
                if piece is not mine and piece.shape == mine.shape:
                    piece.copy_(mine)
        self._fill(piece for piece in pieces if piece is not mine)
        return Handle()

    def _all_gather(self, output: Tensor, block: Tensor) -> Handle:
        return self._exchange(output.view(self.size, *block.shape).unbind(), [block] * self.size)

    def _reduce_scatter(self, partial: Tensor, rows: Sequence[int], parts: int) -> Tensor:
        if not self._is_nccl or len(set(rows)) > 1:
            return super()._reduce_scatter(partial, rows, parts)
        output = partial.new_empty(rows[0], *partial.shape[1:])
        self._start("reduce_scatter", output.numel() * output.element_size() * (self.size - 1), Handle).wait()
        return output

    def _all_reduce(self, tensor: Tensor) -> Handle:
        return Handle()

    def _transfer(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Handle:
        self._to, self._source = (tuple((peer - self.rank) % self.size for peer in peers) for peers in (send, receive))
        self._fill(receive.values())
        return Handle()

    def _fill(self, received: Iterable[Tensor]) -> None:
        """Memory holds anything, also what is no number, by which nothing can be chosen."""
        for tensor in received if self._tape.fills else ():
            if tensor.is_floating_point() and tensor.element_size() > 1:
                tensor.normal_()

    def _send(self, tensor: Tensor, to: int) -> Handle:
        return self._transfer({to: tensor}, {})

    def _receive(self, tensor: Tensor, source: int) -> Handle:
        return self._transfer({}, {source: tensor})
