"""Libraries that bring their own collectives, with nobody else there: a process group that moves nothing, and an eye on what they start and await.

Such code needs a group of PyTorch's and calls its operators, so the null backend (null.py) cannot stand in for them. PyTorch's fake group can:
this process is any rank of any world. What that group would do is left out, though, because it copies, and lets go at once of what NCCL and
gloo keep. While a library runs, a `Stage` takes the operators of torch.distributed away from it, notes what would travel and when it is awaited,
and gives out memory of the size of the answer. How much travels is read off operators as in passes that are measured (observe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from cpbench.dispatch import Watching
from cpbench.distributed.observe import NAMESPACES, SILENT, group_of, named, reading, sent, short
from cpbench.errors import CpbenchError

BACKEND = "fake"
WAIT, WRAP = "wait_tensor", "_wrap_tensor_autograd"
SENDS, RECEIVES = ("send", "isend"), ("recv_", "irecv")

Places = tuple[int, ...]  # of a group, as steps from this rank's own
Start = Callable[[str, int, Places, Places], int]  # operation, bytes received (or sent to a single other), to and from whom: its number
_groups: dict[Places, Any] = {}


def fake_group(ranks: Sequence[int], rank: int, world_size: int) -> Any:
    """The process group of these ranks, in a world that this process is one rank of; the world is made anew where it was another one before.

    Raises RuntimeError where this process has others already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which names the backend to PyTorch

    if _groups and (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        leave()
    if not _groups:
        if dist.is_initialized():
            raise RuntimeError("this process has neighbours, and a projection needs one without")
        dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=FakeStore())
    key = tuple(ranks)
    if key not in _groups:
        _groups[key] = dist.group.WORLD if len(key) == world_size else dist.new_group(list(key), backend=BACKEND)
    return _groups[key]


def leave() -> None:
    """End the world that was made, if there is one."""
    if _groups:
        dist.destroy_process_group()
        _groups.clear()


class Stage(Watching):
    """Around a library that communicates over a group.

    `fill` is given what would be received. What is still under way at the end is awaited there. Raises CpbenchError for an operator that
    communicates in a way that is not known.
    """

    def __init__(self, start: Start, wait: Callable[[int], None], fill: Callable[[Iterable[Tensor]], None]) -> None:
        super().__init__()
        self._start, self._wait, self._fill = start, wait, fill
        self._under_way: dict[int, Any] = {}  # by number what is read and written, kept until it is awaited
        self._numbers: dict[int, int] = {}  # of the tensors that functional collectives gave out, by identity: those are kept

    def __enter__(self) -> Stage:
        stage, self._wait_of_work = self, FakeWork.wait

        def wait(work: FakeWork, timeout: Any = None) -> bool:
            stage._await(work.seq_id)
            return True

        FakeWork.wait = wait  # type: ignore[method-assign, assignment] # which is not dispatched
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        FakeWork.wait = self._wait_of_work  # type: ignore[method-assign]
        for number in list(self._under_way):
            self._await(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not Tensor and kind.__module__.startswith("torch.distributed") for kind in types):
            return NotImplemented  # wrappers, as DTensor is one, call operators on what they hold
        name = short(func)
        if func.namespace not in NAMESPACES:
            return func(*args, **(kwargs or {}))
        if name == WAIT:
            self._await(self._numbers.pop(id(args[0]), 0))
            return args[0]
        if name == WRAP:  # for tensors without storage PyTorch has an operator that forgets to await
            return AsyncCollectiveTensor(args[0])
        if name in SILENT and name not in SENDS:  # nothing travels
            return func(*args, **(kwargs or {}))
        arguments = named(func, args, kwargs)
        number = self._start(*self._seen(name, arguments, func.namespace))
        if func.namespace == "c10d":
            self._under_way[number] = arguments
            self._fill(_written(arguments) if name not in SENDS else ())
            work = FakeWork()
            work.seq_id = number
            return (args[0], work.boxed()) if len(func._schema.returns) > 1 else work.boxed()
        result = _result(func, args, kwargs or {})
        given = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._fill(given)
        self._under_way[number] = arguments, given
        self._numbers |= {id(tensor): number for tensor in given}
        return result

    def _seen(self, name: str, arguments: dict[str, Any], namespace: str) -> tuple[str, int, Places, Places]:
        """What starts, as `Start` takes it."""
        group = group_of(arguments)
        size, rank = group.size(), group.rank()

        def steps(peers: Iterable[int]) -> Places:
            return tuple(sorted((peer - rank) % size for peer in peers if peer != rank))

        if name in (*SENDS, *RECEIVES):
            peer = int(arguments["dst" if name in SENDS else "src"])
            peers = steps([peer if namespace == "c10d" else dist.get_group_rank(group, peer)])
            return ("send_recv", sent(arguments), peers, ()) if name in SENDS else ("send_recv", sent(arguments), (), peers)
        found = reading(name, arguments)
        if found is None:
            raise CpbenchError(f"What a library communicates by {name} is not known to a projection.", "The nearest valid strategy is allgather.")
        to, source = (steps(range(size)),) * 2
        if arguments.get("output_split_sizes"):  # who gets nothing takes no part
            to, source = (steps(peer for peer in range(size) if arguments[f"{way}_split_sizes"][peer]) for way in ("input", "output"))
        operation, travels = found
        if operation == "broadcast":  # a meeting of all, also for the root
            travels = sent(arguments)
        elif len(to) == len(source) == 1 and size > 2:
            operation = "send_recv"
        return operation, travels, to, source

    def _await(self, number: int) -> None:
        if self._under_way.pop(number, None) is not None:
            self._wait(number)


def _written(arguments: dict[str, Any]) -> list[Tensor]:
    """What an operator of c10d writes to."""
    value = next((arguments[name] for name in ("output_tensors", "output_tensor", "output", "outputs", "tensors") if name in arguments), ())
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a functional collective gives out: the tensor that it changes, or memory."""
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    (device,) = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    with _disable_current_modes():
        shaped = func(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **tree_map_only(Tensor, lambda x: x.to("meta"), kwargs))
    return tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), shaped)
