"""The seven numbers of a comparison, on samples made by hand."""

import math

import pytest
import torch

from cpbench.agreement import agreement
from cpbench.errors import NOTHING_COMPARABLE, CpbenchError
from cpbench.report.agreement import block

ONE = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5, -4.0])]


def test_equal_samples():
    found = agreement(ONE, [sample.clone() for sample in ONE])
    assert (found.identical, found.checked, found.different) == (True, 5, 0)
    assert (found.max_delta, found.avg_delta, found.diff_mean, found.diff_max) == (0, 0, 0, 0)


def test_deltas_are_over_the_samples_that_differ_and_diffs_over_all():
    found = agreement(ONE, [ONE[0], torch.tensor([-0.75, -4.0])])
    assert (found.identical, found.checked, found.different) == (False, 5, 1)
    assert (found.max_delta, found.avg_delta) == (0.25, 0.125)
    assert (found.diff_mean, found.diff_max) == (-0.05, 0.25)


def test_signs_cancel_in_the_mean_alone():
    found = agreement(ONE, [torch.tensor([-1.5, -1.5, -3.0]), ONE[1]])
    assert (found.different, found.avg_delta, found.diff_mean, found.diff_max) == (2, 1 / 3, 0, 0.5)


def test_one_ulp_is_a_difference():
    other = torch.nextafter(ONE[1], torch.zeros(2))
    found = agreement(ONE, [ONE[0], other])
    assert (found.identical, found.different) == (False, 2)
    assert found.max_delta == float(other[1].double() - ONE[1][1].double()) == 2.0**-22


def test_nan_is_different_even_from_itself():
    sample = torch.tensor([math.nan, -1.0])
    found = agreement([sample], [sample])
    assert (found.identical, found.different) == (False, 1)
    assert all(math.isnan(value) for value in (found.max_delta, found.avg_delta, found.diff_mean, found.diff_max))


def test_equal_infinities_have_no_difference():
    sample = torch.tensor([-math.inf, -1.0])
    assert agreement([sample], [sample]) == agreement([torch.zeros(2)], [torch.zeros(2)])
    assert agreement([sample], [torch.tensor([-9.0, -1.0])]).diff_max == math.inf


@pytest.mark.parametrize("other", [[ONE[0]], [ONE[0], ONE[1][:1]], [ONE[1], ONE[0]]])
def test_other_lengths_are_refused(other):
    with pytest.raises(CpbenchError, match=r"Samples of 3\+2 and .* tokens cannot be compared") as raised:
        agreement(ONE, other)
    assert raised.value.exit_code == NOTHING_COMPARABLE


def test_no_tokens_are_refused():
    with pytest.raises(CpbenchError, match="There are no log-probabilities"):
        agreement([torch.empty(0)], [torch.empty(0)])


def test_block():
    lines = list(block(agreement(ONE, [ONE[0], torch.tensor([-0.75, -4.0])])))
    assert lines == [
        "=" * 60,
        "LOGPROB COMPARISON RESULTS",
        "=" * 60,
        "Bitwise identical : False",
        "Tokens checked    : 5",
        "Tokens different  : 1",
        "Max delta         : 2.500000e-01",
        "Avg delta         : 1.250000e-01",
        "Diff mean         : -5.000000e-02",
        "Diff max          : 2.500000e-01",
        "=" * 60,
    ]
