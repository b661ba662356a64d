"""The stop rule, samples over ranks, and what the memory tracker counts."""

import gc

import pytest
import torch

from cpbench.kernels import load_kernel
from cpbench.measure.device import Cpu
from cpbench.measure.memory import LiveTensors, OneBlock, measure_peaks
from cpbench.measure.timing import Samples, Timing, Variant, block_order, one_pass, sample
from cpbench.program import alone

CPU = torch.device("cpu")
MB = 1 << 20


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([1.0, 1.0], None),
        ([5.0, 5.0, 5.0], "max_seconds"),
        ([1.0, 1.0, 1.0, 1.0], None),
        ([1.0, 1.0, 1.0, 1.0, 1.01], "precision"),
        ([0.5, 1.0, 0.5, 1.0, 0.5], None),
        ([0.01, 0.02] * 15, "max_samples"),
    ],
)
def test_sampling_stops_for_a_reason_that_is_told(samples, reason):
    assert Timing(3, 30, 10.0, 0.02).stop(samples) == reason


def test_a_sample_is_the_slowest_rank_and_skew_its_distance_to_the_median():
    samples = Samples([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    assert samples.slowest == [4.0, 1.0]
    assert samples.skew == [2.0, 1.0]
    assert samples.of_rank(2) == 2.5


class Ticking:
    """A device whose passes take what a script says."""

    def __init__(self, script):
        self.torch_device, self.name, self.script = CPU, "test", iter(script)

    def time(self, run):
        run()
        return next(self.script)


def test_passes_are_prepared_run_and_reported_until_the_rule_stops():
    calls, seen = [], []
    world = alone().world
    variant = Variant(lambda: calls.append("run"), lambda: calls.append("prepare"), lambda n, s: seen.append((n, s)))
    (samples,) = sample([variant], Timing(3, 4, 100.0, 0.0), Ticking([1, 2, 3, 4]), world)
    assert calls == ["prepare", "run"] * 4
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert samples.stop == "max_samples"
    assert one_pass(lambda: None, lambda: None, Ticking([7]), world) == [7]


def test_two_variants_alternate_there_and_back():
    assert (block_order(1), block_order(2)) == ((0,), (0, 1, 1, 0))
    calls = []
    variants = [Variant(lambda name=name: calls.append(name), lambda: None, lambda n, s: None) for name in "AB"]
    a, b = sample(variants, Timing(3, 4, 100.0, 0.0), Ticking(range(1, 9)), alone().world)
    assert "".join(calls) == "ABBAABBA"
    assert (a.slowest, b.slowest) == ([1, 4, 5, 8], [2, 3, 6, 7])
    assert sum(a.slowest) == sum(b.slowest), "a steady drift adds the same to both"
    assert a.stop == b.stop == "max_samples"


def test_two_variants_have_as_many_samples_and_go_on_until_both_have_enough():
    script = [9.0, 1.0, 1.1, 8.0] * 3  # A has its 5 s after one pass, B after five
    variants = [Variant(lambda: None, lambda: None, lambda n, s: None)] * 2
    a, b = sample(variants, Timing(3, 30, 5.0, 0.0), Ticking(script), alone().world)
    assert (len(a.ranks), len(b.ranks)) == (6, 6)
    assert (a.stop, b.stop) == ("max_seconds", "max_seconds")


def test_live_tensors_counts_storages_once_and_sees_them_go():
    weights = torch.zeros(MB)

    def run():
        a = torch.ones(MB)
        b = a.view(2, -1)[0]
        del a
        b = b + 0
        c = torch.ones(2 * MB)
        return float(c[0] + b[0])

    tracker = LiveTensors(CPU, lambda: [("weights", weights)])
    with tracker:
        run()
    assert tracker.by_category["weights"] == 4 * MB
    assert tracker.by_category["activations"] == pytest.approx(10 * MB, abs=100), "half of `a` as b, and c; a is gone before c"


def test_what_is_kept_counts_as_alive_from_the_start():
    kept = []

    def run():
        passing = torch.ones(2 * MB)
        del passing
        kept.append(torch.ones(MB))

    tracker = LiveTensors(CPU, lambda: [("K/V cache", tensor) for tensor in kept])
    with tracker:
        run()
    assert tracker.by_category == {"K/V cache": 4 * MB, "activations": 8 * MB}
    assert tracker.peak == 12 * MB


def test_the_allocator_peak_includes_what_an_operator_uses_inside():
    gc.collect()
    x = torch.randn(4, 64, 64, 64)
    peaks = measure_peaks(lambda: torch.nn.functional.conv2d(x, torch.randn(64, 64, 3, 3)), Cpu(), lambda: [("activations", x)])
    assert peaks["peak_live_bytes"] >= x.numel() * 4
    assert peaks["peak_allocator_bytes"] >= peaks["peak_live_bytes"]
    assert peaks["peak_rss_bytes"] > peaks["peak_live_bytes"]


def test_one_block_has_the_shapes_of_all_and_the_values_of_the_first_rows():
    q, k, v = (torch.randn(1500, heads, 32) for heads in (4, 2, 2))
    inner = load_kernel("cpu_flash")
    out, lse = OneBlock(inner).block(q, k, v, 0.2, False)
    expected, expected_lse = inner.block(q, k, v, 0.2, False)
    assert out.shape == expected.shape
    assert lse.shape == expected_lse.shape
    torch.testing.assert_close(out[:512, ::2], expected[:512, ::2])
    torch.testing.assert_close(lse[::2, :512], expected_lse[::2, :512])
    assert not out[512:].any()
