"""JSON files of this package that have names, beside those that anyone may have: which there are, and one of them, checked by its model.

What the files hold is said by their models (profile.py, published.py). A word is a name, and what has a slash or ends in .json is a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from cpbench.bounded import read_at_most
from cpbench.errors import UNREADABLE, CpbenchError, unknown

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class NamedFiles(Generic[Model]):
    """The files of a folder beside this module. `word` is one of them in messages, `what` its content, and `hint` says how to come by a good one."""

    folder: str
    word: str
    what: str
    schema: str  # the text that stands at the top of each
    model: type[Model]
    most: int  # bytes
    hint: str

    def names(self) -> list[str]:
        """What is there."""
        return sorted(file.name.removesuffix(".json") for file in self._folder.iterdir() if file.name.endswith(".json"))

    def load(self, name_or_path: str | Path) -> Model:
        """The one of this name, or that in a file.

        Raises CpbenchError: an unknown name (exit code 2), a file that cannot be read or is not what it should be (exit code 4).
        """
        text = str(name_or_path)
        if isinstance(name_or_path, str) and "/" not in text and not text.endswith(".json"):
            if text not in self.names():
                error = unknown(self.word, text, self.names())
                raise CpbenchError(error.message, f"{error.hint} {self.hint}")
            return self._checked(self._folder.joinpath(f"{text}.json").read_text(encoding="utf-8"), text)
        try:
            content = read_at_most(Path(text), self.most)
        except OSError as error:
            there = f"By name there are {', '.join(self.names())}. {self.hint}"
            raise CpbenchError(f"{text} cannot be read: {error.strerror}.", there, UNREADABLE) from error
        except UnicodeDecodeError as error:
            raise self._refused(f"{text} is not a {self.what}.") from error
        if content is None:
            raise self._refused(f"{text} is larger than {self.most >> 20} MiB, which no {self.what} is.")
        return self._checked(content, text)

    @property
    def _folder(self) -> Traversable:
        return resources.files(__package__).joinpath(self.folder)

    def _checked(self, text: str, name: str) -> Model:
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._refused(f"{name} is not JSON.") from error
        if not isinstance(data, dict) or data.get("schema") != self.schema:
            raise CpbenchError(f"{name} is not a {self.what}.", f'One has "schema": "{self.schema}" at its top. {self.hint}', UNREADABLE)
        try:
            return self.model.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its top"
            said = f"lacks {where}" if first["type"] == "missing" else f"is wrong at {where}: {str(first['msg']).removeprefix('Value error, ')}"
            raise self._refused(f"The {self.what} {name} {said}.") from error

    def _refused(self, message: str) -> CpbenchError:
        return CpbenchError(message, self.hint, UNREADABLE)
