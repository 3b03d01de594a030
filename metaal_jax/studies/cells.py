"""Query strategies beside each other: cells over seeds, one compiled program for all cells of a shape.

A cell is one strategy with one batch size in one place, say a condition on an embedding. After every batch logistic
regression is fitted to the embedding; strategies that ask a committee see draws from its Laplace posterior, and all are
judged by the single regression, from a cold start.
"""

import functools
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from metaal_jax import annotators, learners
from metaal_jax.active import ActiveState
from metaal_jax.base import Learner, Problem, PyTree
from metaal_jax.loop import active_learner
from metaal_jax.metrics import Score
from metaal_jax.names import CANDIDATES, Given, Strategy, find
from metaal_jax.policies.selector import SelectorState
from metaal_jax.studies.arms import linear_loss_learner
from metaal_jax.studies.folder import Records, RunFolder, round_to
from metaal_jax.studies.options import above, at_least
from metaal_jax.studies.processes import side_by_side
from metaal_jax.studies.usage import UsageError, arguments, need

SEEDS_AT_ONCE = 8  # of a program; more would only take memory
Place = tuple[str, str]  # embedding and condition, or kind of embedding and target


@dataclass(frozen=True)
class Layer:
    """The linear layer that learns, and the posteriors that strategies see of it."""

    ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of the linear layer, a logistic regression."""
    solver_steps: int = 64
    """Steps of its solver."""
    refit_steps: int = 16
    """Steps where a strategy refits it by the thousand."""
    members: Annotated[int, at_least(2)] = 20
    """Draws from the posterior that committee strategies see."""
    joint_members: Annotated[int, at_least(2)] = 100
    """Draws for strategies that look at a sample of the pool."""
    prior_precision: Annotated[float, above(0)] = 20.0
    """Of the Laplace posterior: the reciprocal variance of each weight before any label."""


class Cell(NamedTuple):
    """One strategy with one batch size in one condition on one embedding."""

    embedding: str
    condition: str
    batch: int
    strategy: str

    def step(self) -> str:
        """The name of its step in the run folder."""
        return f"cell-{self.embedding}-{self.condition}-{self.batch:02d}-{self.strategy}"


class Program(NamedTuple):
    """What one program runs: a strategy by name, rows a round and labels in all.

    The name, because it crosses to other processes, where a strategy's functions cannot follow.
    """

    strategy: str
    k: int
    budget: int


class Work(NamedTuple):
    """A program for a number of classes, and the cells that it runs, of one shape."""

    classes: int
    program: Program
    cells: tuple[Cell, ...]


class Drawn(NamedTuple):
    """The problems of a place, leaves `[seeds, ...]`, and the share of wrong answers there, `[]`."""

    problems: Problem
    wrong: Array


def make_plan(
    chosen: Mapping[str, Strategy],
    *,
    batches: Collection[int],
    single: Collection[str],
    budget: int,
    costly_budget: int,
) -> list[Program]:
    """The programs of a comparison, checked; costly strategies first, so that no core waits at the end.

    Args:
      chosen: the strategies by name.
      batches: rows a round, from 2 on, for all of them.
      single: names of those that are also run row by row.
      budget: labels bought in all.
      costly_budget: labels bought by strategies that look at a sample of the pool, where these are fewer.

    Raises:
      UsageError: for numbers that do not go together, naming the options.
    """
    if not batches and not single:
        raise UsageError("neither --batches nor --one-by-one holds anything; give one of them")
    if min(batches, default=2) < 2 or len(set(batches)) < len(batches):
        raise UsageError(f"--batches {','.join(map(str, batches))} must be different numbers from 2 on; --one-by-one "
                         "is for 1")  # fmt: skip
    if max(batches, default=1) > min(costly_budget, budget):
        raise UsageError(f"batches of {max(batches)} are more than --costly-budget or --budget; raise them")
    found = []
    for name, strategy in chosen.items():
        own = min(costly_budget, budget) if strategy.costly else budget
        for k in (*batches, *((1,) if name in single else ())):
            if own % k:
                raise UsageError(f"batches of {k} do not divide the {own} labels of {name}; give other --batches, "
                                 "--budget or --costly-budget")  # fmt: skip
            if strategy.costly and k > CANDIDATES:
                raise UsageError(f"{name} looks at {CANDIDATES} rows a round, too few for batches of {k}")
            found.append(Program(name, k, own))
    return sorted(found, key=lambda program: not chosen[program.strategy].costly)


def place_work(programs: Iterable[Program], places: Collection[Place], classes: int) -> list[Work]:
    """Every program in every place, in the order in which they are run."""
    return [Work(classes, one, tuple(Cell(*place, one.k, one.strategy) for place in places)) for one in programs]


def check_work(work: Iterable[Work], chosen: Mapping[str, Strategy], layer: Layer) -> None:
    """Makes every run once, so that what cannot be made is a `UsageError` before anything is computed."""
    with arguments():
        for classes, (name, k, budget), _ in work:
            make_run(chosen[name], layer, classes=classes, k=k, budget=budget)


def linear_learners(classes: int, *, ridge: float, steps: int, refit_steps: int) -> tuple[Learner, Learner]:
    """Logistic regression on an embedding, and its quicker form for what refits it by the thousand."""
    return learners.linear(classes, ridge=ridge, steps=steps), learners.linear(classes, ridge=ridge, steps=refit_steps)


def make_run(
    strategy: Strategy, layer: Layer, *, classes: int, k: int, budget: int
) -> Callable[[Array, Problem, Array], tuple[Score, Array, PyTree]]:
    """`(key, problem, wrong) -> (Score [rounds], labels bought, shares [rounds, rules])`: one run, a pure function.

    The last says which rules proposed the batch of each round, if the strategy is a selector; else it is `()`.
    """
    learner, refit = linear_learners(
        classes, ridge=layer.ridge, steps=layer.solver_steps, refit_steps=layer.refit_steps
    )
    posterior = None
    if strategy.committee:
        members = layer.joint_members if strategy.costly else layer.members
        posterior = learners.laplace(learner, members=members, prior_precision=layer.prior_precision)
    given = Given(
        k=k, rounds=budget // k, classes=classes, learner=learner, refit=refit,
        loss_learner=linear_loss_learner(classes),
    )  # fmt: skip
    policy = strategy.build(given, posterior)

    def shares(state: ActiveState) -> PyTree:
        own = state.policy_state
        return own.last if isinstance(own, SelectorState) else ()

    def run(key: Array, problem: Problem, wrong: Array) -> tuple[Score, Array, PyTree]:
        init_key, begin_key, loop_key = jax.random.split(key, 3)
        who = annotators.noisy(annotators.truth(), rate=wrong, classes=classes)
        active = active_learner(learner, policy, capacity=budget, annotator=who, record=shares)
        meta = learner.init(init_key, problem.x)
        params = strategy.params(problem)
        state = active.init(begin_key, meta, params, problem)
        state, trace = active.run(loop_key, meta, params, problem, rounds=budget // k, state=state)
        assert problem.y is not None  # a study's problems have the labels that are asked for
        return trace.test, problem.y[jnp.maximum(state.labelled_index, 0)], trace.record

    return run


def seed_keys(seed: int, number: int, seeds: int) -> Array:
    """Keys `[seeds]` for one of the things that a study draws."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), number), seeds)


def run_program(places: Mapping[Place, Drawn], task: tuple[Layer, int, Work], send: Callable[[Any, Any], None]) -> None:
    """Compiles one program, runs it in all wanted places and sends the records of each.

    The task is the layer, the seed and the work. The strategy is looked up again, in the process that runs it.
    """
    layer, seed, (classes, (name, k, budget), wanted) = task
    one = make_run(find(name), layer, classes=classes, k=k, budget=budget)

    @jax.jit
    def run(keys: Array, problems: Problem, wrong: Array) -> tuple[Score, Array, PyTree]:
        if len(keys) <= SEEDS_AT_ONCE:
            return jax.vmap(one, in_axes=(0, 0, None))(keys, problems, wrong)
        each = lambda inputs: one(inputs[0], inputs[1], wrong)  # noqa: E731
        found: tuple[Score, Array, PyTree] = jax.lax.map(each, (keys, problems), batch_size=SEEDS_AT_ONCE)
        return found

    compiled = None
    for cell in wanted:
        problems, wrong = places[cell[:2]]
        inputs = (seed_keys(seed, 2, len(problems.weight)), problems, wrong)
        compiled = run.lower(*inputs).compile() if compiled is None else compiled
        begin = time.perf_counter()
        found = jax.device_get(compiled(*inputs))
        send(cell, (_records(cell, *found, k=k, classes=classes), time.perf_counter() - begin))


def _records(cell: Cell, test: Score, y: NDArray[Any], shares: Any, *, k: int, classes: int) -> Records:
    records = []
    for seed in range(y.shape[0]):
        share = np.bincount(y[seed], minlength=classes) / y.shape[1]
        balance = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(classes)
        curves: dict[str, Any] = {
            name: [round_to(v) for v in getattr(test, name)[seed]] for name in ("accuracy", "brier", "ece")
        }
        labels = [k * (i + 1) for i in range(test.accuracy.shape[1])]
        if len(shares):
            curves["shares"] = [[round_to(v) for v in row] for row in shares[seed]]
        records.append({**cell._asdict(), "seed": seed, "labels": labels, **curves, "balance": round_to(balance)})
    return records


def run_cells(
    work: Collection[Work], places: Mapping[Place, Drawn], folder: RunFolder, *, layer: Layer, seed: int
) -> dict[Cell, Records]:
    """All cells, a step of the run folder each; as many programs at a time as there are cores to run them.

    Args:
      work: what is to be run.
      places: the problems by the cells' `(embedding, condition)`.
      folder: the run.
      layer: what learns.
      seed: decides the keys of the runs.
    """
    tqdm = need("tqdm", extra="experiments").tqdm
    left = [one._replace(cells=tuple(c for c in one.cells if not folder.done(c.step()))) for one in work]
    found: dict[Cell, Records] = {}
    with side_by_side(run_program, dict(places), [(layer, seed, one) for one in left if one.cells]) as wait:
        bar = tqdm([cell for one in work for cell in one.cells], desc="cells")
        for cell in bar:
            bar.set_postfix_str(" ".join(str(part) for part in cell))
            found[cell] = folder.step(cell.step(), functools.partial(_received, cell, wait, folder))
    return found


def _received(cell: Cell, wait: Callable[[Any], Any], folder: RunFolder) -> Records:
    records: Records
    records, seconds = wait(cell)
    with open(folder.path / "cell_times.jsonl", "a") as file:
        file.write(json.dumps({**cell._asdict(), "seconds": round(seconds, 3)}) + "\n")
    return records
