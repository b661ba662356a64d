"""A text as the input of a prefill: its token ids by the tokenizer of a checkpoint, and the first token as text.

Only `--prompt` needs this; elsewhere token ids are random. The tokenizers package is imported when it is needed, by the driver alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpbench.errors import CpbenchError

TOKENIZER = "tokenizer.json"
MAX_PROMPT_BYTES = 64 << 20


def read_prompt(folder: str | Path, file: str | Path) -> list[int]:
    """Token ids of a text file, with the special tokens that the tokenizer puts around a text. Raises CpbenchError."""
    try:
        if Path(file).stat().st_size > MAX_PROMPT_BYTES:
            raise CpbenchError(f"{file} is larger than 64 MiB.", "Give a shorter text to --prompt.")
        if not Path(file).is_file():  # a device has no end
            raise CpbenchError(f"{file} is no file.", "Give --prompt a text file.")
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise CpbenchError(f"{file} cannot be read: {error.strerror}.", "Give --prompt a text file.") from error
    except ValueError as error:  # of its name too
        raise CpbenchError(f"{file} is not UTF-8 text.", "Give --prompt a text file.") from error
    ids: list[int] = _tokenizer(str(folder)).encode(text).ids
    if not ids:
        raise CpbenchError(f"{file} holds no tokens.", "Give --prompt a text of at least one word.")
    return ids


def prompt_name(ids: Sequence[int]) -> str:
    """What identifies a prompt in a cell: a hash of its tokens, which says nothing about the text."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:12]


def token_text(folder: str | Path, token: int) -> str:
    """One token as text."""
    return str(_tokenizer(str(folder)).decode([token], skip_special_tokens=False))


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Any:
    file = Path(folder) / TOKENIZER
    try:
        there = file.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise CpbenchError(f"{folder} holds no {TOKENIZER}.", f"Put the model's {TOKENIZER} there, or give lengths (--seq) instead of --prompt.")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CpbenchError("--prompt needs the tokenizers package, which is not installed.", "pip install tokenizers, or give lengths (--seq).") from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more specific
        raise CpbenchError(f"{file} is no tokenizer: {error}.", "Download the file again.") from error
