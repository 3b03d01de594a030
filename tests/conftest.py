"""What all tests share: four forced host devices, keys, and the rule for tests that need real data."""

import os
import tempfile

# Before jax is imported: flags and the number of host devices are read once. Most of the tests' time is compilation,
# and their arrays are small: programs are little optimised. The scripts that `test_experiments.py` starts have jax's
# own flags.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What is traced anew is compiled once. Each worker has a folder of its own: entries are not written atomically.
COMPILED = tempfile.TemporaryDirectory(prefix="metaal-compiled-", ignore_cleanup_errors=True)
os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

import jax  # noqa: E402
import pytest  # noqa: E402

# Files whose tests share what is costly to set up.
TOGETHER = (
    "test_shapes.py", "test_experiments.py", "test_few_shot.py", "test_outer.py", "test_policy_experiments.py",
    "test_strategy_experiment.py",
)  # fmt: skip


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
