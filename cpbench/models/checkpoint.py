"""A folder of Hugging Face weights: which tensors it holds and where, and whether they are those of a model.

Only headers are read, so that a wrong checkpoint is refused before anything starts, without torch. Files are untrusted: headers have a
size limit, every offset lies within its file, and names lead nowhere else. Pickled weights are refused. Values are read in weights.py.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cpbench.errors import CpbenchError
from cpbench.models.config import ModelConfig
from cpbench.models.parameters import HEAD, parameters

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 16 << 20  # of a header or an index: a hundred thousand tensors, and 400 MB as objects where it holds nothing but brackets
MAX_DIMENSIONS, MAX_NUMBER, MAX_DTYPE = 16, 1 << 62, 16  # of a shape, of its numbers, and of the characters of a dtype
MAX_FILE_NAME = 255
MAX_COMPARED = 2000  # names that are compared for the nearest one
SAMPLE_BYTES = 4096  # of each file's values, so that the identity tells fine-tuned weights from their base
# fmt: off
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}
# fmt: on
READ_DTYPES = ("F64", "F32", "BF16", "F16")  # and FP8 with the scales of its blocks
FP8, BLOCK, SCALE = "F8_E4M3", 128, "_scale_inv"  # a scale for every 128 x 128 block of a weight, in a tensor of that name
BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")  # what old checkpoints store although it can be computed
LAYER = re.compile(r"^model\.layers\.(\d{1,6})\.")
GET_AGAIN = "Download the file again, or give another folder to --weights."


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: the name of its file, its dtype as safetensors calls it, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder. `name` identifies the weights without saying where they lie."""

    folder: Path
    name: str
    tensors: Mapping[str, Stored] = field(compare=False, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of a folder. Raises CpbenchError that names the file, and the tensor if it is about one."""
        folder = Path(folder)
        try:
            if not folder.is_dir():
                raise CpbenchError(f"{folder} is no folder.", "Give --weights the folder that holds config.json and *.safetensors.")
            placed = _index(folder)
            names = sorted(set(placed.values())) if placed is not None else _unindexed(folder)
        except OSError as error:
            raise CpbenchError(f"{error.filename} cannot be read: {error.strerror}.", GET_AGAIN) from error
        tensors: dict[str, Stored] = {}
        identity = hashlib.sha256()
        for name in names:
            for tensor, stored in _read_header(folder, name, identity).items():
                if placed is not None and placed.get(tensor) != name:
                    continue  # the index says which of two is meant
                if tensor in tensors:
                    raise CpbenchError(f"Tensor {tensor} is in {tensors[tensor].file} and in {name}.", f"Remove one of the files, or add {INDEX}.")
                tensors[tensor] = stored
        for tensor, name in (placed or {}).items():
            if tensor not in tensors:
                raise CpbenchError(f"{INDEX} places tensor {tensor[:200]} in {name}, which does not hold it.", GET_AGAIN)
        label = re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name) or "weights"
        return cls(folder, f"{label}@{identity.hexdigest()[:12]}", tensors)

    def require(self, config: ModelConfig, layers: int) -> None:
        """Raise CpbenchError unless these are the weights of a model, of which the first `layers` layers are asked for."""
        if layers > config.layers:
            raise CpbenchError(f"{config.name} has {config.layers} layers, not {layers}.", f"The nearest valid value is --layers {config.layers}.")
        needed = set()
        for name, shape in parameters(config, layers):  # up to the first that is missing: the numbers of a config may be anything
            self._require(name, shape)
            needed.add(name)
        behind = config.layers + (1 if config.experts and config.experts.correction else 0)  # DeepSeek V3 has a predictor of the token after next
        for name, stored in self.tensors.items():
            if name not in needed and not self._is_harmless(name, range(layers, behind)):
                near = _nearest(name, needed)
                hint = f"The nearest name that it has is {near}." if near else "Give the config.json that belongs to these weights."
                raise CpbenchError(f"{stored.file} holds tensor {name[:200]}, which {config.name} does not have.", hint)

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        """One parameter: it is there, in a shape and a dtype that can be read."""
        stored = self.tensors.get(name)
        if stored is None:
            near = _nearest(name, self.tensors)
            files = sorted({entry.file for entry in self.tensors.values()})
            where = files[0] if len(files) == 1 else f"any of the {len(files)} files of {self.folder}"
            nearest = f" The nearest name there is {near}." if near else ""
            raise CpbenchError(f"Tensor {name} is not in {where}.", f"Give the folder of the model that config.json describes.{nearest}")
        if stored.shape != shape:
            found, wanted = _shown(stored.shape), _shown(shape)
            raise CpbenchError(
                f"Tensor {name} in {stored.file} is {found}; config.json makes it {wanted}.", "Give the config.json that belongs to these weights."
            )
        if stored.dtype == FP8 and len(shape) == 2:
            blocks = tuple(-(-size // BLOCK) for size in shape)
            scale = self.tensors.get(name + SCALE)
            if scale is None or scale.shape != blocks or scale.dtype not in READ_DTYPES:
                found = f"is {scale.dtype} {_shown(scale.shape)}" if scale else "is missing"
                what = f"The scales {name}{SCALE} of the FP8 tensor in {stored.file}"
                raise CpbenchError(f"{what}: {found}, not F32 {_shown(blocks)}.", f"FP8 weights are read with a scale for each {BLOCK} x {BLOCK} block.")
        elif stored.dtype not in READ_DTYPES:
            hint = f"Weights are read in {', '.join(READ_DTYPES)}, and in {FP8} with a scale for each {BLOCK} x {BLOCK} block."
            raise CpbenchError(f"Tensor {name} in {stored.file} has the dtype {stored.dtype}.", hint)

    def _is_harmless(self, name: str, unread: range) -> bool:
        """Whether a tensor that the model does not need may be there: scales, buffers, the copy of a tied head, layers that do not run."""
        if name.endswith(SCALE):
            weight = self.tensors.get(name.removesuffix(SCALE))
            return weight is not None and weight.dtype == FP8
        layer = LAYER.match(name)
        return name == HEAD or bool(BUFFER.search(name)) or (layer is not None and int(layer[1]) in unread)


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor -> file of a sharded checkpoint; None where there is no index, or a single file that holds all."""
    file = folder / INDEX
    if (folder / SINGLE).is_file() or not file.is_file():
        return None
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CpbenchError(f"{INDEX} is larger than {MAX_JSON_BYTES:,} bytes.", GET_AGAIN)
    placed = _json(file.read_bytes(), INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CpbenchError(f"{INDEX} has no weight_map from tensors to files.", GET_AGAIN)
    for tensor, name in placed.items():
        if Path(name).name != name or not name.endswith(".safetensors") or len(name.encode(errors="replace")) > MAX_FILE_NAME:
            raise CpbenchError(f"{INDEX} places tensor {tensor[:200]} in {name[:200]!r}, which is no safetensors file beside it.", GET_AGAIN)
        if not (folder / name).is_file():
            raise CpbenchError(f"{INDEX} names {name} (tensor {tensor[:200]}), which is not in {folder}.", GET_AGAIN)
    return placed


def _unindexed(folder: Path) -> list[str]:
    """The safetensors files of a folder without an index."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    found = [name for name in files if name.endswith(".safetensors")]
    pickled = next((name for name in files if name.endswith(PICKLED)), None)
    if not found and pickled:
        hint = "Save the model again with transformers: model.save_pretrained(FOLDER) writes safetensors."
        raise CpbenchError(f"{folder} holds pickled weights ({pickled}), which can run code when they are read.", hint)
    if not found:
        raise CpbenchError(f"{folder} holds no *.safetensors.", "Give --weights the folder that holds config.json and *.safetensors.")
    return found


def _read_header(folder: Path, name: str, identity: Any) -> dict[str, Stored]:
    """The tensors of one file. What identifies the file is added to `identity`."""
    path = folder / name
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header = _header_bytes(file, size, name)
            identity.update(f"{name}/{size}/{len(header)}/".encode() + header + file.read(SAMPLE_BYTES))
    except OSError as error:
        raise CpbenchError(f"{path} cannot be read: {error.strerror}.", GET_AGAIN) from error
    entries = {tensor: entry for tensor, entry in _json(header, f"The header of {name}").items() if tensor != "__metadata__"}
    return _tensors(entries, size - 8 - len(header), name)


def _header_bytes(file: BinaryIO, size: int, name: str) -> bytes:
    """The JSON in front of the values, behind its length in 8 bytes."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > MAX_JSON_BYTES or length > size - 8:
        what = f"it is {size:,} bytes long" if size < 8 else f"its header claims {length:,} bytes of {size:,}"
        raise CpbenchError(f"{name} is truncated, or no safetensors file: {what}.", GET_AGAIN)
    return file.read(length)


def _tensors(entries: dict[str, Any], size: int, name: str) -> dict[str, Stored]:
    """The entries of a header, checked against the `size` bytes of values behind it, which they fill without gaps."""
    found: dict[str, Stored] = {}
    spans: list[tuple[int, int, str]] = []
    for tensor, entry in entries.items():
        where = f"tensor {tensor[:200]} in {name}"
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = isinstance(dtype, str) and len(dtype) <= MAX_DTYPE and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
            sound = sound and all(type(number) is int and 0 <= number <= MAX_NUMBER for number in [*shape, start, end])
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CpbenchError(f"The header entry of {where} has no dtype, shape and data_offsets.", GET_AGAIN)
        if not start <= end <= size:
            raise CpbenchError(f"The data of {where} lie at {start:,} to {end:,}, but the file holds {size:,} bytes: it is truncated.", GET_AGAIN)
        if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - start:
            raise CpbenchError(f"The {end - start:,} bytes of {where} are not those of {dtype} {_shown(shape)}.", GET_AGAIN)
        found[tensor] = Stored(name, dtype, tuple(shape))
        spans.append((start, end, tensor))
    covered = 0
    for start, end, tensor in sorted(spans):
        if start != covered:
            raise CpbenchError(f"The data of tensor {tensor[:200]} in {name} begin at {start:,}, those before it end at {covered:,}.", GET_AGAIN)
        covered = end
    if covered != size:
        raise CpbenchError(f"{name} has {size - covered:,} bytes behind its last tensor.", GET_AGAIN)
    return found


def _json(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode())  # of bytes json would take UTF-16 and UTF-32 too, which the format does not have
    except (ValueError, RecursionError) as error:
        raise CpbenchError(f"{what} is not JSON.", GET_AGAIN) from error
    if not isinstance(value, dict):
        raise CpbenchError(f"{what} holds no JSON object.", GET_AGAIN)
    return value


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """The name of the same layer that is spelled most alike; all names of a checkpoint would be too many to compare."""
    layer = LAYER.match(name)
    same = [other for other in names if (layer is None) == (LAYER.match(other) is None) and other.startswith(layer[0] if layer else "")]
    return next(iter(difflib.get_close_matches(name[:200], same[:MAX_COMPARED], n=1, cutoff=0.6)), None)


def _shown(shape: tuple[int, ...] | list[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
