"""Every instant of a traced step is one phase's, and one kind's: traces of CPUs and devices, small enough to be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.tracing.chrome import events_of
from cpbench.tracing.timeline import Step, phase_of, steps_of

from .traces import OTHER, STEP, entry, kernel, launch, op, span, trace


def only_step(*entries: dict[str, Any]) -> Step:
    (step,) = steps_of(events_of(trace(*entries)))
    return step


def microseconds(step: Step) -> dict[tuple[str, str], float]:
    """(phase, kind) -> microseconds, those that are nothing left out."""
    found: dict[tuple[str, str], float] = {}
    for piece in step.pieces:
        found[piece.phase, piece.kind] = found.get((piece.phase, piece.kind), 0) + piece.end - piece.start
    return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize(
    ("path", "phase"),
    [
        ("layer/attention", ("layer/attention", False)),
        ("layer/mlp/tp.all_reduce", ("layer/mlp", True)),
        ("layer/attention/cp.send_recv.wait", ("layer/attention", True)),
        ("layer/attention/cp.all_gather/gather_kv", ("layer/attention", True)),
        ("pp.send_recv", (STEP, True)),
    ],
)
def test_collectives_belong_to_the_phase_around_them(path: str, phase: tuple[str, bool]) -> None:
    assert phase_of(path) == phase


def test_on_cpu_the_innermost_span_is_the_phase_and_operators_compute() -> None:
    step = only_step(
        span(STEP, 100, 200),
        span("layer", 110, 190),
        span("layer/attention", 110, 150),
        op("aten::matmul", 112, 130),
        op("aten::mm", 115, 129),
        span("layer/attention/cp.all_gather", 130, 145),
        op("c10d::send", 131, 133),
        op("aten::copy_", 134, 140),
        op("aten::add", 160, 170),
    )
    assert microseconds(step) == {
        (STEP, "idle"): 20,
        ("layer/attention", "idle"): 7,
        ("layer/attention", "compute"): 18,
        ("layer/attention", "exposed"): 15,
        ("layer", "idle"): 30,
        ("layer", "compute"): 10,
    }
    assert step.seconds() == pytest.approx(100e-6)
    assert {(work.name, work.calls): round(work.seconds * 1e6) for work in step.work if work.calls} == {
        ("aten::matmul", 1): 3,
        ("aten::mm", 1): 14,
        ("aten::add", 1): 10,
    }
    assert sum(work.seconds for work in step.work) == pytest.approx(28e-6)  # matmul has another microsecond behind mm


def test_what_gloo_does_meanwhile_is_in_flight_for_the_phase_that_started_it() -> None:
    step = only_step(
        span(STEP, 0, 100),
        span("layer/attention", 0, 80),
        span("layer/attention/cp.send_recv", 5, 10),
        span("gloo:send", 6, 60),
        span("gloo:recv", 7, 60),
        span("layer/attention/kernel", 10, 50),
        op("aten::sdpa", 10, 50),
        span("layer/attention/cp.send_recv.wait", 50, 60),
        span("layer/mlp", 80, 100),
        span("layer/mlp/tp.all_reduce", 82, 95),
        span("gloo:all_reduce", 84, 99, OTHER),
        span("gloo:barrier", 1, 4, OTHER),
    )
    assert step.seconds("exposed", "layer/attention") == pytest.approx(15e-6)
    assert step.communication("layer/attention") == pytest.approx(55e-6)  # from 5 to 60
    assert step.communication("layer/attention/kernel") == 0
    assert step.communication("layer/mlp") == pytest.approx(17e-6)  # from 82 to 99
    assert step.communication() == pytest.approx(72e-6)


def test_gloo_is_in_flight_no_longer_than_a_collective_takes_alone() -> None:
    """Until the rank asks for it, nobody sees when a transfer has ended."""
    entries = [
        span(STEP, 0, 100),
        span("layer/attention/cp.send_recv", 5, 10),
        span("gloo:recv", 7, 92),
        op("aten::sdpa", 10, 90),
        span("layer/attention/cp.send_recv.wait", 90, 92),
    ]
    (step,) = steps_of(events_of(trace(*entries)), {"cp.send_recv": 20e-6, "tp.all_reduce": 1.0})
    assert step.communication("layer/attention") == pytest.approx(24e-6)  # from 5 to 27, and 2 of waiting
    (step,) = steps_of(events_of(trace(*entries)), {"tp.all_reduce": 1.0})
    assert step.communication("layer/attention") == pytest.approx(87e-6)


def test_a_library_that_communicates_by_itself_is_exposed() -> None:
    step = only_step(span(STEP, 0, 10), span("layer/attention", 0, 10), op("_c10d_functional::wait_tensor", 2, 8))
    assert microseconds(step) == {("layer/attention", "idle"): 4, ("layer/attention", "exposed"): 6}


def test_annotations_of_pytorch_are_no_phases() -> None:
    step = only_step(span(STEP, 0, 10), span("ProfilerStep#1", -5, 20), span("## Call CompiledFxGraph ##", 2, 8), span("layer", 3, 4))
    assert {phase for phase, _ in microseconds(step)} == {STEP, "layer"}


def test_other_threads_do_not_count_on_cpu() -> None:
    step = only_step(span(STEP, 0, 10), op("aten::copy_", 2, 8, OTHER), span("layer", 2, 8, OTHER))
    assert microseconds(step) == {(STEP, "idle"): 10}


def test_on_a_device_kernels_belong_to_the_span_of_their_launch() -> None:
    """The kernel outlives its span, and the next one is launched while it runs."""
    step = only_step(
        span(STEP, 0, 100),
        span("layer/attention/kernel", 5, 10),
        launch(1, 6),
        span("layer/mlp", 10, 20),
        launch(2, 12, category="cuda_driver"),
        kernel("flash_fwd", 1, 20, 50),
        kernel("gemm", 2, 60, 90),
    )
    assert microseconds(step) == {
        ("layer/attention/kernel", "idle"): 20,
        ("layer/attention/kernel", "compute"): 30,
        ("layer/mlp", "idle"): 10,
        ("layer/mlp", "compute"): 30,
        (STEP, "idle"): 10,
    }


def test_on_a_device_communication_is_exposed_only_where_nothing_computes() -> None:
    step = only_step(
        span(STEP, 0, 100),
        span("layer/attention/cp.all_gather", 1, 4),
        launch(1, 2),
        launch(2, 3),
        span("layer/attention/kernel", 5, 10),
        launch(3, 6),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 1, 10, 60, stream=13),
        kernel("Memcpy DtoD (Device -> Device)", 2, 60, 65, category="gpu_memcpy"),
        kernel("flash_fwd", 3, 30, 50),
    )
    assert microseconds(step) == {
        ("layer/attention", "idle"): 10,
        ("layer/attention", "exposed"): 35,
        ("layer/attention/kernel", "compute"): 20,
        (STEP, "idle"): 35,
    }
    assert step.communication() == step.communication("layer/attention") == pytest.approx(55e-6)


def test_kernels_that_run_at_once_on_several_streams_count_once() -> None:
    step = only_step(
        span(STEP, 0, 50),
        span("layer/mlp", 1, 9),
        launch(1, 2),
        launch(2, 3),
        kernel("gemm", 1, 10, 30),
        kernel("gemm", 2, 20, 40, stream=8),
        kernel("Memset (Device)", 9, 45, 46, category="gpu_memset"),
    )
    assert microseconds(step) == {("layer/mlp", "idle"): 10, ("layer/mlp", "compute"): 30, (STEP, "idle"): 9, (STEP, "compute"): 1}
    assert sum(work.seconds for work in step.work if work.name == "gemm") == pytest.approx(40e-6)


def test_kernels_beyond_the_step_are_cut() -> None:
    step = only_step(span(STEP, 10, 20), launch(1, 11), kernel("before", 8, 5, 12), kernel("gemm", 1, 15, 40))
    assert [(piece.kind, piece.start, piece.end) for piece in step.pieces] == [("compute", 10, 12), ("idle", 12, 15), ("compute", 15, 20)]


def test_steps_come_in_order_and_a_trace_without_them_has_none() -> None:
    steps = steps_of(events_of(trace(span(STEP, 50, 60), span(STEP, 10, 30), op("aten::add", 52, 55))))
    assert [(step.start, step.end) for step in steps] == [(10, 30), (50, 60)]
    assert [step.seconds("compute") for step in steps] == [0, pytest.approx(3e-6)]
    assert steps_of(events_of(trace(op("aten::add", 52, 55)))) == []


def test_events_without_a_duration_are_skipped() -> None:
    assert list(events_of({"traceEvents": [{"ph": "X", "name": "a", "ts": 1}, entry("cpu_op", "b", 1, 2)]})) == list(
        events_of({"traceEvents": [entry("cpu_op", "b", 1, 2)]})
    )


@st.composite
def nested(draw: st.DrawFn, start: float = 0, end: float = 1000, path: str = "layer", depth: int = 3) -> list[dict[str, Any]]:
    """Spans and operators, nested as record_function nests them; some have the same begin or end as what is around them."""
    found: list[dict[str, Any]] = []
    cuts = sorted(draw(st.lists(st.integers(int(start), int(end)), min_size=2, max_size=6)))
    for number, (first, last) in enumerate(zip(cuts[::2], cuts[1::2], strict=False)):
        if draw(st.booleans()):
            found.append(span(f"{path}/s{number}", first, last))
        else:
            found.append(op(f"aten::o{number}", first, last))
        if depth and last > first:
            found += draw(nested(first, last, f"{path}/s{number}", depth - 1))
    return found


@given(nested(), st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.booleans()), max_size=6))
def test_phases_add_up_to_the_step_whatever_happens_in_it(entries: list[dict[str, Any]], kernels: list[tuple[int, int, bool]]) -> None:
    on_device = [launch(i, min(a, b)) for i, (a, b, _) in enumerate(kernels)]
    on_device += [kernel("nccl" if talks else "gemm", i, min(a, b), max(a, b), i) for i, (a, b, talks) in enumerate(kernels)]
    step = only_step(span(STEP, 0, 1000), *entries, *on_device)
    assert step.pieces[0].start == 0 and step.pieces[-1].end == 1000
    assert all(one.end == other.start for one, other in zip(step.pieces, step.pieces[1:], strict=False))
    assert step.seconds("exposed") <= step.communication() + 1e-12
    assert step.communication() <= 1000e-6 + 1e-12
