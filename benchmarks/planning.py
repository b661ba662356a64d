"""What planning costs: cells, reasons and estimates of thousands of layouts, without starting anything.

    python benchmarks/planning.py --layouts 10000 --repeats 5

Two scenarios of llama3-70b with 8 sequences of 128k tokens: layouts by name that all can run, smallest first, and every layout of 1, 2, 3...
ranks, of which most cannot. Caches are emptied before every repeat. Printed: the median and the range of `make_plan` in seconds, and how
much of it are the estimates of time. Those of memory are made when a table asks for them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import cpbench.plan
from cpbench.environment import Machine
from cpbench.fitting import undivided
from cpbench.layout import Layout, all_layouts
from cpbench.models.presets import load_config
from cpbench.plan import make_plan
from cpbench.scenario import parse_scenario, resolve

MODEL = load_config("llama3-70b")
MACHINE = Machine("cuda", 8, 128, 1 << 40, "a CPU", ("a GPU",) * 8, 139 << 30, "1.0")
FIELDS: dict[str, Any] = {"model": MODEL.name, "layers": MODEL.layers, "seq": "128k", "batch": 8}
ESTIMATES = ("_seconds",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--strategies", default="ring")
    options = parser.parse_args()
    scenarios = {
        "layouts that can run": {"layouts": [str(layout) for layout in islice(runnable(), options.layouts)]},
        "every layout of 1, 2, 3... ranks": {"gpus": ranks_of(options.layouts)},
    }
    print(f"{'':34}layouts   cells    run  median s       range  time")
    for name, fields in scenarios.items():
        report(name, {**FIELDS, **fields, "strategies": options.strategies}, options.repeats)


def runnable() -> Iterator[Layout]:
    """Layouts over which the model divides, by number of ranks."""
    for ranks in count(1):
        for layout in all_layouts(ranks):
            if undivided(MODEL, "prefill", layout.dp, layout.tp) is None and layout.pp <= MODEL.layers:
                yield layout


def ranks_of(layouts: int) -> list[int]:
    """1, 2, 3... until there are so many layouts."""
    found, total = list[int](), 0
    while total < layouts:
        found.append(len(found) + 1)
        total += sum(1 for _ in all_layouts(found[-1]))
    return found


def report(name: str, fields: dict[str, Any], repeats: int) -> None:
    scenario = resolve(parse_scenario(fields), MACHINE)[0]
    times, parts = [], []
    for _ in range(repeats):
        empty_caches()
        watches = [Stopwatch(name) for name in ESTIMATES]
        begin = time.perf_counter()
        plan = make_plan(scenario, MACHINE)
        times.append(time.perf_counter() - begin)
        parts.append([watch.stop() for watch in watches])
    layouts = len({planned.cell.layout for planned in plan.cells})
    run = sum(planned.status != "unsupported" for planned in plan.cells)
    estimates = "  ".join(f"{statistics.median(part):.2f}" for part in zip(*parts, strict=True))
    print(f"{name:34}{layouts:7}{len(plan.cells):8}{run:7}{statistics.median(times):10.2f}  {min(times):.2f}-{max(times):.2f}  {estimates}")


class Stopwatch:
    """Time in one function of plan.py, from now until `stop`."""

    def __init__(self, name: str) -> None:
        self._name, self._seconds = name, 0.0
        self._function: Callable[..., Any] = getattr(cpbench.plan, name)
        setattr(cpbench.plan, name, self._timed)

    def _timed(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = self._function(*arguments)
        self._seconds += time.perf_counter() - begin
        return result

    def stop(self) -> float:
        """Seconds so far; the function is as before."""
        setattr(cpbench.plan, self._name, self._function)
        return self._seconds


def empty_caches() -> None:
    """As in a new process."""
    for cached in gc.get_objects():
        if isinstance(cached, functools._lru_cache_wrapper):
            cached.cache_clear()


if __name__ == "__main__":
    main()
