"""Meta-learned acquisition: policies that learn from many tasks which rows of a new pool to have labelled.

`features` says what they see, `learned` and `selector` are policies to be trained, `bandits` choose among rules
without training, `training` holds the ways to train, and `environment` is the loop as a Markov decision process, for
reinforcement-learning code of others.
"""

from metaal_jax.policies import features
from metaal_jax.policies.bandits import albl, exp4p
from metaal_jax.policies.environment import environment
from metaal_jax.policies.learned import learned, prior, scores_of
from metaal_jax.policies.selector import selector
from metaal_jax.policies.training import (
    PolicyTrainer,
    TrainState,
    pathwise,
    ppo,
    reinforce,
    relaxed_batch,
    supervised,
)

__all__ = [
    "PolicyTrainer",
    "TrainState",
    "albl",
    "environment",
    "exp4p",
    "features",
    "learned",
    "pathwise",
    "ppo",
    "prior",
    "reinforce",
    "relaxed_batch",
    "scores_of",
    "selector",
    "supervised",
]
