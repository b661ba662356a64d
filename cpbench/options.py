"""The flags of the command line: names, placeholders, and one line of help each. What they do is in cli.py and scenario.py.

Values arrive as text and are checked with the scenario's fields, so that a flag, a YAML file and `--set` take the same and complain alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_WHAT, _LONG, _CONTINUE, _OUTPUT = "What to measure", "How long", "Continue a sweep", "Output"


def _option(panel: str, names: str, metavar: str, text: str) -> Any:
    return typer.Option(*names.split(), metavar=metavar, rich_help_panel=panel, help=text, show_default=False)


def _axis(name: str, metavar: str, text: str) -> Any:
    return Annotated[list[str] | None, _option(_WHAT, name, metavar, text)]


def _text(panel: str, name: str, metavar: str, text: str) -> Any:
    return Annotated[str | None, _option(panel, name, metavar, text)]


def _path(panel: str, names: str, text: str) -> Any:
    return Annotated[Path | None, _option(panel, names, "FILE", text)]


def _flag(panel: str, names: str, text: str) -> Any:
    return Annotated[bool, _option(panel, names, "", text)]


SCENARIO = _path(_WHAT, "--scenario", "YAML with any of the fields below and more; flags override it.")
SEQ = _axis("--seq", "LENGTHS", "Tokens per sequence, a comma list: 36k,128k. Default: 36k.")
BATCH = _axis("--batch", "SIZES", "Sequences per batch, a comma list. Default: 1.")
CP = _axis("--cp", "DEGREES", "Context-parallel degrees: 2,4,8; cp=1 is added as the baseline. Default: 1.")
TP = _axis("--tp", "DEGREES", "Tensor-parallel degrees. Default: 1.")
STRATEGY = _axis("--strategy", "NAMES", "Context-parallel algorithms (cpbench list). Default: allgather,ring,ulysses.")
MODEL = _text(_WHAT, "--model", "NAME", "Preset, or path of a config.json. Default: qwen3-tiny on CPU, qwen3-8b on CUDA.")
TARGET = _text(_WHAT, "--target", "NAME", "prefill (time to first token), layer or attention. Default: prefill.")
LAYERS = _text(_WHAT, "--layers", "N", "Decoder layers of a prefill. Default: 1 on CPU, 4 on CUDA.")
DTYPE = _text(_WHAT, "--dtype", "NAME", "Of weights and activations. Default: float32 on CPU, bfloat16 on CUDA.")
SEED = _text(_WHAT, "--seed", "N", "Of weights, tokens and the order of later rounds. Default: 0.")
THREADS = _text(_WHAT, "--threads", "N", "CPU threads per rank. Default: cores // ranks.")
SET = _axis("--set", "A.B=C", "Any field of a scenario, for example timing.precision=1%; may be repeated.")
ROUNDS = _text(_LONG, "--rounds", "N", "Fresh passes over all cells. Default: 1.")
BUDGET = _text(_LONG, "--budget", "TIME", "Skip cells that do not fit into it: 20m. Default: no limit.")
CELL_TIMEOUT = _text(_LONG, "--cell-timeout", "TIME", "End a cell that takes longer in one round. Default: 10m.")
RESUME = _flag(_CONTINUE, "--resume", "Continue the newest unfinished result, or the one named by -o.")
RETRY = _text(_CONTINUE, "--retry", "STATUSES", "What is run again: oom,timeout,crash,... Default: interrupted.")
FORCE = _flag(_CONTINUE, "--force", "Continue although the machine or the software has changed.")
OUTPUT = _path(_OUTPUT, "--output -o", "The result file. Default: results/NAME-TIME.json.")
DRY_RUN = _flag(_OUTPUT, "--dry-run", "Show cells, reasons and estimates; run nothing.")
JSON = _flag(_OUTPUT, "--json", "Print JSON instead of a table.")
QUIET = _flag(_OUTPUT, "--quiet -q", "Print only the result.")
VERSION = _flag("Options", "--version", "Print the version and exit.")
FILE = Annotated[Path, typer.Argument(metavar="FILE", help="A result file, or the journal of an unfinished one.", show_default=False)]
LIST = Annotated[str | None, typer.Argument(metavar="WHAT", help="strategies, kernels, models or partitions; all without it.", show_default=False)]
