"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# A busy machine is no failure: examples may take their time, and so may making them.
settings.register_profile("cpbench", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cpbench")
