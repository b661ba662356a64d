"""Reading up to a limit: files at it and above it, and devices, which have no end and no size."""

from pathlib import Path

import pytest

from cpbench.bounded import read_at_most


@pytest.mark.parametrize(("length", "expected"), [(0, ""), (8, "é" * 8), (9, None)])
def test_a_file_is_whole_or_nothing(tmp_path: Path, length: int, expected: str | None) -> None:
    file = tmp_path / "text"
    file.write_text("é" * length, encoding="utf-8")
    assert read_at_most(file, 8) == expected


def test_a_device_has_no_end() -> None:
    assert read_at_most(Path("/dev/zero"), 8) is None
