"""What `cpbench compare` finds and what it invents: verdicts on simulated rounds, and the time it takes for two large files.

    python benchmarks/verdicts.py

A round's passes scatter by 0.5% around a time that itself scatters by 1% from round to round. Pairs are identical or differ by a true change;
printed is the part of them with each verdict. Then two files of 10,000 cells with 5 rounds of 3 passes are read, compared and printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from cpbench.quantities import Quantity
from cpbench.reading import read
from cpbench.results import CellResult, Metric, ResultFile
from cpbench.stats import median, median_interval
from cpbench.verdicts import NOISE, verdict, weigh

SAMPLE = Path(__file__).parents[1] / "results" / "samples" / "cpu_36k.json"
BETWEEN, WITHIN = 0.01, 0.005


def simulated(rng: np.random.Generator, pairs: int, rounds: int, passes: int, change: float) -> list[Quantity]:
    """One side of so many pairs: a time of 1 s, times 1 + change."""
    centres = (1 + change) * (1 + BETWEEN * rng.standard_normal((pairs, rounds, 1)))
    samples = centres * (1 + WITHIN * rng.standard_normal((pairs, rounds, passes)))
    every = [[float(value) for one in rounds_of for value in one] for rounds_of in samples]
    return [
        Quantity("ttft_s", "measured", "s", "lower", tuple(map(tuple, one.tolist())), median(all_of), median_interval(all_of), len(all_of))
        for one, all_of in zip(samples, every, strict=True)
    ]


def verdicts(pairs: int, rounds: int, passes: int, change: float, seed: int = 0) -> dict[str, float]:
    """The part of simulated pairs that gets each verdict."""
    rng = np.random.default_rng(seed)
    couples = list(zip(simulated(rng, pairs, rounds, passes, 0.0), simulated(rng, pairs, rounds, passes, change), strict=True))
    found = Counter(verdict(old, evidence, NOISE) for (old, _), evidence in zip(couples, weigh(couples), strict=True))
    return {name: found[name] / pairs for name in ("same", "faster", "slower", "unsure")}


def large_file(path: Path, cells: int, seed: int) -> None:
    """The cells of a sample at other lengths, each with 5 rounds of 3 passes."""
    rng, sample = np.random.default_rng(seed), read(SAMPLE)
    known = [cell for cell in sample.cells if cell.status == "ok"]
    made = [_cell(known[number % len(known)], 1024 + number, rng) for number in range(cells)]
    path.write_text(ResultFile.model_dump_json(sample.model_copy(update={"cells": made}), by_alias=True, indent=1), encoding="utf-8")


def _cell(cell: CellResult, tokens: int, rng: np.random.Generator) -> CellResult:
    factors = (1 + BETWEEN * rng.standard_normal((5, 1))) * (1 + WITHIN * rng.standard_normal((5, 3)))
    metrics: dict[str, Metric] = {}
    for name, metric in cell.metrics.items():
        rounds = (metric.median * factors).tolist()
        samples = [value for one in rounds for value in one]
        metrics[name] = metric.model_copy(update={"rounds": rounds, "median": median(samples), "ci95": median_interval(samples), "n": len(samples)})
    return cell.model_copy(update={"id": cell.id.replace("36k", str(tokens)), "key": {**cell.key, "lengths": [tokens]}, "metrics": metrics})


def seconds_to_compare(cells: int, form: str) -> tuple[float, float, float]:
    """(MB of a file, seconds of the whole command in a process of its own, those of a processor); the best of three."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("a.json", "b.json")]
        for seed, file in enumerate(files):
            large_file(file, cells, seed)
        taken, worked = [], []
        for _ in range(3):
            begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-m", "cpbench", "compare", *map(str, files), "--format", form], capture_output=True, check=True)
            taken.append(time.perf_counter() - begin)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            worked.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if form == "json":
            assert len(json.loads(done.stdout)["comparisons"][0]["rows"]) == 2 * cells
        return files[0].stat().st_size / 1e6, min(taken), min(worked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--cells", type=int, default=10_000)
    options = parser.parse_args()
    print("rounds  passes  true change   same  faster  slower  unsure")
    for rounds, passes in ((5, 3), (5, 5), (4, 5), (8, 5), (1, 20)):
        for change in (0.0, 0.05, 1 / 1.05 - 1, 0.02, 0.03):
            found = verdicts(options.pairs, rounds, passes, change)
            print(f"{rounds:6}  {passes:6}  {change:+11.1%}  {'  '.join(f'{part:6.2%}' for part in found.values())}", flush=True)
    for form in ("text", "json", "csv"):
        size, taken, worked = seconds_to_compare(options.cells, form)
        what = f"two files of {options.cells:,} cells, {size:.0f} MB each, read, compared and printed as {form}"
        print(f"{what}: {taken:.2f} s ({worked:.2f} s of a processor)", flush=True)


if __name__ == "__main__":
    main()
