"""Memory over time: levels that are thinned, phases, owners, an allocator's trace, what is said when it runs out, and the drawing."""

from __future__ import annotations

import gc
import json
import random

import pytest
import torch

from cpbench.cell import Cell
from cpbench.errors import UNREADABLE, CpbenchError
from cpbench.kernels import kernel_of
from cpbench.layout import Layout
from cpbench.measure.allocator import BEFORE, UNNAMED, from_trace
from cpbench.measure.device import Cpu
from cpbench.measure.history import MAX_POINTS, History, Owner, Phase, named, thinned
from cpbench.measure.memory import LiveTensors, measure_peaks, memory_history
from cpbench.measure.out_of_memory import OutOfMemory, OverLimit, cause, owners_named
from cpbench.memory_record import keep, read_history
from cpbench.models.presets import PRESETS
from cpbench.program import Program, alone
from cpbench.report.memory_plot import draw
from cpbench.tracing.phases import PhaseLog
from cpbench.tracing.spans import KERNEL, LAYER, MLP, using

CPU = torch.device("cpu")
MB = 1 << 20
PHASES = (Phase("layer", 10.0, 14.0), Phase("layer/mlp", 12.0, 13.0), Phase("head", 14.5, 15.0))
LEVELS = [(10.0, 100), (10.5, 300), (12.5, 900), (13.5, 200), (16.0, 50)]


def history(peak: int = 900) -> History:
    owners = [Owner("weights", 600), Owner("layer/mlp aten::mm [2, 3]", 300), Owner("K/V cache", 50), Owner("inputs", 1)]
    return History.of("live tensors", [(when, min(size, peak)) for when, size in LEVELS], PHASES, owners)


def test_a_phase_has_the_highest_level_while_it_was_open_and_the_one_it_began_with() -> None:
    found = history()
    assert found.levels[0] == (0.0, 100) and found.seconds == 6.0
    assert found.peak_by_phase() == {"layer": 900, "layer/mlp": 900, "head": 200}
    assert (found.peak, found.peak_phase) == (900, "layer/mlp")
    assert History.of("x", LEVELS[:1], PHASES).peak_by_phase() == {"layer": 100, "layer/mlp": 100, "head": 100}


def test_thinning_keeps_the_ends_and_both_extremes_and_peaks_are_taken_before() -> None:
    draw_from = random.Random(0)
    levels = [(float(when), draw_from.randint(1000, 2000)) for when in range(50_000)]
    levels[31_234], levels[777] = (31_234.0, 9999), (777.0, 1)
    kept = thinned(levels)
    assert len(kept) <= MAX_POINTS and kept == sorted(kept)
    assert {levels[0], levels[-1], levels[31_234], levels[777]} <= set(kept)
    assert thinned(levels[:MAX_POINTS]) == levels[:MAX_POINTS]
    phases = [Phase(f"layer/{number}", number, number + 0.5) for number in range(20_000)]
    found = History.of("x", levels, [Phase("layer", 0, 20_000), *phases])
    assert [phase.path for phase in found.phases] == ["layer"], "of too many phases the outer ones stay"
    assert found.peak_by_phase()["layer/17123"] == levels[17_123][1], "and their peaks are known"


def test_a_history_is_json_and_comes_back_and_anything_else_is_refused(tmp_path) -> None:
    found = history()
    assert History.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    files = keep({3: found}, tmp_path / "r.json", "cell2-", 1000)
    assert files == ["r.memory/cell2-rank3.json", "r.memory/cell2-memory.svg"]
    assert read_history(tmp_path / files[0]) == found
    for text in ("[]", "{", '{"schema": "cpbench.memory"}', '{"schema": "cpbench.memory", "levels": [], "phases": 3}', '{"schema": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CpbenchError) as refused:
            read_history(tmp_path / "bad.json")
        assert refused.value.exit_code == UNREADABLE


def test_owners_are_categories_of_what_is_held_and_else_span_operator_and_shape() -> None:
    weights = torch.zeros(MB)
    phases = PhaseLog(lambda: 0.0)
    tracker = LiveTensors(CPU, lambda: [("weights", weights)], phases=phases)
    with using(phases), tracker, LAYER():
        with MLP():
            left, right = torch.ones(MB // 2), torch.ones(MB // 2)
        product = left * 2
        del product
    names = {owner.name: owner.bytes for owner in tracker.history().owners}
    assert names == {
        "weights": 4 * MB,
        f"2 x layer/mlp aten::ones [{MB // 2}]": 4 * MB,
        f"layer aten::mul [{MB // 2}]": 2 * MB,
    }
    assert named(tracker.history().owners).startswith("largest: ")
    del left, right


def test_a_limit_is_held_against_live_tensors_and_says_who_has_them() -> None:
    gc.collect()
    weights = torch.zeros(MB)

    def run() -> torch.Tensor:
        with LAYER(), KERNEL():
            first = torch.ones(MB)
            return first * first

    with pytest.raises(OutOfMemory, match=r"tried to allocate 4.00 MiB with 8.00 MiB of the limit of 10.0 MiB in use; largest: ") as raised:
        measure_peaks(run, Cpu(), lambda: [("weights", weights)], 10 * MB)
    owners = {owner.name: owner.bytes for owner in raised.value.owners}
    assert owners == {"weights": 4 * MB, f"layer/kernel aten::ones [{MB}]": 4 * MB, f"layer/kernel aten::mul [{MB}]": 4 * MB}
    assert raised.value.history is not None and raised.value.history.peak == 12 * MB
    assert raised.value.history.levels[0] == (0.0, 4 * MB)
    assert raised.value.history.peak_phase == "layer/kernel"
    assert measure_peaks(run, Cpu(), lambda: [("weights", weights)], 12 * MB)["peak_live_bytes"] == 12 * MB
    with pytest.raises(OutOfMemory, match=r"4.00 MiB are held before the pass, more than the limit of 1.00 MiB; largest: weights 4.00 MiB"):
        measure_peaks(run, Cpu(), lambda: [("weights", weights)], MB)


def test_a_pass_that_fits_only_the_first_time_does_not_fit() -> None:
    kept: list[torch.Tensor] = []

    def run() -> None:
        passing = torch.ones(2 * MB)
        del passing
        kept.append(torch.ones(MB))

    with pytest.raises(OutOfMemory, match=r"every later pass needs 12.0 MiB, more than the limit of 9.00 MiB"):
        measure_peaks(run, Cpu(), lambda: [("K/V cache", tensor) for tensor in kept], 9 * MB)


def test_another_error_stays_what_it_is() -> None:
    def run() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        measure_peaks(run, Cpu(), list, MB)


def test_where_nothing_tracks_tensors_what_is_held_is_named() -> None:
    held = [("weights", torch.zeros(MB)), ("K/V cache", torch.zeros(2 * MB))]
    held.append(("weights", held[0][1][:5]))
    with pytest.raises(OutOfMemory) as raised, owners_named(lambda: held):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total capacity of 139 GiB")
    assert str(raised.value) == "tried to allocate 432.00 MiB; largest: K/V cache 8.00 MiB, weights 4.00 MiB"
    assert raised.value.history is None
    with pytest.raises(ValueError, match="else"), owners_named(lambda: held):
        raise ValueError("something else")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."), "4.00 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB. GPU"), "tried to allocate 6.00 GiB"),
        (OverLimit("9 GiB are held"), "9 GiB are held"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_was_tried_is_read_from_every_kind_of_error(error: BaseException, text: str) -> None:
    assert text in cause(error)


def test_the_history_of_a_prefill_has_its_peak_and_its_phases() -> None:
    cell = Cell("prefill", PRESETS["qwen3-tiny"], 2, Layout(), "none", "contiguous", "auto", "float32", "cpu", (256,))
    with torch.inference_mode():
        program = Program(cell, alone(), kernel_of(cell), CPU)
        program.prepare()
        found = memory_history(program.run, Cpu(), program.tensors)
        again = measure_peaks(program.run, Cpu(), program.tensors)
    assert found.peak == again["peak_live_bytes"], "of the first pass as of a later one"
    peaks = found.peak_by_phase()
    assert {"embed", "layer", "layer/attention", "layer/attention/kernel", "layer/mlp", "head"} <= peaks.keys()
    assert max(peaks.values()) == found.peak
    assert peaks["layer/attention/kernel"] <= peaks["layer/attention"] <= peaks["layer"]
    assert sum(phase.path == "layer" for phase in found.phases) == 2
    assert found.owners[0].name == "weights"
    assert sum(owner.bytes for owner in found.owners) == found.peak


def test_an_allocators_trace_is_the_same_kind_of_history() -> None:
    trace = [
        {"action": "alloc", "addr": 1, "size": 7, "time_us": 500_000, "stream": 0, "frames": []},  # before it began
        {"action": "segment_alloc", "addr": 64, "size": 4096, "time_us": 1_000_000},
        {"action": "alloc", "addr": 64, "size": 1000, "time_us": 1_100_000},
        {"action": "alloc", "addr": 2048, "size": 500, "time_us": 1_200_000},
        {"action": "free_requested", "addr": 64, "size": 1000, "time_us": 1_300_000},
        {"action": "alloc", "addr": 3000, "size": 300, "time_us": 1_350_000},
        {"action": "free_completed", "addr": 64, "size": 1000, "time_us": 1_400_000},
        {"action": "alloc", "addr": 64, "size": 50, "time_us": 1_500_000},
        {"action": "free_completed", "addr": 9, "size": 200, "time_us": 1_600_000},  # of a block from before
        {"action": "snapshot", "size": 0, "time_us": 1_700_000},
    ]
    phases = [Phase("layer", 1.05, 1.45), Phase("layer/mlp", 1.15, 1.3)]
    held = {64: Owner("K/V cache", 50), 5: Owner("weights", 600)}
    found = from_trace(trace, (1.0, 900), phases, held)
    assert [size for _, size in found.levels] == [900, 1900, 2400, 2700, 1700, 1750, 1550]
    assert found.levels[1][0] == pytest.approx(0.1)
    assert found.peak_by_phase() == {"layer": 2700, "layer/mlp": 2400}
    assert found.owners == (Owner("layer", 1300), Owner("weights", 600), Owner("layer/mlp", 500), Owner(BEFORE, 300))
    outside = from_trace(trace[2:3], (1.0, 0), [], {})
    assert outside.owners == (Owner(UNNAMED, 1000),)


def test_a_drawing_names_ranks_phases_the_peak_and_the_limit(tmp_path) -> None:
    ranks = {rank: history(900 - rank) for rank in range(11)}
    draw(ranks, tmp_path / "m.svg", 1000)
    text = (tmp_path / "m.svg").read_text()
    assert all(part in text for part in ("rank 0", "rank 6", "rank 10", "8 of 11 ranks", "peak 900 B in layer/mlp", "layer/mlp", "limit 0.98 KiB"))
    assert ">rank 7<" not in text
    draw({0: history()}, tmp_path / "m.png", 900_000)
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    draw({0: history()}, tmp_path / "far.svg", 900_000)
    assert "limit" not in (tmp_path / "far.svg").read_text(), "a limit far away would flatten the picture"
