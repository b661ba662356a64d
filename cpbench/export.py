"""Results as a file for another program: CSV and Parquet of the tidy frame, Markdown for a pull request, JSON. What they hold is decided in frame.py.

Files are untrusted: in CSV no text from one has control characters, or begins like a formula, which a spreadsheet would compute.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cpbench.errors import CpbenchError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from cpbench.frame import Results

Format = Literal["text", "md", "csv", "parquet", "json"]
SUFFIXES: dict[str, Format] = {".md": "md", ".csv": "csv", ".parquet": "parquet", ".json": "json"}
FORMULA = ("=", "+", "-", "@")


def chosen_format(asked: str | None, as_json: bool, output: Path | None) -> Format:
    """What --format, --json or the name of the output say; text otherwise. Raises CpbenchError for a format there is none of, or two."""
    if as_json and asked not in (None, "json"):
        raise CpbenchError(f"--json and --format {asked} are two formats.", "Leave one of them out.")
    found = "json" if as_json else asked or SUFFIXES.get(output.suffix.lower() if output else "", "text")
    for name in get_args(Format):
        if found == name:
            if name == "parquet" and output is None:
                raise CpbenchError("Parquet is not text and needs a file.", "Name one, for example -o results.parquet.")
            return name  # type: ignore[no-any-return]
    raise unknown("format", found, get_args(Format))


def to_csv(results: Results) -> str:
    """The tidy frame as comma-separated values with a header; what is not known is empty."""
    frame = results.to_frame()
    for name in frame.columns:
        if frame[name].dtype.kind not in "biuf":
            frame[name] = _harmless(frame[name])
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_parquet(results: Results) -> bytes:
    """The tidy frame as Parquet. Raises CpbenchError where pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401 - pandas would choose another library or complain at length
    except ImportError as error:
        raise CpbenchError("Parquet needs pyarrow, which is not installed.", "Run pip install 'cpbench[parquet]', or use --format csv.") from error
    content = io.BytesIO()
    results.to_frame().to_parquet(content, engine="pyarrow", index=False)
    return content.getvalue()


def to_json(results: Results) -> str:
    """One result file as it is; several as a list of them."""
    texts = [file.model_dump_json(by_alias=True, indent=1) for file in results]
    return texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]"


def _harmless(column: pd.Series[Any]) -> pd.Series[Any]:
    texts = {value: _cell(value) for value in column.dropna().unique()}
    return column.astype(object).map(texts)


def _cell(value: object) -> str:
    from cpbench.report.console import plain

    text = plain(str(value)).plain
    return f"'{text}" if text.startswith(FORMULA) else text
