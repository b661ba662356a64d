"""Device profiles: what is shipped is complete and has sources, what compute costs, and what users are told about a wrong name or file."""

import json
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import UNREADABLE, USAGE, CpbenchError
from cpbench.projection.constants import Curve
from cpbench.projection.profile import load_profile, profile_names, side

SHAPE = (32, 8, 128, 128, "bfloat16")
ASKED = {"h100", "h200", "b200", "a100", "h800", "h20", "ascend-910b"}
KINDS = {"datasheet", "measured", "fitted", "derived", "assumed"}


def stored(name):
    return json.loads(resources.files("cpbench.projection").joinpath("devices", f"{name}.json").read_text(encoding="utf-8"))


def sourced(part):
    """Everything in a file that has a value, points or lines, which all need a source."""
    if isinstance(part, dict):
        if {"value", "points", "by_ranks"} & part.keys():
            yield part
        for inner in part.values():
            yield from sourced(inner)


def test_every_device_that_was_promised_is_there():
    assert set(profile_names()) >= ASKED | {"cpu"}


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_is_complete_and_every_number_says_where_it_is_from(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.memory_bytes > 1 << 30
    assert set(profile.gemm_efficiency) <= set(profile.peaks)
    assert set(profile.attention_cost) <= set(profile.peaks)
    assert profile.gemm(4096, 4096, 4096, "bfloat16") > 0
    assert profile.attention(4096, 4096, 4096 * 4097 // 2, *SHAPE) > 0
    numbers = list(sourced(stored(name)))
    assert len(numbers) > 20
    assert all(number["kind"] in KINDS and len(number["source"]) > 7 for number in numbers)


@pytest.mark.parametrize("name", ["h800", "h20", "ascend-910b"])
def test_links_that_nobody_measured_are_labelled(name):
    profile = load_profile(name)
    assert "uncalibrated" in profile.title
    assert profile.links.inside.all_gather.kind in ("derived", "assumed")


def test_a_gemm_reaches_what_was_measured():
    profile = load_profile("h200")
    seconds = profile.gemm(16384, 8192, 8192, "bfloat16") - profile.launch_s
    assert 2 * 16384 * 8192 * 8192 / seconds == pytest.approx(685e12, rel=0.01)


def test_a_gemm_of_few_rows_is_bound_by_its_weights():
    profile = load_profile("h200")
    seconds = profile.gemm(1, 8192, 8192, "bfloat16") - profile.launch_s
    assert seconds == pytest.approx(2 * 8192 * 8192 / (0.825 * 4.8e12), rel=0.01)
    assert profile.gemm(0, 8192, 8192, "bfloat16") == profile.launch_s


def test_a_causal_square_takes_what_the_fit_of_its_form_says():
    profile = load_profile("h200")
    for length in (2048, 16384):
        operations = 2 * 32 * 128 * length**2
        seconds = profile.attention(length, length, length**2 // 2, 32, 8, 128, 128, "bfloat16")
        assert seconds == pytest.approx(operations / 606e12 * (1 + 660 / length), rel=0.001)


def test_the_cost_of_a_row_is_paid_once_by_a_rectangle_and_again_by_each_of_its_parts():
    profile = load_profile("h200")
    whole = profile.attention(4096, 8192, 4096 * 8192, *SHAPE)
    parts = 2 * profile.attention(4096, 4096, 4096 * 4096, *SHAPE)
    rows = 2 * 256 * 32 * 4096 * 330 / 606e12
    assert parts - whole == pytest.approx(rows, rel=0.01)
    assert profile.attention(4096, 0, 0, *SHAPE) == 0


def test_attention_of_one_query_is_bound_by_its_keys():
    profile = load_profile("h200")
    seconds = profile.attention(1, 1 << 20, 1 << 20, *SHAPE)
    assert seconds == pytest.approx(2 * 256 * 8 * (1 << 20) / (0.825 * 4.8e12), rel=0.01)


@given(st.integers(1, 1 << 16), st.integers(1, 1 << 16), st.sampled_from(sorted(ASKED)))
def test_more_work_never_takes_less_time(rows, more, name):
    profile = load_profile(name)
    assert profile.gemm(rows, 4096, 4096, "bfloat16") <= profile.gemm(rows + more, 4096, 4096, "bfloat16")
    assert profile.moved(rows) <= profile.moved(rows + more)
    assert profile.attention(rows, rows, rows * rows, *SHAPE) <= profile.attention(rows, rows + more, rows * (rows + more), *SHAPE)


def test_a_curve_is_linear_in_the_logarithm_and_flat_outside():
    curve = Curve(unit="of peak", size_unit="side", kind="measured", source="made by hand", low=10, high=1000, points=[(10, 0.2), (1000, 0.8)])
    assert [curve.at(size) for size in (1, 10, 100, 1000, 5000)] == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])


def test_a_size_that_was_not_measured_is_named():
    profile = load_profile("h200")
    assert profile.outside("attention", 16384) is None
    assert profile.outside("attention", 1 << 20) == "attention to 1,048,576 keys is outside of the 16 to 16,384 that h200 was measured in"
    assert profile.outside("gemm", side(128, 4096, 4096)) == "a GEMM of 361 is outside of the 4,096 to 65,536 that h200 was measured in"
    assert profile.range_of("moved") == (1 << 20, 1 << 32, "bytes")


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(CpbenchError, match="The profile a100 has no GEMM rate in fp8") as caught:
        load_profile("a100").gemm(64, 64, 64, "fp8")
    assert "cpbench calibrate" in caught.value.hint


def test_what_libraries_reserve_depends_on_the_ranks():
    profile = load_profile("h100")
    assert profile.reserved(1) == {"device context": 500_000_000}
    assert profile.reserved(2)["nccl buffers"] == 342_000_000
    assert profile.reserved(8)["nccl buffers"] == 392_000_000


def test_an_unknown_device_names_the_nearest_and_how_to_measure_one():
    with pytest.raises(CpbenchError, match="Unknown device 'h2000'") as caught:
        load_profile("h2000")
    assert caught.value.exit_code == USAGE
    assert "'h200'" in caught.value.hint
    assert "cpbench calibrate" in caught.value.hint


def without(data, *path):
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return data


def with_value(data, value, *path):
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: json.dumps(without(stored("h200"), "bandwidth")), "lacks bandwidth"),
        (lambda: json.dumps(without(stored("h200"), "links", "inside", "all_gather")), "lacks links.inside.all_gather"),
        (lambda: json.dumps(without(stored("h200"), "launch", "source")), "lacks launch.source"),
        (lambda: json.dumps(with_value(stored("h200"), -1.0, "launch", "value")), "is wrong at launch.value"),
        (lambda: json.dumps(with_value(stored("h200"), 9.0, "links", "between", "rate", "value")), "not between its low and high ends"),
        (lambda: json.dumps(with_value(stored("h200"), [[2, 1], [1, 1]], "moved_rate", "points")), "do not ascend"),
        (lambda: json.dumps(with_value(stored("cpu"), [[0.1, 0], [0.1, 1]], "links", "behind", "points")), "do not ascend"),
        (lambda: json.dumps(with_value(stored("h200"), 2, "schema_version")), "is wrong at schema_version"),
        (lambda: json.dumps({"schema": "cpbench.result"}), "is not a device profile"),
        (lambda: "[" * 100_000, "is not JSON"),
        (lambda: "no", "is not JSON"),
    ],
)
def test_a_file_that_is_not_a_whole_profile_is_refused_in_one_sentence(tmp_path, content, said):
    file = tmp_path / "mine.json"
    file.write_text(content(), encoding="utf-8")
    with pytest.raises(CpbenchError) as caught:
        load_profile(file)
    assert caught.value.exit_code == UNREADABLE
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(CpbenchError, match="cannot be read") as caught:
        load_profile(str(tmp_path / "none.json"))
    assert caught.value.exit_code == UNREADABLE
    (tmp_path / "image.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CpbenchError, match="is not a device profile"):
        load_profile(tmp_path / "image.json")
