import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import CpbenchError
from cpbench.units import format_bytes, format_count, format_seconds, parse_count, parse_fraction, parse_seconds


@pytest.mark.parametrize(
    ("text", "value"), [("36k", 36864), ("1M", 1048576), ("36000", 36000), ("36_000", 36000), ("1.5M", 1572864), ("0.5k", 512), (17, 17), ("2GiB", 2**31)]
)
def test_counts_are_binary_and_plain_integers_exact(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["36q", "", "k", "-1", "1.0001k", "1e9", "36k tokens", "9" * 41, "0x10", "1.5", "nan"])
def test_what_is_not_a_count_is_refused_in_one_sentence_with_a_hint(text):
    with pytest.raises(CpbenchError) as caught:
        parse_count(text)
    assert "\n" not in caught.value.message
    assert "36k = 36,864" in caught.value.hint
    assert caught.value.exit_code == 2


@given(st.integers(0, 2**45))
def test_a_printed_count_reads_back(value):
    assert parse_count(format_count(value)) == value


@pytest.mark.parametrize(("text", "value"), [("20m", 1200), ("90s", 90), ("1.5h", 5400), ("250ms", 0.25), ("7", 7), (3, 3)])
def test_durations(text, value):
    assert parse_seconds(text) == value


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.5", 0.5), ("100%", 1.0), (0.1, 0.1), (1e-5, 1e-5)])
def test_fractions(text, value):
    assert parse_fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["101%", "2", "2 percent", "-1%"])
def test_fractions_outside_the_range_are_refused(text):
    with pytest.raises(CpbenchError):
        parse_fraction(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.5311, "4.53 s"), (0.0214, "21.4 ms"), (0.00031, "310 us"), (150, "2m30"), (7300, "2h01"), (None, "-"), (0.9999, "1.00 s"), (119.9, "120 s")],
)
def test_seconds_are_printed_with_three_digits(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1.00 KiB"), (268 << 20, "268 MiB"), (3.5 * 2**30, "3.50 GiB"), (None, "-")])
def test_bytes_are_printed_with_three_digits(size, text):
    assert format_bytes(size) == text
