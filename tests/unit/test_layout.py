"""Names, ranks and groups of layouts, held against the formulas and the worked rank lists of SGLang PR 17213.

Its tp_size is the ranks of a stage here; its attn_dp, attn_cp, attn_tp and moe_dp, moe_ep, moe_tp are dp, cp, tp and moe_dp, ep, moe_tp.
"""

from dataclasses import asdict
from itertools import product
from math import log2, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import CpbenchError
from cpbench.layout import AXES, INNER_AXES, MOE_AXES, Coordinates, Layout, all_layouts, divisors, engine_notes, nearest_divisor

STAGE_AXES = (*AXES[1:], *INNER_AXES, *MOE_AXES)
TOGETHER = [("dp", "tp"), ("dp", "cp"), ("cp", "tp"), ("pp", "tp"), ("ring", "tp"), ("moe_dp", "ep"), ("ep", "moe_tp"), ("moe_dp", "moe_tp")]
STAGE = [("stage",), ("dp", "cp", "tp"), ("dp", "ring", "ulysses", "tp"), MOE_AXES]


@st.composite
def layouts(draw):
    """Every layout of up to 64 ranks, with hybrids and expert axes."""

    def split(number, parts):
        sizes = []
        for _ in range(parts - 1):
            sizes.append(draw(st.sampled_from(divisors(number))))
            number //= sizes[-1]
        return [*sizes, number]

    pp, dp, cp, tp = split(draw(st.integers(1, 64)), 4)
    return Layout(pp, dp, cp, tp, draw(st.sampled_from(divisors(cp))), *split(dp * cp * tp, 3))


def ranks_of(text):
    """`0,1 2,3` as rank lists."""
    return tuple(tuple(map(int, group.split(","))) for group in text.split())


EIGHT, SINGLE = "0,1,2,3,4,5,6,7", "0 1 2 3 4 5 6 7"
PAIRS, FOURS = "0,1 2,3 4,5 6,7", "0,1,2,3 4,5,6,7"
BY_4, BY_2, EVERY_2 = "0,4 1,5 2,6 3,7", "0,2 1,3 4,6 5,7", "0,2,4,6 1,3,5,7"
# Where SGLang has attn_cp > moe_dp = 1 it lets its MOE_DP be ATTN_CP, to bring tokens together in front of the experts. Here moe_dp stays
# what its size says, and who brings tokens together is the communicator's decision.
WORKED = {
    "dp2cp2tp2/ep4tp2": {"stage": EIGHT, "tp": PAIRS, "cp": BY_2, "dp": BY_4, "moe_tp": PAIRS, "ep": EVERY_2, "moe_dp": SINGLE, "pp": SINGLE},
    "dp2cp2tp2/dp2ep4": {"stage": EIGHT, "tp": PAIRS, "cp": BY_2, "dp": BY_4, "moe_tp": SINGLE, "ep": FOURS, "moe_dp": BY_4, "pp": SINGLE},
    "cp2tp4/dp2ep4": {"stage": EIGHT, "tp": FOURS, "cp": BY_4, "dp": SINGLE, "moe_tp": SINGLE, "ep": FOURS, "moe_dp": BY_4, "pp": SINGLE},
    "cp4tp2/ep8": {"stage": EIGHT, "tp": PAIRS, "cp": EVERY_2, "dp": SINGLE, "moe_tp": SINGLE, "ep": EIGHT, "moe_dp": SINGLE, "pp": SINGLE},
    "cp2tp4/dp2ep2tp2": {"stage": EIGHT, "tp": FOURS, "cp": BY_4, "dp": SINGLE, "moe_tp": PAIRS, "ep": BY_2, "moe_dp": BY_4, "pp": SINGLE},
    "pp2cp2tp2/dp2ep2": {"stage": FOURS, "tp": PAIRS, "cp": BY_2, "dp": SINGLE, "moe_tp": SINGLE, "ep": PAIRS, "moe_dp": BY_2, "pp": BY_4},
}


def formulas(layout):
    """Rank lists as the PR writes them, one list per stage and place on the other axes."""
    size = layout.stage_size
    dp, cp, tp, moe_dp, ep, moe_tp = (range(getattr(layout, axis)) for axis in ("dp", "cp", "tp", "moe_dp", "ep", "moe_tp"))
    bases = range(0, layout.world_size, size)
    return {
        "stage": [tuple(range(b, b + size)) for b in bases],
        "tp": [tuple(b + (d * len(cp) + c) * len(tp) + k for k in tp) for b in bases for d in dp for c in cp],
        "cp": [tuple(b + d * len(cp) * len(tp) + t + k * len(tp) for k in cp) for b in bases for d in dp for t in tp],
        "dp": [tuple(b + j + k * len(cp) * len(tp) for k in dp) for b in bases for j in range(len(cp) * len(tp))],
        "moe_tp": [tuple(b + (m * len(ep) + e) * len(moe_tp) + k for k in moe_tp) for b in bases for m in moe_dp for e in ep],
        "ep": [tuple(b + m * len(ep) * len(moe_tp) + t + k * len(moe_tp) for k in ep) for b in bases for m in moe_dp for t in moe_tp],
        "moe_dp": [tuple(b + j + k * len(moe_tp) * len(ep) for k in moe_dp) for b in bases for j in range(len(moe_tp) * len(ep))],
        "pp": [tuple(range(r, layout.world_size, size)) for r in range(size)],
    }


@pytest.mark.parametrize("name", WORKED)
def test_the_worked_rank_lists(name):
    layout = Layout.parse(name)
    assert str(layout) == name
    for axis, text in WORKED[name].items():
        assert layout.groups(axis) == ranks_of(text), axis
        assert tuple(formulas(layout)[axis]) == ranks_of(text), axis


@given(layouts())
def test_groups_are_those_of_the_formulas(layout):
    for axis, groups in formulas(layout).items():
        assert layout.groups(axis) == tuple(groups), axis


def engine_loop(tp_size, stages, step):
    """The MOE_DP groups as SGLang's loop makes them, whose stop lies in the next stage."""
    return tuple(tuple(range(i * tp_size + j, (i + 1) * tp_size + j, step)) for i in range(stages) for j in range(step))


def test_the_loop_of_the_engine_and_the_formula_agree_on_249_settings():
    """All of (tp_size, pp, ep, moe_dp) with tp_size in 2, 4 ... 64, pp in 1, 2, 4, and ep * moe_dp a divisor of tp_size."""
    settings = [
        (size, pp, ep, moe_dp)
        for size, pp in product((2, 4, 8, 16, 32, 64), (1, 2, 4))
        for ep in range(1, size + 1)
        for moe_dp in range(1, size + 1)
        if size % (ep * moe_dp) == 0
    ]
    assert len(settings) == 249
    for size, pp, ep, moe_dp in settings:
        layout = Layout(pp=pp, tp=size, moe_dp=moe_dp, ep=ep)
        step = layout.moe_tp * ep
        explicit = tuple(tuple(base + j + k * step for k in range(moe_dp)) for base in range(0, pp * size, size) for j in range(step))
        assert layout.groups("moe_dp") == explicit == engine_loop(size, pp, step)


def test_a_product_that_does_not_divide_crosses_stages_in_the_loop_and_is_refused():
    assert (2, 5, 8) in engine_loop(8, 2, 1 * 3)  # rank 8 is in stage 1
    with pytest.raises(CpbenchError) as caught:
        Layout(pp=2, tp=8, moe_dp=2, ep=3, moe_tp=1)
    assert caught.value.message == "A stage of pp2tp8 has 8 ranks, and the expert axes /dp2ep3 are 6 ranks."
    assert caught.value.hint == "The nearest valid layout is pp2tp8/dp2ep4."


@given(layouts())
def test_every_axis_partitions_the_ranks(layout):
    for axes in [("pp",), *((axis,) for axis in STAGE_AXES), *TOGETHER, *STAGE]:
        groups = layout.groups(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size)), axes
        assert {len(group) for group in groups} == {layout.stage_size if axes == ("stage",) else prod(layout.size(axis) for axis in axes)}, axes
        assert [group[0] for group in groups] == sorted(group[0] for group in groups), axes


@given(layouts())
def test_only_pipeline_groups_cross_stages(layout):
    for axes in [*((axis,) for axis in STAGE_AXES), *STAGE, *(axes for axes in TOGETHER if "pp" not in axes)]:
        assert all(len({rank // layout.stage_size for rank in group}) == 1 for group in layout.groups(*axes)), axes
    for group in layout.groups("pp"):
        assert [layout.coordinates(rank).pp for rank in group] == list(range(layout.pp))
        assert len({rank % layout.stage_size for rank in group}) == 1


@given(layouts())
def test_a_group_varies_its_own_coordinates_only(layout):
    for family, axes in [*((AXES, (axis,)) for axis in AXES), *((("pp", *MOE_AXES), (axis,)) for axis in MOE_AXES), (AXES, ("dp", "tp"))]:
        for group in layout.groups(*axes):
            places = [asdict(layout.coordinates(rank)) for rank in group]
            assert [tuple(place[axis] for axis in axes) for place in places] == list(product(*(range(layout.size(axis)) for axis in axes)))
            assert all(len({place[axis] for place in places}) == 1 for axis in family if axis not in axes)


@given(layouts())
def test_all_axes_of_a_stage_together_are_the_stage(layout):
    assert len({layout.groups(*axes) for axes in STAGE}) == 1
    assert layout.groups("ring", "ulysses") == layout.groups("cp")


@given(layouts())
def test_coordinates_and_ranks_are_inverse(layout):
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        assert layout.rank_of(pp=place.pp, dp=place.dp, cp=place.cp, tp=place.tp) == rank
    places = product(*(range(size) for size in layout.sizes.values()))
    assert [layout.rank_of(*place) for place in places] == list(range(layout.world_size))


@given(layouts())
def test_coordinates_follow_the_formulas(layout):
    for rank in range(layout.world_size):
        r = rank % layout.stage_size
        assert layout.coordinates(rank) == Coordinates(
            pp=rank // layout.stage_size,
            dp=r // (layout.tp * layout.cp),
            cp=r // layout.tp % layout.cp,
            tp=r % layout.tp,
            moe_dp=r // (layout.moe_tp * layout.ep),
            ep=r // layout.moe_tp % layout.ep,
            moe_tp=r % layout.moe_tp,
        )


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_is_not_there_has_no_coordinates(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is outside the 8 ranks of cp4tp2"):
        Layout(cp=4, tp=2).coordinates(rank)


@given(layouts())
def test_a_printed_layout_parses_back(layout):
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("name", "layout", "printed"),
    [
        ("tp2cp4", Layout(cp=4, tp=2), "cp4tp2"),
        ("cp1", Layout(), "cp1"),
        ("tp1/tp1", Layout(), "cp1"),
        ("cp4tp2/tp8", Layout(cp=4, tp=2), "cp4tp2"),
        ("cp2tp4/tp2ep4", Layout(cp=2, tp=4, ep=4), "cp2tp4/ep4tp2"),
        ("u2tp2cp4dp2pp2/ep16", Layout(2, 2, 4, 2, 2, 1, 16, 1), "pp2dp2cp4u2tp2/ep16"),
    ],
)
def test_a_layout_has_one_name(name, layout, printed):
    assert Layout.parse(name) == layout
    assert str(layout) == printed


def test_experts_are_cut_over_what_is_left_of_a_stage():
    assert Layout(pp=2, cp=4, tp=2).moe_tp == 8
    assert not Layout(pp=2, cp=4, tp=2).divides_experts
    assert Layout(pp=2, cp=4, tp=2, ep=2).moe_tp == 4
    assert Layout(pp=2, cp=4, tp=2, ep=2).divides_experts


def test_a_hybrid_has_neighbours_for_ulysses_and_rings_between_them():
    layout = Layout.parse("cp8u4")
    assert (layout.ulysses, layout.ring) == (4, 2)
    assert layout.groups("ulysses") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.groups("ring") == ((0, 4), (1, 5), (2, 6), (3, 7))
    layout = Layout.parse("cp4u2tp2")
    assert layout.groups("ring") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("ulysses") == ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 7, 8, 12])
def test_all_layouts_are_every_product_once(ranks, experts):
    found = list(all_layouts(ranks, experts))
    sizes = range(1, ranks + 1)
    expected = set()
    for attention in product(sizes, repeat=4):
        if prod(attention) == ranks:
            stage = prod(attention[1:])
            splits = [split for split in product(sizes, repeat=3) if prod(split) == stage] if experts else [(1, 1, stage)]
            expected |= {(*attention, 1, *split) for split in splits}
    assert len(found) == len(expected)
    assert {(x.pp, x.dp, x.cp, x.tp, x.ulysses, x.moe_dp, x.ep, x.moe_tp) for x in found} == expected


AXIS_HINT = "Join axis names (pp, dp, cp, u, tp) and sizes, for example cp4tp2, cp8u4, tp4sp or cp2tp4/ep4tp2."
BEHIND_HINT = "The axes behind the slash are dp, ep, tp; for example cp2tp4/ep4tp2."
BAD = {
    **{name: (f"{name!r} is not a layout.", AXIS_HINT) for name in ["", "cp", "4", "cp4tp2 ", "cp-1", "CP4", "cp4,tp2", "cp1000000", "cp٤"]},
    **{name: (f"{name!r} is not a layout.", AXIS_HINT) for name in ["/", "cp4/", "/ep4", "cp4/ep2/tp2"]},
    "cp" * 50: (f"{'cp' * 20!r} is not a layout.", AXIS_HINT),
    "cp4x2": ("Layout 'cp4x2' names the unknown axis 'x'.", AXIS_HINT),
    "cp4/sp4": ("Layout 'cp4/sp4' names the unknown axis 'sp'.", AXIS_HINT),
    "ep4": ("Layout 'ep4' names the unknown axis 'ep'.", "The axes in front of the slash are pp, dp, cp, u, tp; for example cp2tp4/ep4tp2."),
    "cp4/cp4": ("Layout 'cp4/cp4' names the unknown axis 'cp'.", BEHIND_HINT),
    "cp4cp2": ("Layout 'cp4cp2' names the axis 'cp' twice.", AXIS_HINT),
    "cp4/ep2ep2": ("Layout 'cp4/ep2ep2' names the axis 'ep' twice.", AXIS_HINT),
    "cp0": ("cp=0 is not a size.", "Axis sizes go from 1 to 1024; the nearest is cp=1."),
    "pp2048": ("pp=2048 is not a size.", "Axis sizes go from 1 to 1024; the nearest is pp=1024."),
    "cp4/ep0": ("/ep=0 is not a size.", "Axis sizes go from 1 to 1024; the nearest is /ep=1."),
    "cp4/tp0": ("/tp=0 is not a size.", "Axis sizes go from 1 to 1024; the nearest is /tp=1."),
    "cp4/dp9999": ("/dp=9999 is not a size.", "Axis sizes go from 1 to 1024; the nearest is /dp=1024."),
    "cp8u3": ("u=3 does not divide cp=8.", "The nearest valid value is u=2."),
    "cp512tp512": ("cp512tp512 has 262144 ranks.", "At most 1024 ranks are supported."),
    "cp4/ep3": ("cp4 has 4 ranks, and the expert axes /ep3 are 3 ranks.", "The nearest valid layout is cp4/ep4."),
    "cp4/tp1": ("cp4 has 4 ranks, and the expert axes /tp1 are 1 rank.", "The nearest valid layout is cp4."),
    "cp1/ep2": ("cp1 has 1 rank, and the expert axes /ep2 are 2 ranks.", "The nearest valid layout is cp1."),
    "pp2tp4/ep8": ("A stage of pp2tp4 has 4 ranks, and the expert axes /ep8 are 8 ranks.", "The nearest valid layout is pp2tp4/ep4."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused(name):
    with pytest.raises(CpbenchError) as caught:
        Layout.parse(name)
    assert (caught.value.message, caught.value.hint) == BAD[name]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 8, "ep": 3}, "tp8 has 8 ranks, and the expert axes /ep3 do not divide them."),
        ({"tp": 8, "moe_tp": -2}, "/tp=-2 is not a size."),
        ({"dp": -1}, "dp=-1 is not a size."),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(CpbenchError) as caught:
        Layout(**sizes)
    assert caught.value.message == message


@given(st.tuples(*[st.integers(1, 8)] * 3), st.tuples(*[st.integers(1, 16)] * 3))
def test_the_nearest_layout_is_valid_and_none_is_nearer(attention, experts):
    dp, cp, tp = attention

    def distance(sizes):
        return sum(abs(log2(size / asked)) for size, asked in zip(sizes, experts, strict=True))

    try:
        layout = Layout(2, dp, cp, tp, 1, *experts)
    except CpbenchError as error:
        layout = Layout.parse(error.hint.removeprefix("The nearest valid layout is ").removesuffix("."))
        assert prod(experts) != prod(attention)
    else:
        assert (layout.moe_dp, layout.ep, layout.moe_tp) == experts
    assert (layout.pp, layout.dp, layout.cp, layout.tp) == (2, *attention)
    valid = [(x.moe_dp, x.ep, x.moe_tp) for x in all_layouts(dp * cp * tp, experts=True) if (x.pp, x.dp, x.cp) == (1, dp, cp)]
    assert distance((layout.moe_dp, layout.ep, layout.moe_tp)) == pytest.approx(min(map(distance, valid)))


def test_the_nearest_divisor():
    assert [nearest_divisor(size, 12) for size in (1, 5, 6, 7, 9, 10, 100)] == [1, 4, 6, 6, 6, 12, 12]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


PP_CP = "SGLang 0.5.9 needs pp=1 with cp > 1; 0.5.12 and later do not."
PP_MOE_DP = "SGLang needs pp=1 where the experts are data-parallel (/dp > 1)."
EP_TP = "SGLang needs ep x moe_dp to be all ranks of a stage where ep > 1: it does not cut an expert (/tp > 1) then."
MOE_DP_CP = "SGLang 0.5.12 and later need moe_dp = 1 or moe_dp = cp."


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("cp8", []),
        ("pp2tp4", []),
        ("dp2cp2tp2/dp2ep4", []),
        ("cp4tp2/ep8", []),
        ("cp2tp4/dp2tp4", []),
        ("pp2cp4", [PP_CP]),
        ("pp2tp4/dp4", [PP_MOE_DP, MOE_DP_CP]),
        ("cp2tp4/ep4tp2", [EP_TP]),
        ("cp4tp2/dp2ep4", [MOE_DP_CP]),
        ("pp2cp2tp4/dp4ep1tp2", [PP_CP, PP_MOE_DP, MOE_DP_CP]),
        ("pp2cp2tp4/dp2ep2tp2", [PP_CP, PP_MOE_DP, EP_TP]),
    ],
)
def test_what_an_engine_forbids_is_noted(name, notes):
    assert engine_notes(Layout.parse(name)) == notes
