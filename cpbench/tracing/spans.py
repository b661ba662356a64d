"""Named stretches of a rank's work, for whatever tool looks on: NVTX, the torch profiler, the memory tracker. Decides names, not times.

A span knows the last part of its name; spans that are open around it make the rest, so that names form a tree (`layer/attention/gather_kv`)
and a strategy need not know where it is called from. Spans of the harness stand beside the tree: what runs inside one starts it anew.
Numbers go into payloads, never into names. Without a tool a span is a look at an empty tuple (benchmarks/spans.py).
Inside compiled regions nothing is marked: what a tool does cannot be captured there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, Protocol

DOMAIN = "cpbench"


class Category(Enum):
    """What a span is for: a name, and the colour in which tools that have colours draw it."""

    HARNESS = ("harness", "gray")
    LAYER = ("layer", "teal")
    ATTENTION = ("attention", "blue")
    COMMUNICATION = ("communication", "orange")

    @property
    def title(self) -> str:
        return self.value[0]

    @property
    def colour(self) -> str:
        return self.value[1]


class Tool(Protocol):
    """What looks on. Calls are nested per thread; `path` is the whole name, `payload` what was given with the span."""

    def enter(self, path: str, category: Category, payload: float | None) -> None: ...
    def exit(self) -> None: ...


class Span:
    """One name. Calling it gives a context manager, with a number for the tools where there is one: a layer's index, bytes."""

    __slots__ = ("category", "name")

    def __init__(self, name: str, category: Category) -> None:
        self.name, self.category = name, category

    def __call__(self, payload: float | None = None) -> AbstractContextManager[None]:
        if not _tools:
            return NOTHING
        return _open(self, payload)


class _Open:
    """A span while it is open."""

    __slots__ = ("payload", "span")

    def __init__(self, span: Span, payload: float | None) -> None:
        self.span, self.payload = span, payload

    def __enter__(self) -> None:
        span, before = self.span, _thread.path
        in_tree = span.category is not Category.HARNESS
        path = f"{before}/{span.name}" if in_tree and before else span.name
        _thread.open.append((path, in_tree))
        for tool in _tools:
            tool.enter(path, span.category, self.payload)

    def __exit__(self, *_: object) -> None:
        if _thread.open:
            _thread.open.pop()
            for tool in reversed(_tools):
                tool.exit()


def _open(span: Span, payload: float | None) -> AbstractContextManager[None]:
    import torch

    return NOTHING if torch.compiler.is_compiling() else _Open(span, payload)


NOTHING = nullcontext()
# fmt: off
VERIFY = Span("harness/verify", Category.HARNESS)
MEMORY = Span("harness/memory", Category.HARNESS)
FIRST_CALL = Span("harness/first_call", Category.HARNESS)
TIMED = Span("harness/timed", Category.HARNESS)
TRACED = Span("harness/traced", Category.HARNESS)
EMBED = Span("embed", Category.LAYER)
LAYER = Span("layer", Category.LAYER)
HEAD = Span("head", Category.LAYER)
PIPELINE = Span("pipeline", Category.COMMUNICATION)
ATTENTION = Span("attention", Category.ATTENTION)
PROJECT = Span("project", Category.LAYER)
RELEASE = Span("release", Category.LAYER)
OUTPUT = Span("output", Category.LAYER)
KERNEL = Span("kernel", Category.ATTENTION)
MERGE = Span("merge", Category.ATTENTION)
SELECT = Span("select", Category.ATTENTION)
LIBRARY = Span("library", Category.ATTENTION)
MLP = Span("mlp", Category.LAYER)
ROUTE = Span("route", Category.LAYER)
EXPERTS = Span("experts", Category.LAYER)
SHARED = Span("shared", Category.LAYER)
# fmt: on


def moving(name: str) -> Span:
    """A span for what a strategy moves between ranks: `gather_kv`."""
    return Span(name, Category.COMMUNICATION)


_tools: tuple[Tool, ...] = ()
_known: dict[tuple[str, str, str], Span] = {}


class _Thread(threading.local):
    """The spans that are open in a thread: their paths, and whether they are part of the tree."""

    def __init__(self) -> None:
        self.open: list[tuple[str, bool]] = []

    @property
    def path(self) -> str:
        return self.open[-1][0] if self.open and self.open[-1][1] else ""


_thread = _Thread()


def collective(axis: str, operation: str, part: str = "") -> Span:
    """The span of a collective over an axis: `cp.all_gather`, or a part of it."""
    known = _known.get((axis, operation, part))
    if known is None:
        known = _known[axis, operation, part] = Span(f"{axis}.{operation}" + (f".{part}" if part else ""), Category.COMMUNICATION)
    return known


def watched() -> bool:
    """Whether a tool looks on."""
    return bool(_tools)


def path() -> str:
    """The name of the innermost open span of this thread, while a tool looks on; empty outside of the tree."""
    return _thread.path


@contextmanager
def using(*tools: Tool) -> Iterator[None]:
    """Let tools look on. Raises RuntimeError inside of a span of the tree, of which they would see a part; those of the harness stand beside it."""
    global _tools  # noqa: PLW0603 - a span must not cost a look-up of who owns it
    if _thread.path:
        raise RuntimeError(f"a tool cannot begin inside of {_thread.path}")
    before, _tools = _tools, (*_tools, *tools)
    try:
        yield
    finally:
        _tools = before
        if not _tools:
            _thread.open.clear()  # of spans that an exception left


class Nvtx:
    """NVTX ranges in the domain `cpbench`, with category, colour and payload. Costs nothing unless a tool was injected into the process."""

    def __init__(self) -> None:
        import nvtx

        self._domain: Any = nvtx.get_domain(DOMAIN)
        self._attributes: dict[str, Any] = {}

    def enter(self, path: str, category: Category, payload: float | None) -> None:
        if path not in self._attributes:
            number = self._domain.get_category_id(category.title)
            self._attributes[path] = self._domain.get_event_attributes(path, color=category.colour, category=number)
        attributes = self._attributes[path]
        if attributes is not None:  # None: no tool after all
            attributes.payload = 0 if payload is None else payload
        self._domain.push_range(attributes)

    def exit(self) -> None:
        self._domain.pop_range()


class TorchProfile:
    """`record_function` ranges: worth their microseconds only while a torch profile is active."""

    def __init__(self) -> None:
        self._open = threading.local()

    def enter(self, path: str, category: Category, payload: float | None) -> None:
        from torch.profiler import record_function

        record = record_function(path)
        record.__enter__()
        self._stack().append(record)

    def exit(self) -> None:
        self._stack().pop().__exit__(None, None, None)

    def _stack(self) -> list[Any]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        stack: list[Any] = self._open.stack
        return stack


def injected_tools(environment: Sequence[str] | dict[str, str]) -> list[Tool]:
    """NVTX where the environment says that a tool was injected into this process; the package is not even imported elsewhere."""
    return [Nvtx()] if "NVTX_INJECTION64_PATH" in environment else []
