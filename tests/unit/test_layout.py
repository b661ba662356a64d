import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import CpbenchError
from cpbench.layout import AXES, Layout

layouts = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 16)).map(lambda sizes: Layout(sizes[0] * sizes[1], sizes[2], sizes[0]))


@given(layouts)
def test_a_printed_layout_parses_back(layout):
    assert Layout.parse(str(layout)) == layout


@given(layouts)
def test_every_axis_partitions_the_ranks(layout):
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {layout.sizes[axis]}


@given(layouts)
def test_coordinates_and_ranks_are_inverse(layout):
    for rank in range(layout.world_size):
        assert layout.rank_of(**layout.coordinates(rank)) == rank


def test_tensor_parallel_ranks_are_neighbours():
    layout = Layout.parse("tp2cp4")
    assert str(layout) == "cp4tp2"
    assert layout.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("cp") == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_a_hybrid_has_neighbours_for_ulysses_and_rings_between_them():
    layout = Layout.parse("cp8u4")
    assert (layout.ulysses, layout.ring) == (4, 2)
    assert layout.groups("ulysses") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.groups("ring") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert Layout.parse("cp4u2tp2").groups("ring") == ((0, 4), (2, 6), (1, 5), (3, 7))


@given(layouts)
def test_inner_axes_partition_the_ranks_too(layout):
    for axis, size in (("ulysses", layout.ulysses), ("ring", layout.ring)):
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {size}


def test_a_degree_that_does_not_divide_names_the_nearest():
    with pytest.raises(CpbenchError, match="u=3 does not divide cp=8") as caught:
        Layout.parse("cp8u3")
    assert "u=2" in caught.value.hint


def test_a_layout_of_one_rank_has_a_name():
    assert str(Layout()) == "cp1"
    assert Layout.parse("cp1") == Layout()


@pytest.mark.parametrize("name", ["", "cp", "4", "cp4x2", "cp4cp2", "xp4", "cp0", "cp4tp2 ", "cp-1", "cp1000000"])
def test_bad_names_are_refused(name):
    with pytest.raises(CpbenchError) as caught:
        Layout.parse(name)
    assert caught.value.hint


def test_too_many_ranks_are_refused():
    with pytest.raises(CpbenchError, match="ranks"):
        Layout(cp=512, tp=512)
