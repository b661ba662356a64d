"""What the ranks reported, put together: the record of one round joins what is known of a cell, and first tokens are compared.

Pure functions over plain data. A record is what worker.py writes after one cell; which rounds run is decided in driver.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from cpbench.cell import Cell
from cpbench.clock_record import ClockRound, Clocks, clock_warnings
from cpbench.errors import CpbenchError
from cpbench.projection.light import Limits, light
from cpbench.results import CellResult, ComparedCell, Failure, FirstToken, Memory, Metric, Numerics, Peak, RankRecord, Split, Status
from cpbench.stats import median, median_interval, outliers

TIME_METRIC = {"prefill": "ttft_s", "layer": "layer_s", "attention": "attention_s"}
SPLIT_METRICS = ("compute_s", "comm_s", "exposed_comm_s")
NO_TIME: tuple[Status, ...] = ("wrong", "unsupported")
OUTLIER_WARNING = "far from the median (kept)"


def time_of(cell: ComparedCell) -> Metric | None:
    """The metric that the target is about: TTFT, or the time of a layer or of the attention."""
    return next((cell.metrics[name] for name in TIME_METRIC.values() if name in cell.metrics), None)


def rounds_done(result: CellResult | None) -> int:
    """How many rounds of samples a cell has."""
    time = time_of(result) if result else None
    return len(time.rounds) if time else 0


def merge_record(cell: Cell, previous: CellResult | None, record: dict[str, Any]) -> CellResult:
    """Add the record of one round. Raises CpbenchError for a record that breaks the schema."""
    try:
        return _merged(cell, previous, record)
    except ValidationError as error:
        first = error.errors()[0]
        raise CpbenchError(f"the worker's record breaks the schema at {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CpbenchError(f"the worker's record cannot be read: {type(error).__name__} {error}") from error


def _merged(cell: Cell, previous: CellResult | None, record: dict[str, Any]) -> CellResult:
    status: Status = record["status"]
    timed = record.get("timed", True)
    if status == "ok" and timed and not record["samples"]:
        raise ValueError("no samples")
    metrics = {} if status in NO_TIME or not timed else _metrics(cell, previous.metrics if previous else {}, record)
    numerics = Numerics.model_validate(record["numerics"]) if record.get("numerics") else previous.numerics if previous else None
    known = previous.clocks if previous else Clocks()
    clocks = Clocks(rounds=[*known.rounds, *([ClockRound.model_validate(record["clocks"])] if record.get("clocks") else [])])
    outdated = clock_warnings(known)
    earlier = [text for text in (previous.warnings if previous else []) if text not in outdated]
    warnings = [*earlier, *record.get("warnings", []), *_refused(record), *clock_warnings(clocks)]
    return CellResult(
        id=cell.id,
        key=cell.key,
        status=status,
        reason=record.get("reason"),
        world_size=cell.world_size,
        tokens_per_rank=record.get("tokens_per_rank"),
        oversubscribed=record.get("oversubscribed", False),
        cp_active=record.get("cp_active", True),
        cp_off_reason=record.get("cp_off_reason"),
        threads_per_rank=record.get("threads_per_rank"),
        kernel=record.get("kernel"),
        metrics=metrics,
        first_call_s=previous.first_call_s if previous and previous.first_call_s is not None else record.get("first_call_s"),
        memory=_larger(previous.memory if previous else None, record.get("memory")),
        ranks=[RankRecord.model_validate(rank) for rank in record.get("ranks", [])],
        traffic=record.get("traffic") or {},
        split=Split.model_validate(record["split"]) if record.get("split") else None,
        peak=_peak(record),
        experts=record.get("experts") or {},
        clocks=clocks,
        numerics=numerics,
        first_tokens=[FirstToken.model_validate(token) for token in record.get("first_tokens") or []],
        warnings=_with_outliers(warnings, metrics, TIME_METRIC[cell.target]),
    )


def _metrics(cell: Cell, old: dict[str, Metric], record: dict[str, Any]) -> dict[str, Metric]:
    """The time of the target, and what follows from it, with this round added."""
    samples = [float(sample) for sample in record["samples"]]
    operations = record.get("flops_per_rank")
    new: dict[str, tuple[str, Literal["lower", "higher", "none"], list[float]]] = {
        TIME_METRIC[cell.target]: ("s", "lower", samples),
        "tokens_per_s": ("tokens/s", "higher", [cell.tokens / sample for sample in samples]),
    }
    if operations and not _refused(record):
        achieved, peak = [operations / sample for sample in samples], _peak(record)
        new["tflops_per_rank"] = ("TFLOP/s", "higher", [flops / 1e12 for flops in achieved])
        if peak:
            least = light(cell, Limits(peak.flops)).seconds  # of the compute floor: neither memory nor links have a data sheet here
            new["peak_fraction"] = ("1", "higher", [flops / peak.flops for flops in achieved])
            new["light_fraction"] = ("1", "higher", [least / sample for sample in samples])
    for name in SPLIT_METRICS:
        if (value := (record.get("split") or {}).get(name)) is not None:
            new[name] = ("s", "lower", [float(value)])
    if record.get("skew_samples"):
        new["skew"] = ("1", "lower", [float(sample) for sample in record["skew_samples"]])
    added = {name: _metric(old.get(name), unit, better, values, record.get("stop")) for name, (unit, better, values) in new.items()}
    return {**old, **added}


def _peak(record: dict[str, Any]) -> Peak | None:
    return Peak.model_validate(record["peak"]) if record.get("peak") else None


def _refused(record: dict[str, Any]) -> list[str]:
    """Why the achieved FLOP/s are not believed, in words."""
    peak, operations = _peak(record), record.get("flops_per_rank")
    if not (peak and peak.is_limit and operations and record.get("samples")):
        return []
    most = operations / min(record["samples"])
    if most <= peak.flops:
        return []
    return [f"{most / 1e12:,.0f} TFLOP/s per rank is above the {peak.flops / 1e12:,.0f} of the {peak.source}, and is not stored: the time is too short"]


def _metric(old: Metric | None, unit: str, better: Literal["lower", "higher", "none"], samples: list[float], stop: str | None) -> Metric:
    rounds = [*(old.rounds if old else []), samples]
    everything = [sample for one in rounds for sample in one]
    stops = [*(old.stop if old else []), *([stop] if stop else [])]
    return Metric(unit=unit, better=better, rounds=rounds, median=median(everything), ci95=median_interval(everything), n=len(everything), stop=stops)


def _larger(old: Memory | None, new: dict[str, Any] | None) -> Memory | None:
    """The record of the round with the higher peak."""
    memory = Memory.model_validate(new) if new else None
    if old is None or memory is None:
        return memory or old
    return max(old, memory, key=lambda m: (m.peak_live_bytes or 0, m.peak_allocator_bytes or 0, m.peak_reserved_bytes or 0))


def _with_outliers(warnings: Sequence[str], metrics: dict[str, Metric], time: str) -> list[str]:
    """Each warning once, and the count of outliers over all rounds brought up to date."""
    kept = [text for text in dict.fromkeys(warnings) if not text.endswith(OUTLIER_WARNING)]
    samples = [sample for one in metrics[time].rounds for sample in one] if time in metrics else []
    far = len(outliers(samples))
    return [*kept, f"{far} of {len(samples)} samples {OUTLIER_WARNING}"] if far else kept


def not_measured(cell: Cell, status: Status, reason: str, previous: CellResult | None = None, failure: Failure | None = None) -> CellResult:
    """A cell that failed or was not run. What earlier rounds measured is kept, unless the answer is wrong."""
    result = previous or CellResult(id=cell.id, key=cell.key, status=status, world_size=cell.world_size)
    metrics = {} if status in NO_TIME else result.metrics
    return result.model_copy(update={"status": status, "reason": reason, "failure": failure, "metrics": metrics})


def token_reference(cell: Cell, finished: Iterable[tuple[Cell, CellResult]]) -> CellResult | None:
    """Of the cells before this one in the order of the plan (so the baseline, or the smallest layout), the first with the same answer to give."""
    for other, result in finished:
        if other.id == cell.id:
            return None
        if result.status == "ok" and result.first_tokens and _same_answer(cell) == _same_answer(other):
            return result
    return None


def _same_answer(cell: Cell) -> tuple[object, ...]:
    return cell.target, cell.config, cell.layers, cell.dtype, cell.device, cell.lengths, cell.prefixes, cell.seed


def compare_tokens(cell: Cell, result: CellResult, reference: CellResult | None) -> CellResult:
    """Hold first tokens against the reference's.

    Another token is wrong only where both margins to the next token exceed the error of the logits; closer calls are warnings.
    """
    if reference is None or result.status != "ok":
        return result
    errors = [n.logits_max_error for n in (result.numerics, reference.numerics) if n and n.logits_max_error is not None]
    warnings = list(result.warnings)
    for sequence, (mine, theirs) in enumerate(zip(result.first_tokens, reference.first_tokens, strict=False)):
        if mine.token == theirs.token:
            continue
        margin = min(mine.margin, theirs.margin)
        text = f"first token of sequence {sequence} is {mine.token}, in {reference.key['layout']} it is {theirs.token}"
        if errors and margin > max(errors):
            return not_measured(cell, "wrong", f"{text}; both margins ({margin:.3g} at least) exceed the error of the logits ({max(errors):.3g})", result)
        known = f"within the error of the logits ({max(errors):.3g})" if errors else "the error of the logits is not known"
        warnings.append(f"{text}; the margin is {margin:.3g}, {known}")
    return result.model_copy(update={"warnings": list(dict.fromkeys(warnings))})
