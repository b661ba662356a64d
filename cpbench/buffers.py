"""Memory that outlives a pass: scratch buffers that every layer reuses.

Fresh memory costs page faults (3 to 4 microseconds per 4 KiB page on CPU), so what every layer needs is allocated once and reused.
Every tensor has a category, so that a memory report can say what it is for. Nothing is decided here about what is stored.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

CATEGORIES = {"merge": "merge buffers", "gather": "gathered K/V", "comm": "communication buffers", "rows": "K/V rows", "cache": "K/V cache"}
CATEGORIES |= {"select": "selection buffers"}
ALL_CATEGORIES = ("weights", "activations", *CATEGORIES.values())


class Buffers:
    """Scratch tensors by name: the first part of the name, up to `_`, is the category. The largest size asked for is kept."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor with undefined content, valid until the next `get` of the same name, of the dtype and device of `like`."""
        dtype, device = dtype or like.dtype, like.device
        size = prod(shape) * dtype.itemsize
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size or flat.device != device:
            self._flat.pop(name, None)  # free the smaller one before the larger one is made
            flat = None
            flat = self._flat[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return flat[:size].view(dtype).view(shape)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(category, flat tensor) of everything held."""
        return [(CATEGORIES[name.split("_")[0]], flat) for name, flat in self._flat.items()]
