"""What operators cost: products, attention, bytes and launches, counted by a profile that prices one of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cpbench.device_kind import standing_for
from cpbench.formulas import flops_of_rank
from cpbench.projection.pricing import PricedClock, PricedKernel
from cpbench.projection.profile import DeviceProfile, load_profile
from cpbench.projection.simulated import META, classes, simulate, without_storage
from tests.unit.test_simulated import CELLS, make


@dataclass
class Prices:
    """A profile in which an operation, a byte and a launch cost so many seconds."""

    operation: float = 0.0
    byte: float = 0.0
    launch_s: float = 0.0
    high: float = float("inf")

    def gemm(self, m: int, n: int, k: int, dtype: str) -> float:
        return 2 * m * n * k * self.operation + self.launch_s

    def attention(self, q_rows: int, k_rows: int, pairs: int, heads: int, kv_heads: int, dim_qk: int, dim_v: int, dtype: str) -> float:
        return 2 * pairs * heads * (dim_qk + dim_v) * self.operation

    def moved(self, traffic: float) -> float:
        return traffic * self.byte

    def range_of(self, kind: str, dtype: str) -> tuple[float, float, str]:
        return 0.0, self.high, ""

    def outside(self, kind: str, size: float, dtype: str) -> str:
        return f"{kind} of {size:.0f} in {dtype}"


def clock_of(**prices: float) -> PricedClock:
    return PricedClock(cast(DeviceProfile, Prices(**prices)))


def cost(work: Callable[[], Any], **prices: float) -> float:
    clock = clock_of(**prices)
    with clock:
        before = clock.mark()
        work()
        return clock.between(before, clock.mark())


def shaped(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device=META)


X, W, B = shaped(3, 5), shaped(7, 5), shaped(7)


SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "sub": lambda x: x - x.t().contiguous().t(),
    "sub, broadcast": lambda x: x - x[:1],
    "sub, wider": lambda x: x - x.double(),
    "sub, number": lambda x: x - 1.0,
    "logaddexp": lambda x: torch.logaddexp(x, x),
    "sigmoid": torch.sigmoid,
    "in place": lambda x: x.add_(x),
    "cat": lambda x: torch.cat([x, x[:2], x]),
    "cat, other side": lambda x: torch.cat([x, x[:, :2]], 1),
    "cat, wider": lambda x: torch.cat([x, x.double()]),
    "cat, one side": lambda x: torch.cat([x[0], x[1, :2]]),
}


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_that_are_worked_out_here_are_those_of_pytorch(name: str) -> None:
    real = SHAPED[name](torch.rand(4, 4))
    with PricedClock(load_profile("h200")) as clock:
        shaped = SHAPED[name](torch.empty(4, 4, device="meta"))
    assert (shaped.shape, shaped.dtype, shaped.is_meta) == (real.shape, real.dtype, True)
    assert clock.seconds > 0


@pytest.mark.parametrize(
    ("work", "operations"),
    [
        (lambda: X @ W.T, 2 * 3 * 5 * 7),
        (lambda: torch.nn.functional.linear(X, W, B), 2 * 3 * 5 * 7),
        (lambda: torch.nn.functional.linear(X.expand(2, 4, 3, 5), W), 2 * 2 * 4 * 3 * 5 * 7),
        (lambda: torch.addmm(B, X, W.T), 2 * 3 * 5 * 7),
        (lambda: torch.bmm(shaped(4, 3, 5), shaped(4, 5, 7)), 2 * 4 * 3 * 5 * 7),
        (lambda: X[:0] @ W.T, 0),
        (lambda: X + X, 0),
    ],
)
def test_products_cost_two_operations_per_multiply_add(work: Callable[[], Any], operations: int) -> None:
    assert cost(work, operation=1.0) == operations


def test_a_grouped_product_costs_the_product_of_every_expert() -> None:
    """Rows are taken to be shared out evenly; FP8 has its own price."""
    rows, weights, ends = shaped(32, 16, dtype=torch.bfloat16), shaped(4, 16, 48, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32, device=META)
    assert cost(lambda: torch._grouped_mm(rows, weights, ends), operation=1.0, launch_s=0.5) == 2 * 32 * 16 * 48 + 0.5


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda: X + X, 3 * 60),
        (lambda: X.add_(1.0), 2 * 60),
        (lambda: X.to(torch.float16), 60 + 30),
        (X.T.contiguous, 2 * 60),
        (lambda: torch.logaddexp(X, X), 3 * 60),
        (lambda: X[:0] + 1.0, 0),
    ],
)
def test_everything_else_costs_what_it_reads_and_writes(work: Callable[[], Any], moved: int) -> None:
    assert cost(work, byte=1.0) == moved


@pytest.mark.parametrize("work", [lambda: X.T, lambda: X.view(5, 3)[1:], lambda: X.split(1), X.unbind, lambda: X.expand(2, 3, 5), lambda: torch.empty_like(X)])
def test_views_and_empty_tensors_cost_nothing(work: Callable[[], Any]) -> None:
    assert cost(work, operation=1.0, byte=1.0, launch_s=1.0) == 0


def test_every_operator_that_does_something_is_launched_once() -> None:
    assert cost(lambda: (X + X).mul_(2.0) @ W.T, launch_s=1.0) == 3


def test_what_shapes_are_made_of_without_asking_is_what_operators_would_make() -> None:
    y = shaped(3, 5)
    with clock_of():
        assert y.add_(1.0) is y
        assert torch.sigmoid(X.T).shape == X.T.shape


def test_real_tensors_beside_the_shaped_ones_are_free() -> None:
    assert cost(lambda: torch.ones(3, 3) @ torch.ones(3, 3) + 1.0, operation=1.0, byte=1.0, launch_s=1.0) == 0


@pytest.mark.parametrize(("causal", "pairs"), [(True, 4 * 10 - 6 + 3 * 3 - 3), (False, 4 * 10 + 3 * 3)])
def test_a_varlen_launch_costs_the_pairs_of_each_sequence(causal: bool, pairs: int) -> None:
    q, k, v = shaped(7, 8, 16), shaped(13, 2, 16), shaped(13, 2, 32)

    def work() -> None:
        out, lse = PricedKernel(clock).varlen_block(q, k, v, (0, 4, 7), (0, 10, 13), 1.0, causal)
        assert (out.shape, lse.shape, lse.dtype) == ((7, 8, 32), (8, 7), torch.float32)

    clock = clock_of(operation=1.0, launch_s=0.5)
    work()
    assert clock.seconds == 2 * pairs * 8 * (16 + 32) + 0.5


def test_paged_attention_costs_the_same_as_keys_in_a_row() -> None:
    q, pages = shaped(7, 8, 16), shaped(4, 16, 2, 16)
    clock = clock_of(operation=1.0)
    out, _ = PricedKernel(clock).paged_block(q, pages, pages, torch.empty(2, 2, dtype=torch.int32, device=META), (0, 4, 7), (10, 3), 1.0)
    assert out.shape == (7, 8, 16)
    assert clock.seconds == 2 * (4 * 10 - 6 + 3 * 3 - 3) * 8 * 32


@pytest.mark.parametrize("causal", [False, True])
def test_the_cpu_kernel_is_priced_by_its_rows(causal: bool) -> None:
    """It pays for half of the pairs where it masks; a flag that is not given is not among the arguments."""
    q, k = shaped(1, 4, 6, 8), shaped(1, 2, 6, 8)

    def work() -> None:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, causal)

    assert cost(work, operation=1.0) == 2 * (18 if causal else 36) * 4 * 16


def test_sizes_beyond_the_profile_are_named_where_they_count() -> None:
    clock = clock_of(operation=1.0, high=100.0)
    with clock:
        shaped(400, 400) @ shaped(400, 400)
        assert clock.outside() == ["gemm of 400 in float32"]
        shaped(90, 9000) @ shaped(9000, 60)
    assert clock.outside() == ["gemm of 400 in float32"]
    small = clock_of(operation=1.0, high=100.0)
    with small:
        for _ in range(80):
            shaped(60, 60) @ shaped(60, 60)
        shaped(101, 101) @ shaped(101, 101)
    assert small.outside() == ["gemm of 101 in float32"]
    with small:
        for _ in range(2000):
            shaped(60, 60) @ shaped(60, 60)
    assert small.outside() == []


FAMILIES = {
    "moe": make("cp2tp2/ep4", "ring", "qwen3-moe-tiny", lengths=(512,)),
    "moe-sp": make("tp4sp/ep4", "none", "qwen3-moe-tiny", lengths=(512,)),
    "mla": make("cp2tp2", "allgather", "deepseek-v2-tiny", layers=4, lengths=(256, 128)),
    "mla-absorbed": make("cp2", "ring", "deepseek-v2-tiny", mla="absorbed", lengths=(256, 128), partition="contiguous"),
    "prefix": make("cp2", "ring", lengths=(128,), prefixes=(500,), partition="contiguous"),
    "attention": make("cp4", "allgather", target="attention", layers=1),
}


DENSE = [name for name in CELLS if name.endswith(("zigzag", "contiguous", "interleave")) or name in ("tp", "tp-sp", "dp", "pp")]


@pytest.mark.parametrize("name", [*DENSE, *FAMILIES])
def test_operations_of_a_program_are_those_of_the_formulas(name: str) -> None:
    cell = (CELLS | FAMILIES)[name]
    clock = clock_of(operation=1.0)
    with without_storage("cuda"), clock:
        for rank in list(classes(cell))[:3]:
            script = simulate(cell, rank, PricedKernel(clock), clock, META, is_nccl=True)
            assert script.work_s == pytest.approx(flops_of_rank(cell, rank), rel=1e-9)


def test_where_keys_are_selected_masked_scores_are_computed_too() -> None:
    """Scores that select keys are products of whole blocks, of which the formula counts what is not masked."""
    cell = make("cp2", "allgather", "deepseek-v3.2-tiny", lengths=(512,))
    clock = clock_of(operation=1.0)
    with without_storage("cuda"), clock:
        script = simulate(cell, 0, PricedKernel(clock), clock, META, is_nccl=True)
    assert 1.0 < script.work_s / flops_of_rank(cell, 0) < 2.0


def test_shapes_stand_for_a_device_only_inside() -> None:
    with standing_for("cuda"):
        assert cost(lambda: X + X, byte=1.0) == 180
