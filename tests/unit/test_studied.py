"""What a projection makes of published rows: machines, rates and products in eight bits, without what the rows say of time."""

from __future__ import annotations

import pytest

from cpbench.projection.pricing import PricedClock
from cpbench.projection.profile import load_profile
from cpbench.projection.published import Machine, load_study
from cpbench.projection.studied import EightBits, on_machine, studied, with_attention

MACHINE = Machine(device="h100", gpus_per_node=8, title="slower H100", flops=800e12, memory_bytes_per_s=2.4e12, memory_bytes=96e9)


def test_a_machine_replaces_peaks_memory_and_bandwidth_and_nothing_else() -> None:
    known = load_profile("h100")
    found = on_machine(known, MACHINE, "bfloat16")
    assert found.peak_flops("bfloat16") == pytest.approx(800e12)
    assert found.peak_flops("fp8") / known.peak_flops("fp8") == pytest.approx(800 / 989.4)
    assert (found.memory_bytes, found.bandwidth.value) == (96_000_000_000, pytest.approx(2.4e12))
    assert found.moved(1e9) / known.moved(1e9) == pytest.approx(3.35 / 2.4)
    assert (found.gemm_efficiency, found.attention_cost, found.links) == (known.gemm_efficiency, known.attention_cost, known.links)
    assert found.peaks["bfloat16"].source == "published: slower H100"


def test_a_machine_of_which_nothing_is_said_is_its_profile() -> None:
    known = load_profile("h100")
    assert on_machine(known, Machine(device="h100", gpus_per_node=8, title="8 H100"), "bfloat16") == known


def test_a_device_without_eight_bits_has_them_at_twice_its_rate() -> None:
    found = on_machine(load_profile("ascend-910b"), Machine(device="ascend-910b", gpus_per_node=8, title="8 NPUs"), "bfloat16")
    assert found.peak_flops("fp8") == 2 * found.peak_flops("bfloat16")
    assert found.peaks["fp8"].kind == "assumed"


def test_a_measured_rate_changes_attention_alone() -> None:
    known = load_profile("a100")
    found = with_attention(known, "bfloat16", 0.5, "a table somewhere")
    square = (8192, 8192, 8192 * 8193 // 2, 32, 8, 128, 128)
    assert found.attention(*square, "bfloat16") == pytest.approx(2 * known.attention(*square, "bfloat16"))
    assert found.attention(*square, "float16") == known.attention(*square, "float16")
    assert found.attention_cost["bfloat16"].efficiency.kind == "measured"


def test_products_in_eight_bits_are_those_of_some_matrices_and_their_operands_are_quantised_once() -> None:
    profile = load_profile("h100")
    plain, fast = PricedClock(profile), EightBits(profile, {(8192, 4096)})
    assert fast._gemm(4096, 4096, 8192, "bfloat16") == plain._gemm(4096, 4096, 8192, "bfloat16")
    expected = profile.gemm(4096, 8192, 4096, "fp8") + profile.moved(3 * 4096 * 4096)
    assert fast._gemm(4096, 8192, 4096, "bfloat16") == pytest.approx(expected)
    assert fast._gemm(4096, 8192, 4096, "bfloat16") < plain._gemm(4096, 8192, 4096, "bfloat16")


def test_the_row_that_says_how_fast_one_device_is_is_met_and_others_are_not_fitted() -> None:
    study = load_study("ring-flash-attention")
    rows = [row for row in study.rows if row.machine == "8xA100"]
    rate = studied(study, rows[0])
    assert rows[0].is_rate and study.rate(rows[1]) == rows[0]
    assert rate.error == pytest.approx(0, abs=0.005)
    ring = studied(study, rows[1])
    assert ring.error is not None and 0.001 < abs(ring.error) < 0.12
    changed = study.model_copy(update={"rows": (rows[0], rows[1].model_copy(update={"value": 1.0}))})
    assert studied(changed, changed.rows[1]).seconds == ring.seconds  # what is predicted is not read


def test_published_times_to_first_token_are_within_an_eighth_on_average() -> None:
    study = load_study("meta-context-parallel")
    errors = [studied(study, row).error for row in study.rows if row.tokens <= 128_000 and "cp16" not in row.layout]
    assert None not in errors
    assert sum(abs(error or 0.0) for error in errors) / len(errors) < 0.12


def test_a_change_is_against_its_baseline() -> None:
    study = load_study("sglang-tp-sp")
    found = studied(study, study.rows[0])
    assert found.error is None and found.baseline_s is not None
    assert found.value == pytest.approx(found.seconds / found.baseline_s - 1)
    assert -0.15 < found.value < 0
