"""Query strategies: scorers by what they look at, and the lifts that make policies of them.

A scorer is a pure function `(key, view) -> [n]`, higher = query first. It may score rows that cannot be asked for;
the lifts leave those out.
"""

from metaal_jax.acquisition.disagreement import bald, consensus_entropy, mean_kl, vote_entropy
from metaal_jax.acquisition.diversity import typical
from metaal_jax.acquisition.lifts import one_of, per_row, pick_in_turn, row_noise, select_top, top_k
from metaal_jax.acquisition.pool import predict_pool, score_pool
from metaal_jax.acquisition.uncertainty import entropy, least_confident, margin, random

__all__ = [
    "bald",
    "consensus_entropy",
    "entropy",
    "least_confident",
    "margin",
    "mean_kl",
    "one_of",
    "per_row",
    "pick_in_turn",
    "predict_pool",
    "random",
    "row_noise",
    "score_pool",
    "select_top",
    "top_k",
    "typical",
    "vote_entropy",
]
