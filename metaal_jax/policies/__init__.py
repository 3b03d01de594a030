"""Meta-learned acquisition: policies that learn from many tasks which rows of a new pool to have labelled.

`features` says what they see, `learned` and `selector` are policies to be trained, `bandits` choose among rules
without training; `reinforce`, `ppo`, `evolution`, `supervised` and `pathwise` are the ways to train, with one shape
(`PolicyTrainer`), `in_turn` on several kinds of problems; and `environment` is the loop as a Markov decision process,
for reinforcement-learning code of others.
"""

from metaal_jax.policies import features
from metaal_jax.policies.bandits import albl, exp4p
from metaal_jax.policies.environment import environment
from metaal_jax.policies.episodes import PolicyTrainer, TrainState
from metaal_jax.policies.evolution import evolution
from metaal_jax.policies.in_turn import in_turn
from metaal_jax.policies.learned import fixed, learned, prior
from metaal_jax.policies.pathwise import pathwise, relaxed_batch
from metaal_jax.policies.policy_gradient import ppo, reinforce
from metaal_jax.policies.saved import Saved, load, save, shipped
from metaal_jax.policies.scrambled import Scrambled
from metaal_jax.policies.selector import favoured, selector
from metaal_jax.policies.supervised import supervised

__all__ = [
    "PolicyTrainer",
    "Saved",
    "Scrambled",
    "TrainState",
    "albl",
    "environment",
    "evolution",
    "exp4p",
    "favoured",
    "features",
    "fixed",
    "in_turn",
    "learned",
    "load",
    "pathwise",
    "ppo",
    "prior",
    "reinforce",
    "relaxed_batch",
    "save",
    "selector",
    "shipped",
    "supervised",
]
