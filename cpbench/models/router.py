"""Which experts a token goes to, and with which weights: the routers of Qwen3-MoE, DeepSeek V2 and DeepSeek V3.

One rule covers them (HF modeling files of the three): scores by softmax or sigmoid; groups of experts limited by their best score, or with a
correction bias by the sum of their two best; of what is left the `top_k` best; the scores of the chosen, without the bias, as weights, summing
to 1 or not, times a scale. Everything is in fp32, in fp64 for fp64 inputs. Of equal scores the lowest expert index wins, on every rank and
device, so that ranks with the same rows choose alike. How rows get to the chosen experts is decided in moe.py.

Shapes: n rows, M hidden, E experts, K chosen ones, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.choices import ChoiceLog, Note
from cpbench.experts import RouterRule
from cpbench.models.config import Experts, ModelConfig
from cpbench.models.invariant import InvariantWeight, in_blocks
from cpbench.models.linear import linear, plain
from cpbench.models.weights import RandomWeights, Weights


@dataclass(frozen=True)
class Choice:
    """Experts [n, K] of each row, ascending, and their weights [n, K] in fp32 (fp64)."""

    experts_nK: Tensor
    weights_nK: Tensor


@dataclass(frozen=True)
class Routing:
    """What the routers of one step need beside rows. `tokens_n`: the place in the batch of each row that this rank routes."""

    rule: RouterRule
    seed: int
    tokens_n: Tensor
    log: ChoiceLog


class Router:
    """The gate of one layer; every rank has all of it."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, layer: int) -> None:
        assert config.experts is not None
        self.experts, self.layer = config.experts, layer
        self.weight = weights.plain(weights.linear(f"{prefix}.weight", (config.experts.count, config.hidden)))
        name = f"{prefix}.e_score_correction_bias"  # kept in fp32, because its steps are smaller than those of narrow dtypes
        self.bias = weights.bias(name, config.experts.count, wide=True) if config.experts.correction else None

    def forward(self, x_nM: Tensor, routing: Routing | None = None) -> Choice:
        """Experts and weights of every row."""
        scores_nE = self.scores(x_nM)
        ranked_nE = scores_nE if self.bias is None else scores_nE + self.bias
        experts_nK = choose(ranked_nE, self.experts) if routing is None else self._routed(ranked_nE, routing)
        return Choice(experts_nK, weigh(scores_nE, experts_nK, self.experts))

    def scores(self, x_nM: Tensor) -> Tensor:
        """Of every expert for every row [n, E], before any bias."""
        wide = torch.promote_types(x_nM.dtype, torch.float32)
        weight = self.weight if isinstance(self.weight, InvariantWeight) else plain(self.weight).to(wide)  # it is widened a part at a time
        logits_nE = linear(x_nM.to(wide), weight)
        return logits_nE.softmax(1) if self.experts.scoring == "softmax" else in_blocks(torch.sigmoid, logits_nE)

    def _routed(self, ranked_nE: Tensor, routing: Routing) -> Tensor:
        experts, log, exponent = self.experts, routing.log, routing.rule.exponent
        own_nK = choose(ranked_nE, experts) if exponent is None else drawn(routing.seed, self.layer, routing.tokens_n, experts, exponent)
        used_nK = own_nK if log.forced_LNK is None else log.forced_LNK[self.layer, routing.tokens_n]
        if log.watching:
            loads = torch.bincount(used_nK.flatten(), minlength=experts.count).tolist()
            detail = (routing.tokens_n, used_nK, own_nK, ranked_nE, margins(ranked_nE, experts)) if log.detailed else ()
            log.notes.append(Note(self.layer, loads, *detail))
        return used_nK


def choose(ranked_nE: Tensor, experts: Experts) -> Tensor:
    """The best experts of each row [n, K], ascending, from the groups that may be chosen."""
    if experts.groups > experts.top_groups:
        ranked_nE = _within_groups(ranked_nE, experts)
    return best(ranked_nE, experts.top_k).sort(1).values


def weigh(scores_nE: Tensor, experts_nK: Tensor, experts: Experts) -> Tensor:
    """The weights [n, K] of the chosen experts."""
    weights_nK = scores_nE.gather(1, experts_nK)
    if experts.normalised:
        weights_nK = weights_nK / (weights_nK.sum(1, keepdim=True) + 1e-20)
    return weights_nK * experts.scale


def best(scores_nE: Tensor, count: int) -> Tensor:
    """Indices [n, count] of the highest scores, best first, the lowest index of equal ones first: `topk` promises no order among them."""
    left_nE, found = scores_nE.clone(), []
    for _ in range(count):
        found.append(left_nE.argmax(1, keepdim=True))
        left_nE.scatter_(1, found[-1], float("-inf"))
    return torch.cat(found, 1)


def group_scores(ranked_nE: Tensor, experts: Experts) -> Tensor:
    """Of every group [n, G]: its best score, and with a correction bias the sum of its two best."""
    ranked_nGe = ranked_nE.view(len(ranked_nE), experts.groups, experts.count // experts.groups)
    return ranked_nGe.topk(min(2, ranked_nGe.shape[2]), 2).values.sum(2) if experts.correction else ranked_nGe.amax(2)


def _within_groups(ranked_nE: Tensor, experts: Experts) -> Tensor:
    """Scores with those of the groups left out at minus infinity."""
    chosen_nG = best(group_scores(ranked_nE, experts), experts.top_groups)
    out_nG = torch.ones(len(ranked_nE), experts.groups, dtype=torch.bool, device=ranked_nE.device).scatter_(1, chosen_nG, False)
    return ranked_nE.masked_fill(out_nG.repeat_interleave(experts.count // experts.groups, 1), float("-inf"))


def margins(ranked_nE: Tensor, experts: Experts) -> Tensor:
    """By how much [n] scores would have to change for other experts to be chosen: the last expert's lead, or that of the last group."""
    lead_n = torch.full((len(ranked_nE),), float("inf"), dtype=ranked_nE.dtype, device=ranked_nE.device)
    if experts.groups > experts.top_groups:
        groups_nG = group_scores(ranked_nE, experts).topk(experts.top_groups + 1, 1).values
        lead_n = torch.minimum(lead_n, groups_nG[:, -2] - groups_nG[:, -1])
        ranked_nE = _within_groups(ranked_nE, experts)
    if experts.count > experts.top_k:
        top_nk = ranked_nE.topk(experts.top_k + 1, 1).values
        lead_n = torch.minimum(lead_n, top_nk[:, -2] - top_nk[:, -1])
    return lead_n


def drawn(seed: int, layer: int, tokens_n: Tensor, experts: Experts, exponent: float) -> Tensor:
    """Experts [n, K] of tokens, drawn without replacement from Zipf's law (0: uniform), ascending.

    Each token gives every expert the logarithm of its share plus Gumbel noise, and the largest win (Gumbel top-k). The noise is a hash of seed,
    layer, token and expert; which expert is how popular is drawn for every layer.
    """
    hashed = RandomWeights(seed, torch.float32, tokens_n.device)
    columns = torch.arange(experts.count)
    noise_nE = hashed.values(f"router.{layer}", tokens_n, columns, 0.5 * 3**-0.5, 0.5).clamp_(1e-7, 1 - 1e-7)
    if exponent:
        order = hashed.values(f"router.{layer}.popularity", torch.zeros(1, dtype=torch.int64), columns, 1.0).view(-1).argsort(stable=True)
        share_E = torch.empty(experts.count, device=tokens_n.device)
        share_E[order] = -exponent * torch.arange(1, experts.count + 1, device=tokens_n.device, dtype=torch.float32).log()
        noise_nE = noise_nE.log_().neg_().log_().neg_().add_(share_E)
    return best(noise_nE, experts.top_k).sort(1).values
