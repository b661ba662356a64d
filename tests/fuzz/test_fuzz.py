"""Broken inputs of every kind are answered or refused with a sentence. benchmarks/fuzz.py tries many more."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.guard import Finding, guarded, import_everything
from tests.fuzz.inputs import made, seeds
from tests.fuzz.targets import TARGETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_everything()
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("kind", TARGETS)
def test_broken_inputs_are_answered_or_refused(kind: str, folder: Path) -> None:
    for seed in seeds(kind):
        TARGETS[kind](seed, folder)

    @settings(max_examples=200, derandomize=True)  # the same each time: what is new is for benchmarks/fuzz.py to find
    @given(data=st.one_of(st.binary(max_size=300), st.builds(made, st.just(kind), st.integers(0, 2**63))))
    def tried(data: bytes) -> None:
        with guarded(folder):
            TARGETS[kind](data, folder)

    tried()


@pytest.mark.parametrize("act", [lambda: eval("1 + 1"), lambda: Path("elsewhere").touch(), lambda: sum(range(10**9)), lambda: bytes(600 << 20)])
def test_the_guard_sees_what_it_is_for(act, folder: Path) -> None:
    with pytest.raises((Finding, MemoryError)), guarded(folder):
        act()
