"""What alternating buys: two variants that do the same work (another seed), while somebody else's load grows.

    python benchmarks/ab.py --seq 2k --seconds 20

The same pair is measured one after the other and in turn (`--ab`), on a machine that is left alone and under a load that rises from nothing
to one core over the time that a measurement takes. Prints the ratio of B over A, which is 1, with its interval: in turn that of the median
over blocks, one after the other that of the ratio of medians by 9,999 resamples; and what the clocks' warning says of the load.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from cpbench.clocks import Watcher
from cpbench.driver import run_sweep
from cpbench.environment import detect_machine
from cpbench.plan import make_plan
from cpbench.report.progress import Silent
from cpbench.results import CellResult
from cpbench.scenario import parse_scenario, resolve

SETTINGS = ("seed=0", "seed=1")
UNTIMED = 12.0  # seconds of a sweep that are not timed, about
GROWING = """
import sys, time
begin, period = time.monotonic(), 0.1
while (age := (time.monotonic() - begin) / float(sys.argv[1])) < 3:
    busy = time.monotonic() + period * min(1.0, age)
    while time.monotonic() < busy:
        pass
    time.sleep(period * max(0.0, 1.0 - age))
"""


@contextmanager
def load(seconds: float) -> Iterator[None]:
    """Somebody else's work, which takes a whole core after so many seconds. Its parent ends at once, so that it is none of our processes."""
    command = [sys.executable, "-c", GROWING, str(seconds)]
    started = subprocess.run(["sh", "-c", '"$@" >/dev/null & echo $!', "sh", *command], stdout=subprocess.PIPE, text=True, check=True)
    try:
        yield
    finally:
        os.kill(int(started.stdout), signal.SIGKILL)


def measure(seq: str, seconds: float, **fields: Any) -> list[CellResult]:
    """The cells of a sweep with as many passes as fit into so many seconds for each."""
    machine = detect_machine()
    timing = {"min_samples": 5, "max_samples": 100_000, "max_seconds": seconds, "precision": "0.01%"}
    data = {"seq": seq, "cp": 2, "strategies": "ring", "baseline": False, "device": "cpu", "timing": timing, **fields}
    scenario, notes = resolve(parse_scenario(data), machine)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.json"
        return run_sweep(scenario, make_plan(scenario, machine), machine, file, argv=[], notes=notes, progress=Silent(), clocks=Watcher(machine.cores)).cells


def in_turn(seq: str, seconds: float) -> str:
    cells = measure(seq, seconds, ab=SETTINGS)
    ab = cells[1].ab
    assert ab is not None and ab.ratio is not None and ab.ratio_ci95 is not None, "too few blocks: more --seconds"
    return _line(ab.ratio, ab.ratio_ci95, f"{ab.blocks} blocks", cells)


def one_after_the_other(seq: str, seconds: float) -> str:
    cells = [cell for setting in SETTINGS for cell in measure(seq, seconds, seed=int(setting.removeprefix("seed=")))]
    a, b = (cell.metrics["ttft_s"].rounds[0] for cell in cells)
    interval = bootstrap((b, a), lambda x, y, axis: np.median(x, axis) / np.median(y, axis), method="percentile", random_state=0).confidence_interval
    return _line(float(np.median(b) / np.median(a)), (float(interval.low), float(interval.high)), f"{len(a)} and {len(b)} passes", cells)


def _line(ratio: float, interval: tuple[float, float], count: str, cells: list[CellResult]) -> str:
    warnings = dict.fromkeys(text for cell in cells for text in cell.warnings if "processes" in text)
    return f"{ratio:.3f} [{interval[0]:.3f}, {interval[1]:.3f}], {count}; {', '.join(warnings) or 'no warning'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", default="2k")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed passes of each variant")
    options = parser.parse_args()
    for name, method in (("one after the other", one_after_the_other), ("in turn", in_turn)):
        print(f"{name}, left alone: {method(options.seq, options.seconds)}", flush=True)
        with load(2 * options.seconds + UNTIMED):
            print(f"{name}, load that grows: {method(options.seq, options.seconds)}", flush=True)


if __name__ == "__main__":
    main()
