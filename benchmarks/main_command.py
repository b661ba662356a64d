"""What the main command costs besides measuring: `cpbench sweep --seq 36k --cp 2,4,8`, timed from outside.

    python benchmarks/main_command.py

Prints the seconds of the whole command and until its first finished row, for each world size the seconds outside timed passes (start-up,
checks, memory passes, writing), and the median of `cpbench --help`. The sweep runs through the same driver as the command line.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cpbench.driver import run_sweep
from cpbench.environment import detect_machine
from cpbench.plan import make_plan
from cpbench.scenario import parse_scenario, resolve

HELP_RUNS = 11


class Clock:
    """A progress that notes when things happen."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first_row: float | None = None
        self.worlds: dict[int, float] = {}
        self.timed: dict[int, float] = {}
        self._world = 0

    def now(self) -> float:
        return time.monotonic() - self.start

    def begin(self, *_: Any) -> None: ...

    def launching(self, world_size: int, _: int) -> None:
        self._close()
        self._world, self._since = world_size, self.now()

    def cell_started(self, *_: Any) -> None: ...

    def sample(self, _cell: Any, _n: int, samples: list[float], _left: float) -> None:
        self.timed[self._world] = self.timed.get(self._world, 0.0) + samples[-1]

    def cell_finished(self, result: Any) -> None:
        self.first_row = self.first_row or self.now()
        print(f"{self.now():7.1f} s  {result.id}  {result.status}", flush=True)

    def warn(self, text: str) -> None:
        print(text)

    def end(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._world:
            self.worlds[self._world] = self.worlds.get(self._world, 0.0) + self.now() - self._since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", default="36k")
    parser.add_argument("--cp", default="2,4,8")
    options = parser.parse_args()
    clock, machine = Clock(), detect_machine()
    scenario, notes = resolve(parse_scenario({"seq": options.seq, "cp": options.cp}), machine)
    with tempfile.TemporaryDirectory() as folder:
        run_sweep(scenario, make_plan(scenario, machine), machine, Path(folder) / "r.json", argv=sys.argv, notes=notes, progress=clock)
    print(f"\nwhole sweep {clock.now():.1f} s, first finished row after {clock.first_row:.1f} s")
    for world_size, seconds in clock.worlds.items():
        timed = clock.timed.get(world_size, 0.0)
        print(f"  {world_size} ranks: {seconds - timed:5.1f} s outside timed passes, {timed:6.1f} s inside")
    times = []
    for _ in range(HELP_RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cpbench", "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    print(f"cpbench --help: median {statistics.median(times):.3f} s of {HELP_RUNS}")


if __name__ == "__main__":
    main()
