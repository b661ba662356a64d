"""Other libraries' context parallelism on CPU: ring-flash-attn's zigzag ring and yunchang's Ulysses, over gloo, on cpbench's CPU kernel.

Both packages run FlashAttention 2, which needs CUDA. Here a module named `flash_attn` with the functions that they call stands in for it:
each call is one call of cpbench's `cpu_flash` per sequence, with FlashAttention 2's order of results and its log-sum-exp as [B, H, S] in
fp32. Everything else (communication, merging, copies) is the library's own. Rivals get q, k and v as separate contiguous tensors, as
their users would have them, and every rival's answer is compared with ours before it is timed.

The packages are optional: pip install --no-deps ring-flash-attn yunchang
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cpbench.kernels import load_kernel
from cpbench.program import Program
from cpbench.strategies import STRATEGIES
from cpbench.strategies.library import LibraryStrategy

COUNTERPARTS = {"ring-flash-attn": "ring", "yunchang-ulysses": "ulysses"}  # rival -> the strategy of ours that it is checked against
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # relative RMSE between two sound answers


def rival(name: str, ours: Program) -> Callable[[], Tensor]:
    """One pass of a rival on the inputs of `ours`, a program of its counterpart. Exits where the package is missing or its answer differs."""
    strategy = STRATEGIES[name]
    assert isinstance(strategy, LibraryStrategy)
    absent = [module for module in strategy.modules if module != "flash_attn" and find_spec(module) is None]
    if absent:
        raise SystemExit(f"{name} needs the package {absent[0]}: pip install --no-deps ring-flash-attn yunchang")
    install_flash_attn()
    q, rows = ours.attention_inputs()
    q, k, v = (x.unsqueeze(0).contiguous() for x in (q, *ours.open_rows()(rows)))
    context = ours.steps[0].attention.context

    def run() -> Tensor:
        return strategy.call(q, k, v, context)

    expected, found = ours.run().rows.double(), run().squeeze(0).double()
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= MAX_DIFFERENCE[q.dtype]:
        raise SystemExit(f"{name} gives another answer than {ours.cell.strategy}: relative RMSE {difference:.1e}")
    return run


def install_flash_attn() -> None:
    """Put a `flash_attn` for the CPU in the place of the package."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    for module in (package, interface):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    functions: dict[str, Any] = {"_flash_attn_forward": flash_attn_forward, "flash_attn_func": flash_attn_func}
    for name in ("_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        functions[name] = forward_of_dense_batches_only  # imported by the libraries, never called here
    for name, function in functions.items():
        setattr(interface, name, function)
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]


def flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    """FlashAttention 2.8's `_flash_attn_forward`: (out [B, S, H, D], lse [B, H, S] in fp32, the probabilities, the random state)."""
    assert not dropout_p and (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
    assert not causal or q.shape[1] == k.shape[1], "aligned to the bottom right: here only squares are needed"
    kernel = load_kernel("cpu_flash")
    outs, lses = zip(*(kernel.block(*sequence, softmax_scale, causal) for sequence in zip(q, k, v, strict=True)), strict=True)
    if len(outs) == 1:
        return outs[0].unsqueeze(0), lses[0].unsqueeze(0), None, None
    return torch.stack(outs), torch.stack(lses), None, None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """FlashAttention 2.8's `flash_attn_func`."""
    assert not return_attn_probs
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return flash_attn_forward(q, k, v, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, False)[0]


def forward_of_dense_batches_only(*arguments: object, **named: object) -> None:
    """What this stand-in lacks."""
    raise NotImplementedError("flash_attn on CPU has the forward pass of dense batches only")
