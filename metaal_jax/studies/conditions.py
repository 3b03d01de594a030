"""The conditions under which strategies are compared on one target, and their problems, embedded once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax import tasks
from metaal_jax.base import Problem, PyTree
from metaal_jax.studies.arms import standardised
from metaal_jax.studies.cells import Drawn, Place, seed_keys
from metaal_jax.studies.usage import UsageError, need

CONDITIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "repeated": {"duplicates": 5, "noise": 10.0},
    "wrong": {"wrong": 0.2},
    "unbalanced": {"imbalance": 10.0},
}
PLAIN = "plain"


@dataclass(frozen=True)
class Rows:
    """Rows of every problem."""

    pool: int = 3000
    """Pool rows."""
    test: int = 3000
    """Test rows."""
    held_out: int = 300
    """Rows beside the pool that the oracle chooses by."""


def check_rows(rows: Rows, data: tasks.ProblemData, target: str) -> None:
    """Raises a `UsageError` where a target has fewer rows than a problem."""
    have = data.pool.y.shape[0], data.test.y.shape[0]
    for name, wanted, there in (("pool", rows.pool + rows.held_out, have[0]), ("test", rows.test, have[1])):
        if wanted > there:
            raise UsageError(f"{wanted} rows wanted for --{name}, {target!r} has {there}")


def check_pool(rows: Rows, *, budget: int, conditions: Sequence[str] = ()) -> None:
    """Raises a `UsageError` where a pool is too small for a budget, or does not hold whole groups of repeated rows."""
    if budget > rows.pool:
        raise UsageError(f"a budget of {budget} labels is larger than the pool of {rows.pool} rows")
    if "repeated" in conditions and rows.pool % 5:
        raise UsageError(f"--pool {rows.pool} must be a multiple of 5 for the condition repeated")


def condition_problems(
    data: tasks.ProblemData,
    embed: Callable[[PyTree, Array], Array],
    networks: Mapping[str, Callable[[], PyTree]],
    places: Sequence[Place],
    *,
    rows: Rows,
    seed: int,
    seeds: int,
) -> dict[Place, Drawn]:
    """Every seed's problem in every place, embedded and standardised by its pool.

    Args:
      data: of the target.
      embed: `(network, x) -> [n, d]`.
      networks: what gives the networks' parameters, by the name of the embedding.
      places: embeddings and conditions.
      rows: of every problem.
      seed: decides the problems.
      seeds: problems in each place.
    """
    tqdm = need("tqdm", extra="experiments").tqdm
    keys = seed_keys(seed, 1, seeds)
    found = {}
    for embedding, condition in tqdm(places, desc="embedding"):
        options: dict[str, Any] = {name: value for name, value in CONDITIONS[condition].items() if name != "wrong"}
        sampler = tasks.problems(pool=rows.pool, test=rows.test, validation=rows.held_out, **options)

        @jax.jit
        def draw(network: PyTree, key: Array, data: tasks.ProblemData, sampler: Any = sampler) -> Problem:
            return standardised(lambda x: embed(network, x), sampler(key, data))[0]

        network = networks[embedding]()
        each = [draw(network, key, data) for key in keys]
        problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        found[embedding, condition] = Drawn(problems, jnp.float32(CONDITIONS[condition].get("wrong", 0.0)))
    return found
