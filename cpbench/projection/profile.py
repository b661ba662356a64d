"""What the compute of a device costs: seconds of a GEMM, of attention and of moving bytes, from constants that say where they are from.

A profile is one JSON file: those of `devices/`, which have a name, or one that `cpbench calibrate` wrote. It knows nothing of programs,
layouts or ranks; what its links cost is in links.py. Every curve knows the sizes that it was measured between, and answers outside of them
too: `outside` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from cpbench.cell import DTYPE_BYTES
from cpbench.errors import CpbenchError
from cpbench.projection.constants import Curve, Number, Part
from cpbench.projection.links import LinkCosts
from cpbench.projection.named_files import NamedFiles

Costs = TypeVar("Costs")
SCHEMA, SCHEMA_VERSION = "cpbench.device", 1
MAX_BYTES = 4 << 20  # of a file: a calibrated profile with its raw points has a hundredth
OPERAND_BYTES = {**DTYPE_BYTES, "fp8": 1}
OUTPUT_BYTES = {**DTYPE_BYTES, "fp8": 2}
UNITS = {"gemm": "harmonic mean of m, n and k", "attention": "keys", "moved": "bytes"}
PIECES = {"gemm": "a GEMM of {:,.0f}", "attention": "attention to {:,.0f} keys", "moved": "a kernel over {:,.0f} bytes"}
CALIBRATE = "cpbench calibrate -o FILE measures the device at hand, and --hardware FILE takes it."


class Attention(Part):
    """Attention of one varlen launch: t = F/P (1 + half/S), where F are its operations, P = `efficiency` x peak.

    S is twice the mean number of keys that a query sees: the length of a causal square, and so the term with `half_keys` is a cost per row of
    queries. Least squares over causal prefills on GPUs have this form (7 % of error). What tiles on the diagonal mask is in that cost, or apart
    where rectangles were measured too: half of `tile_keys` per row, and never more than there is to mask. `score_operations`: of the softmax,
    for each score, which the products of narrow heads do not hide.
    """

    efficiency: Number
    half_keys: Number
    tile_keys: Number
    score_operations: Number
    low_keys: Number
    high_keys: Number
    mean_error: float | None = None
    worst_error: float | None = None
    kernel: str = ""


class Reserve(Part):
    """Bytes that libraries take on a device: its context, and the buffers of collectives of two ranks and of more."""

    context: Number
    buffers_of_two: Number
    buffers: Number


class DeviceProfile(Part):
    """Everything that a device and its links cost.

    `peaks` are FLOP/s by dtype, `gemm` the part of the
    peak that a GEMM reaches over the harmonic mean of its sides, `moved` bytes per second over bytes read and written.
    """

    schema_name: Literal["cpbench.device"] = Field(alias="schema")
    schema_version: Literal[1]
    name: str
    title: str
    device: Literal["cuda", "cpu", "npu"]
    backend: Literal["nccl", "gloo", "hccl"]
    memory: Number
    reserve: Reserve
    node: Number
    peaks: dict[str, Number]
    bandwidth: Number
    launch: Number
    gemm_efficiency: dict[str, Curve]
    attention_cost: dict[str, Attention]
    moved_rate: Curve
    links: LinkCosts
    measured_with: dict[str, Any] | None = None  # of a calibrated one: date, versions, machine, raw points

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return int(self.memory.value)

    @property
    def gpus_per_node(self) -> int:
        """Devices that the fast links join."""
        return int(self.node.value)

    @property
    def launch_s(self) -> float:
        """Seconds of one kernel beside its work."""
        return self.launch.value

    def reserved(self, ranks: int) -> dict[str, int]:
        """Bytes that libraries take on each device when so many ranks communicate, by what they are for."""
        buffers = self.reserve.buffers_of_two if ranks == 2 else self.reserve.buffers
        parts = {"device context": self.reserve.context.value, f"{self.backend} buffers": buffers.value if ranks > 1 else 0.0}
        return {name: int(value) for name, value in parts.items() if value}

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s. Raises CpbenchError where the profile does not have the dtype."""
        return self._of(self.peaks, dtype, "peak").value

    def gemm(self, m: int, n: int, k: int, dtype: str) -> float:
        """Seconds of [m, k] x [k, n], its launch included: the longer of its operations and its bytes. Raises CpbenchError as `peak_flops`."""
        if not m * n * k:
            return self.launch_s
        efficiency = self._of(self.gemm_efficiency, dtype, "GEMM rate").at(side(m, n, k))
        traffic = OPERAND_BYTES[dtype] * (m * k + k * n) + OUTPUT_BYTES[dtype] * m * n
        return max(2 * m * n * k / (efficiency * self.peak_flops(dtype)), self.moved(traffic)) + self.launch_s

    def attention(self, q_rows: int, k_rows: int, pairs: int, heads: int, kv_heads: int, dim_qk: int, dim_v: int, dtype: str) -> float:
        """Seconds of one sequence of a varlen launch, without the launch: `pairs` of a query and a key that each head computes.

        The longer of operations, with their cost per row (see `Attention`), and bytes. Raises CpbenchError as `peak_flops`.
        """
        if not pairs:
            return 0.0
        cost = self._of(self.attention_cost, dtype, "attention rate")
        both = dim_qk + dim_v
        pairs += min(int(q_rows * cost.tile_keys.value / 2), q_rows * k_rows - pairs)
        operations = heads * (2 * both * (pairs + q_rows * cost.half_keys.value / 2) + cost.score_operations.value * pairs)
        traffic = OPERAND_BYTES[dtype] * both * (q_rows * heads + k_rows * kv_heads)
        return max(operations / (cost.efficiency.value * self.peak_flops(dtype)), self.moved(traffic))

    def moved(self, traffic: float) -> float:
        """Seconds of an element-wise kernel that reads and writes so many bytes, without its launch."""
        return traffic / self.moved_rate.at(traffic) if traffic else 0.0

    def range_of(self, kind: str, dtype: str = "bfloat16") -> tuple[float, float, str]:
        """Between which sizes `gemm`, `attention` or `moved` was measured: (low, high, unit)."""
        if kind == "attention":
            cost = self._of(self.attention_cost, dtype, "attention rate")
            return cost.low_keys.value, cost.high_keys.value, UNITS[kind]
        curve = self.moved_rate if kind == "moved" else self._of(self.gemm_efficiency, dtype, "GEMM rate")
        return curve.low, curve.high, UNITS[kind]

    def outside(self, kind: str, size: float, dtype: str = "bfloat16") -> str | None:
        """A phrase for a size that the profile was not measured at; None for one within."""
        low, high, _ = self.range_of(kind, dtype)
        if low <= size <= high:
            return None
        return f"{PIECES[kind].format(size)} is outside of the {low:,.0f} to {high:,.0f} that {self.name} was measured in"

    def _of(self, by_dtype: dict[str, Costs], dtype: str, what: str) -> Costs:
        if dtype not in by_dtype:
            raise CpbenchError(f"The profile {self.name} has no {what} in {dtype}.", f"It has {', '.join(by_dtype)}; {CALIBRATE}")
        return by_dtype[dtype]


def side(m: int, n: int, k: int) -> float:
    """The harmonic mean of the sides of a GEMM: it decides how often a value that was loaded is used."""
    return 3 / (1 / m + 1 / n + 1 / k)


_PROFILES = NamedFiles("devices", "device", "device profile", SCHEMA, DeviceProfile, MAX_BYTES, CALIBRATE)


def profile_names() -> list[str]:
    """The devices that cpbench has a profile of."""
    return _PROFILES.names()


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """The profile of a known device, or of a file (anything with a slash or .json at its end).

    Raises CpbenchError: unknown device (exit code 2), a file that cannot be read or lacks a constant (exit code 4).
    """
    return _PROFILES.load(name_or_path)
