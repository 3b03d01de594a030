"""The labelled buffer of a run: an append-only list of answers of a fixed capacity, and what corrects it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.active import ActiveState
from metaal_jax.base import Answer, Batch, Decision, Problem, pad_batch, require, take
from metaal_jax.rows import finite_rows


class Told(NamedTuple):
    """An `Answer` with nothing left open: weight 0 where nothing was asked, told or can be right."""

    y: Array
    weight: Array
    later: Array
    cost: Array
    annotator: Array


def marked(index: Array, n: int) -> Array:
    """Bool `[n]`, which rows `index` holds; entries of -1 are none."""
    return jnp.zeros(n, bool).at[jnp.where(index >= 0, index, n)].set(True, mode="drop")


def asked_of(decision: Decision) -> Array:
    """Who is asked, int32 `[k]`."""
    return jnp.zeros_like(decision.index) if decision.annotator is None else decision.annotator


def held(state: ActiveState, index: Array, person: Array) -> Array:
    """Where the buffer holds an answer of this annotator to each row, int32 `[k]`, -1 for nowhere."""
    same = (state.labelled_index[None] == index[:, None]) & (state.labelled_annotator[None] == person[:, None])
    return jnp.where(same.any(1), same.argmax(1), -1).astype(jnp.int32)


def completed(answer: Answer, problem: Problem, decision: Decision) -> Told:
    """Fills in what an answer leaves open; answers for rows that hold NaN, or that are NaN, count as missing."""
    sound = finite_rows((take(problem.x, decision.index), answer.y))
    later = jnp.zeros(sound.shape, bool) if answer.later is None else answer.later.astype(bool)
    weight = jnp.ones(sound.shape) if answer.weight is None else answer.weight
    weight = (decision.valid & sound & ~later & (weight > 0)).astype(jnp.float32)
    cost = jnp.where(weight > 0, problem.cost[decision.index], 0.0)
    if answer.cost is not None:
        cost = jnp.where(decision.valid & ~later, answer.cost, 0.0).astype(jnp.float32)
    person = asked_of(decision) if answer.annotator is None else answer.annotator.astype(jnp.int32)
    return Told(y=answer.y, weight=weight, later=later, cost=cost, annotator=person)


def take_in(state: ActiveState, problem: Problem, decision: Decision, answer: Told, again: bool) -> ActiveState:
    """Appends the answers to the buffer, or puts them in the place of the same annotators' earlier ones.

    Raises:
      ValueError: outside compiled programs, for more answers than the buffer holds; inside, those beyond are lost.
    """
    n, room = state.queried.shape[0], state.labelled_index.shape[0]
    before = held(state, decision.index, answer.annotator)
    answered, new = answer.weight > 0, (answer.weight > 0) & (before < 0)
    place = jnp.where(before >= 0, before, state.count + jnp.cumsum(new) - 1)
    full = f"tell: the buffer holds {room} answers and more came in; enlarge it with loop.grow, or raise capacity"
    require(state.count + new.sum() <= room, full)
    answered &= place < room
    place = jnp.where(answered, place, room)
    # A correction is not paid for; a second question to the same annotator is.
    charged = jnp.where((before >= 0) & (not again), 0.0, jnp.where(answered | (answer.weight == 0), answer.cost, 0.0))
    labelled = Batch(
        x=jax.tree.map(lambda buffer, rows: buffer.at[place].set(rows, mode="drop"), state.labelled.x,
                       take(problem.x, decision.index)),
        y=state.labelled.y.at[place].set(answer.y, mode="drop"),
        weight=state.labelled.weight.at[place].set(1.0, mode="drop"),
    )  # fmt: skip
    done = decision.valid & ~answer.later
    return state._replace(
        labelled=labelled,
        labelled_index=state.labelled_index.at[place].set(decision.index, mode="drop"),
        labelled_annotator=state.labelled_annotator.at[place].set(answer.annotator, mode="drop"),
        labelled_cost=state.labelled_cost.at[jnp.where(before < 0, place, room)].set(answer.cost, mode="drop"),
        count=state.count + (answered & (before < 0)).sum(dtype=jnp.int32),
        queried=state.queried.at[jnp.where(done, decision.index, n)].set(True, mode="drop"),
        spent=state.spent + charged.sum(),
    )


def taken_back(state: ActiveState, index: Array) -> ActiveState:
    """The state without the answers to rows `index`; later answers move up, and what is left free is zero."""
    n, room = state.queried.shape[0], state.labelled_index.shape[0]
    gone = marked(index, n)
    kept = (state.labelled_index >= 0) & ~gone[jnp.maximum(state.labelled_index, 0)]
    order = jnp.argsort(~kept, stable=True)
    count = kept.sum(dtype=jnp.int32)
    free = jnp.arange(room) >= count

    def closed(leaf: Array, empty: int = 0) -> Array:
        moved = leaf[order]
        return jnp.where(free.reshape((-1,) + (1,) * (leaf.ndim - 1)), jnp.asarray(empty, leaf.dtype), moved)

    removed = (state.labelled_index >= 0) & ~kept
    return state._replace(
        labelled=jax.tree.map(closed, state.labelled),
        labelled_index=closed(state.labelled_index, -1),
        labelled_annotator=closed(state.labelled_annotator),
        labelled_cost=closed(state.labelled_cost),
        count=count,
        queried=state.queried & ~gone,
        spent=state.spent - jnp.where(removed, state.labelled_cost, 0.0).sum(),
    )


def grow(state: ActiveState, capacity: int) -> ActiveState:
    """The same state with room for `capacity` answers, for an `active_learner` of that capacity.

    Raises:
      ValueError: for a capacity below the present one.
    """
    labelled = pad_batch(state.labelled, capacity)
    extra = (0, capacity - state.labelled_index.shape[0])
    return state._replace(
        labelled=labelled,
        labelled_index=jnp.pad(state.labelled_index, extra, constant_values=-1),
        labelled_annotator=jnp.pad(state.labelled_annotator, extra),
        labelled_cost=jnp.pad(state.labelled_cost, extra),
    )
