"""What holds for all tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and threads of several that wait for each other take all of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

# A busy machine is no failure: examples may take their time, and so may making them.
settings.register_profile("cpbench", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cpbench")
