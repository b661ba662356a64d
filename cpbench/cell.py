"""One thing to measure: a cell of the sweep, with everything that changes the work written down.

A cell is plain data that travels as JSON from the driver to the workers and into the result file. Its `id` is canonical: two cells
with the same id do the same work. Whether a cell can run is decided in plan.py, and how it runs in worker.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.partition import Split, split
from cpbench.units import format_count

TARGETS = ("prefill", "layer", "attention")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
DEFAULT_OPTIONS: dict[str, Any] = {"kv_cache": "keep"}


@dataclass(frozen=True)
class Cell:
    """Target, model, layout, strategy and batch. `lengths` are the new tokens of each sequence; the batch is packed."""

    target: str
    config: ModelConfig
    layers: int
    layout: Layout
    strategy: str
    partition: str
    kernel: str
    dtype: str
    device: str
    lengths: tuple[int, ...]
    seed: int = 0
    kv_cache: str = "keep"

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def tokens(self) -> int:
        """New tokens of the whole batch."""
        return sum(self.lengths)

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def split(self) -> Split:
        """The blocks of every context-parallel rank. Raises CpbenchError where the batch cannot be split."""
        return split(self.partition, self.lengths, self.layout.cp)

    @property
    def heads(self) -> int:
        """Query heads of one tensor-parallel rank."""
        return self.config.heads // self.layout.tp

    @property
    def kv_heads(self) -> int:
        """Kv heads of one tensor-parallel rank: at least one, then held by several ranks."""
        return max(1, self.config.kv_heads // self.layout.tp)

    @property
    def key(self) -> dict[str, Any]:
        """What the result file stores and `compare` joins on: every knob that changes the work."""
        options = {name: getattr(self, name) for name, default in DEFAULT_OPTIONS.items() if getattr(self, name) != default}
        return {
            "target": self.target,
            "model": self.config.name,
            "layers": self.layers,
            "layout": str(self.layout),
            "strategy": self.strategy,
            "partition": self.partition,
            "kernel": self.kernel,
            "dtype": self.dtype,
            "device": self.device,
            "lengths": list(self.lengths),
            "seed": self.seed,
            "options": options,
        }

    @property
    def id(self) -> str:
        """The key as one line: the identity used by resume."""
        key = self.key
        options = [f"{name}={value}" for name, value in sorted(key["options"].items())]
        lengths = [format_count(length) for length in self.lengths]
        lengths = [f"{lengths[0]}x{len(lengths)}"] if len(lengths) > 1 and len(set(lengths)) == 1 else lengths
        parts = [self.target, self.config.name, f"l{self.layers}", str(self.layout), self.strategy, self.partition, self.kernel, self.dtype, self.device]
        return "/".join([*parts, "+".join(lengths), f"seed{self.seed}", *options])

    @property
    def label(self) -> str:
        """Short name for progress and warnings: `cp4 ring 36k`."""
        batch = f" b{len(self.lengths)}" if len(self.lengths) > 1 else ""
        return f"{self.layout} {self.strategy} {format_count(max(self.lengths))}{batch}"

    def to_dict(self) -> dict[str, Any]:
        """Everything a worker needs, as JSON."""
        return {**self.key, "config": self.config.to_dict(), "kv_cache": self.kv_cache}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Cell:
        """The inverse of `to_dict`."""
        return cls(
            target=data["target"],
            config=ModelConfig(**data["config"]),
            layers=data["layers"],
            layout=Layout.parse(data["layout"]),
            strategy=data["strategy"],
            partition=data["partition"],
            kernel=data["kernel"],
            dtype=data["dtype"],
            device=data["device"],
            lengths=tuple(data["lengths"]),
            seed=data["seed"],
            kv_cache=data["kv_cache"],
        )
