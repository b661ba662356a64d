"""Filters: `strategy==ring and seq>=128k` as data that a row can be held against. Nothing is evaluated: texts become comparisons, or an error.

    filter      = all {"or" all}        all = one {"and" one}        one = "not" one | "(" filter ")" | comparison
    comparison  = NAME ("==" | "!=" | "<" | "<=" | ">" | ">=") VALUE  |  NAME "in" ("(" | "[") VALUE {"," VALUE} (")" | "]")

A value is a word, a quoted text, or a number with an optional binary suffix (128k). What a row's values are is decided in frame.py.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from cpbench.errors import CpbenchError, unknown
from cpbench.units import parse_bytes

MAX_TEXT, MAX_DEPTH = 2000, 50
EXAMPLE = "Join comparisons with and, or, not: strategy==ring and seq>=128k, layout in (cp2, cp4)."
ORDER: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATORS = ("==", "!=", *ORDER, "in")
TRUTH = {"true": True, "yes": True, "false": False, "no": False}
_TOKEN = re.compile(r"""\s*(?:(?P<op>==|!=|<=|>=|<|>)|(?P<mark>[()\[\],])|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<word>[\w./@:+*%-]+))""")


@dataclass(frozen=True)
class Comparison:
    """`name op value`; several values only after `in`."""

    name: str
    op: str
    values: tuple[str, ...]

    def keep(self, values: Mapping[str, object]) -> bool:
        """A value that is not known is equal to nothing and has no order."""
        if self.name not in values:
            raise unknown("field", self.name, values)
        found = values[self.name]
        if found is None or (isinstance(found, float) and math.isnan(found)):
            return self.op == "!="
        if self.op in ORDER:
            return ORDER[self.op](self._ordered(found), _number(self.name, self.values[0]))
        return any(self._equal(found, value) for value in self.values) != (self.op == "!=")

    def _ordered(self, found: object) -> float:
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise CpbenchError(f"{self.name} has no order, and the filter asks for {self.op}.", f"Use ==, != or in: {self.name}=={found}.")
        return found

    def _equal(self, found: object, value: str) -> bool:
        if isinstance(found, bool):
            if value.lower() not in TRUTH:
                raise CpbenchError(f"{self.name} is true or false, and not {value!r}.", f"Write {self.name}==true or {self.name}==false.")
            return found == TRUTH[value.lower()]
        return found == _number(self.name, value) if isinstance(found, int | float) else str(found) == value


@dataclass(frozen=True)
class Junction:
    """All of its parts, or any; with no room for both."""

    every: bool
    parts: tuple[Node, ...]

    def keep(self, values: Mapping[str, object]) -> bool:
        return (all if self.every else any)(part.keep(values) for part in self.parts)


@dataclass(frozen=True)
class Negation:
    part: Node

    def keep(self, values: Mapping[str, object]) -> bool:
        return not self.part.keep(values)


Node = Comparison | Junction | Negation


@dataclass(frozen=True)
class Where:
    """A filter. `text` is what the user wrote."""

    text: str
    root: Node

    @property
    def names(self) -> list[str]:
        """The fields that it asks for, each once, in order."""
        found: list[str] = []
        nodes: list[Node] = [self.root]
        while nodes:
            node = nodes.pop(0)
            if isinstance(node, Comparison):
                found.append(node.name)
            else:
                nodes[:0] = node.parts if isinstance(node, Junction) else (node.part,)
        return list(dict.fromkeys(found))

    def require(self, fields: Iterable[str]) -> None:
        """Raise CpbenchError for a field that is not among these; `keep` alone would never look at it where no row reaches it."""
        valid = set(fields)
        for name in self.names:
            if name not in valid:
                raise unknown("field", name, valid)

    def keep(self, values: Mapping[str, object]) -> bool:
        """Whether a row with these values stays. Raises CpbenchError for an unknown field, or a value that is not of its kind."""
        return self.root.keep(values)


def parse_where(text: str) -> Where:
    """The filter that a text says. Raises CpbenchError (exit code 2) where it does not parse."""
    if len(text) > MAX_TEXT:
        raise CpbenchError(f"The filter has {len(text):,} characters, and {MAX_TEXT:,} are allowed.", EXAMPLE)
    parser = _Parser(text)
    root = parser.junction("or", 0)
    if parser.peek() is not None:
        raise parser.unexpected("and, or, or the end")
    return Where(text, root)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, text: str) -> None:
        self._text, self._tokens, self._next = text, list(_tokens(text)), 0

    def peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def junction(self, word: str, depth: int) -> Node:
        parts = [self._operand(word, depth)]
        while self._took("word", word):
            parts.append(self._operand(word, depth))
        return parts[0] if len(parts) == 1 else Junction(word == "and", tuple(parts))

    def _operand(self, word: str, depth: int) -> Node:
        return self.junction("and", depth) if word == "or" else self._one(depth)

    def _one(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise CpbenchError(f"The filter is nested more than {MAX_DEPTH} deep.", EXAMPLE)
        if self._took("word", "not"):
            return Negation(self._one(depth + 1))
        if self._took("mark", "("):
            inner = self.junction("or", depth + 1)
            self._need("mark", ")")
            return inner
        name = self._need("word").text
        if self._took("word", "in"):
            return Comparison(name, "in", self._list())
        return Comparison(name, self._need("op", expected=f"one of {' '.join(OPERATORS)} after {name!r}").text, (self._value(),))

    def _list(self) -> tuple[str, ...]:
        closing = ")" if self._took("mark", "(") else "]"
        if closing == "]":
            self._need("mark", "[", "( or [ after in")
        values = [self._value()]
        while self._took("mark", ","):
            values.append(self._value())
        self._need("mark", closing, f", or {closing}")
        return tuple(values)

    def _value(self) -> str:
        return self._need("text").text if self._is("text") else self._need("word", expected="a value").text

    def _is(self, kind: str, text: str | None = None) -> bool:
        token = self.peek()
        return token is not None and token.kind == kind and text in (None, token.text)

    def _took(self, kind: str, text: str) -> bool:
        found = self._is(kind, text)
        self._next += found
        return found

    def _need(self, kind: str, text: str | None = None, expected: str = "") -> _Token:
        if not self._is(kind, text):
            raise self.unexpected(expected or text or "the name of a field")
        self._next += 1
        return self._tokens[self._next - 1]

    def unexpected(self, expected: str) -> CpbenchError:
        token = self.peek()
        found = f"{token.text!r} stands" if token else "the end is"
        return CpbenchError(f"The filter {self._text!r} does not parse: {found} where {expected} should be.", EXAMPLE)


def _tokens(text: str) -> Iterable[_Token]:
    at = 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if found is None:
            rest = text[at:].strip()
            hint = f"Compare with ==. {EXAMPLE}" if rest[0] == "=" else EXAMPLE
            raise CpbenchError(f"The filter {text!r} does not parse at {rest[:20]!r}.", hint)
        kind = str(found.lastgroup)
        yield _Token("text" if kind in ("double", "single") else kind, found[kind])
        at = found.end()


@lru_cache(maxsize=256)
def _number(name: str, text: str) -> float:
    """`128k` -> 131072, `0.5`, `1e-3`, `-2`."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parse_bytes(text)
    except CpbenchError as error:
        raise CpbenchError(f"{name} is a number, and {text!r} is none.", f"Write a number with an optional binary suffix: {name}>=128k.") from error
