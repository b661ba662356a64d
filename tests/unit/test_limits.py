"""What profiled devices and their links could do at most."""

from __future__ import annotations

import pytest

from cpbench.errors import CpbenchError
from cpbench.projection.light import Limits
from cpbench.projection.limits import limits_of
from cpbench.projection.links import Links, Topology
from cpbench.projection.profile import load_profile, profile_names


def links(name: str, gpus_per_node: int = 8) -> Links:
    return Links(load_profile(name).links, Topology(64, gpus_per_node))


def test_those_of_an_h200_are_of_its_data_sheet_and_of_a_400_gigabit_card() -> None:
    found = limits_of(load_profile("h200"), links("h200"), "bfloat16")
    assert found == Limits(989.4e12, 1978.9e12, 4.8e12, 450e9, pytest.approx(50e9), 8)


@pytest.mark.parametrize("name", [name for name in profile_names() if load_profile(name).backend != "gloo"])  # its links are measured ones
def test_every_profile_has_limits_above_what_its_links_reach(name: str) -> None:
    device, mine = load_profile(name), links(name)
    found = limits_of(device, mine, "bfloat16")
    assert found.link is not None and found.network is not None and found.memory is not None
    for operation in ("all_gather", "reduce_scatter", "all_to_all", "send_recv"):
        assert max(lines.large_bytes_per_s for lines in mine.costs.inside.of(operation).by_ranks.values()) <= found.link
    assert device.moved_rate.at(1e9) <= found.memory
    between = mine.costs.between
    assert between is not None and (between.rate.high or 0) <= found.network


def test_other_links_have_other_limits() -> None:
    device = load_profile("h100")
    slow, flat, wired = (limits_of(device, links("h100").with_link(text), "bfloat16") for text in ("200G", "nvlink", "pcie5"))
    assert slow.network == pytest.approx(25e9)
    assert flat.gpus_per_node == 64
    assert wired.link == 63e9


def test_measured_links_limit_nothing() -> None:
    device = load_profile("h100")
    between = device.links.between
    assert between is not None
    known = device.links.model_copy(
        update={"title": "gloo", "between": between.model_copy(update={"rate": between.rate.model_copy(update={"kind": "measured"})})}
    )
    found = limits_of(device, Links(known, Topology(2, 2)), "bfloat16")
    assert (found.link, found.network) == (None, None)


def test_a_dtype_that_a_profile_lacks_is_refused() -> None:
    with pytest.raises(CpbenchError, match="float64"):
        limits_of(load_profile("a100"), links("a100"), "float64")
