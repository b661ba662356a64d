"""Rotary position embedding in the half-split (NeoX) form: pairs are (i, i + D/2). Positions are given, never assumed."""

from __future__ import annotations

import torch
from torch import Tensor


def cos_sin(positions_n: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [n, 1, D/2] in fp32 of positions [n]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_n.device) / head_dim
    angle = positions_n.to(torch.float32)[:, None] * theta**-exponent
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x_nHD: Tensor, cos: Tensor, sin: Tensor, out_nHD: Tensor) -> Tensor:
    """Rotate into `out_nHD`, which may be a strided view of a larger tensor but not of `x_nHD`."""
    half = x_nHD.shape[-1] // 2
    x1, x2 = x_nHD[..., :half], x_nHD[..., half:]
    torch.mul(x1, cos, out=out_nHD[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out_nHD[..., half:]).addcmul_(x1, sin)
    return out_nHD
