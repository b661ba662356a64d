"""Which keys each query may choose from, as data, for attention that selects among them: ranges in order of position, and what they cost.

Selection is joint over all keys that a query sees, so a rank needs them in one place, in the order of positions, whatever order they
arrived in. This module says that order, what a block of queries sees of it, and how many pairs and bytes follow. Pure numbers, without
torch; numpy is imported where an order is made. Which strategy brings the rows is decided in strategies/, how keys are scored and attended
to in kernels/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from cpbench.segments import PlacedBlock, Span

if TYPE_CHECKING:
    from cpbench.paging import Slots


class Visible(NamedTuple):
    """Query row r of `queries` sees the first `first + r * step` of the key rows `keys`, which lie in order of position.

    `step` is that of the queries' positions: 1 for contiguous and zigzag blocks, cp for interleaved ones.
    """

    queries: Span
    keys: Span
    first: int
    step: int = 1

    def seen(self, row: int) -> int:
        """Keys that the given row sees, counted from the block's first."""
        return self.first + row * self.step

    def rows_seeing(self, keys: int) -> int:
        """How many rows see at most so many keys. They are the first ones."""
        return min(max(0, (keys - self.first) // self.step + 1), self.queries.rows)

    @property
    def most(self) -> int:
        """Keys that the last row sees."""
        return self.seen(self.queries.rows - 1)

    def scored_pairs(self, top_k: int) -> int:
        """Pairs that are scored: those of the rows that see more than `top_k` keys."""
        all_seen = self.rows_seeing(top_k)
        return self._pairs(self.queries.rows) - self._pairs(all_seen)

    def selected_pairs(self, top_k: int) -> int:
        """Pairs that are attended to: at most `top_k` for each row."""
        all_seen = self.rows_seeing(top_k)
        return self._pairs(all_seen) + (self.queries.rows - all_seen) * top_k

    def _pairs(self, rows: int) -> int:
        """Visible pairs of the first rows."""
        return rows * self.first + self.step * rows * (rows - 1) // 2


class Tile(NamedTuple):
    """Queries and keys whose scores are computed in one product."""

    queries: int
    keys: int


TILES = {"cpu": Tile(32, 512), "cuda": Tile(256, 2048)}  # cpu: the scores of 64 heads in 4 MiB, where one product reaches 95% of a large one
TILE_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}  # of gathered rows, scores and results of a tile of queries that attends


def visible_keys(blocks: Iterable[PlacedBlock], keys: Mapping[int, Span]) -> tuple[Visible, ...]:
    """What the query blocks of a rank see, where sequence s has the key rows `keys[s]`, from its first cached token on."""
    return tuple(Visible(Span(row, row + block.rows), keys[block.sequence], block.start + 1, block.step) for block, row in blocks if block.rows)


def require_visible(blocks: Sequence[Visible]) -> None:
    """Raises ValueError for a block whose queries see no key, or more than it has."""
    for block in blocks:
        if block.first < 1 or block.step < 1 or block.most > block.keys.rows:
            raise ValueError(f"{block} does not see between 1 and {block.keys.rows} keys")


@dataclass(frozen=True, eq=False)  # an array has no hash: an order is known by what it is, not by what it holds
class InOrder:
    """The rows that a rank collected, put into the order of sequences and positions, and what each of its query blocks sees of them.

    `rows`: for each place in that order the row that belongs there. `visible` counts places.
    """

    rows: Slots
    visible: tuple[Visible, ...]

    @cached_property
    def is_identity(self) -> bool:
        """Whether rows were collected in this order already."""
        import numpy as np

        return bool((self.rows == np.arange(len(self.rows))).all())


def in_order(queries: Iterable[PlacedBlock], collected: Iterable[PlacedBlock]) -> InOrder:
    """The order of collected blocks, which hold every token of a sequence up to its last one, once."""
    import numpy as np

    of_sequence: dict[int, list[PlacedBlock]] = {}
    for placed in collected:
        of_sequence.setdefault(placed[0].sequence, []).append(placed)
    parts, keys, first = [], {}, 0
    for sequence, blocks in sorted(of_sequence.items()):
        positions = np.concatenate([np.arange(block.start, block.stop, block.step) for block, _ in blocks])
        rows = np.concatenate([np.arange(row, row + block.rows) for block, row in blocks])
        order = positions.argsort()
        if not (positions[order] == np.arange(len(positions))).all():
            raise ValueError(f"the blocks of sequence {sequence} do not hold each of its tokens once")
        parts.append(rows[order])
        keys[sequence] = Span(first, first + len(rows))
        first += len(rows)
    return InOrder(np.concatenate([np.empty(0, dtype=np.int64), *parts]), visible_keys(queries, keys))


def pieces(first: int, last: int, rows: int) -> list[tuple[int, int]]:
    """[first, last) in pieces of `rows` rows, at least one."""
    rows = max(1, rows)
    return [(start, min(start + rows, last)) for start in range(first, last, rows)]


def rows_attending_to_all(block: Visible, shape: tuple[int, int], top_k: int, values: int) -> int:
    """Queries of a tile that attend to all keys they see, where (heads, kv_rank) share a budget of `values`."""
    heads, kv_rank = shape
    return max(1, values // (heads * (min(top_k, block.keys.rows) + kv_rank)))


def rows_attending_to_selected(shape: tuple[int, int, int], top_k: int, values: int) -> int:
    """Queries of a tile that attend to selected keys, where (heads, width, kv_rank) share a budget of `values`."""
    heads, width, kv_rank = shape
    return max(1, values // ((heads + width) * top_k + heads * kv_rank))


def selection_values(blocks: Sequence[Visible], heads: int, device: str) -> int:
    """Values (fp32, fp64 for fp64) of the space in which tiles of queries are scored."""
    tile, longest = TILES[device], max((block.most for block in blocks), default=0)
    return tile.queries * (heads * tile.keys + -(-longest // tile.keys) * tile.keys)


def attending_values(blocks: Sequence[Visible], shape: tuple[int, int, int], top_k: int, device: str, itemsize: int) -> tuple[int, int]:
    """(values in the width of scores, values in the width of rows) of the space in which tiles of queries attend."""
    (heads, width, kv_rank), values = shape, TILE_BYTES[device] // itemsize
    weights = out = gathered = 0
    for block in blocks:
        seeing_all = block.rows_seeing(top_k)
        rows = rows_attending_to_all(block, (heads, kv_rank), top_k, values)
        for first, last in pieces(0, seeing_all, rows):
            weights, out = max(weights, (last - first) * heads * block.seen(last - 1)), max(out, (last - first) * heads * kv_rank)
        rest = min(block.queries.rows - seeing_all, rows_attending_to_selected(shape, top_k, values))
        weights, out, gathered = max(weights, rest * heads * top_k), max(out, rest * heads * kv_rank), max(gathered, rest * top_k * width)
    return weights + out, gathered
