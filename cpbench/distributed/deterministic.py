"""Sums over ranks in a fixed binary tree: level 1 adds ranks (0, 1), (2, 3) ..., level 2 what these gave, in the dtype that travels.

What an all-reduce of a library adds first depends on its algorithm, on the number of ranks and on the size of the message. Here every rank
gets a share of the rows from all others and adds it itself; for an all-reduce the shares are gathered. Bits are those of gathering everything
and adding it on every rank, while received are 2 (P - 1) / P of the rows, as in a ring all-reduce, and not P - 1 times as much.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cpbench.deterministic import shares
from cpbench.distributed.collectives import Group


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of what the ranks have, in rank order; overwrites them. Raises ValueError unless they are a power of two."""
    if not parts or len(parts) & (len(parts) - 1):
        raise ValueError(f"a binary tree adds a power of two of parts, not {len(parts)}")
    level = list(parts)
    while len(level) > 1:
        level = [left.add_(right) for left, right in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def tree_reduce_scatter(group: Group, partial_nM: Tensor, rows: Sequence[int]) -> Tensor:
    """Sum `partial_nM` [sum(rows), M] over the ranks in the tree and keep one's own rows [rows[rank], M]."""
    mine = rows[group.rank]
    received_PmM = partial_nM.new_empty(group.size, mine, partial_nM.shape[1])
    group.all_to_all(received_PmM.flatten(0, 1), partial_nM.contiguous(), [mine] * group.size, rows).wait()
    return tree_sum(received_PmM.unbind()).clone()  # alone: what the others sent is let go


def tree_all_reduce(group: Group, tensor_nM: Tensor) -> None:
    """Sum over the ranks in the tree, in place."""
    rows = shares(len(tensor_nM), group.size)
    group.all_gather_rows(tensor_nM, tree_reduce_scatter(group, tensor_nM, rows), rows).wait()
