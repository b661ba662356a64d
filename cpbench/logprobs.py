"""Log-probabilities of the tokens of a prompt, over the full vocabulary: how they are made from logits, and on which rank.

A token's log-probability is that of the token given all before it, so row i of the logits says that of token i + 1. The first token of a sequence
has none (what precedes it, if anything, is cached and has no row), and nothing follows the last one. Trainers and serving engines round
at different points; both ways are here by name, because log-probabilities only agree in every bit where both sides round alike. How two sets are
compared is decided in agreement.py.

Shapes: N tokens of the batch, n rows of a rank, V vocabulary, W width of the logits, which may be padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.errors import CpbenchError, unknown
from cpbench.models.decoder import shown
from cpbench.program import Program, Step
from cpbench.sharding import VOCABULARY

BLOCK_BYTES = 32 << 20  # of logits in fp32 that exist at a time
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 100.0
NO_TOKEN = -1


def _trainer(logits_nV: Tensor, temperature: float) -> Tensor:
    """As trainers do: logits to fp32, divided by the temperature in fp32, log-softmax in fp32. Nothing else is rounded. [n, V] fp32."""
    return torch.log_softmax(logits_nV.float().div_(temperature), 1)


def _rollout(logits_nV: Tensor, temperature: float) -> Tensor:
    """As serving engines do: logits / temperature rounded to the model's dtype, then a log-softmax whose output is rounded to it too. [n, V] in it."""
    return torch.log_softmax(logits_nV / temperature, 1)


ROUNDINGS: dict[str, Callable[[Tensor, float], Tensor]] = {"trainer-fp32": _trainer, "rollout": _rollout}


@dataclass(frozen=True)
class Rule:
    """How log-probabilities are made from logits. Raises CpbenchError for a temperature or a rounding that cannot be."""

    temperature: float = 1.0
    rounding: str = "trainer-fp32"

    @classmethod
    def parse(cls, temperature: str | None, rounding: str | None) -> Rule:
        """From text; None: the default."""
        try:
            value = cls.temperature if temperature is None else float(temperature)
        except ValueError as error:
            raise CpbenchError(f"{temperature!r} is not a temperature.", "Write a number, for example 0.7.") from error
        return cls(value, rounding or cls.rounding)

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise unknown("rounding", self.rounding, ROUNDINGS)
        if not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            nearest = MOST_TEMPERATURE if self.temperature > MOST_TEMPERATURE else LEAST_TEMPERATURE
            valid = f"from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
            raise CpbenchError(f"A temperature of {self.temperature:g} is not possible: it is {valid}.", f"The nearest valid value is {nearest:g}.")


def log_probs(logits_nW: Tensor, tokens_n: Tensor, vocab: int, rule: Rule) -> Tensor:
    """The log-probability [n] in fp32 of one token per row, over the first `vocab` columns: those behind them pad the vocabulary.

    Raises ValueError where there are fewer columns than that.
    """
    if vocab > logits_nW.shape[1]:
        raise ValueError(f"a vocabulary of {vocab:,} in logits of {logits_nW.shape[1]:,} columns")
    return ROUNDINGS[rule.rounding](logits_nW[:, :vocab], rule.temperature).gather(1, tokens_n[:, None])[:, 0].float()


def successors(ids_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """The token that follows each of a packed batch [N]; NO_TOKEN behind the last one of each sequence."""
    next_N = ids_N.roll(-1)
    next_N[torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1] = NO_TOKEN
    return next_N


def rank_log_probs(program: Program, rows_nM: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """(tokens [n], log-probabilities [n] in fp32 of what follows each) that a rank has, from the hidden states that its pass left.

    Only ranks of the last pipeline stage have any. Tensor-parallel ranks call together, and all get those of all their rows. A row is NaN
    where nothing follows. The tokens are numbered by their places in the packed batch.
    """
    next_N = successors(program.models.token_ids(program.cell), program.cell.lengths).to(rows_nM.device)
    tokens, values = [program.attended[:0]], [torch.empty(0, device=rows_nM.device)]
    for step in program.steps if program.slice.head else ():
        if step.attention is not None:
            tokens.append(program.attended[step.rows])
            values.append(_step_log_probs(program, step, rows_nM[step.held], tokens[-1], next_N, rule))
    return torch.cat(tokens), torch.cat(values)


def _step_log_probs(program: Program, step: Step, rows_nM: Tensor, tokens_n: Tensor, next_N: Tensor, rule: Rule) -> Tensor:
    """Of the rows of one step, a block of them at a time. `rows_nM` are those held here, `tokens_n` those of the tensor-parallel group."""
    decoder, communicator, vocab = program.decoder, step.communicator, program.cell.config.vocab
    normed_nM = communicator.together(shown(program.watching(step), decoder.final_normed(rows_nM), "final norm"), VOCABULARY)
    next_n, values_n = next_N[tokens_n], torch.empty(len(tokens_n), device=rows_nM.device)
    size = max(1, BLOCK_BYTES // (4 * vocab))
    for first in range(0, len(tokens_n), size):
        block = slice(first, first + size)
        logits_nV = communicator.whole_logits(decoder.logits(normed_nM[block]))
        if program.watch is not None:
            program.watch(tokens_n[block], "logits", logits_nV)
        values_n[block] = log_probs(logits_nV, next_n[block].clamp(min=0), vocab, rule)
    return values_n.masked_fill_(next_n == NO_TOKEN, float("nan"))
