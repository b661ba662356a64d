"""Is the answer right? What is proved about a cell: as it is, or on a small input before it is timed.

The cell's strategy, partition, layout and kernel run on a few hundred tokens; for wide models the width is reduced, the heads are not.
The truth is fp64 on one device. The yardstick is one device in the cell's dtype that rounds where the layout rounds (one_device.py). A
maximum error cannot tell a good merge from a bad one, so errors are relative root mean squares, and the bound is on their ratio. Quantised
projections are quantised in the yardstick and not in the truth. All ranks compute the answer (answer.py); one judges it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cpbench.answer import Answer, solve
from cpbench.cell import Cell
from cpbench.choice_errors import wrong_choice
from cpbench.choices import Forced
from cpbench.deterministic import reduced
from cpbench.distributed.mesh import Groups
from cpbench.distributed.traffic import Traffic
from cpbench.formulas import traffic
from cpbench.kernels.base import Kernel
from cpbench.models.config import ModelConfig
from cpbench.models.held import Models
from cpbench.one_device import OneDevice, Solution
from cpbench.quantisation import NONE
from cpbench.strategies.base import row_index

MAX_RATIO = 1.3  # a sound ring at 32 ranks stays at 1.22; a bf16 accumulator at 8 ranks is at 1.36 and above
MAX_FP32_RMSE = 1e-5
MIN_REMOTE_GAP = 10.0  # in rounding errors of one device: how far off the answer without remote tokens lies where it can be recognised
MAX_MARGIN = 4.0  # in logit errors of one device: two logits, each twice as far off
MAX_SEQUENCES, MAX_PREFIX, MAX_CHUNKS = 3, 80, 3


@dataclass(frozen=True)
class Counted:
    """What one rank received in one pass, and what the formula says."""

    rank: int
    received: Traffic
    predicted: Traffic

    @property
    def difference(self) -> str | None:
        """Every kind of collective whose calls or bytes are not those of the formula; None if all are."""
        none, texts = (0, 0), []
        for axis, operation in sorted({*self.received.counts, *self.predicted.counts}):
            counted, formula = (traffic.counts.get((axis, operation), none) for traffic in (self.received, self.predicted))
            if counted != formula:
                texts.append(f"{_amount(counted)} of {operation} over {axis}, not {_amount(formula)}")
        return f"rank {self.rank} counted {'; '.join(texts)}" if texts else None


@dataclass(frozen=True)
class Check:
    """The verdict on one cell: errors against fp64 (the worse of attention alone and the whole target), and what is wrong, if anything.

    `bitwise_equal`: every row has the bits of the yardstick. `collectives`: those of the whole target, on a rank that differs from its
    formula, else on the one that receives most. None: not known, or nothing to tell.
    """

    passed: bool
    reason: str | None
    ratio: float | None = None
    relative_rmse: float | None = None
    limit: str = ""
    remote_tokens_used: bool | None = None
    logits_max_error: float | None = None
    tokens: int | None = None
    max_error: float | None = None
    finite: bool | None = None
    bitwise_equal: bool | None = None
    collectives: Counted | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields of `results.Numerics`."""
        return {name: getattr(self, name) for name in RECORDED}


RECORDED = ("passed", "ratio", "relative_rmse", "limit", "remote_tokens_used", "logits_max_error", "tokens")


def check(cell: Cell, groups: Groups, kernel: Kernel, device: torch.device, models: Models) -> Check:
    """Prove a cell on a small input. Every rank learns whether it passed; the first one knows the details."""
    answers = solve(small_cell(cell), groups, kernel, device, models)
    verdict = judge(answers, kernel, OneDevice(device)) if groups.rank == 0 else Check(True, None)
    passed = bool(groups.world.share([float(verdict.passed)])[0][0])
    return verdict if groups.rank == 0 else Check(passed, None)


def small_cell(cell: Cell) -> Cell:
    """The same layout and rules on short sequences: long enough that every block has rows, uneven where the cell is.

    The shortest sequence is among them, because it may switch context parallelism off. Prefixes stay, and so does chunking. Weights are
    random ones, because those of a checkpoint do not fit a reduced width, and so are tokens.
    """
    cp, pp = cell.layout.cp, cell.layout.pp
    shortest = min(range(len(cell.lengths)), key=lambda index: cell.lengths[index])
    chosen = sorted({shortest, *range(min(max(MAX_SEQUENCES, cell.layout.dp), len(cell.lengths)))})
    enough = max(16 * cp, -(-96 // (2 * cp)) * 2 * cp)  # with the remainder of the cell's own length, which a strategy may need to be zero
    lengths = tuple(min(cell.lengths[index], enough + cell.lengths[index] % (2 * cp)) for index in chosen)
    prefixes = tuple(min(cell.prefixes[index], MAX_PREFIX + cell.prefixes[index] % 7) for index in chosen)
    chunk = None if cell.chunk is None else max(2 * cp, -(-max(lengths) // min(MAX_CHUNKS, -(-max(cell.lengths) // cell.chunk))))
    capacity = None if cell.cache_tokens is None else sum(lengths) + sum(prefixes) + len(chosen) * cell.tokens_per_page
    layers = min(cell.layers, max(2, pp))
    return replace(
        cell,
        config=replace(_reduced(cell, layers), layers=layers),
        layers=layers,
        lengths=lengths,
        prefixes=prefixes,
        chunk=chunk,
        cache_tokens=capacity,
        weights=None,
        prompt=None,
    )


def _reduced(cell: Cell, layers: int) -> ModelConfig:
    """The model of a cell in a narrow width."""
    config = reduced(cell.config, cell.deterministic, cell.layout.tp)
    if not cell.deterministic or config.experts is None or cell.has_experts:
        return config
    return replace(config, experts=replace(config.experts, first=layers))  # the layout need not do for layers that do not run


def _other_bits(answer: Answer, yardstick: Solution) -> str | None:
    """Where a deterministic answer has other bits than that of one device; None where it has the same, or need not."""
    if not answer.cell.deterministic:
        return None
    for rank, rows in answer.copies.items():
        different = int((rows != yardstick.rows).any(1).sum())
        if different or not torch.equal(rows, yardstick.rows):
            return f"deterministic, but {different} of {len(rows)} tokens of rank {rank} have other bits than those of one device"
    same = answer.logits is None or yardstick.logits is None or torch.equal(answer.logits, yardstick.logits)
    return None if same else "deterministic, but logits have other bits than those of one device"


@torch.inference_mode()
def judge(answers: Sequence[Answer], kernel: Kernel, one_device: OneDevice) -> Check:
    """Compare what `solve` returned with one device: the first reason for which an answer is wrong, and the worse of all numbers."""
    parts = [_judge(answer, kernel, one_device) for answer in answers]
    failed = next((number for number, part in enumerate(parts) if not part.passed), None)
    reason = None if failed is None else parts[failed].reason
    if failed is not None and len(parts) > 1:
        reason = f"{'attention alone' if failed == 0 else answers[failed].cell.target}: {reason}"
    counts = [part.collectives for part in parts if part.collectives]
    return replace(
        parts[-1],
        passed=failed is None,
        reason=reason,
        ratio=_largest(part.ratio for part in parts),
        relative_rmse=_largest(part.relative_rmse for part in parts),
        remote_tokens_used=parts[0].remote_tokens_used,
        max_error=_largest(part.max_error for part in parts),
        finite=all(part.finite for part in parts),
        bitwise_equal=all(part.bitwise_equal for part in parts),
        collectives=next((count for count in counts if count.difference), counts[-1]),
    )


def _judge(answer: Answer, kernel: Kernel, one_device: OneDevice) -> Check:
    """The verdict on one pass."""
    cell, narrow = answer.cell, rounds_much(answer.cell)
    limit = f"ratio to one device at most {MAX_RATIO}" if narrow else f"relative RMSE at most {MAX_FP32_RMSE:g}"
    collectives = _collectives(answer)
    differs = f"traffic differs from its formula: {collectives.difference}" if collectives.difference else None
    finite = all(bool(torch.isfinite(rows).all()) for rows in answer.copies.values())
    verdict = Check(True, None, limit=limit, tokens=cell.tokens, finite=finite, bitwise_equal=False, collectives=collectives)
    reason = _unusable(answer)
    if reason:
        return replace(verdict, passed=False, reason=_joined(reason, differs))
    forced = Forced(*(used.chosen_LNK if used else None for used in (answer.experts, answer.keys)))
    truth, yardstick = one_device.truth(cell, forced), one_device.yardstick(cell, kernel, forced)
    errors = {rank: relative_rmse(rows, truth.rows) for rank, rows in answer.copies.items()}
    worst = max(errors, key=lambda rank: errors[rank])
    rounding = max(relative_rmse(yardstick.rows, truth.rows), torch.finfo(torch.float64).eps)
    error, ratio = errors[worst], errors[worst] / rounding
    remote = _remote_tokens_used(cell, answer.copies[worst], truth.rows, rounding, one_device) if cell.target == "attention" else None
    if remote is False:
        reason = "the answer is the one that ignores the tokens of other ranks"
    elif ratio > MAX_RATIO if narrow else error > MAX_FP32_RMSE:
        bound = f"more than {MAX_RATIO}" if narrow else f"and above {MAX_FP32_RMSE:g}"
        reason = f"relative RMSE {error:.2e} is {ratio:.3g} times that of one device, {bound}{_where(answer, errors, truth.rows)}"
    else:
        reason = wrong_choice(answer, truth, yardstick, MAX_MARGIN) or _wrong_token(answer, truth, yardstick) or _other_bits(answer, yardstick)
    return replace(
        verdict,
        passed=not (reason or differs),
        reason=_joined(reason, differs),
        ratio=ratio,
        relative_rmse=error,
        remote_tokens_used=remote,
        max_error=max(_max_error(rows, truth.rows) for rows in answer.copies.values()),
        bitwise_equal=all(torch.equal(rows, yardstick.rows) for rows in answer.copies.values()),
        logits_max_error=None if answer.logits is None or truth.logits is None else _max_error(answer.logits, truth.logits),
    )


def rounds_much(cell: Cell) -> bool:
    """Whether rounding is so large that only the ratio to one device tells anything: in half precision, and behind quantised projections."""
    return cell.dtype in ("bfloat16", "float16") or (cell.quant != NONE and cell.target != "attention")


def relative_rmse(rows: Tensor, truth: Tensor) -> float:
    """Root mean square error over the root mean square of the truth, in fp64."""
    return float((rows.double() - truth.double()).norm() / truth.double().norm())


def _collectives(answer: Answer) -> Counted:
    """Of the first rank that differs from its formula, else of the one that receives most."""
    counted = [Counted(rank, received, traffic(answer.cell, rank, answer.sent)) for rank, received in enumerate(answer.received)]
    return next((count for count in counted if count.difference), max(counted, key=lambda count: count.received.bytes))


def _unusable(answer: Answer) -> str | None:
    """Why there is nothing to compare: tokens that no rank has, values that are not finite, zeros."""
    if answer.lost:
        return f"{answer.lost} of {answer.cell.tokens} tokens are on no rank"
    for rank, rows in answer.copies.items():
        copy = f" on rank {rank}" if len(answer.copies) > 1 else ""
        bad = (~torch.isfinite(rows)).any(1)
        if bad.any():
            return f"{int(bad.sum())} of {len(bad)} rows have values that are not finite{copy or _holders(bad, answer.cell)}"
        if not rows.any():
            return f"the answer is all zeros{copy}"
    return None


def _remote_tokens_used(cell: Cell, rows: Tensor, truth: Tensor, rounding: float, one_device: OneDevice) -> bool | None:
    """Whether the answer lies at the truth or at the attention of each rank to its own tokens. None: at neither, or they are the same.

    They are the same where every rank holds whole sequences, and cannot be told apart where they differ by little more than rounding.
    """
    if cell.layout.cp == 1 or all(rows.replicated[dp] for rows in cell.token_rows for dp in range(cell.layout.dp) if sum(rows.rows[dp])):
        return None
    local = one_device.own_tokens_only(cell)
    gap = relative_rmse(local, truth)
    if gap <= MIN_REMOTE_GAP * rounding:
        return None
    if relative_rmse(rows, truth) < gap / 2:
        return True
    return False if float((rows.double() - local).norm() / truth.norm()) < gap / 2 else None


def _wrong_token(answer: Answer, truth: Solution, yardstick: Solution) -> str | None:
    """A first token that rounding does not excuse: the right one leads by more than that."""
    if truth.logits is None or yardstick.logits is None:
        return None
    rounding = _max_error(yardstick.logits, truth.logits)
    for sequence, (token, right, margin) in enumerate(zip(answer.first_tokens, truth.tokens, truth.margins, strict=True)):
        if token != right and margin > MAX_MARGIN * rounding:
            return f"the first token of sequence {sequence} is {token}, not {right}, which leads by {margin:.2e}; one device is off by {rounding:.1e}"
    return None


def _where(answer: Answer, errors: dict[int, float], truth: Tensor) -> str:
    """The ranks that are best and worst, where they are far apart."""
    what = "rank"
    if len(errors) == 1:
        (rows,), what = answer.copies.values(), "rank" if answer.cell.layout.dp > 1 else "context-parallel rank"
        held = _held(answer.cell, truth.device)
        errors = {rank: relative_rmse(rows[index], truth[index]) for rank, index in held.items() if len(index)}
    best, worst = (pick(errors, key=lambda rank: errors[rank]) for pick in (min, max))
    return f": {errors[best]:.1e} on {what} {best}, {errors[worst]:.1e} on {what} {worst}" if errors[worst] > 2 * errors[best] else ""


def _holders(bad_N: Tensor, cell: Cell) -> str:
    """The ranks that hold the marked tokens."""
    if cell.layout.cp == cell.layout.dp == 1:
        return ""
    what = "rank" if cell.layout.dp > 1 else "context-parallel rank"
    ranks = [str(rank) for rank, index in _held(cell, bad_N.device).items() if bad_N[index].any()]
    return f" on {what}{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"


def _held(cell: Cell, device: torch.device) -> dict[int, Tensor]:
    """Places in the packed batch of the tokens of every context-parallel rank; where there are DP groups, of every rank with tokens of its own."""
    layout = cell.layout
    found = {(dp, cp): row_index(cell.tokens_of(dp, cp), device) for dp in range(layout.dp) for cp in range(layout.cp)}
    return {layout.rank_of(layout.pp - 1, dp, cp) if layout.dp > 1 else cp: index for (dp, cp), index in found.items()}


def _max_error(rows: Tensor, truth: Tensor) -> float:
    return float((rows.double() - truth.double()).abs().max())


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _joined(*reasons: str | None) -> str | None:
    return "; ".join(reason for reason in reasons if reason) or None


def _amount(counts: tuple[int, int]) -> str:
    calls, received = counts
    return f"{calls} call{'' if calls == 1 else 's'} ({received:,} bytes)" if calls else "none"
