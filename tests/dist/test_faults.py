"""Whatever happens to a sweep costs the cell that it happens to: every line of the fault matrix, once. Real processes."""

import pytest

from tests.dist.faults import FAULTS, run_fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_costs_its_cell_only(tmp_path, fault):
    outcome = run_fault(fault, tmp_path)
    assert not outcome.problems, outcome
