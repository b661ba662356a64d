"""What the shell offers for the values of flags when <TAB> is pressed: names from the registries, by kind of value.

Registries are imported when a value is asked for, and none of them imports torch, so that an answer takes no longer than --help. Which flag
takes which kind is said in options.py; that a shell asks at all is typer's part (`cpbench --install-completion`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Complete = Callable[[str], list[str]]  # from what was typed to whole values that begin with it


def one_of(names: Callable[[], Iterable[str]]) -> Complete:
    """Values that are one name."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def list_of(names: Callable[[], Iterable[str]]) -> Complete:
    """Comma lists: the last name is completed, and those before it stay and are not offered again."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names() if name.startswith(last) and name not in before.split(",")]

    return complete


def words(*names: str) -> Callable[[], Sequence[str]]:
    return lambda: names


# Names whose homes are not imported for them; tests hold them against these.
LISTED = words("strategies", "kernels", "models", "partitions", "scenarios")
RETRIED = words("oom", "timeout", "crash", "interrupted", "wrong", "skipped")
ROUTERS = words("trained", "uniform", "zipf:1.2")


def choices(field: str) -> Callable[[], Sequence[str]]:
    """What a field of a scenario can be."""

    def names() -> list[str]:
        from typing import get_args

        from cpbench.scenario import Scenario

        kind = Scenario.model_fields[field].annotation
        return [name for part in (kind, *get_args(kind)) for name in get_args(part) if isinstance(name, str)]

    return names


def figures() -> Sequence[str]:
    """As cpbench.plot has them, which imports matplotlib."""
    return ("time", "throughput", "memory", "efficiency", "split", "heatmap", "pareto", "forest")


def strategies() -> list[str]:
    """Those that can be asked for, and two hybrids."""
    from cpbench.defaults import EVERY_STRATEGY
    from cpbench.strategies import STRATEGIES

    return [*(name for name in STRATEGIES if name != "none"), "u2r2", "u4r2", EVERY_STRATEGY]


def models() -> Iterable[str]:
    from cpbench.models.presets import PRESETS

    return PRESETS


def partitions() -> Iterable[str]:
    from cpbench.partition import PARTITIONS

    return PARTITIONS


def layouts() -> list[str]:
    """Context and tensor parallelism over 2 to 16 ranks: of all layouts there are too many to read."""
    from cpbench.layout import Layout

    sizes = (1, 2, 4, 8, 16)
    return [str(Layout(cp=cp, tp=tp)) for cp in sizes for tp in sizes if 1 < cp * tp <= 16]


def hardware() -> Iterable[str]:
    from cpbench.projection.profile import profile_names

    return profile_names()


def settings() -> list[str]:
    """Fields of a scenario, up to the sign: `timing.precision=`."""
    from cpbench.fields import group_of_fields
    from cpbench.scenario import Scenario

    found = []
    for name in Scenario.model_fields:
        group = group_of_fields(Scenario, name)
        found += [f"{name}.{field}=" for field in group.model_fields] if group else [f"{name}="]
    return found
