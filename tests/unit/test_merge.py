"""Traces of two ranks as one timeline."""

from __future__ import annotations

from cpbench.tracing.merge import PIDS_PER_RANK, merged, unaligned

from .traces import PID, STEP, rank, span, steps, trace


def test_the_timeline_has_every_rank_under_its_name_on_one_clock() -> None:
    flow = {"ph": "s", "id": 5, "pid": PID, "tid": 1, "ts": 3, "cat": "ac2g", "name": "ac2g"}
    one, other = rank(), rank(base=1_790_857_026_000_002_000)
    for each in (one, other):
        each["traceEvents"].append(flow)
    together = merged([one, other])
    events = together["traceEvents"]
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(named.values()) == ["rank 0: CPU", "rank 0: marks", "rank 1: CPU", "rank 1: marks"]
    assert {event["pid"] // PIDS_PER_RANK for event in events} == {0, 1}
    begins = {event["pid"] // PIDS_PER_RANK: event["ts"] for event in reversed(events) if event["name"] == STEP}
    assert begins == {0: 0, 1: 2}  # its base is 2 us later
    assert together["baseTimeNanoseconds"] == one["baseTimeNanoseconds"]
    assert len({event["id"] for event in events if event["ph"] == "s"}) == 2
    assert [event["pid"] for event in one["traceEvents"] if event["ph"] == "X"] == [PID] * 8  # the ranks' own stay as they were


def test_clocks_that_differ_are_found() -> None:
    aligned, shifted, based = rank(shift=30), rank(shift=150), rank(base=1_790_857_026_000_300_000)
    assert unaligned([rank(), aligned], steps(rank(), aligned)) is None
    assert unaligned([rank(), shifted], steps(rank(), shifted)) == "step 0 of rank 1 begins 5e-05 s after that of rank 0 has ended, so their clocks differ"
    assert "step 0 of rank 1" in str(unaligned([rank(), based], steps(rank(), based)))
    short = trace(span(STEP, 0, 100))
    assert unaligned([rank(), short], steps(rank(), short)) == "the ranks did not trace the same number of steps"
