"""What it costs to know where the time goes: a span without and with a tool, and the split of every cell in a sweep.

    python benchmarks/split.py --seq 16k --cp 2,4

Spans: nanoseconds of an empty `with SPAN():`, and what marks add to a collective, the best of a few runs. Sweep: the ranks count the seconds
that they spend on timing collectives alone and on the peak of the device, in a sweep as users run it; printed is their part of the wall time
of each cell and of the sweep. Nothing is compared with another run, so the load of the machine cancels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpbench import trial, worker
from cpbench.commands import fresh
from cpbench.distributed.flight import FlightLog, Handle, started
from cpbench.driver import run_sweep
from cpbench.launch import Torchrun
from cpbench.measure.device import Cpu
from cpbench.plan import make_plan
from cpbench.report.progress import Silent
from cpbench.tracing.spans import ATTENTION, LAYER, Nvtx, TorchProfile, using

spent: list[float] = []  # seconds of the cell at hand, in a rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", default="16k")
    parser.add_argument("--cp", default="2,4")
    parser.add_argument("--strategy", default="allgather,ring,ulysses")
    options = parser.parse_args()
    spans()
    sweep({"seq": options.seq, "cp": options.cp, "strategies": options.strategy})


def spans() -> None:
    """Nanoseconds per span."""

    def bare() -> None:
        with ATTENTION():
            pass

    def numbered() -> None:
        with LAYER(3):
            pass

    def collective() -> None:
        started("cp", 2, "all_gather", 1, Handle, None).wait()

    def marked() -> None:
        started("cp", 2, "all_gather", 1, Handle, log).wait()

    log = FlightLog(Cpu().mark)
    print(f"no tool: {_best(bare):.0f} ns, with a number {_best(numbered):.0f} ns")
    print(f"marks of a collective: {_best(marked) - _best(collective):.0f} ns")
    with using(Nvtx()):
        print(f"NVTX without a listener: {_best(bare):.0f} ns")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), using(TorchProfile()):
        print(f"torch profile: {_best(bare, 2000):.0f} ns")


def _best(call: Callable[[], None], number: int = 200_000) -> float:
    return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e9


def sweep(fields: dict[str, Any]) -> None:
    """The sweep whose ranks are this file."""
    with tempfile.TemporaryDirectory() as folder:
        job = fresh(None, fields, {}, [], Path(folder) / "r.json")
        plan = make_plan(job.scenario, job.machine)
        start = time.perf_counter()
        launcher = Torchrun("benchmarks.split", {"PYTHONPATH": str(Path(__file__).parent.parent)})
        result = run_sweep(job.scenario, plan, job.machine, job.output, argv=sys.argv, notes=[], progress=Silent(), launcher=launcher)
        wall, total = time.perf_counter() - start, 0.0
    for cell in result.cells:
        text = next((text for text in cell.warnings if text.startswith("split:")), "split: 0 of 1")
        seconds, whole = (float(word) for word in text.removeprefix("split: ").split(" of "))
        total += seconds
        print(f"{cell.key['layout']} {cell.key['strategy']}: {1e3 * seconds:.0f} ms of {whole:.2f} s, {seconds / whole:.2%}")
    print(f"sweep: {1e3 * total:.0f} ms of {wall:.1f} s, {total / wall:.2%}")


def rank() -> None:
    """One rank, with a clock around what the split costs."""
    for name in ("_split", "peak_of"):
        setattr(trial, name, _clocked(getattr(trial, name)))
    measure = worker.measure

    def measured(*arguments: Any) -> list[dict[str, Any]]:
        spent.clear()
        start = time.perf_counter()
        (record,) = measure(*arguments)
        return [{**record, "warnings": [*record["warnings"], f"split: {sum(spent)} of {time.perf_counter() - start}"]}]

    worker.measure = measured  # type: ignore[assignment]
    worker.main(sys.argv[1])


def _clocked(function: Callable[..., Any]) -> Callable[..., Any]:
    def clocked(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        spent.append(time.perf_counter() - start)
        return result

    return clocked


if __name__ == "__main__":
    rank() if sys.argv[-1].endswith(".json") else main()
