"""Rotary position embedding: half-split pairs (i, i + D/2) as NeoX and Llama have them, or neighbours (2i, 2i + 1) as DeepSeek has.

Positions are given, never assumed. Frequencies may be stretched by YaRN (arXiv 2309.00071), as DeepSeek's are, or as those of Llama 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cpbench.models.config import LlamaRope, Yarn
from cpbench.models.invariant import in_blocks


def cos_sin(positions_n: Tensor, dim: int, theta: float, yarn: Yarn | None = None, llama: LlamaRope | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [n, 1, D/2] in fp32 of positions [n], for `dim` = D rotated values."""
    frequency = _frequencies(dim, theta, yarn, llama, positions_n.device)
    angle = positions_n.to(torch.float32)[:, None] * frequency
    cos, sin = (in_blocks(function, angle).unsqueeze(1) for function in (torch.cos, torch.sin))
    if yarn is None:
        return cos, sin
    amplitude = _attention_scale(yarn.factor, yarn.mscale) / _attention_scale(yarn.factor, yarn.mscale_all_dim)
    return cos.mul_(amplitude), sin.mul_(amplitude)


def softmax_scale(dim: int, yarn: Yarn | None = None) -> float:
    """What scores are multiplied by: D^-0.5, and with YaRN the square of its attention scale over all dimensions."""
    scale = float(dim**-0.5)
    return scale if yarn is None else scale * _attention_scale(yarn.factor, yarn.mscale_all_dim) ** 2


def _attention_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _frequencies(dim: int, theta: float, yarn: Yarn | None, llama: LlamaRope | None, device: torch.device) -> Tensor:
    """[D/2] in fp32. Slow rotations are stretched by a factor, fast ones are not; between them it changes linearly, with YaRN over the dimensions,
    with Llama's over the turns in the positions that the model was trained on."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    own = theta**-exponent
    if llama is not None:
        kept = ((llama.original * own / (2 * math.pi) - llama.low) / (llama.high - llama.low)).clamp_(0, 1)
        return own / llama.factor * (1 - kept) + own * kept
    if yarn is None:
        return own

    def dimension(rotations: float) -> float:
        return dim * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(dimension(yarn.beta_fast))), min(dim - 1, math.ceil(dimension(yarn.beta_slow)))
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 1e-3)).clamp_(0, 1)
    return own / yarn.factor * ramp + own * (1 - ramp)


def rotate(x_nHD: Tensor, cos: Tensor, sin: Tensor, out_nHD: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) into `out_nHD`, which may be a strided view of a larger tensor but not of `x_nHD`."""
    half = x_nHD.shape[-1] // 2
    return _rotate(x_nHD[..., :half], x_nHD[..., half:], cos, sin, out_nHD[..., :half], out_nHD[..., half:], out_nHD)


def rotate_neighbours(x_nHD: Tensor, cos: Tensor, sin: Tensor, out_nHD: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1) into `out_nHD`, which may be a strided view of a larger tensor but not of `x_nHD`."""
    return _rotate(x_nHD[..., 0::2], x_nHD[..., 1::2], cos, sin, out_nHD[..., 0::2], out_nHD[..., 1::2], out_nHD)


def _rotate(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, out1: Tensor, out2: Tensor, out: Tensor) -> Tensor:
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
    return out
