"""Results made by hand, for tests of what is printed. They go through the models of cpbench.results like measured ones."""

from __future__ import annotations

from typing import Any

from cpbench.ab import alternations, with_ratio, with_rounds
from cpbench.cell import Cell
from cpbench.formulas import new_rows, score_pairs, traffic
from cpbench.layout import AXES, Layout
from cpbench.models.presets import PRESETS
from cpbench.pairing import Pair
from cpbench.records import merge_record, not_measured
from cpbench.results import CellResult, Failure, ResultFile, Run
from cpbench.strategies import STRATEGIES

SEQ = 36 * 1024
CORES = 2
TOKEN_WARNING = "first token of sequence 0 is 18, in cp1 it is 17; the margin is 0.0001, within the error of the logits (0.0003)"


def make_cell(layout: str, strategy: str, seq: int = SEQ, batch: int = 1, **changes: Any) -> Cell:
    fields: dict[str, Any] = {
        "target": "prefill",
        "config": PRESETS["qwen3-tiny"],
        "layers": 1,
        "layout": Layout.parse(layout),
        "strategy": strategy,
        "partition": STRATEGIES[strategy].partitions[0],
        "kernel": "auto",
        "dtype": "float32",
        "device": "cpu",
        "lengths": (seq,) * batch,
    }
    return Cell(**{**fields, **changes})


def measured(
    cell: Cell, samples: list[float], *, memory: int = 268 << 20, ratio: float = 1.02, warnings: tuple[str, ...] = (), skew: float = 1.02
) -> CellResult:
    """A cell that ended well, with `samples` in seconds; the last rank has `skew` times the work of the median one."""
    ranks = range(cell.world_size)
    received = [traffic(cell, rank).bytes for rank in ranks]
    record = {
        "status": "ok",
        "samples": samples,
        "stop": "precision",
        "skew_samples": [1.01] * len(samples),
        "flops_per_rank": 3.4e11,
        "kernel": "cpu_flash" if cell.device == "cpu" else "sdpa",
        "tokens_per_rank": cell.max_rows,
        "threads_per_rank": max(1, CORES // cell.world_size) if cell.device == "cpu" else None,
        "oversubscribed": cell.device == "cpu" and cell.world_size > CORES,
        "memory": {"rank": 0, "peak_live_bytes": memory, "peak_allocator_bytes": 2 * memory},
        "ranks": [
            {
                "rank": rank,
                "coordinates": {axis: getattr(cell.layout.coordinates(rank), axis) for axis in AXES},
                "tokens": new_rows(cell, rank),
                "score_pairs": score_pairs(cell, rank),
            }
            for rank in ranks
        ],
        "traffic": {"bytes": max(received), "calls": 4},
        "split": _split(samples[0], cell.world_size, skew),
        "cp_active": cell.cp_off is None,
        "cp_off_reason": cell.cp_off,
        "numerics": {"ratio": ratio, "relative_rmse": 3e-7, "limit": "1.3", "remote_tokens_used": True, "tokens": 96},
        "first_tokens": [{"token": 17, "margin": 0.3}],
        "warnings": list(warnings),
    }
    return merge_record(cell, None, record)


def _split(seconds: float, ranks: int, skew: float) -> dict[str, Any]:
    """A tenth of the pass is exposed where there are several ranks."""
    exposed = 0.0 if ranks == 1 else seconds / 10
    times = {"step_s": seconds, "compute_s": seconds - exposed, "comm_s": 2 * exposed, "exposed_comm_s": exposed}
    kind = {"axis": "cp", "ranks": ranks, "operation": "send_recv", "calls": 3, "bytes": 9 << 20, "exposed_s": exposed, "alone_s": exposed, "bytes_per_s": 9e8}
    found = {"rank": ranks - 1, "compute_skew": 1.0 if ranks == 1 else skew, "ranks": [times] * ranks}
    return {**times, **found, "collectives": [kind] if ranks > 1 else []}


def result(cells: list[CellResult], *, complete: bool = True, device: str = "cpu") -> ResultFile:
    gpus = ["NVIDIA H200"] * 8 if device == "cuda" else []
    environment = {"device": device, "devices": len(gpus), "gpus": gpus, "cores": CORES, "cpu": "Example CPU", "packages": {"torch": "2.13.0"}}
    run = Run(
        id="0123456789ab",
        name="sweep",
        argv=["sweep", "--seq", "36k", "--cp", "2,4,8"],
        scenario={},
        started="2026-11-20T12:00:00+00:00",
        ended="2026-11-20T12:03:00+00:00" if complete else None,
        complete=complete,
        cpbench_version="0.1.0",
    )
    return ResultFile(schema_name="cpbench.result", run=run, environment=environment, cells=cells)


def healthy() -> ResultFile:
    """The main command's cells, all of them ok."""
    return result(
        [
            measured(make_cell("cp1", "none"), [4.55, 4.53, 4.51], memory=301 << 20, ratio=1.0),
            measured(make_cell("cp2", "allgather"), [4.61, 4.58, 4.6], memory=187 << 20),
            measured(make_cell("cp2", "ring"), [4.57, 4.6, 4.62], memory=181 << 20),
            measured(make_cell("cp2", "ulysses"), [4.5, 4.49, 4.52], memory=202 << 20),
            measured(make_cell("cp4", "ring"), [4.61, 4.68, 4.66, 4.6, 4.7], memory=93 << 20, warnings=(TOKEN_WARNING,)),
            measured(make_cell("cp8", "ring"), [4.8, 4.71, 4.75], memory=49 << 20),
        ]
    )


def troubled() -> ResultFile:
    """One cell of every status, two lengths, and a length whose baseline is missing."""
    long = 128 * 1024
    tail = ["Traceback (most recent call last):", '  File "worker.py", line 1, in main', "RuntimeError: [bold]injected\x1b[31m[/bold]"]
    return result(
        [
            measured(make_cell("cp1", "none"), [4.55, 4.53, 4.51], memory=301 << 20),
            not_measured(make_cell("cp3", "ulysses"), "unsupported", "8 query heads do not divide over cp=3; the nearest degree is cp=2"),
            not_measured(make_cell("cp4", "ring"), "crash", "RuntimeError: injected", failure=Failure(rank=3, log_tail=tail)),
            not_measured(make_cell("cp4", "ulysses"), "wrong", "relative RMSE is 2.1 times that of one device"),
            not_measured(make_cell("cp1", "none", long), "oom", "DefaultCPUAllocator: can't allocate memory"),
            measured(make_cell("cp2", "ring", long), [57.5, 57.2, 57.7], memory=640 << 20),
            measured(make_cell("cp4", "ring", long), [58.1, 58.6, 58.0], memory=331 << 20),
            not_measured(
                make_cell("cp4", "allgather", long), "timeout", "took longer than 10m00", measured(make_cell("cp4", "allgather", long), [59.0, 59.5, 58.8])
            ),
            not_measured(make_cell("cp8", "ring", long), "skipped", "does not fit into the budget of 5m00"),
            not_measured(make_cell("cp8", "ulysses", long), "interrupted", "interrupted in round 1 of 1"),
        ],
        complete=False,
    )


def on_gpus() -> ResultFile:
    """Tensor and context parallelism of a layer, with a batch, on GPUs; no cp1."""
    changes: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "config": PRESETS["qwen3-8b"], "target": "layer", "batch": 2}
    return result(
        [
            measured(make_cell("tp2", "none", **changes), [0.0214, 0.0213, 0.0215, 0.0214, 0.0214], memory=3 << 30),
            measured(make_cell("cp2tp2", "ring", **changes), [0.0112, 0.0111, 0.0113, 0.0111, 0.0112], memory=2 << 30),
            measured(make_cell("cp4tp2", "ring", **changes), [0.0061, 0.006, 0.0061, 0.0062, 0.006], memory=1 << 30, skew=1.31),
        ],
        device="cuda",
    )


def batches() -> ResultFile:
    """Two batches with cached prefixes, in chunks, of which one is too short for eight ranks; a hybrid, and ties within noise."""
    mixed: dict[str, Any] = {"lengths": (1003, 517, SEQ), "prefixes": (500, 0, 32 * 1024), "chunk": 8192}
    short: dict[str, Any] = {"lengths": (9,), "prefixes": (32 * 1024,), "chunk": 8192}
    return result(
        [
            measured(make_cell("cp1", "none", **mixed), [9.5, 9.4, 9.6, 9.5, 9.5], memory=356 << 20),
            measured(make_cell("cp2", "allgather", head_groups=2, **mixed), [9.1, 9.3, 9.2, 9.0, 9.2], memory=232 << 20),
            measured(make_cell("cp8u4", "usp", **mixed), [9.0, 9.2, 9.1, 9.0, 9.3], memory=102 << 20),
            measured(make_cell("cp1", "none", **short), [0.021, 0.02, 0.021], memory=40 << 20),
            measured(make_cell("cp8", "ring", **short), [0.05, 0.051, 0.052], memory=41 << 20),
            measured(make_cell("cp4", "ring", **short), [0.019, 0.018, 0.019], memory=30 << 20),
        ]
    )


def variants() -> ResultFile:
    """Three pairs whose passes alternated: enough blocks for an interval, one block, and a variant that failed."""
    cells: list[CellResult] = []
    for seq, seconds in ((SEQ, [4.6, 4.5, 4.62, 4.58, 4.7, 4.52] * 2), (2 * SEQ, [18.2, 18.4]), (4 * SEQ, [73.0, 73.4])):
        pair = Pair(make_cell("cp2", "ring", seq), make_cell("cp2", "allgather", seq), ("strategy=ring", "strategy=allgather"))
        known = alternations([pair])
        a = with_rounds(measured(pair.a, seconds), known[pair.a.id], 0)
        b = with_rounds(measured(pair.b, [0.93 * sample for sample in reversed(seconds)]), known[pair.b.id], 0)
        cells += [a, with_ratio(b, a)]
    cells[-1] = not_measured(pair.b, "oom", "DefaultCPUAllocator: can't allocate memory").model_copy(update={"ab": known[pair.b.id]})
    cells[0].warnings += ["other processes used 0.7 of 2 cores"]
    return result(cells)
