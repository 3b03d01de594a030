"""What all tests share: four forced host devices, keys, and the rule for tests that need real data."""

import contextlib
import gc
import importlib
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import compiled

# Before jax is imported: flags and the number of host devices are read once. Most of the tests' time is compilation,
# and their arrays are small: programs are little optimised, and not split for more cores than a worker has. Fusions
# are emitted in the old way, which takes half the time; a flag that XLA does not know ends the process, so both are
# given to the versions that are known to have them. The scripts that tests start are compiled in the same way.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
# What is traced anew is compiled once; each worker has a folder of its own.
COMPILED = tempfile.TemporaryDirectory(prefix="metaal-compiled-", ignore_cleanup_errors=True)
os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
KEPT = compiled.kept()
with contextlib.suppress(OSError):  # nothing kept, or nothing that may be read
    compiled.borrow(Path(COMPILED.name), KEPT)

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes many objects that live long: to look for cycles among them at every turn costs a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

collect_ignore = ["campaigns"]  # by commands of their own, see the README there

# The files that take longest, longest first: begun last, one of them would be waited for.
LONGEST = (
    "test_experiments.py", "test_policy_experiments.py", "test_policies.py", "test_policy_training.py",
    "test_policy_evaluation.py", "test_meta_learners.py", "test_few_shot.py", "test_strategy_experiment.py",
    "test_policy_comparison.py", "test_loop.py", "test_strategies.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first; each file stays in one piece."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n` a file stays on one worker, which compiles what its tests share once; in the order above."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_sessionfinish():
    """What this process has compiled is kept for the next run, where the user's cache can be written."""
    with contextlib.suppress(OSError):
        compiled.give_back(Path(COMPILED.name), KEPT)


@pytest.fixture
def key():
    """A typed key; a test splits it as often as it needs."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def scripts():
    """The scripts of policies, and the main job, as modules."""
    place = str(Path(__file__).resolve().parent.parent / "experiments")
    names = ("meta_active", "learn_policy", "compare_trainings", "evaluate_policy", "many_targets")
    sys.path.insert(0, place)
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(place)


@pytest.fixture(scope="session")
def meta_run(scripts, tmp_path_factory):
    """The run folder of a tiny main job, whose network embeds."""
    from metaal_jax.studies.options import with_options

    run, script = tmp_path_factory.mktemp("main_job") / "main", scripts["meta_active"]
    script.job(with_options(
        script.Config(), source="digits", target="digits", meta_steps=4, learners="maml", strategies="random", seeds=1,
        seeds_at_once=1, budget=10, pool=50, test=50, adapt_steps=1, out=str(run),
    ))  # fmt: skip
    return str(run)


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
