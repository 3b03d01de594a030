"""What all tests share: four forced host devices, keys, and the rule for tests that need real data."""

import os

# Before jax is imported: the number of host devices is read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest

# Files whose tests share what is costly to set up.
TOGETHER = ("test_exemplars.py", "test_experiments.py", "test_outer.py", "test_strategy_experiment.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n`, the files of `TOGETHER` stay on one worker each; all other tests go where there is room."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


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
