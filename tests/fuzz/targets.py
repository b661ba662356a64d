"""What reads untrusted input, as functions of bytes: each ends with an answer or with a CpbenchError, and everything else is a finding.

A target writes its bytes into a folder of its own where what it tries reads files. Which bytes are tried is decided in inputs.py, what a
target may do and cost in guard.py.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Callable
from pathlib import Path

from cpbench import show
from cpbench.comparing import Question, compare_files
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.layout import Layout
from cpbench.models.checkpoint import INDEX, SINGLE, Checkpoint
from cpbench.models.hugging_face import from_hugging_face
from cpbench.models.presets import PRESETS
from cpbench.plan import make_plan
from cpbench.scenario import load_scenario, parse_scenario, resolve
from cpbench.units import format_count, parse_bytes, parse_count, parse_fraction, parse_seconds

MACHINE = Machine("cpu", 0, 2, 8 << 30, "a CPU")
OTHER = Path(__file__).parents[2] / "results" / "samples" / "ring_512.json"
EXIT_CODES = (0, 2, 3, 4)
MAX_SENTENCE = 2000  # characters of what is said about a mistake

Target = Callable[[bytes, Path], None]


def sizes(data: bytes, _: Path) -> None:
    """A size, a duration, a percentage from the command line."""
    text = data.decode(errors="surrogateescape")
    for parse in (parse_count, parse_bytes, parse_seconds, parse_fraction):
        with refusing():
            value = parse(text)
            assert math.isfinite(value) and value >= 0, value
            assert parse is not parse_count or parse_count(format_count(int(value))) == value


def layouts(data: bytes, _: Path) -> None:
    """The name of a layout."""
    with refusing():
        layout = Layout.parse(data.decode(errors="surrogateescape"))
        assert Layout.parse(str(layout)) == layout


def scenario(data: bytes, folder: Path) -> None:
    """A scenario file, up to its plan."""
    file = folder / "scenario.yaml"
    file.write_bytes(data)
    with refusing():
        resolved, _ = resolve(load_scenario(file), MACHINE)
        make_plan(resolved, MACHINE)


def result(data: bytes, folder: Path) -> None:
    """A result file or a journal, as it is shown and compared."""
    file = folder / ("r.jsonl" if data.startswith(b'{"type"') else "r.json")
    file.write_bytes(data)
    with refusing(), contextlib.redirect_stdout(io.StringIO()):
        show.run([file], None, None, False, None)
        show.run([file], None, "csv", False, None)
    with refusing(), contextlib.redirect_stdout(io.StringIO()):
        compare_files([OTHER, file], Question(None, None, None, False, None), None, "text", False)
    file.unlink()


def config(data: bytes, folder: Path) -> None:
    """The config.json of a model, up to the plan of a sweep over it."""
    file = folder / "config.json"
    file.write_bytes(data)
    with refusing():
        from_hugging_face(file)
        resolved, _ = resolve(parse_scenario({"model": str(file), "seq": "1k", "cp": "2", "tp": "1,2", "strategies": "ring,ulysses"}), MACHINE)
        make_plan(resolved, MACHINE)


def weights(data: bytes, folder: Path) -> None:
    """The header of a safetensors file, or the index of several, held against a model."""
    (folder / "weights").mkdir(exist_ok=True)
    for name in (SINGLE, INDEX, "a.safetensors"):
        (folder / "weights" / name).unlink(missing_ok=True)
    single, model = folder / "weights" / SINGLE, PRESETS["qwen3-tiny"]
    if data.startswith(b'{"weight_map"'):
        (folder / "weights" / INDEX).write_bytes(data)
        single = single.with_name("a.safetensors")
        data = b'{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    behind = struct.pack("<Q", len(data)) + data + bytes(4) if data.startswith(b"{") else data
    single.write_bytes(behind)
    with refusing():
        Checkpoint.open(folder / "weights").require(model, 1)


TARGETS: dict[str, Target] = {"sizes": sizes, "layouts": layouts, "scenario": scenario, "result": result, "config": config, "weights": weights}


@contextlib.contextmanager
def refusing():
    """A CpbenchError is an answer, if it is a sentence."""
    try:
        yield
    except CpbenchError as error:
        assert error.message and error.exit_code in EXIT_CODES, repr(error)
        assert len(error.message) + len(error.hint) < MAX_SENTENCE, f"{len(error.message)} characters: {error.message[:100]}"
