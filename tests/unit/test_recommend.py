"""Advice: the front holds exactly what nothing dominates, and ties are what the intervals do not tell apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpbench.recommend import Candidate, advise


def candidate(name: str, seconds: float, memory: int | None, noise: float = 0.0) -> Candidate:
    return Candidate(name, seconds, (seconds - noise, seconds + noise), memory)


numbers = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=12)  # few values, so that equals happen


@given(numbers)
def test_nothing_on_the_front_is_dominated_and_everything_off_it_is(pairs: list[tuple[int, int]]) -> None:
    candidates = [candidate(str(index), float(seconds), memory) for index, (seconds, memory) in enumerate(pairs)]
    advice = advise(candidates)
    assert advice is not None

    def beaten(mine: tuple[int, int]) -> bool:
        return any(a <= mine[0] and b <= mine[1] and (a < mine[0] or b < mine[1]) for a, b in pairs)

    front = {int(one.name) for one in advice.front}
    assert front == {index for index, pair in enumerate(pairs) if not beaten(pair)}
    assert advice.fastest.seconds == min(seconds for seconds, _ in pairs)
    assert {one.memory for one in advice.leanest} == {min(memory for _, memory in pairs)}
    assert [one.seconds for one in advice.front] == sorted(one.seconds for one in advice.front)


def test_overlapping_intervals_tie_with_the_fastest() -> None:
    fast, near, far = candidate("a", 1.0, 5, 0.1), candidate("b", 1.15, 4, 0.1), candidate("c", 1.5, 3, 0.1)
    advice = advise([far, near, fast])
    assert advice is not None and advice.fastest == fast and advice.ties == (near,)


def test_a_candidate_without_memory_can_be_fastest_only() -> None:
    unknown, known = candidate("a", 1.0, None), candidate("b", 2.0, 7)
    advice = advise([unknown, known])
    assert advice is not None and advice.fastest == unknown
    assert advice.front == advice.leanest == (known,)
    assert advise([unknown, unknown]).front == ()  # type: ignore[union-attr]


def test_one_layout_is_no_choice() -> None:
    assert advise([]) is None and advise([candidate("a", 1.0, 5)]) is None
