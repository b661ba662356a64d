"""Why a kernel cannot run on this machine: the device, its generation, the dtype, a package that is missing, broken or too old.

Nothing is imported before it is asked for, and an import that fails is a reason like any other, not an error.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from inspect import signature
from typing import Any

import torch

HALF_PRECISION = ("bfloat16", "float16")
GENERATIONS = {8: "Ampere or Ada", 9: "Hopper", 10: "Blackwell (B200, B300)", 11: "Blackwell (Thor)", 12: "Blackwell (RTX)"}


def cuda_refusal(device: str, dtype: str, majors: Collection[int]) -> str | None:
    """Why a half-precision CUDA kernel for these major compute capabilities cannot run; None if nothing speaks against it."""
    if device != "cuda":
        return f"runs on cuda, not on {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is visible, or this PyTorch is a CPU build"
    if dtype not in HALF_PRECISION:
        return f"takes bfloat16 and float16, not {dtype}"
    major, minor = torch.cuda.get_device_capability()
    if major not in majors:
        wanted = ", ".join(GENERATIONS[known] for known in GENERATIONS if known in majors)
        return f"runs on {wanted}, not on compute capability {major}.{minor}"
    return None


def head_size_refusal(dim_qk: int, dim_v: int, largest: int, multiple: int = 8) -> str | None:
    """Why head sizes are out of range; None if they are not."""
    for dim in (dim_qk, dim_v):
        if dim > largest or dim % multiple:
            return f"takes head sizes up to {largest} in steps of {multiple}, not {dim}"
    return None


def package_refusal(module: str, functions: dict[str, str], how: str) -> str | None:
    """Why functions of an optional package cannot be used; None if they can.

    `functions`: name -> a parameter that versions before the supported ones lack. `how`: how to install it.
    """
    try:
        package: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            return f"the module {module} is not installed: {how}"
        return f"the module {module} is broken ({error}): {how}"
    except Exception as error:  # a package built for another torch fails in many ways
        return f"the module {module} is broken ({str(error).splitlines()[0] if str(error) else type(error).__name__}): {how}"
    for function, parameter in functions.items():
        if not hasattr(package, function) or parameter not in signature(getattr(package, function)).parameters:
            return f"this version of {module} has no {function} with {parameter}, which cpbench calls: {how}"
    return None
