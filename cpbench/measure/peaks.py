"""What a device could compute: the peak that achieved FLOP/s are a fraction of, and above which a value is refused.

Of GPUs it is the dense peak of the data sheet. A CPU's depends on clocks and on how many of its cores a rank may use, so it is measured:
a GEMM on the threads of the rank while all ranks do the same. A large product may beat that by a little; it is a yardstick, not a limit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

SMALL, LARGE, QUICK = 512, 1024, 0.02  # sides of a GEMM, and seconds in which the small one must be done for the large one to be tried
REPEATS = 3

# TFLOP/s without sparsity: bf16 and fp16 with fp32 accumulation, fp8, fp32 without tensor cores. NVIDIA's data sheets; the first match counts
# fmt: off
DATA_SHEETS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200",      {"half": 2250.0, "fp8": 4500.0, "float32": 80.0}),
    ("H200",      {"half": 989.4, "fp8": 1978.9, "float32": 66.9}),
    ("H100 PCIe", {"half": 756.0, "fp8": 1513.0, "float32": 51.0}),
    ("H100 NVL",  {"half": 835.5, "fp8": 1671.0, "float32": 60.0}),
    ("H100",      {"half": 989.4, "fp8": 1978.9, "float32": 66.9}),
    ("H800",      {"half": 989.4, "fp8": 1978.9, "float32": 66.9}),
    ("H20",       {"half": 148.0, "fp8": 296.0, "float32": 44.0}),
    ("A100",      {"half": 312.0, "float32": 19.5}),
    ("A800",      {"half": 312.0, "float32": 19.5}),
    ("L40S",      {"half": 362.0, "fp8": 733.0, "float32": 91.6}),
    ("L4",        {"half": 121.0, "fp8": 242.0, "float32": 30.3}),
    ("RTX 4090",  {"half": 165.2, "fp8": 330.3, "float32": 82.6}),
    ("A10",       {"half": 125.0, "float32": 31.2}),
)
# fmt: on
KINDS = {"bfloat16": "half", "float16": "half"}


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank's device, and where the number is from."""

    flops: float
    source: str
    is_limit: bool  # nothing real is above it


def data_sheet(name: str, dtype: str, quant: str) -> Peak | None:
    """The peak of a GPU by the name that its driver gives it; None for one that is not listed, or a dtype that its sheet does not give."""
    sheet = next((sheet for part, sheet in DATA_SHEETS if part in name), {})
    tflops = sheet.get(quant if quant != "none" else KINDS.get(dtype, dtype))
    return None if tflops is None else Peak(tflops * 1e12, f"data sheet of {name}", True)


def measured(dtype: torch.dtype) -> Peak:
    """The fastest of a few GEMMs on this rank's threads."""
    side, seconds = SMALL, _gemm_seconds(SMALL, dtype, REPEATS)
    if seconds < QUICK:
        side, seconds = LARGE, _gemm_seconds(LARGE, dtype, REPEATS)
    name = str(dtype).removeprefix("torch.")
    return Peak(2 * side**3 / seconds, f"the fastest {name} GEMM of {side} on the threads of a rank", False)


def _gemm_seconds(side: int, dtype: torch.dtype, repeats: int) -> float:
    a, b = (torch.rand(side, side).to(dtype) for _ in range(2))
    out = a @ b
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return best
