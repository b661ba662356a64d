"""Whether experts and keys were chosen as they had to be: choices that rounding does not excuse.

The choices of the ranks were used on one device too, so that answers can be compared (numerics.py); what is left to judge are the choices.
Another one than that of fp64 is right where scores, each off as on one device, can turn the lead around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpbench.answer import Answer
from cpbench.one_device import Solution


def wrong_choice(answer: Answer, truth: Solution, yardstick: Solution, margin: float) -> str | None:
    """The first choice that leads of more than `margin` rounding errors speak against, in words; None where there is none."""
    return _wrong_experts(answer, truth, yardstick, margin) or _wrong_keys(answer, truth, yardstick, margin)


def _wrong_experts(answer: Answer, truth: Solution, yardstick: Solution, margin: float) -> str | None:
    """A choice of experts that rounding does not excuse: those of fp64 lead by more than that."""
    if answer.experts is None or truth.experts is None or yardstick.experts is None:
        return None
    if answer.experts.disagreed:
        return f"ranks choose different experts for {answer.experts.disagreed} tokens"
    right, used = truth.experts.chosen_LNK, answer.experts.chosen_LNK
    rounding = float((yardstick.experts.scores_LNE.double() - truth.experts.scores_LNE.double()).abs().max())
    leads = torch.where((right != used).any(2), truth.experts.margins_LN, 0.0)
    layer, token = divmod(int(leads.argmax()), leads.shape[1])
    lead = float(leads[layer, token])
    if lead <= margin * rounding:
        return None
    which = f"token {token} has the experts {used[layer, token].tolist()} in layer {layer}, not {right[layer, token].tolist()}"
    return f"{which}, which lead by {lead:.2e}; scores of one device are off by {rounding:.1e}"


def _wrong_keys(answer: Answer, truth: Solution, yardstick: Solution, margin: float) -> str | None:
    """A selection of keys that rounding does not excuse: a key that was left out leads one that was taken by more than that."""
    if answer.keys is None or truth.keys is None or yardstick.keys is None:
        return None
    if answer.keys.disagreed:
        return f"ranks select different keys for {answer.keys.disagreed} tokens"
    scores, theirs = truth.keys.scores_LNE, yardstick.keys.scores_LNE
    used, right = (_marked(chosen, scores) for chosen in (answer.keys.chosen_LNK, truth.keys.chosen_LNK))
    visible = scores.isfinite() & theirs.isfinite()
    rounding = float((theirs.double() - scores).where(visible, 0.0).abs().max())
    taken = scores.masked_fill(~used | right, torch.inf).amin(2)
    left = scores.masked_fill(used | ~right, -torch.inf).amax(2)
    leads = torch.where((used != right).any(2), left - taken, 0.0)
    layer, token = divmod(int(leads.argmax()), leads.shape[1])
    lead, wrong = float(leads[layer, token]), int((used.sum(2) != right.sum(2)).sum())
    if wrong:
        return f"{wrong} tokens attend to more or fewer keys than they select"
    if lead <= margin * rounding:
        return None
    missed = int((right & ~used)[layer, token].sum())
    return f"token {token} misses {missed} keys in layer {layer}, one of which leads by {lead:.2e}; scores of one device are off by {rounding:.1e}"


def _marked(chosen_LNK: Tensor, scores_LNE: Tensor) -> Tensor:
    """Which keys were chosen: [L, N, E]."""
    marks = torch.zeros(*scores_LNE.shape[:2], scores_LNE.shape[2] + 1, dtype=torch.bool, device=scores_LNE.device)
    return marks.scatter_(2, chosen_LNK + 1, True)[..., 1:]
