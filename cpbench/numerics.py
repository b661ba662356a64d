"""Is the answer right? What is proved about a cell, on a small input, before it is timed.

The cell's strategy, partition, layout and kernel run on a few hundred tokens; for wide models the width is reduced, the heads are not.
The truth is fp64 on one device. The yardstick is one device in the cell's dtype that rounds where the layout rounds: the same
tensor-parallel partial sums, without context parallelism. A maximum error cannot tell a good merge from a bad one, so errors are
relative root mean squares, and the bound is on their ratio. All ranks compute the answer; the first one judges it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.distributed.collectives import Group
from cpbench.distributed.mesh import Groups
from cpbench.formulas import traffic
from cpbench.kernels import load_kernel
from cpbench.kernels.accumulate import Accumulator
from cpbench.kernels.base import Kernel
from cpbench.layout import Layout
from cpbench.partition import packed
from cpbench.program import Models, Output, Program, alone, run_locally
from cpbench.segments import causal_segments, place
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import cached_rows, laid_out, row_index

MAX_RATIO = 1.3  # a sound ring at 32 ranks stays at 1.22; a bf16 accumulator at 8 ranks is at 1.36 and above
MAX_FP32_RMSE = 1e-5
MIN_REMOTE_FACTOR = 10.0  # how much farther than the error the answer without remote tokens must lie
MIN_REMOTE_NEED = 1e-9
MAX_SEQUENCES, MAX_PREFIX, MAX_CHUNKS = 3, 80, 3


@dataclass(frozen=True)
class Check:
    """The verdict on one cell: errors against fp64 (the worse of attention alone and the whole target), and what is wrong, if anything."""

    passed: bool
    reason: str | None
    ratio: float | None = None
    relative_rmse: float | None = None
    limit: str = ""
    remote_tokens_used: bool | None = None
    logits_max_error: float | None = None
    tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields of `results.Numerics`."""
        return {name: value for name, value in asdict(self).items() if name != "reason"}


@dataclass(frozen=True)
class Answer:
    """What the ranks computed together for one small cell: rows [N, M] in packed order, and the logits of a prefill [batch, V]."""

    cell: Cell
    rows: Tensor
    logits: Tensor | None


def check(cell: Cell, groups: Groups, kernel: Kernel, device: torch.device, models: Models) -> Check:
    """Prove a cell on a small input. Every rank learns whether it passed; the first one knows the details."""
    small = small_cell(cell)
    attention = replace(small, target="attention", layers=1)
    answers, mismatches = [], []
    for part in (attention, small):
        answer, mismatch = _answer(part, groups, kernel, device, models)
        answers.append(answer)
        mismatches.append(mismatch)
    mismatch = mismatches[0] or mismatches[1]
    differing = [rank for rank, (differs,) in enumerate(groups.world.share([float(mismatch is not None)])) if differs]
    verdict = Check(True, None)
    if groups.rank == 0:
        verdict = _judge(answers, kernel, device)
        if verdict.passed and differing:
            detail = mismatch or f"rank {differing[0]} received something else"
            verdict = replace(verdict, passed=False, reason=f"traffic differs from its formula: {detail}")
    passed = bool(groups.world.share([float(verdict.passed)])[0][0])
    return verdict if groups.rank == 0 else Check(passed, None)


def small_cell(cell: Cell) -> Cell:
    """The same layout and rules on short sequences: long enough that every block has rows, uneven where the cell is.

    The shortest sequence is among them, because it may switch context parallelism off. Prefixes stay, and so does chunking.
    """
    cp = cell.layout.cp
    shortest = min(range(len(cell.lengths)), key=lambda index: cell.lengths[index])
    chosen = sorted({shortest, *range(min(MAX_SEQUENCES, len(cell.lengths)))})
    enough = max(16 * cp, -(-96 // (2 * cp)) * 2 * cp)  # with the remainder of the cell's own length, which a strategy may need to be zero
    lengths = tuple(min(cell.lengths[index], enough + cell.lengths[index] % (2 * cp)) for index in chosen)
    prefixes = tuple(min(cell.prefixes[index], MAX_PREFIX + cell.prefixes[index] % 7) for index in chosen)
    chunk = None if cell.chunk is None else max(2 * cp, -(-max(lengths) // min(MAX_CHUNKS, -(-max(cell.lengths) // cell.chunk))))
    capacity = None if cell.cache_tokens is None else sum(lengths) + sum(prefixes) + len(chosen) * cell.tokens_per_page
    return replace(
        cell,
        config=cell.config.reduced(),
        layers=min(cell.layers, 2),
        lengths=lengths,
        prefixes=prefixes,
        chunk=chunk,
        cache_tokens=capacity,
    )


def _answer(cell: Cell, groups: Groups, kernel: Kernel, device: torch.device, models: Models) -> tuple[Answer, str | None]:
    """Run one pass on all ranks and collect it; and how this rank's counted traffic differs from its formula."""
    program = Program(cell, groups, kernel, device, models)
    program.keeps_rows = True
    program.prepare()
    groups.recorder.reset()
    output = program.run()
    received, predicted = groups.recorder.reset(), traffic(cell, groups.rank)
    logits = None if output.first is None else _gather_columns(output.first.logits_BV, groups.tp)
    answer = Answer(cell, _collect(output.rows.flatten(1), program.tokens, cell, groups), logits)
    groups.recorder.reset()
    if received == predicted:
        return answer, None
    return answer, f"rank {groups.rank} counted {received.to_dict()}, predicted {predicted.to_dict()}"


def _judge(answers: list[Answer], kernel: Kernel, device: torch.device) -> Check:
    """Compare the answers (attention alone first, then the whole target) with one device."""
    ratios, errors, logits_error, remote = [], [], None, None
    for answer in answers:
        truth, exact = _one_device(answer.cell, load_kernel("reference"), device, exact=True)
        yardstick, _ = _one_device(answer.cell, kernel, device, exact=False)
        errors.append(relative_rmse(answer.rows, truth))
        ratios.append(errors[-1] / max(relative_rmse(yardstick, truth), torch.finfo(torch.float64).eps))
        if answer is answers[0] and answer.cell.layout.cp > 1 and not answer.cell.steps[0].split.replicated:
            local = _own_tokens_only(answer.cell, device)
            needed = relative_rmse(local, truth) > MIN_REMOTE_NEED  # not where every rank holds whole sequences
            remote = relative_rmse(answer.rows, local) > MIN_REMOTE_FACTOR * errors[-1] if needed else None
        if answer.logits is not None and exact.first is not None:
            logits_error = float((answer.logits.double() - exact.first.logits_BV.double()).abs().max())
    cell, worst, ratio = answers[0].cell, max(errors), max(ratios)
    narrow = cell.dtype in ("bfloat16", "float16")
    limit = f"ratio to one device at most {MAX_RATIO}" if narrow else f"relative RMSE at most {MAX_FP32_RMSE:g}"
    reason = None
    if not all(bool(torch.isfinite(answer.rows).all()) for answer in answers):
        return Check(False, "the answer has values that are not finite", limit=limit, tokens=cell.tokens)
    if not all(bool(answer.rows.any()) for answer in answers):
        reason = "the answer is all zeros"
    elif (narrow and ratio > MAX_RATIO) or (not narrow and worst > MAX_FP32_RMSE):
        reason = f"relative RMSE {worst:.2e} is {ratio:.2f} times that of one device (limit: {limit})"
    elif remote is False:
        reason = "the answer is the one that ignores the tokens of other ranks"
    return Check(reason is None, reason, ratio, worst, limit, remote, logits_error, cell.tokens)


def relative_rmse(rows: Tensor, truth: Tensor) -> float:
    """Root mean square error over the root mean square of the truth, in fp64."""
    return float((rows.double() - truth.double()).norm() / truth.double().norm())


def _one_device(cell: Cell, kernel: Kernel, device: torch.device, exact: bool) -> tuple[Tensor, Output]:
    """The cell without context parallelism, in packed order: in fp64 on one rank, or in its dtype with its tensor-parallel sums."""
    layout, dtype = (Layout(), "float64") if exact else (Layout(tp=cell.layout.tp), cell.dtype)
    single = replace(cell, layout=layout, strategy="none", partition="contiguous", dtype=dtype, chunk=None, cache_tokens=None, head_groups=1)
    outputs = [output for _, output in run_locally(single, kernel, device, getattr(torch, cell.dtype) if exact else None)]
    rows = [output.rows.flatten(1) for output in outputs]
    return torch.cat(rows, 1) if cell.target == "attention" else rows[0], outputs[0]


def _own_tokens_only(cell: Cell, device: torch.device) -> Tensor:
    """In fp64: the attention in which every context-parallel rank sees its own tokens and what it has cached, in packed order."""
    single = replace(cell, layout=Layout(), strategy="none", partition="contiguous", dtype="float64", chunk=None, cache_tokens=None, head_groups=1)
    kernel = load_kernel("reference")
    program = Program(single, alone(), kernel, device, rounded_to=getattr(torch, cell.dtype))
    q_THD, k_SGD, v_SGE = program.attention_inputs()
    cached_k, cached_v = program.cached_inputs(0)
    starts = [0, *accumulate(cell.prefixes)]
    rows = torch.empty_like(q_THD)
    for rank in range(cell.layout.cp):
        blocks = tuple(block for step in cell.steps for block in step.split.ranks[rank])
        before = STRATEGIES[cell.strategy].cached(cell.steps[0], rank)
        tokens = row_index(cell.packed_tokens(blocks), device)
        prefix = row_index([packed(block, starts[block.sequence]) for block, _ in cached_rows(before)], device)
        result = Accumulator(len(tokens), program.buffers)
        k, v = torch.cat([cached_k[prefix], k_SGD[tokens]]), torch.cat([cached_v[prefix], v_SGE[tokens]])
        kernel.attend(q_THD[tokens], k, v, causal_segments(place(blocks), laid_out(before, blocks)), program.scale, result)
        rows[tokens] = result.result()
    return rows.flatten(1)


def _collect(rows_nM: Tensor, tokens: Tensor, cell: Cell, groups: Groups) -> Tensor:
    """The rows of all context-parallel ranks in packed order; of attention alone, also the heads of all tensor-parallel ranks."""
    if cell.target == "attention":
        rows_nM = _gather_columns(rows_nM, groups.tp)
    padded = rows_nM.new_zeros(cell.max_rows, rows_nM.shape[1])
    padded[: rows_nM.shape[0]] = rows_nM
    places = torch.full((cell.max_rows,), -1, dtype=torch.int64, device=rows_nM.device)
    places[: len(tokens)] = tokens
    gathered = padded.new_empty(groups.cp.size * cell.max_rows, rows_nM.shape[1])
    indices = places.new_empty(groups.cp.size * cell.max_rows)
    groups.cp.all_gather(gathered, padded).wait()
    groups.cp.all_gather(indices, places).wait()
    whole = rows_nM.new_full((cell.tokens, rows_nM.shape[1]), float("nan"))
    whole[indices[indices >= 0]] = gathered[indices >= 0]
    return whole


def _gather_columns(rows_nM: Tensor, group: Group) -> Tensor:
    """[n, M] of each rank side by side: [n, size * M]."""
    gathered = rows_nM.new_empty(group.size * rows_nM.shape[0], rows_nM.shape[1])
    group.all_gather(gathered, rows_nM.contiguous()).wait()
    return torch.cat(gathered.chunk(group.size), 1)
