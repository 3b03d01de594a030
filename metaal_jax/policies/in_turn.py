"""One policy trained on several kinds of problems."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.base import Metrics, PyTree, require
from metaal_jax.policies.episodes import PolicyTrainer, TrainState, repeated


def in_turn(trainers: Sequence[PolicyTrainer]) -> PolicyTrainer:
    """Trains one policy on several kinds of problems: with each trainer's learner, numbers of classes, rows and labels.

    A step is one step of every trainer, in this order. They hand on the policy's parameters and the optimiser's state;
    the learners' meta-parameters and what trainers remember stay their own. A policy that asks for several batch sizes
    is given to each trainer with its own `k`.

    Args:
      trainers: of policies with the same parameters, and with the same optimizer.

    Returns:
      A `PolicyTrainer` whose `meta` and `data` are tuples, one entry for each trainer. Metrics have the trainer's
      number behind their names, `area_0`.

    Raises:
      ValueError: without trainers, for one that trains the learner as well, or, in `init`, for policies of different
        parameters.
    """
    trainers = tuple(trainers)
    require(trainers, "in_turn: no trainers given")
    require(not any(trainer.joint for trainer in trainers), "in_turn: a trainer trains its learner as well, which the "
            "others do not know; give trainers of the policy alone")  # fmt: skip

    def init(key: Array, meta: PyTree, data: PyTree) -> TrainState:
        states = [trainer.init(key, *own) for trainer, *own in zip(trainers, meta, data, strict=True)]
        shapes = [jax.tree.map(jnp.shape, (state.params, state.opt_state)) for state in states]
        for number, shape in enumerate(shapes):
            require(shape == shapes[0], f"in_turn: trainer {number} trains other parameters than trainer 0")
        memory = tuple(state.memory for state in states)
        return states[0]._replace(meta=tuple(meta), memory=memory)

    def step(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        memories: list[PyTree] = []
        metrics: Metrics = {}
        now = state
        for number, trainer in enumerate(trainers):
            own = now._replace(meta=state.meta[number], memory=state.memory[number], step=state.step)
            now, found = trainer.step(jax.random.fold_in(key, number), own, data[number])
            memories.append(now.memory)
            metrics |= {f"{name}_{number}": value for name, value in found.items()}
        return state._replace(params=now.params, opt_state=now.opt_state, memory=tuple(memories),
                              step=state.step + 1), metrics  # fmt: skip

    return PolicyTrainer(init=init, step=step, run=repeated(step))
