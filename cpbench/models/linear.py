"""A linear layer whose weight is a tensor, quantised to FP8, or multiplied in a fixed order (invariant.py): y = x W^T, by one function for all.

W8A8 with row-wise scales: each output channel of a weight and each token of an activation is divided by its largest magnitude / 448 and rounded
to e4m3; products are summed in fp32, multiplied by both scales and rounded once, to the dtype of the input. Scales belong to what a
rank has: where the inputs of a layer are cut over ranks, each rank has its own for its part, as servers that quantise at load do. On CUDA PyTorch's
scaled GEMM does it, with fast accumulation, which servers use; on CPU it is simulated with the same rounded values, block by block, so that
weights are held in one byte per value there too. Which layers are quantised is in quantisation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.device_kind import kind_of
from cpbench.models.invariant import InvariantWeight, invariant_linear
from cpbench.quantisation import BLOCK, FP8, blocks

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_AMAX = 1e-12  # a row of zeros has a scale too
MIN_CAPABILITY = (8, 9)
GROUPED_CAPABILITY = (9, 0)  # PyTorch has a grouped scaled GEMM for Hopper alone


@dataclass(frozen=True)
class QuantisedWeight:
    """`values` [..., N, K] in e4m3 and `scales` [..., N] in fp32: channel n of the weight is values[n] * scales[n]."""

    values: Tensor
    scales: Tensor

    def __getitem__(self, index: int) -> QuantisedWeight:
        return QuantisedWeight(self.values[index], self.scales[index])


Weight = Tensor | QuantisedWeight | InvariantWeight


@dataclass(frozen=True)
class Projection:
    """A linear layer of rows [n, K], and what is done to each row of its output by itself: values [n, N'] of rows."""

    weight: Weight
    bias_N: Tensor | None = None
    then: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x_nK: Tensor) -> Tensor:
        return self._finished(linear(x_nK, self.weight, self.bias_N))

    def behind(self, product_nN: Tensor) -> Tensor:
        """The same of rows by the weight alone, which are overwritten."""
        return self._finished(product_nN if self.bias_N is None else product_nN.add_(self.bias_N))

    def _finished(self, out_nN: Tensor) -> Tensor:
        return out_nN if self.then is None else self.then(out_nN)


def hold(weight_NK: Tensor, quant: str) -> Weight:
    """A weight as a layer holds it, quantised or not."""
    return QuantisedWeight(*quantise(weight_NK)) if quant == FP8 else weight_NK


def room_for(count: int, like: Weight) -> Weight:
    """Room for so many weights of one shape, not filled yet."""
    if isinstance(like, InvariantWeight):
        return InvariantWeight(like.values.new_empty(count, *like.values.shape), like.is_summed)
    if isinstance(like, QuantisedWeight):
        return QuantisedWeight(like.values.new_empty(count, *like.values.shape), like.scales.new_empty(count, *like.scales.shape))
    return like.new_empty(count, *like.shape)


def fill(room: Weight, index: int, weight: Weight) -> None:
    """Put one weight where there is room for it."""
    if isinstance(room, QuantisedWeight) and isinstance(weight, QuantisedWeight):
        room.values[index], room.scales[index] = weight.values, weight.scales
    elif not isinstance(room, QuantisedWeight) and not isinstance(weight, QuantisedWeight):
        plain(room)[index] = plain(weight)


def plain(weight: Weight) -> Tensor:
    """The values of a weight that is not quantised. Raises TypeError for one that is."""
    if isinstance(weight, QuantisedWeight):
        raise TypeError("a quantised weight has no values of its own")
    return weight if isinstance(weight, Tensor) else weight.values


def linear(x_nK: Tensor, weight: Weight, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + bias [n, N] in the dtype of `x_nK`."""
    if isinstance(weight, Tensor):
        return F.linear(x_nK, weight, bias_N)
    if isinstance(weight, InvariantWeight):
        out_nN = invariant_linear(x_nK, weight)
    else:
        out_nN = _scaled(x_nK, weight) if kind_of(x_nK) == "cuda" and len(x_nK) else _simulated(x_nK, weight)
    return out_nN if bias_N is None else out_nN.add_(bias_N)


def grouped_linear(x_PK: Tensor, weight_ENK: Weight, ends_E: Tensor) -> Tensor:
    """Rows that lie one expert after the other, by the weights of their experts, in one kernel: [P, N]. `ends_E`: where the rows of each end."""
    assert not isinstance(weight_ENK, InvariantWeight), "has_grouped says so"
    if isinstance(weight_ENK, Tensor):
        return F.grouped_mm(x_PK, weight_ENK.transpose(1, 2), offs=ends_E)
    values, scales = quantise(x_PK)
    weight = weight_ENK.values.transpose(1, 2)
    return torch._scaled_grouped_mm(values, weight, scales, weight_ENK.scales, offs=ends_E, out_dtype=x_PK.dtype, use_fast_accum=True)


def has_grouped(x_PK: Tensor, weight_ENK: Weight) -> bool:
    """Whether PyTorch has one kernel for `grouped_linear`: bf16 on CUDA, and on Hopper for quantised weights."""
    if kind_of(x_PK) != "cuda" or isinstance(weight_ENK, InvariantWeight) or x_PK.dtype != torch.bfloat16 or not len(x_PK):
        return False
    if isinstance(weight_ENK, Tensor):
        return hasattr(F, "grouped_mm")
    return hasattr(torch, "_scaled_grouped_mm") and (x_PK.is_meta or torch.cuda.get_device_capability(x_PK.device) == GROUPED_CAPABILITY)


def refusal(device: torch.device, quant: str) -> str | None:
    """Why a device cannot compute quantised layers; None if it can."""
    if quant != FP8 or device.type != "cuda" or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY:
        return None
    wanted, found = (".".join(map(str, numbers)) for numbers in (MIN_CAPABILITY, torch.cuda.get_device_capability(device)))
    return f"scaled FP8 GEMMs need compute capability {wanted}, this GPU has {found}; the nearest valid value is quant=none"


def quantise(x_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, K] in e4m3, and the scale of each in fp32 [n]."""
    lowest_n, highest_n = x_nK.aminmax(dim=1)
    scales_n = torch.maximum(-lowest_n, highest_n).float().clamp_(min=SMALLEST_AMAX).div_(LARGEST)
    del lowest_n, highest_n
    values_nK = x_nK.new_empty(x_nK.shape, dtype=E4M3)
    step = max(1, BLOCK // x_nK.shape[1])
    for first in range(0, len(x_nK), step):
        rows = slice(first, first + step)
        values_nK[rows] = x_nK[rows] / scales_n[rows, None]
    return values_nK, scales_n


def _scaled(x_nK: Tensor, weight: QuantisedWeight) -> Tensor:
    return scaled_product(*quantise(x_nK), weight, x_nK.dtype)


def scaled_product(values_nK: Tensor, scales_n: Tensor, weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The product of quantised rows and a quantised weight [n, N], on CUDA."""
    return torch._scaled_mm(values_nK, weight.values.t(), scales_n[:, None], weight.scales[None], out_dtype=dtype, use_fast_accum=True)


def _simulated(x_nK: Tensor, weight: QuantisedWeight) -> Tensor:
    """The same from the same values. A product of two of them is exact in fp32; what differs is the order in which products are summed."""
    values_nK, scales_n = quantise(x_nK)
    out_nN = x_nK.new_empty(len(x_nK), len(weight.values))
    rows, columns = blocks(len(x_nK), *weight.values.shape)
    for c in range(0, out_nN.shape[1], columns):
        wide_cK, scales_c = weight.values[c : c + columns].float(), weight.scales[c : c + columns]
        for r in range(0, len(x_nK), rows):
            product_rc = values_nK[r : r + rows].float() @ wide_cK.T
            out_nN[r : r + rows, c : c + columns] = product_rc.mul_(scales_n[r : r + rows, None]).mul_(scales_c)
            del product_rc
        del wide_cK
    return out_nN
