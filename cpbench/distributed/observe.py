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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench.distributed.traffic import Traffic

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
OPERATIONS = ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter", "send_recv")  # all that can be observed
SILENT = ("send", "isend", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd", "check_for_nan")  # nothing is received


@dataclass
class Observation:
    """What was seen: traffic, and the operators that communicate in a way that is not known here."""

    traffic: Traffic = field(default_factory=Traffic)
    unread: set[str] = field(default_factory=set)


class Observer(TorchDispatchMode):
    """Adds the collectives that run inside it to an observation, under one axis."""

    def __init__(self, axis: str, observation: Observation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axis, self._observation = axis, observation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that guards against compilation imports torch._dynamo: 2 seconds per rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace in NAMESPACES and name not in SILENT:
            if name in _READERS:
                operation, read = _READERS[name]
                named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
                self._observation.traffic.add(self._axis, operation, read(named | (kwargs or {})))
            else:
                self._observation.unread.add(name)
        return result


def _members(arguments: dict[str, Any]) -> tuple[int, int]:
    """(ranks of the group, place of this rank in it), whether the operator got the group or its name."""
    if "process_group" in arguments:
        group: Any = dist.ProcessGroup.unbox(arguments["process_group"])
    else:
        group = _resolve_process_group(arguments["group_name"])
    return group.size(), group.rank()


def _sent(arguments: dict[str, Any]) -> int:
    """Bytes of what this rank puts in: the first of these arguments that the operator has."""
    names = ("input_tensors", "input_list", "input_tensor", "inputs", "input", "tensors", "tensor")
    value = next(arguments[name] for name in names if name in arguments)
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _everyone_elses(arguments: dict[str, Any]) -> int:
    """As much as this rank puts in, from each of the others."""
    return _sent(arguments) * (_members(arguments)[0] - 1)


def _all_but_own_share(arguments: dict[str, Any]) -> int:
    """A partial sum of its own block from each of the others (a ring, as in `Group.all_reduce`)."""
    size, _ = _members(arguments)
    return _sent(arguments) * (size - 1) // size


def _twice_all_but_own_share(arguments: dict[str, Any]) -> int:
    size, _ = _members(arguments)
    return 2 * _sent(arguments) * (size - 1) // size


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
    return 0 if rank == arguments.get("root_rank", arguments.get("src")) else _sent(arguments)


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
    "recv_": ("send_recv", _sent),
    "recv_any_source_": ("send_recv", _sent),
    "irecv": ("send_recv", _sent),
}
