"""How far two sets of log-probabilities of one prompt agree, in the numbers that reinforcement-learning systems report for trainer and generator.

Pure functions on tensors. What is compared, and how it was made, is decided in against.py and logprobs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.errors import NOTHING_COMPARABLE, CpbenchError


@dataclass(frozen=True)
class Agreement:
    """Two sets of log-probabilities, compared sample by sample; a sample is one sequence.

    `identical`: every sample equals its counterpart (torch.equal). `checked` and `different`: tokens; NaN differs from everything. `max_delta`
    and `avg_delta`: of |other - one| over all tokens of the samples that are not equal, 0 where all are. `diff_mean` and `diff_max`: of the
    signed and the absolute other - one over all samples.
    """

    identical: bool
    checked: int
    different: int
    max_delta: float
    avg_delta: float
    diff_mean: float
    diff_max: float


def agreement(one: Sequence[Tensor], other: Sequence[Tensor]) -> Agreement:
    """Compare samples [tokens] in fp32. Differences and their means are taken in fp64. Raises CpbenchError where lengths differ, or there are no tokens."""
    lengths = [[len(sample) for sample in samples] for samples in (one, other)]
    if lengths[0] != lengths[1]:
        hint = "Compare log-probabilities of one prompt."
        raise CpbenchError(f"Samples of {_listed(lengths[0])} and {_listed(lengths[1])} tokens cannot be compared.", hint, NOTHING_COMPARABLE)
    if not sum(lengths[0]):
        raise CpbenchError("There are no log-probabilities: nothing follows the only token of a sequence.", "Give a sequence at least 2 tokens (--lengths).")
    equal = [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    # two infinities of one sign are equal and have no difference
    diffs = [torch.where(a == b, 0.0, b.double() - a.double()) for a, b in zip(one, other, strict=True)]
    every = torch.cat(diffs)
    delta = torch.cat([diff for diff, same in zip(diffs, equal, strict=True) if not same] or [every[:0]]).abs()
    return Agreement(
        identical=all(equal),
        checked=len(every),
        different=sum(int((a != b).sum()) for a, b, same in zip(one, other, equal, strict=True) if not same),
        max_delta=float(delta.max()) if len(delta) else 0.0,
        avg_delta=float(delta.mean()) if len(delta) else 0.0,
        diff_mean=float(every.mean()),
        diff_max=float(every.abs().max()),
    )


def _listed(lengths: Sequence[int]) -> str:
    return "+".join(map(str, lengths)) or "no"
