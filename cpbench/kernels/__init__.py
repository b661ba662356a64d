"""Attention on one device: one file per kernel, one line here each. Modules are imported when a kernel is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cpbench.errors import unknown

if TYPE_CHECKING:
    from cpbench.cell import Cell
    from cpbench.kernels.base import Kernel

SELECTED = "sparse_latent"  # what attends to selected keys; no kernel above does

FIXED = "fixed_blocks"  # what attends in deterministic cells

KERNELS = {  # name -> module and class; `auto` takes the first that is available
    "flash3": "cpbench.kernels.flash3:Flash3",
    "flash4": "cpbench.kernels.flash4:Flash4",
    "flash2": "cpbench.kernels.flash2:Flash2",
    "sdpa": "cpbench.kernels.sdpa:Sdpa",
    "cudnn": "cpbench.kernels.cudnn:Cudnn",
    "cpu_flash": "cpbench.kernels.cpu_flash:CpuFlash",
    "reference": "cpbench.kernels.reference:Reference",
    "fixed_blocks": "cpbench.kernels.fixed_blocks:FixedBlocks",
}


def load_kernel(name: str) -> Kernel:
    """The kernel of that name. Raises CpbenchError for a name that is not registered."""
    if name not in KERNELS:
        raise unknown("kernel", name, [*KERNELS, "auto"])
    module, class_name = KERNELS[name].split(":")
    kernel: Kernel = getattr(import_module(module), class_name)()
    return kernel


def pick_kernel(device: str, dtype: str, dim_qk: int, dim_v: int) -> Kernel:
    """The first registered kernel that can run here. `reference` always can."""
    return next(kernel for kernel in map(load_kernel, KERNELS) if kernel.available(device, dtype, dim_qk, dim_v) is None)


def kernel_of(cell: Cell) -> Kernel:
    """The kernel that a cell runs with."""
    shape = cell.shape
    if cell.deterministic:
        return load_kernel(FIXED)
    return pick_kernel(cell.device, cell.dtype, shape.qk_dim, shape.v_dim) if cell.kernel == "auto" else load_kernel(cell.kernel)


def dispatched(cell: Cell, kernel: Kernel) -> str:
    """What really attends in a cell."""
    return SELECTED if cell.shape.top_k else kernel.dispatched(cell.dtype, cell.shape.qk_dim, cell.shape.v_dim)
