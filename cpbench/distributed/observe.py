"""What another library's code receives, read off the operators that torch.distributed dispatches.

Code that brings its own collectives is not counted by a `Group`. While such code runs, an `Observer` sees the operators of the namespaces
`c10d` and `_c10d_functional` and takes bytes from the shapes of their tensors. It changes nothing, but costs Python time per operator,
so it is on only in passes that are not timed. What communicates below torch's dispatcher (symmetric memory, a library's own NCCL calls)
is not seen, and one operator that is not known here makes the observation incomplete. Who may communicate is not decided here.

Bytes are those that a rank receives from other ranks, as in traffic.py. A receive is counted as `send_recv`; the send that belongs to it
is not counted again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves

from cpbench.dispatch import Watching
from cpbench.distributed.traffic import Traffic

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
OPERATIONS = ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter", "send_recv")  # all that can be observed
SILENT = ("send", "isend", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd", "check_for_nan")  # nothing is received


@dataclass
class Observation:
    """What was seen: traffic, and the operators that communicate in a way that is not known here."""

    traffic: Traffic = field(default_factory=Traffic)
    unread: set[str] = field(default_factory=set)


class Observer(Watching):
    """Adds the collectives that run inside it to an observation, under one axis."""

    def __init__(self, axis: str, observation: Observation) -> None:
        super().__init__()
        self._axis, self._observation = axis, observation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES and short(func) not in SILENT:
            found = reading(short(func), named(func, args, kwargs))
            if found:
                self._observation.traffic.add(self._axis, *found)
            else:
                self._observation.unread.add(short(func))
        return result


def short(operator: Any) -> str:
    """The name of an operator without its namespace and overload."""
    return str(operator._schema.name.partition("::")[2])


def named(operator: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | (kwargs or {})


def reading(name: str, arguments: dict[str, Any]) -> tuple[str, int] | None:
    """What a call of a collective is, and the bytes that this rank receives in it; None where the operator is not known."""
    if name not in _READERS:
        return None
    operation, received = _READERS[name]
    return operation, received(arguments)


def group_of(arguments: dict[str, Any]) -> Any:
    """The process group of a call, whether the operator got the group or its name."""
    if "process_group" in arguments:
        return dist.ProcessGroup.unbox(arguments["process_group"])
    return _resolve_process_group(arguments["group_name"])


def _members(arguments: dict[str, Any]) -> tuple[int, int]:
    """(ranks of the group, place of this rank in it)."""
    group = group_of(arguments)
    return group.size(), group.rank()


def sent(arguments: dict[str, Any]) -> int:
    """Bytes of what this rank puts in: the first of these arguments that the operator has."""
    names = ("input_tensors", "input_list", "input_tensor", "inputs", "input", "tensors", "tensor")
    value = next(arguments[name] for name in names if name in arguments)
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _everyone_elses(arguments: dict[str, Any]) -> int:
    """As much as this rank puts in, from each of the others."""
    return sent(arguments) * (_members(arguments)[0] - 1)


def _all_but_own_share(arguments: dict[str, Any]) -> int:
    """A partial sum of its own block from each of the others (a ring, as in `Group.all_reduce`)."""
    size, _ = _members(arguments)
    return sent(arguments) * (size - 1) // size


def _twice_all_but_own_share(arguments: dict[str, Any]) -> int:
    size, _ = _members(arguments)
    return 2 * sent(arguments) * (size - 1) // size


def _exchanged(arguments: dict[str, Any]) -> int:
    """The rows of the output that come from the others: equal shares where no sizes are given."""
    size, rank = _members(arguments)
    tensor: Tensor = arguments.get("output", arguments["input"])
    rows = [int(rows) for rows in arguments.get("output_split_sizes") or [tensor.shape[0] // size] * size]
    return (sum(rows) - rows[rank]) * prod(tensor.shape[1:]) * tensor.element_size()


def _exchanged_as_list(arguments: dict[str, Any]) -> int:
    """The tensors of the output that come from the others."""
    _, rank = _members(arguments)
    outputs = arguments["output_tensors"]
    return sum(tensor.numel() * tensor.element_size() for source, tensor in enumerate(outputs) if source != rank)


def _from_root(arguments: dict[str, Any]) -> int:
    """Everything, on every rank but the root."""
    _, rank = _members(arguments)
    return 0 if rank == arguments.get("root_rank", arguments.get("src")) else sent(arguments)


_READERS: dict[str, tuple[str, Callable[[dict[str, Any]], int]]] = {
    "_allgather_base_": ("all_gather", _everyone_elses),
    "allgather_": ("all_gather", _everyone_elses),
    "allgather_coalesced_": ("all_gather", _everyone_elses),
    "allgather_into_tensor_coalesced_": ("all_gather", _everyone_elses),
    "all_gather_into_tensor": ("all_gather", _everyone_elses),
    "all_gather_into_tensor_out": ("all_gather", _everyone_elses),
    "all_gather_into_tensor_coalesced": ("all_gather", _everyone_elses),
    "alltoall_base_": ("all_to_all", _exchanged),
    "all_to_all_single": ("all_to_all", _exchanged),
    "alltoall_": ("all_to_all", _exchanged_as_list),
    "allreduce_": ("all_reduce", _twice_all_but_own_share),
    "allreduce_coalesced_": ("all_reduce", _twice_all_but_own_share),
    "all_reduce": ("all_reduce", _twice_all_but_own_share),
    "all_reduce_": ("all_reduce", _twice_all_but_own_share),
    "all_reduce_coalesced": ("all_reduce", _twice_all_but_own_share),
    "all_reduce_coalesced_": ("all_reduce", _twice_all_but_own_share),
    "_reduce_scatter_base_": ("reduce_scatter", _all_but_own_share),
    "reduce_scatter_": ("reduce_scatter", _all_but_own_share),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _all_but_own_share),
    "reduce_scatter_tensor": ("reduce_scatter", _all_but_own_share),
    "reduce_scatter_tensor_out": ("reduce_scatter", _all_but_own_share),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _all_but_own_share),
    "broadcast": ("broadcast", _from_root),
    "broadcast_": ("broadcast", _from_root),
    "recv_": ("send_recv", sent),
    "recv_any_source_": ("send_recv", sent),
    "irecv": ("send_recv", sent),
}
