"""What a result file holds of a profile: where the time of a traced step went, by phase and rank, and the operators or kernels that took most.

All seconds are per step, the mean of the traced steps. How they are found is timeline.py's affair.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class PhaseTime(_Record):
    """One phase on one rank. time_s = compute_s + exposed_comm_s + idle_s."""

    phase: str = Field(description="path of spans, innermost last; a phase's time is without the phases in it")
    rank: int
    time_s: float
    compute_s: float
    comm_s: float = Field(description="communication that the phase started, as long as it was under way")
    exposed_comm_s: float = Field(description="communication while nothing was computed")
    overlap: float | None = Field(None, description="the part of the communication that was not exposed; null without communication")
    idle_s: float = Field(description="neither")
    peak_bytes: int | None = Field(None, description="most bytes alive while the phase was open")


class RankTime(_Record):
    """All phases of one rank together."""

    rank: int
    step_s: float = Field(description="by the clock of the timed passes, not by the trace")
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    overlap: float | None = None
    idle_s: float


class KernelTime(_Record):
    """An operator (CPU) or kernel (CUDA) on the rank where it took longest, without what it called."""

    name: str
    rank: int
    calls: float = Field(description="per step")
    seconds: float
    share: float = Field(description="of the rank's step")


class NvtxRange(_Record):
    """A range of the domain `cpbench` in the report of Nsight Systems of one rank, over all captured steps."""

    range: str
    rank: int
    calls: int
    seconds: float = Field(description="from its begin to its end on the CPU")
    gpu_seconds: float | None = Field(None, description="of the GPU work that it launched")


class Profile(_Record):
    """A traced step of a cell. What Nsight Systems traced has `nvtx` instead of phases and kernels."""

    tool: str = Field(description="torch or nsys")
    steps: int = Field(description="traced steps per rank")
    ranks: list[RankTime] = Field(default_factory=list)
    phases: list[PhaseTime] = Field(default_factory=list, description="in the order in which they first came, rank by rank")
    kernels: list[KernelTime] = Field(default_factory=list, description="those that took longest, longest first")
    nvtx: list[NvtxRange] = Field(default_factory=list)
