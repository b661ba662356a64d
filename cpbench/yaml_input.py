"""YAML from people: safe, small, without aliases, tags and duplicate keys. What the values mean is scenario.py's part.

The limits are on what reading costs: a value is a Python object that takes 50 microseconds to make, and a number's digits are multiplied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cpbench.bounded import read_at_most
from cpbench.errors import CpbenchError

MAX_BYTES = 256 << 10
MAX_DEPTH = 8
MAX_VALUES = 5000  # a list that is longer is one value as text: 1k,2k,3k
MAX_DIGITS = 30  # of a number as it is written, as in result files
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """safe_load that refuses what a scenario never needs and an attacker or a slip produces."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        if tag := getattr(self.peek_event(), "tag", None):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"tags such as {str(tag)[:40]!r} are not allowed")
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")
        if self.values > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"the number {node.value[:12]}... has {len(node.value)} characters")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for name in [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if name in seen:
                raise yaml.YAMLError(f"{name[:40]!r} is given twice (line {node.start_mark.line + 1} on)")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises CpbenchError for a file that cannot be read or is something else."""
    try:
        text = read_at_most(file, MAX_BYTES)
        if text is None:
            raise CpbenchError(f"{file} is larger than {MAX_BYTES >> 10} KiB.", "A scenario is a few lines of YAML: is this the right file?")
        data = _parse(text)
    except OSError as error:
        raise CpbenchError(f"{file} cannot be read: {error.strerror}.", "Give the path of a scenario file, or a name of cpbench list scenarios.") from error
    except UnicodeDecodeError as error:
        raise CpbenchError(f"{file} is not text.", "Give a scenario file such as scenarios/smoke.yaml.") from error
    except yaml.YAMLError as error:
        raise CpbenchError(f"{file} is not YAML: {_one_line(error)}.", "Compare it with scenarios/smoke.yaml.") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise CpbenchError(f"{file} does not hold fields and values.", "Write lines such as `seq: [36k]`; compare with scenarios/smoke.yaml.")
    return data


def parse_value(text: str, field: str) -> Any:
    """One YAML value: `1%`, `[2, 4]`, `false`, `null`. Raises CpbenchError."""
    try:
        return _parse(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise CpbenchError(f"{field}: {text[:40]!r} is not a value.", "Write a number, a word, or a list such as [2, 4].") from error


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (RecursionError, ValueError, OverflowError) as error:  # dates such as 2024-99-99, characters such as \UFFFFFFFF
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or next(iter(str(error).splitlines()), "it cannot be read")
    return f"{problem} (line {mark.line + 1})" if mark else str(problem)
