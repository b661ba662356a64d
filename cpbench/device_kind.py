"""Which kind of device a tensor is on; a tensor without storage (`meta`) stands for one on a device that may not be here.

What runs differently on CPU and on accelerators asks here, so that a program on tensors without storage takes the way of its device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_stands_for = "meta"


def kind_of(tensor: Tensor) -> str:
    """`cpu`, `cuda`, ..."""
    return _stands_for if tensor.is_meta else tensor.device.type


@contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """Tensors without storage stand for those of this kind of device."""
    global _stands_for  # noqa: PLW0603 - a process simulates one device at a time
    before, _stands_for = _stands_for, kind
    try:
        yield
    finally:
        _stands_for = before
