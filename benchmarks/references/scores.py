"""Scorers in plain NumPy, float32 and vectorised over the pool: `(pool) -> scores [n]`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata


class Pool(NamedTuple):
    """What the rules look at.

    Attributes:
      logits: `[m, n, c]`.
      embedding: `[n, d]`.
      available: bool `[n]`.
      labelled: positions `[l]`; `y` their classes.
      k: how many rows to pick.
    """

    logits: np.ndarray
    embedding: np.ndarray
    available: np.ndarray
    labelled: np.ndarray
    y: np.ndarray
    k: int


def softmax(logits: np.ndarray) -> np.ndarray:
    each = np.exp(logits - logits.max(-1, keepdims=True))
    return each / each.sum(-1, keepdims=True)


def mean_probs(pool: Pool) -> np.ndarray:
    return softmax(pool.logits).mean(0)


def entropy_of(probs: np.ndarray) -> np.ndarray:
    return -(probs * np.log(np.maximum(probs, 1e-38))).sum(-1)


def top(pool: Pool, scores: np.ndarray) -> np.ndarray:
    """The `k` best available rows, in any order."""
    return np.argpartition(np.where(pool.available, -scores, np.inf), pool.k)[: pool.k]


def two_largest(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    part = np.partition(probs, -2, axis=-1)
    return part[:, -1], part[:, -2]


def margin(pool: Pool) -> np.ndarray:
    first, second = two_largest(mean_probs(pool))
    return second - first


def ratio(pool: Pool) -> np.ndarray:
    first, second = two_largest(mean_probs(pool))
    return second / first


def entropy(pool: Pool) -> np.ndarray:
    return entropy_of(mean_probs(pool))


def votes(pool: Pool) -> np.ndarray:
    return np.eye(pool.logits.shape[-1], dtype=np.float32)[pool.logits.argmax(-1)].mean(0)


def bald(pool: Pool) -> np.ndarray:
    probs = softmax(pool.logits)
    return entropy_of(probs.mean(0)) - entropy_of(probs).mean(0)


def mean_kl(pool: Pool) -> np.ndarray:
    probs = softmax(pool.logits)
    log_ratio = np.log(np.maximum(probs, 1e-38)) - np.log(np.maximum(probs.mean(0), 1e-38))
    return (probs * log_ratio).sum(-1).mean(0)


def length(pool: Pool) -> np.ndarray:
    return np.sqrt((pool.embedding**2).sum(-1) + 1)


def head_gradient_length(pool: Pool) -> np.ndarray:
    probs = mean_probs(pool)
    square = 1 - 2 * probs + (probs**2).sum(-1, keepdims=True)
    return (probs * np.sqrt(np.maximum(square, 0))).sum(-1) * length(pool)


def model_change(pool: Pool) -> np.ndarray:
    probs = softmax(pool.logits)
    return np.sqrt(((probs - probs.mean(0)) ** 2).sum(-1)).mean(0) * length(pool)


def unit_rows(embedding: np.ndarray) -> np.ndarray:
    return embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)


def density(pool: Pool) -> np.ndarray:
    rows = unit_rows(pool.embedding)
    return rows @ rows.mean(0)


def ranks(pool: Pool, scores: np.ndarray) -> np.ndarray:
    found = np.full(len(scores), np.inf)
    found[pool.available] = rankdata(-scores[pool.available])
    return found


def epig(pool: Pool) -> np.ndarray:
    """Expected predictive information gain with all available rows of the pool as targets."""
    probs = softmax(pool.logits)
    members, n = probs.shape[:2]
    flat = probs[:, pool.available].reshape(members, -1)
    joint = np.concatenate([
        entropy_of((part.reshape(members, -1).T @ flat / members).reshape(part.shape[1], -1))
        for part in np.array_split(probs, n // 100 + 1, axis=1)
    ])  # fmt: skip
    alone = entropy_of(probs.mean(0))
    return alone + alone[pool.available].mean() - joint / pool.available.sum()


SCORES: dict[str, Callable[[Pool], np.ndarray]] = {
    "least_confident": lambda pool: -np.log(mean_probs(pool).max(-1)),
    "margin": margin,
    "entropy": entropy,
    "ratio": ratio,
    "tempered_entropy": lambda pool: entropy(pool._replace(logits=pool.logits / 3)),
    "vote_entropy": lambda pool: entropy_of(votes(pool)),
    "consensus_entropy": entropy,
    "mean_kl": mean_kl,
    "variation_ratio": lambda pool: 1 - votes(pool).max(-1),
    "mean_std": lambda pool: softmax(pool.logits).std(0).mean(-1),
    "bald": bald,
    "head_gradient_length": head_gradient_length,
    "model_change": model_change,
    "density": density,
    "density_entropy": lambda pool: entropy(pool) * np.maximum(density(pool), 0),
    "rank_sum": lambda pool: -(ranks(pool, margin(pool)) + ranks(pool, density(pool))),
    "rank_product": lambda pool: -(np.log(ranks(pool, margin(pool))) + np.log(ranks(pool, density(pool)))),
}
