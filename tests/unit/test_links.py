"""What collectives cost: the fits as they were published, properties of any cost, formulas between nodes, and links that users name."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import USAGE, CpbenchError
from cpbench.projection.links import Links, Topology
from cpbench.projection.profile import load_profile

OPERATIONS = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "send_recv")
ONE_NODE = range(8)
CARD = 35e9


def links(name="h100", ranks=64, per_node=8):
    return Links(load_profile(name).links, Topology(ranks, per_node))


@pytest.mark.parametrize(
    ("name", "operation", "ranks", "whole", "microseconds"),
    [  # the table of fits, worked out by hand: a + wire / b
        ("h100", "all_gather", 8, 64 << 20, 22.7 + (64 << 20) * 7 / 8 / 322.5e3),
        ("h100", "all_gather", 8, 1 << 20, 11.2 + (1 << 20) * 7 / 8 / 150.6e3),
        ("h200", "all_reduce", 8, 512 << 20, 63.0 + (512 << 20) * 14 / 8 / 468.3e3),
        ("a100", "reduce_scatter", 4, 256 << 20, 40.4 + (256 << 20) * 3 / 4 / 201.1e3),
        ("b200", "all_to_all", 8, 128 << 20, 18.6 + (128 << 20) * 7 / 8 / 522.7e3),
        ("h100", "send_recv", 2, 64 << 20, 7.6 + (64 << 20) / 361.1e3),
        ("h20", "all_gather", 8, 64 << 20, 22.7 + (64 << 20) * 7 / 8 / 322.5e3),
        ("h800", "all_gather", 8, 64 << 20, 22.7 + (64 << 20) * 7 / 8 / (322.5e3 * 165 / 371)),
    ],
)
def test_the_published_fits_come_back(name, operation, ranks, whole, microseconds):
    travels = {"all_reduce": 2 * whole * (ranks - 1) / ranks, "send_recv": whole}.get(operation, whole * (ranks - 1) / ranks)
    assert links(name).seconds(operation, range(ranks), travels) == pytest.approx(microseconds / 1e6, rel=1e-4)


@given(
    st.sampled_from(["h100", "b200", "a100", "ascend-910b"]),
    st.sampled_from(OPERATIONS),
    st.sampled_from([2, 3, 5, 8, 12, 16, 64]),
    st.integers(0, 1 << 32),
    st.integers(0, 1 << 32),
    st.sampled_from(["fast", "expected", "slow"]),
)
def test_more_bytes_never_take_less_time(name, operation, ranks, less, more, end):
    priced = links(name).at(end)
    assert priced.seconds(operation, range(ranks), less) <= priced.seconds(operation, range(ranks), less + more)


@given(st.sampled_from(OPERATIONS), st.integers(2, 64), st.integers(0, 1 << 32))
def test_the_band_is_around_what_is_expected(operation, ranks, travels):
    fast, slow = links().band(operation, range(ranks), travels)
    assert fast <= links().seconds(operation, range(ranks), travels) <= slow


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rank_alone_communicates_for_nothing(operation):
    assert links().seconds(operation, [3], 1 << 30) == 0


def test_between_two_measured_numbers_of_ranks_lies_the_middle():
    whole = 64 << 20
    four, six, eight = (links().seconds("all_gather", range(n), whole * (n - 1) / n) for n in (4, 6, 8))
    assert min(four, eight) <= six <= max(four, eight)


def test_beyond_what_was_measured_each_rank_is_a_step_more():
    big = links(per_node=64)
    eight, twelve = (big.seconds("all_gather", range(n), 64e6 * (n - 1) / n) for n in (8, 12))
    assert twelve - eight == pytest.approx(4 * 3.4e-6 + 64e6 * (11 / 12 - 7 / 8) / 322.5e9, rel=0.01)
    assert big.outside("all_gather", range(12), 64e6) == "all_gather of 12 ranks is beyond the 8 that were measured"
    assert big.outside("all_gather", range(8), 64e6) is None
    assert big.outside("send_recv", range(12), 64e6) is None
    assert "beyond the 536,870,912" in str(big.outside("send_recv", range(2), 1e9))


def test_a_step_of_a_ring_that_leaves_a_node_goes_through_one_card():
    message = 100e6
    assert links().seconds("send_recv", [7, 8], message) == pytest.approx(20e-6 + message / CARD)
    assert links().seconds("send_recv", range(16), message) == links().seconds("send_recv", [7, 8], message)
    assert links().seconds("send_recv", [6, 7], message) < links().seconds("send_recv", [7, 8], message) / 5


def test_a_gather_over_nodes_shares_the_cards_of_a_node():
    whole = 4e9
    travels = whole * 15 / 16
    one_each = links().seconds("all_gather", [0, 8], whole / 2)
    assert one_each == pytest.approx(20e-6 + whole / 2 / CARD)
    slow_card = links().with_link("50G")
    assert slow_card.seconds("all_gather", range(16), travels) == pytest.approx(whole / 2 / (8 * 6.25e9 * 0.7), rel=0.01)


def test_an_all_to_all_is_bound_by_the_card_of_each_device():
    travels = 100e6
    to_other_nodes = travels * 8 / 15
    assert links().seconds("all_to_all", range(16), travels) == pytest.approx(20e-6 + to_other_nodes / CARD, rel=0.01)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nodes_are_never_faster_than_one_node(operation):
    for travels in (1e3, 1e6, 1e9):
        assert links(per_node=16).seconds(operation, ONE_NODE, travels) <= links(per_node=4).seconds(operation, ONE_NODE, travels)


def test_a_broadcast_costs_what_a_gather_of_its_bytes_does():
    assert links().seconds("broadcast", ONE_NODE, 1e6) == links().seconds("all_gather", ONE_NODE, 1e6)


@pytest.mark.parametrize(("text", "line"), [("400G", 50e9), ("200Gb/s", 25e9), ("50GB/s", 50e9), ("800Gbps", 100e9), ("12.5G", 1.5625e9)])
def test_a_card_reaches_a_part_of_the_line_rate_that_is_a_band(text, line):
    named = links("a100").with_link(text)
    assert named.seconds("send_recv", [0, 8], 1e9) == pytest.approx(20e-6 + 1e9 / (0.7 * line))
    assert named.band("send_recv", [0, 8], 1e9) == pytest.approx((20e-6 + 1e9 / (0.94 * line), 20e-6 + 1e9 / (0.52 * line)))


def test_nvlink_between_nodes_makes_one_node_of_all():
    named = links().with_link("nvlink")
    assert named.seconds("all_gather", range(0, 16, 8), 1e8) == links().seconds("all_gather", [0, 1], 1e8)


def test_pcie_is_known_between_two_devices_only():
    named = links().with_link("pcie4")
    assert named.seconds("all_gather", [0, 1], 1e9) == pytest.approx(1e9 / 19.9e9, rel=0.01)
    assert named.seconds("send_recv", [0, 8], 1e8) == links().seconds("send_recv", [0, 8], 1e8)
    with pytest.raises(CpbenchError, match="PCIe 4 x16 between 4 devices depends on the board") as caught:
        named.seconds("all_gather", range(4), 1e9)
    assert "cpbench calibrate" in caught.value.hint


@pytest.mark.parametrize("text", ["", "fast", "0G", "400", "400g/s", "-5G", "NVLINK", "1e9G", "9" * 90 + "G"])
def test_another_text_is_no_link(text):
    with pytest.raises(CpbenchError, match="is not a link") as caught:
        links().with_link(text)
    assert caught.value.exit_code == USAGE
    assert "400G" in caught.value.hint


def test_links_without_a_network_are_refused_between_nodes():
    alone = replace(links(), costs=links().costs.model_copy(update={"between": None}))
    with pytest.raises(CpbenchError, match="nothing is known between nodes") as caught:
        alone.seconds("all_gather", range(16), 1e6)
    assert "--link" in caught.value.hint
    assert alone.with_link("400G").seconds("send_recv", [0, 8], 1e9) == links().seconds("send_recv", [0, 8], 1e9)


def test_contention_is_none_at_the_fast_end_and_twice_as_much_at_the_slow_one():
    assert [links().at(end).kappa(ONE_NODE) for end in ("fast", "expected", "slow")] == pytest.approx([0, 0.15, 1 - 1 / (1 + 2 * 0.15 / 0.85)])
    assert links().kappa(range(16)) == 0.02
    assert links().drag(ONE_NODE) == 0
