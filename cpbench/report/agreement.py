"""How `cpbench verify --against` looks: which two runs, the block of seven numbers, where they part, and the same as JSON.

Pure. The block is laid out as reinforcement-learning systems print it, so that logs of both can be read by one script. What the numbers are is decided
in agreement.py, and what a divergence is in divergence.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from cpbench.against import Comparison
from cpbench.agreement import Agreement
from cpbench.batch import Batch
from cpbench.cell import Cell
from cpbench.logprob_record import LogProbs
from cpbench.report.verification import title_of

RULE = "=" * 60
TITLE = "LOGPROB COMPARISON RESULTS"
LABELS = ("Bitwise identical", "Tokens checked", "Tokens different", "Max delta", "Avg delta", "Diff mean", "Diff max")
MAX_RANGES = 8  # of tokens that are named in the text


def running(cell: Cell) -> str:
    """What is about to run."""
    return f"{cell.layout} {cell.strategy} {cell.partition}: {title_of(cell)}"


def agreement_view(found: Comparison, traced: bool) -> Iterator[str]:
    """Which two, the block, and the first module that differs where that was asked for."""
    one, other = found.one, found.other
    alike = [name for name in ("dtype", "rounding") if _named(one)[name] == _named(other)[name]]
    yield f"{_name(other, alike)} against {_name(one, alike)}"
    yield _common(one, alike)
    yield from block(found.agreement)
    if traced:
        yield from _divergence(found)


def block(numbers: Agreement) -> Iterator[str]:
    """The seven numbers, labels on the left, between lines."""
    yield from (RULE, TITLE, RULE)
    width = max(map(len, LABELS))
    for label, value in zip(LABELS, asdict(numbers).values(), strict=True):
        yield f"{label:<{width}} : {f'{value:.6e}' if isinstance(value, float) else value}"
    yield RULE


def _divergence(found: Comparison) -> Iterator[str]:
    parted, lengths = found.divergence, found.one.key.lengths
    if parted is None:
        yield f"no module differs: from embedding to logits, all outputs have the same bits for all {sum(lengths):,} tokens"
        return
    yield f"first difference: {parted.module}, {len(parted.tokens):,} of {sum(lengths):,} tokens"
    yield f"relative RMSE {parted.relative_rmse:.2e}, largest absolute difference {parted.max_error:.2e}"
    ranges = [f"{sequence}:{first}" + (f"-{last}" if last > first else "") for sequence, first, last in _ranges(parted.tokens, lengths)]
    yield f"tokens (sequence:places among its new tokens): {', '.join(ranges[:MAX_RANGES])}{', ...' if len(ranges) > MAX_RANGES else ''}"


def _ranges(tokens: Iterable[int], lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(sequence, first, last) of neighbours among places in the packed batch."""
    starts, found = (0, *accumulate(lengths)), list[tuple[int, int, int]]()
    for token in tokens:
        sequence = max(index for index in range(len(lengths)) if starts[index] <= token)
        place = token - starts[sequence]
        if found and found[-1][0] == sequence and found[-1][2] == place - 1:
            found[-1] = (sequence, found[-1][1], place)
        else:
            found.append((sequence, place, place))
    return found


def record_line(record: LogProbs) -> str:
    """What was run and nothing was compared with."""
    everything = ("dtype", "rounding")
    return f"{_name(record, everything)}: {sum(map(len, record.samples)):,} log-probabilities of {_common(record, everything)}"


def _named(record: LogProbs) -> dict[str, str]:
    strategy = "" if record.key.strategy == "none" else record.key.strategy
    return {"layout": record.key.layout, "strategy": strategy, "dtype": record.key.dtype, "rounding": record.rounding}


def _name(record: LogProbs, common: Sequence[str]) -> str:
    """`cp2 ring bfloat16`, without what is said elsewhere."""
    return " ".join(text for name, text in _named(record).items() if text and name not in common)


def _common(record: LogProbs, common: Sequence[str]) -> str:
    """What two records have in common."""
    key = record.key
    batch = Batch(tuple(key.lengths), tuple(key.prefixes or [0] * len(key.lengths)))
    parts = [f"{key.layers} layers of {key.model}", batch.name, *(text for name, text in _named(record).items() if name in common)]
    return ", ".join([*parts, f"temperature {record.temperature:g}"])


def agreement_json(found: Comparison) -> dict[str, Any]:
    """The same as data. A number that is not finite is null."""
    numbers = {name: value if math.isfinite(value) else None for name, value in asdict(found.agreement).items()}
    left_out = {"samples", "config", "schema_name", "schema_version"}
    runs = {name: record.model_dump(exclude=left_out) for name, record in (("one", found.one), ("other", found.other))}
    return {"schema": "cpbench.agreement", **runs, **numbers, "divergence": asdict(found.divergence) if found.divergence else None}
