"""Measure how to split a long prompt over GPUs.

The command line is the main way in (`cpbench --help`). From Python, `cpbench.load` reads result files, `cpbench.compare` compares two,
`cpbench.plot` draws them, and `cpbench.project` says what layouts would take on devices that are not here:

    results = cpbench.load("results/*.json")                # all files that match
    frame = results.to_frame()                              # pandas, one row per cell and metric
    rings = results.where("strategy==ring and seq>=32k")    # the same files, fewer cells
    cpbench.compare(results[0], results[1]).to_frame()      # same, faster, slower or unsure, with evidence
    cpbench.plot.figures(results)["pareto"]                 # a matplotlib figure

What is wrong with files, names or filters raises `cpbench.CpbenchError`. Importing this package imports nothing heavy: torch, pandas and
matplotlib are imported where they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["CpbenchError", "Results", "__version__", "compare", "load", "plot", "project"]

if TYPE_CHECKING:
    from cpbench import plot
    from cpbench.comparison import compare
    from cpbench.errors import CpbenchError
    from cpbench.frame import Results, load
    from cpbench.projection.from_python import project

_HOMES = {"CpbenchError": "errors", "Results": "frame", "compare": "comparison", "load": "frame", "project": "projection.from_python"}


def __getattr__(name: str) -> object:
    if name == "plot":  # a package: cpbench.plot.figures(results)
        return import_module("cpbench.plot")
    if name not in _HOMES:
        raise AttributeError(f"module 'cpbench' has no attribute {name!r}")
    return getattr(import_module(f"cpbench.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
