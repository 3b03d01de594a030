"""The one harness of all benchmarks: check the answer against a plain reference, then time it.

Compilation is timed apart from running. Candidates that are compared run in turn (A B A B ...), so that whatever else
the machine does falls on all of them, and ratios are taken pair by pair. Figures are medians with their quartiles.
"""

import ctypes
import dataclasses
import gc
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from metaal_jax.studies.options import check_options, parse
from metaal_jax.studies.results import write_results
from metaal_jax.studies.usage import command, main

NO_TORCH = "PyTorch is not installed, so only the JAX part runs; install it with: pip install -e '.[bench]'"
C = TypeVar("C")


class Candidate(NamedTuple):
    """Something that can be timed.

    Attributes:
      call: does the work once and waits until it is done.
      work: how many units (rows, experiments) one call handles; ratios compare the time of one unit.
      compile_seconds: lowering and compilation; 0 where nothing is compiled.
    """

    call: Callable[[], Any]
    work: int
    compile_seconds: float = 0.0


class Times(NamedTuple):
    """What a candidate's calls took: seconds `[repeats]`, and the units of one call."""

    seconds: np.ndarray
    work: int
    compile_seconds: float


class Quartiles(NamedTuple):
    """Median with its quartiles."""

    median: float
    low: float
    high: float


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(*, cores_as_devices: bool = True) -> None:
    """Call first: no compilation cache, so that compile times are true; every core a device, to be used at will."""
    jax.config.update("jax_enable_compilation_cache", False)
    if cores_as_devices:
        jax.config.update("jax_num_cpu_devices", cores())
    if jax.default_backend() != "cpu":
        # Float32 products of full precision, as on a CPU and as PyTorch's default: the answers are compared.
        jax.config.update("jax_default_matmul_precision", "highest")


def compiled(function: Callable, *args: Any, work: int = 1) -> Candidate:
    """`function(*args)` as one compiled program."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - begin
    return Candidate(lambda: jax.block_until_ready(program(*args)), work, seconds)


def called(function: Callable, *args: Any, work: int = 1) -> Candidate:
    """`function(*args)` as it is: PyTorch (its result must end on the host), or what compiles itself when called."""
    return Candidate(lambda: jax.block_until_ready(function(*args)), work)


def torch_device() -> str:
    """Where PyTorch's side runs: on the GPU where JAX is on one and this PyTorch can use it."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def fastest_threads(function: Callable[[], Any]) -> int:
    """Sets PyTorch's number of threads, one or all cores, to what runs `function` faster; gives that number."""
    import torch

    taken: dict[int, float] = {}
    for threads in sorted({1, cores()}):
        torch.set_num_threads(threads)
        taken[threads] = float(compare({"": called(function)}, repeats=3)[""].seconds.min())
    best = min(taken, key=taken.__getitem__)
    torch.set_num_threads(best)
    print("PyTorch, " + ", ".join(f"{threads} thread(s): {v:.2f} s" for threads, v in taken.items()))
    return best


def measure(function: Callable, *args: Any, repeats: int, work: int = 1) -> Times:
    """Compile time and steady times of `jit(function)(*args)`, apart."""
    return compare({"": compiled(function, *args, work=work)}, repeats=repeats)[""]


def compare(candidates: dict[str, Candidate], *, repeats: int, warm: bool = False) -> dict[str, Times]:
    """Times of several candidates, run in turn, after a warm-up call each unless they are warm already."""
    if not warm:
        for candidate in candidates.values():
            candidate.call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            begin = time.perf_counter()
            candidate.call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: Times(np.asarray(seconds[name]), c.work, c.compile_seconds) for name, c in candidates.items()}


def quartiles(values: np.ndarray) -> Quartiles:
    low, median, high = np.percentile(values, [25, 50, 75])
    return Quartiles(float(median), float(low), float(high))


def per_second(times: Times) -> Quartiles:
    """Units a second."""
    return quartiles(times.work / times.seconds)


def ratio(slow: Times, fast: Times) -> Quartiles:
    """How many times longer a unit takes in `slow` than in `fast`, pair by pair of the same round."""
    return quartiles((slow.seconds / slow.work) / (fast.seconds / fast.work))


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """What a call returns, and the memory it needs on top of what is held before it (None where that cannot be told).

    From the device's own statistics where it has any (they never go down, so only a new peak tells something); on a
    CPU from the resident set, whose peak Linux lets a process reset. Memory that an allocator still holds from earlier
    calls is not seen, so figures below some tens of megabytes are lower bounds.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        result = call()
        after = jax.local_devices()[0].memory_stats()
        risen = after["peak_bytes_in_use"] > statistics["peak_bytes_in_use"]
        return result, int(after["peak_bytes_in_use"] - statistics["bytes_in_use"]) if risen else None
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {field} in /proc/self/status")
    return 1024 * int(found[1])


def rows(unit: str, times: dict[str, Times], pairs: Sequence[tuple[str, str]], peaks: dict[str, int | None]) -> list:
    """The rows of a result: seconds, units a second and compilation of every candidate, ratios, bytes."""
    found: list[dict] = []

    def add(name: str, metric: str, value: Quartiles, **more: Any) -> None:
        numbers = {k: float(f"{v:.4g}") for k, v in zip(("mean", "low", "high"), value, strict=True)}
        found.append({"name": name, "metric": metric, **numbers, **more})

    for name, t in times.items():
        more = {unit: t.work, "repeats": len(t.seconds)}
        add(name, "seconds", quartiles(t.seconds), **more)
        add(name, f"{unit}_per_second", per_second(t), **more)
        if t.compile_seconds:
            add(name, "compile_seconds", Quartiles(*[t.compile_seconds] * 3), repeats=1)
        if peaks.get(name) is not None:
            add(name, "bytes", Quartiles(*[float(peaks[name] or 0)] * 3), repeats=1)
    for slow, fast in pairs:
        if slow in times and fast in times:
            repeats = len(times[slow].seconds)
            add(fast, "ratio", ratio(times[slow], times[fast]), compared_with=slow, repeats=repeats)
    return found


def show(found: list[dict]) -> None:
    """Prints the rows of a result as a table."""
    print(f"{'':34} {'metric':24} {'median':>10}   quartiles")
    for row in found:
        against = f" (compared with {row['compared_with']})" if "compared_with" in row else ""
        spread = f"{row['low']:.4g} to {row['high']:.4g}"
        print(f"{row['name']:34} {row['metric']:24} {row['mean']:10.4g}   {spread}{against}")


def environment() -> dict:
    """Versions and device, as they stand in every result."""
    versions = {"python": platform.python_version()}
    ours = ("metaal_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")
    peers = ("scikit-learn", "scikit-activeml", "baal", "batchbald_redux")
    for name in (*ours, *peers):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    kind = f"{cores()}-core CPU" if device.platform == "cpu" else f"{device.device_kind} x {jax.device_count()}"
    return {"device": kind, "versions": versions}


def result_path(name: str) -> Path:
    """`benchmarks/results/<device>/<name>.json`, the device being like `cpu-2`."""
    device = jax.devices()[0]
    kind = f"cpu-{cores()}" if device.platform == "cpu" else f"{device.device_kind}-{jax.device_count()}"
    return Path(__file__).parent / "results" / re.sub(r"[^a-z0-9.]+", "-", kind.lower()) / f"{name}.json"


def write(path: Path, *, seconds: float, config: Any, found: list[dict]) -> None:
    """One small JSON file in the form shared by all results, one line a row."""
    settings = dataclasses.asdict(config)
    settings.pop("out", None)
    write_results(path, command=command(), environment=environment(), seconds=seconds, config=settings, rows=found,
                  paired=[])  # fmt: skip
    print(f"written: {path}")


def options(config: type[C], documentation: str | None) -> C:
    """The command line of a config dataclass, with the first line of a script's documentation."""
    found: list[C] = []

    def read() -> None:
        found.append(parse(config, (documentation or "").partition("\n")[0]))
        check_options(found[0])

    main(read)
    return found[0]


def finish(name: str, config: Any, begin: float, found: list[dict]) -> None:
    """Shows the rows; writes them to `config.out`, or to their place unless the run was a quick one."""
    show(found)
    seconds = time.perf_counter() - begin
    print(f"{environment()['device']}, {seconds:.0f} s in all")
    path = Path(config.out) if config.out else None if config.quick else result_path(name)
    if path is not None:
        write(path, seconds=seconds, config=config, found=found)
