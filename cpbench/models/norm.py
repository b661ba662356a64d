"""RMSNorm. The normalised value is rounded to the input's dtype before the weight multiplies it, as Hugging Face's models do."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; the mean is taken in fp32."""
    return F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)
