"""What all tests share: four forced host devices, keys, and the rule for tests that need real data."""

import os

# Before jax is imported: the number of host devices is read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest


def pytest_configure(config):
    """Under `pytest -n`, tests of one `xdist_group` share a worker, and so what is costly to set up."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"
    config.addinivalue_line("markers", "xdist_group(name): tests that run on the same worker")


@pytest.fixture
def key():
    """A typed key; a test splits it as often as it needs."""
    return jax.random.key(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With METAAL_REQUIRE_REAL_DATA=1 a test marked `real_data` may not be skipped."""
    report = yield
    required = os.environ.get("METAAL_REQUIRE_REAL_DATA") == "1"
    if required and report.skipped and item.get_closest_marker("real_data"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"METAAL_REQUIRE_REAL_DATA=1 forbids skipping this test. {reason}"
    return report
