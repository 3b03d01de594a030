"""The outer loop of meta-learning: Optax on the learners' meta-gradients, scanned on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import Learner, Metrics, PyTree, Task, require


class MetaState(NamedTuple):
    """State of the outer loop: meta-parameters, optimiser state and the number of steps taken (int32 `[]`)."""

    meta: PyTree
    opt_state: PyTree
    step: Array


class OuterLoop(NamedTuple):
    """The outer loop's functions.

    Attributes:
      init: `(key, x) -> MetaState` for inputs like `x`.
      step: `(key, state, data) -> (state, metrics)`: one step on freshly sampled tasks.
      run: `(key, state, data, *, steps) -> (state, metrics)`: `steps` (static) steps in one scan, metrics `[steps]`.
        The key of a step is `fold_in(key, state.step)`: a run in pieces, with the same key, gives the same bits.
      evaluate: `(key, meta, data, *, tasks) -> metrics` leaves `[tasks]`, of the adapted learner on fresh tasks.
    """

    init: Callable[[Array, PyTree], MetaState]
    step: Callable[[Array, MetaState, PyTree], tuple[MetaState, Metrics]]
    run: Callable[..., tuple[MetaState, Metrics]]
    evaluate: Callable[..., Metrics]


def outer_loop(
    learner: Learner,
    sampler: Callable[[Array, PyTree], Task],
    *,
    optimizer: optax.GradientTransformation,
    tasks: int,
    chunk: int | None = None,
    axis_name: Any = None,
) -> OuterLoop:
    """Meta-trains a learner on tasks drawn on the device.

    Args:
      learner: any `Learner`.
      sampler: `(key, data) -> Task`, see `metaal_jax.tasks`.
      optimizer: the outer optimiser; give it a schedule for a learning rate that falls.
      tasks: tasks per step, over all devices.
      chunk: how many of them are vmapped at a time; None for all at once (suits a GPU), 1 suits a CPU. The result is
        the same up to rounding.
      axis_name: a mapped axis (see `metaal_jax.parallel`) over which the tasks are split and gradients averaged.

    Returns:
      An `OuterLoop`.

    Raises:
      ValueError: for `tasks < 1`, or a chunk or number of devices that does not divide the tasks.

    Reference: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017.
    """
    require(tasks >= 1, f"outer_loop: tasks must be a positive integer, got {tasks}")
    require(chunk is None or chunk >= 1, f"outer_loop: chunk must be a positive integer or None, got {chunk}")

    def init(key: Array, x: PyTree) -> MetaState:
        meta = learner.init(key, x)
        return MetaState(meta=meta, opt_state=optimizer.init(meta), step=jnp.zeros((), jnp.int32))

    def step(key: Array, state: MetaState, data: PyTree) -> tuple[MetaState, Metrics]:
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        first = 0 if axis_name is None else lax.axis_index(axis_name) * (tasks // devices)
        if tasks % devices:
            raise ValueError(f"outer_loop: {tasks} tasks do not divide among {devices} devices")
        local = tasks // devices
        size = local if chunk is None else min(chunk, local)
        if local % size:
            raise ValueError(f"outer_loop: chunks of {size} do not divide the {local} tasks of a device")

        def one(number: Array) -> tuple[PyTree, Metrics]:
            task_key, learn_key = jax.random.split(jax.random.fold_in(key, number))
            return learner.meta_grad(learn_key, state.meta, sampler(task_key, data), step=state.step)

        def some(numbers: Array) -> tuple[PyTree, Metrics]:
            # A single task goes without vmap: a batched weight axis of one is slower than none.
            if size == 1:
                return one(numbers[0])
            return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(one)(numbers))

        numbers = (first + jnp.arange(local)).reshape(-1, size)
        if numbers.shape[0] == 1:
            grads, metrics = some(numbers[0])
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(some, numbers[0]))

            def add(total: PyTree, numbers: Array) -> tuple[PyTree, None]:
                return jax.tree.map(jnp.add, total, some(numbers)), None

            total, _ = lax.scan(add, zeros, numbers)
            grads, metrics = jax.tree.map(lambda leaf: leaf / numbers.shape[0], total)
        if axis_name is not None:
            grads, metrics = lax.pmean((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.meta)
        meta = optax.apply_updates(state.meta, updates)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        return MetaState(meta=meta, opt_state=opt_state, step=state.step + 1), metrics

    def run(key: Array, state: MetaState, data: PyTree, *, steps: int) -> tuple[MetaState, Metrics]:
        def body(state: MetaState, _: None) -> tuple[MetaState, Metrics]:
            return step(jax.random.fold_in(key, state.step), state, data)

        return lax.scan(body, state, length=steps)

    def evaluate(key: Array, meta: PyTree, data: PyTree, *, tasks: int) -> Metrics:
        def one(key: Array) -> Metrics:
            task_key, learn_key = jax.random.split(key)
            # The metrics of meta_grad are those after adaptation; XLA drops the gradient that nobody reads.
            return learner.meta_grad(learn_key, meta, sampler(task_key, data), step=jnp.zeros((), jnp.int32))[1]

        # As in `step`, single tasks go without vmap.
        size = tasks if chunk is None else min(chunk, tasks)
        return lax.map(one, jax.random.split(key, tasks), batch_size=None if size == 1 else size)

    return OuterLoop(init=init, step=step, run=run, evaluate=evaluate)
