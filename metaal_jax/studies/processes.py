"""Independent programs of small operations, one process a core: XLA leaves most of a second core idle in them.

Processes and not threads: two programs that run at a time in one process share XLA's pool of threads, and some
operations (eigenvalues among them) wait inside it for others that then find no thread.
"""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import jax

_worker: dict[str, Any] = {}


def _begin(shared: Any, cores: Any, results: Any, parent: int) -> None:
    """In each process, before JAX is used: one core, the shared data, and an end with the parent's."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker.update(shared=jax.device_put(shared), results=results)


def _call(function: Callable[..., None], task: Any) -> None:
    function(_worker["shared"], task, lambda name, value: _worker["results"].put((name, value)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What starts here is without XLA's notes, say on slow compilation, which would land in a progress bar.

    Errors are raised nonetheless. JAX itself sets the level 1; another one is the user's, and stays.
    """
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3" if level == "1" else level
    try:
        yield
    finally:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = level


@contextlib.contextmanager
def side_by_side(function: Callable[..., None], shared: Any, tasks: Iterable[Any]) -> Iterator[Callable[[Any], Any]]:
    """Runs `function(shared, task, send)` for every task; gives `wait(name)`, the value of `send(name, value)`.

    On a CPU in as many processes as there are cores, on an accelerator in this one. `function` must be importable by
    its name; names and values must be picklable. A failure in a task is raised by the next `wait`.

    Args:
      function: does a task and sends what it has as soon as it has it.
      shared: arrays that all tasks read; they cross to each process once.
      tasks: what to do, in this order.
    """
    tasks = list(tasks)
    values: dict[Any, Future[Any]] = {}
    lock = threading.Lock()

    def place(name: Any) -> Future[Any]:
        with lock:
            return values.setdefault(name, Future())

    if jax.default_backend() != "cpu" or not tasks:
        rest = iter(tasks)

        def wait_here(name: Any) -> Any:
            while not place(name).done():
                if (task := next(rest, None)) is None:
                    raise KeyError(f"no task sent {name!r}")
                function(shared, task, lambda sent, value: place(sent).set_result(value))
            return place(name).result()

        yield wait_here
        return

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = cores[: len(tasks)]
    context = multiprocessing.get_context("spawn")
    free, results = context.Queue(), context.Queue()
    for core in cores:
        free.put(core)
    failure: Future[Any] = Future()

    def collect() -> None:
        while (item := results.get()) is not None:
            place(item[0]).set_result(item[1])

    def ended(task: Future[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) and not failure.done():
            failure.set_result(error)

    def wait(name: Any) -> Any:
        mine = place(name)
        while True:
            with contextlib.suppress(TimeoutError):
                return mine.result(timeout=0.2)
            if failure.done():
                raise failure.result()

    pool = ProcessPoolExecutor(len(cores), context, _begin, (jax.device_get(shared), free, results, os.getpid()))
    threading.Thread(target=collect, daemon=True).start()
    try:
        with _quiet():  # processes start as tasks come
            for task in tasks:
                pool.submit(_call, function, task).add_done_callback(ended)
        yield wait
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        results.put(None)
