"""Where the values of a model come from: random numbers that are a function of (seed, parameter name, global index), or a checkpoint.

A rank makes or reads its own shard without its neighbours', and every layout has the same model, so answers can be compared over layouts.
Random linear weights are uniform with standard deviation fan_in^-0.5, so that activations keep their size; norm weights lie around 1. Where
projections are quantised, their output channels are half, once or twice as large, as a function of the index: trained ones differ too, and where
all are alike a scale of the wrong channel would hide in the rounding.
Which tensors a checkpoint has, and whether they are those of a model, is decided in checkpoint.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from cpbench.models.checkpoint import BLOCK, SCALE, Checkpoint
from cpbench.models.invariant import InvariantWeight
from cpbench.models.linear import Weight, hold
from cpbench.quantisation import NONE

ROW_CHUNK_ELEMENTS = 1 << 20
PROJECTION = "_proj.weight"  # how the names of quantised weights end


class Weights(Protocol):
    """Shards of named parameters. Two that are equal give the same values, so that decoders are kept under them."""

    def linear(self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None) -> Tensor:
        """The given rows (output features) and columns (input features) of weight `name` [out, in]."""
        ...

    def hold(self, weight: Tensor, *, is_summed: bool = False) -> Weight:
        """A weight [out, in] as a projection holds it: quantised where the cell's are. `is_summed`: ranks have parts of its inputs, and add up."""
        ...

    def plain(self, weight: Tensor) -> Weight:
        """A weight [out, in] of a product that is never quantised."""
        ...

    def norm(self, name: str, size: int) -> Tensor:
        """A norm weight [size]."""
        ...

    def bias(self, name: str, size: int, rows: range | None = None, *, wide: bool = False) -> Tensor:
        """The given entries of a bias [size]; `wide`: in fp32 (fp64)."""
        ...


@dataclass(frozen=True)
class RandomWeights:
    """Shards of named parameters on a device, in a dtype."""

    seed: int
    dtype: torch.dtype
    device: torch.device
    rounded_to: torch.dtype | None = None  # the dtype whose values are used, where `dtype` is wider: the reference of a bf16 model, never quantised
    quant: str = NONE
    deterministic: bool = False

    def linear(self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None) -> Tensor:
        """The given rows (output features) and columns (input features) of weight `name` [out, in]."""
        out_features, in_features = shape
        rows, columns = rows or range(out_features), columns or range(in_features)
        index = torch.arange(rows.start, rows.stop)
        weight = self.values(name, index, torch.arange(columns.start, columns.stop), in_features**-0.5)
        if self.quant != NONE and name.endswith(PROJECTION):
            weight.mul_((_hash_index(index.to(self.device), f"{self.seed}/{name}/size") % 3 - 1).to(torch.float32).exp2_().to(self.dtype)[:, None])
        return weight

    def hold(self, weight: Tensor, *, is_summed: bool = False) -> Weight:
        """As in `Weights`."""
        return _held(self, weight, is_summed)

    def plain(self, weight: Tensor) -> Weight:
        """As in `Weights`."""
        return InvariantWeight(weight) if self.deterministic else weight

    def norm(self, name: str, size: int) -> Tensor:
        """A norm weight [size], around 1."""
        return self.values(name, torch.zeros(1, dtype=torch.int64), torch.arange(size), 0.1, 1.0).view(size)

    def bias(self, name: str, size: int, rows: range | None = None, *, wide: bool = False) -> Tensor:
        """The given entries of a bias [size]; `wide`: in fp32 (fp64)."""
        rows = rows or range(size)
        source: RandomWeights = widened(self) if wide else self
        return source.values(name, torch.zeros(1, dtype=torch.int64), torch.arange(rows.start, rows.stop), 0.1).view(-1)

    def values(self, name: str, rows: Tensor, columns: Tensor, std: float, mean: float = 0.0) -> Tensor:
        """Uniform values [rows, columns] at any global indices, computed alike on every device."""
        row_hash = _hash_index(rows.to(self.device), f"{self.seed}/{name}/row")
        column_hash = _hash_index(columns.to(self.device), f"{self.seed}/{name}/column")
        out = torch.empty(len(rows), len(columns), dtype=self.dtype, device=self.device)
        step = max(1, ROW_CHUNK_ELEMENTS // max(1, len(columns)))
        for start in range(0, len(rows), step):
            bits = _mix(row_hash[start : start + step, None] ^ column_hash)
            value = bits.to(torch.float32).mul_(std * 3**0.5 / 2**31).add_(mean)
            out[start : start + step] = value.to(self.rounded_to or self.dtype)
        return out


@dataclass(frozen=True)
class CheckpointWeights:
    """Shards of the tensors of a checkpoint on a device, in a dtype. Of each file only what a shard covers is read."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    rounded_to: torch.dtype | None = None  # as in RandomWeights
    quant: str = NONE
    deterministic: bool = False
    _files: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # open files by name: opening one parses its header

    def linear(self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None) -> Tensor:
        """The given rows (output features) and columns (input features) of weight `name` [out, in]."""
        return self._read(name, shape, (rows, columns))

    def hold(self, weight: Tensor, *, is_summed: bool = False) -> Weight:
        """As in `Weights`."""
        return _held(self, weight, is_summed)

    def plain(self, weight: Tensor) -> Weight:
        """As in `Weights`."""
        return InvariantWeight(weight) if self.deterministic else weight

    def norm(self, name: str, size: int) -> Tensor:
        """A norm weight [size]."""
        return self._read(name, (size,), (None,))

    def bias(self, name: str, size: int, rows: range | None = None, *, wide: bool = False) -> Tensor:
        """The given entries of a bias [size]; `wide`: in fp32 (fp64)."""
        source: CheckpointWeights = widened(self) if wide else self
        return source._read(name, (size,), (rows,))

    def _read(self, name: str, shape: tuple[int, ...], parts: tuple[range | None, ...]) -> Tensor:
        """A copy: a view of the file would hold all of it, and be read from disk when it is first used."""
        stored = self.checkpoint.tensors[name]
        assert stored.shape == shape, f"{name} is {stored.shape} in the checkpoint and {shape} in the model"
        part = tuple(slice(part.start, part.stop) if part is not None else slice(0, size) for part, size in zip(parts, shape, strict=True))
        value: Tensor = self._slice(name)[part]
        if value.dtype == torch.float8_e4m3fn:
            value = value.float() * self._scales(name, part)
        out = torch.empty(value.shape, dtype=self.dtype, device=self.device)
        return out.copy_(value.to(self.rounded_to or self.dtype))

    def _scales(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """The scale of every value of a slice of an FP8 weight, from those of the blocks that the slice touches."""
        scales: Tensor = self._slice(name + SCALE)[tuple(slice(cut.start // BLOCK, -(-cut.stop // BLOCK)) for cut in part)]
        for dimension, cut in enumerate(part):
            blocks = torch.arange(cut.start, cut.stop) // BLOCK - cut.start // BLOCK
            scales = scales.index_select(dimension, blocks)
        return scales.float()

    def _slice(self, name: str) -> Any:
        """A tensor of which nothing is read until it is indexed."""
        file = self.checkpoint.tensors[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.checkpoint.folder / file, framework="pt")
        return self._files[file].get_slice(name)


def _held(weights: Any, weight: Tensor, is_summed: bool) -> Weight:
    """A weight of random weights or of a checkpoint, as a layer holds it."""
    if weights.deterministic:
        return InvariantWeight(weight, is_summed)
    return hold(weight, weights.quant if weights.rounded_to is None else NONE)


def widened(weights: Any) -> Any:
    """Random weights or a checkpoint's in fp32; in fp64 those that fp32 holds."""
    if weights.dtype == torch.float64:
        return replace(weights, rounded_to=torch.float32)
    return replace(weights, dtype=torch.float32, rounded_to=None)


def token_ids(seed: int, lengths: Sequence[int], vocab: int) -> Tensor:
    """Random token ids of the packed batch [N], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (sum(lengths),), generator=generator)


def _hash_index(index: Tensor, name: str) -> Tensor:
    salt = zlib.crc32(name.encode()) - 2**31
    return _mix(_mix(index.to(torch.int32) * 0x61C88647 + salt))


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 in wrapping 32-bit arithmetic. The masks make the shifts logical: int32 shifts copy the sign."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits.mul_(0x85EBCA6B - 2**32)
    bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF))
    bits.mul_(0xC2B2AE35 - 2**32)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))
