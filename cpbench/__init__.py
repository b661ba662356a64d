"""cpbench: measure how to split a long prompt over GPUs.

The command line is the main way in (`cpbench --help`). From Python, `cpbench.load` reads result files. Importing this package
imports nothing heavy: torch and pandas are imported where they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["CpbenchError", "__version__", "load"]

if TYPE_CHECKING:
    from cpbench.errors import CpbenchError
    from cpbench.results import load


def __getattr__(name: str) -> object:
    if name == "load":
        from cpbench.results import load

        return load
    if name == "CpbenchError":
        from cpbench.errors import CpbenchError

        return CpbenchError
    raise AttributeError(f"module 'cpbench' has no attribute {name!r}")
