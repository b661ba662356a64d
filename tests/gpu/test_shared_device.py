"""On one CUDA device: every strategy and tensor parallelism by several processes over gloo, against fp64. Skipped without one."""

import pytest
import torch

from tests.dist.test_shared_device import require_right

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: ranks did not share one"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_that_share_a_device_give_the_answers_of_one(ranks):
    require_right("cuda", ranks)
