"""Query strategies compared on somebody's own labelled rows, in one call."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array

from metaal_jax import data as sources
from metaal_jax import learners, names, tasks
from metaal_jax.base import Policy, Problem, PyTree
from metaal_jax.door_inputs import HAS, LearnerLike, class_numbers, learner_of, parts_of, scaled, strategy_of
from metaal_jax.loop import active_learner
from metaal_jax.metrics import Score
from metaal_jax.studies.study import Study

AT_ONCE = 8  # seeds of a program; more would only take memory
CHUNK = 5000
Data = str | tuple[Any, Any] | sources.Arrays
Progress = Callable[[Iterable[str]], Iterable[str]]


def compare(
    data: Data,
    strategies: Sequence[str] | Mapping[str, Policy] = ("random", names.DEFAULT),
    *,
    learner: LearnerLike = "linear",
    budget: int = 100,
    batch_size: int = 10,
    seeds: int = 16,
    pool: int | None = None,
    test: int | None = None,
    scale: Literal["columns", "common", "none"] = "columns",
    members: int = 20,
    seed: int = 0,
    progress: Progress = list,
) -> Study:
    """Simulates active learning on labelled rows: how many labels would each strategy have needed?

    Every seed draws a pool and balanced test rows anew, and all strategies get the same: differences are paired. Each
    starts without any label. All seeds of a strategy run in one compiled program.

    >>> import metaal_jax as ml
    >>> study = ml.compare("iris", ["random", "margin"], budget=20, batch_size=5, seeds=4)
    >>> study.labels.tolist(), study.curves["linear", "margin"]["accuracy"].shape
    ([5, 10, 15, 20], (4, 4))

    Args:
      data: rows and labels `(x, y)`, labels of any hashable kind; or what `data.load` takes, such as `"digits"` or the
        path of a `.npz` file, whose splits are put together.
      strategies: names, see `suggest`; or `{name: policy}`, each made for `k=batch_size`.
      learner: see `suggest`.
      budget: labels bought in all, a multiple of `batch_size`.
      batch_size: labels bought in one round.
      seeds: runs of every strategy.
      pool: rows of the pool; by default what the test leaves, at most 2,000.
      test: test rows; by default two fifths, at most 1,000.
      scale, members: see `suggest`. Columns are scaled by all rows, which needs no labels.
      seed: decides everything that is drawn.
      progress: wraps the names as they are run, such as `tqdm.tqdm`.

    Returns:
      A `Study`, with `.table()`, `.paired()`, `.plot()`, `.save()`. Its curves are on the test rows: `accuracy`,
      `balanced_accuracy` and the other fields of `metrics.Score`.

    Raises:
      ValueError: for rows or labels that cannot be right, numbers that do not go together, and names that are unknown
        or need what is not there.
    """
    began = time.perf_counter()
    x, y, target = _rows_of(data)
    learner = learner_of("compare", learner)
    x = learner.prepare(x) if isinstance(learner, learners.Trained) else scaled("compare", x, scale)
    classes, numbered = class_numbers("compare", y, len(x))
    sizes = _sizes(len(x), pool=pool, test=test, budget=budget, batch_size=batch_size, seeds=seeds)
    chosen = list(strategies)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"compare: strategies must be different names, got {chosen}")
    held = False
    if not isinstance(strategies, Mapping):
        held = any(strategy_of("compare", name, HAS["compare"]).held_out for name in chosen)
    name_of_learner = learner if isinstance(learner, str) else getattr(learner, "name", "learner")
    sampler = tasks.composed_problems(
        ways=len(classes), parts=1, pool=sizes["pool"], test=sizes["test"], validation=min(300, sizes["test"]) * held
    )
    rows = jax.device_put(tasks.class_data(x, numbered))
    keys = jax.random.split(jax.random.key(seed), seeds)
    curves = {}
    for name in progress(chosen):
        policy = strategies[name] if isinstance(strategies, Mapping) else None
        run, meta = _experiment(name, policy, learner, len(classes), budget, batch_size, members)

        @jax.jit
        def many(keys: Array, meta: PyTree, rows: PyTree, run: Any = run) -> Score:
            def one(key: Array) -> Score:
                problem_key, run_key = jax.random.split(key)
                score: Score = run(run_key, meta, sampler(problem_key, rows))
                return score

            scores: Score = jax.lax.map(one, keys, batch_size=AT_ONCE)
            return scores

        scores = jax.device_get(many(keys, meta, rows))
        curves[name_of_learner, name] = {metric: np.asarray(v) for metric, v in scores._asdict().items()}
    config = {"strategies": chosen, "learner": name_of_learner, "budget": budget, "batch_size": batch_size,
              "seeds": seeds, "pool": sizes["pool"], "test": sizes["test"], "scale": scale, "members": members,
              "seed": seed, "rows": len(x), "classes": len(classes)}  # fmt: skip
    call = f"metaal_jax.compare({target!r}, " + ", ".join(
        f"{name}={config[name]!r}" for name in ("strategies", "learner", "budget", "batch_size", "seeds", "pool",
                                                 "test", "scale", "members", "seed")) + ")"  # fmt: skip
    about = {"target": target, "config": config, "call": call, "seconds": time.perf_counter() - began}
    return Study(np.arange(batch_size, budget + 1, batch_size), curves, {}, about)


def _experiment(
    name: str, policy: Policy | None, learner: LearnerLike, classes: int, budget: int, k: int, members: int
) -> tuple[Callable[[Array, PyTree, Problem], Score], PyTree]:
    """`(key, meta, problem) -> Score [rounds]`, a whole run, and the trained meta-parameters to give it, or None."""
    parts = parts_of(
        learner, name if policy is None else "random", k=k, classes=classes, members=members, rounds=budget // k
    )
    chooser = parts.policy if policy is None else policy
    active = active_learner(parts.learner, chooser, capacity=budget, chunk=CHUNK)

    def run(key: Array, meta: PyTree, problem: Problem) -> Score:
        meta_key, loop_key = jax.random.split(key)
        meta = parts.learner.init(meta_key, problem.x) if meta is None else meta
        params = chooser.init(meta_key) if policy is not None else names.find(name).params(problem)
        score: Score = active.run(loop_key, meta, params, problem, rounds=budget // k)[1].test
        return score

    return run, parts.meta


def _rows_of(data: Data) -> tuple[Any, Any, str]:
    if isinstance(data, str):
        parts = [sources.load(data, split) for split in ("train", "test")]
        return np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]), data
    if isinstance(data, sources.Arrays):
        return data.x, data.y, "rows"
    if isinstance(data, tuple) and len(data) == 2:
        return data[0], data[1], "rows"
    raise ValueError(f"compare: data must be (x, y), a name or a path, got a {type(data).__name__}")


def _sizes(n: int, *, pool: int | None, test: int | None, budget: int, batch_size: int, seeds: int) -> dict[str, int]:
    """Checked numbers of pool and test rows."""
    for name, value, least in (("budget", budget, 1), ("batch_size", batch_size, 1), ("seeds", seeds, 1),
                               ("pool", pool, 1), ("test", test, 1)):  # fmt: skip
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"compare: {name} must be a positive integer, got {value!r}")
    if budget % batch_size:
        raise ValueError(f"compare: budget={budget} must be a multiple of batch_size={batch_size}")
    test = min(2 * n // 5, 1000) if test is None else test
    pool = min(n - test, 2000) if pool is None else pool
    if pool + test > n:
        raise ValueError(f"compare: {pool} rows of pool and {test} of test are wanted, there are {n}")
    if budget > pool:
        raise ValueError(f"compare: a budget of {budget} labels is more than the {pool} rows of the pool; give a "
                         "smaller budget")  # fmt: skip
    return {"pool": pool, "test": test}
