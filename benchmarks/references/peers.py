"""The query strategies of scikit-activeml, baal and batchbald_redux: `(pool) -> (scores [n] or None, picks [k])`."""

import contextlib
import gc
import io
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from baal.active.heuristics import heuristics
from batchbald_redux.batchbald import get_batchbald_batch
from skactiveml import pool as activeml
from skactiveml.base import SkactivemlClassifier
from skactiveml.classifier import SklearnClassifier
from sklearn.linear_model import LogisticRegression

import harness
from references.rules import standardised
from references.scores import Pool, mean_probs, softmax, top, unit_rows

Found = tuple[np.ndarray | None, np.ndarray]


class Told(SkactivemlClassifier):
    """A fitted classifier: it knows the probabilities of the unlabelled rows."""

    def __init__(self, probs: np.ndarray | None = None):
        super().__init__()
        self.probs = probs

    def fit(self, X, y, sample_weight=None):  # noqa: D102
        return self

    def predict_proba(self, X):  # noqa: D102
        return self.probs


def _uncertainty(method: str, as_ours: Callable[[np.ndarray], np.ndarray] = lambda s: s) -> Callable[[Pool], Found]:
    def call(pool: Pool) -> Found:
        scores = as_ours(activeml.uncertainty_scores(mean_probs(pool), method=method))
        return scores, top(pool, scores)

    return call


def _scored(score: Callable[[Pool], np.ndarray]) -> Callable[[Pool], Found]:
    def call(pool: Pool) -> Found:
        scores = score(pool)
        return scores, top(pool, scores)

    return call


def _query(make: Callable[[], object], embedding: Callable = lambda z: z, **more: Callable) -> Callable[[Pool], Found]:
    """A strategy's `query` with the embedding as its samples and the labels that are known."""

    def call(pool: Pool) -> Found:
        y = np.full(len(pool.embedding), np.nan)
        y[pool.labelled] = pool.y
        arguments = {name: value(pool) for name, value in more.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = make().query(embedding(pool.embedding), y, batch_size=pool.k, **arguments)
        return None, np.asarray(found)

    return call


SCIKIT, BAAL = "scikit-activeml", "baal"
PEERS: dict[tuple[str, str], Callable[[Pool], Found]] = {
    # Ours is -log p for 1 - p, and p2 - p1 for 1 - (p1 - p2).
    ("least_confident", SCIKIT): _uncertainty("least_confident", lambda s: -np.log1p(-s)),
    ("margin", SCIKIT): _uncertainty("margin_sampling", lambda s: s - 1),
    ("entropy", SCIKIT): _uncertainty("entropy"),
    ("mean_kl", SCIKIT): _scored(lambda pool: activeml.average_kl_divergence(softmax(pool.logits))),
    ("vote_entropy", SCIKIT): _scored(
        lambda pool: activeml.vote_entropy(pool.logits.argmax(-1).T, np.arange(pool.logits.shape[-1]))
    ),
    ("variation_ratio", SCIKIT): _scored(lambda pool: activeml.variation_ratios(pool.logits.argmax(-1).T)),
    ("bald", BAAL): _scored(lambda pool: heuristics.BALD().compute_score(softmax(pool.logits).transpose(1, 2, 0))),
    ("k_center", SCIKIT): _query(lambda: activeml.CoreSet(random_state=0)),
    ("badge", SCIKIT): _query(
        lambda: activeml.Badge(random_state=0),
        clf=lambda pool: Told(mean_probs(pool)[pool.available]),
        fit_clf=lambda pool: False,
    ),
    ("typiclust", SCIKIT): _query(lambda: activeml.TypiClust(random_state=0, k=20), unit_rows),
    ("discriminative, one fit", SCIKIT): _query(
        lambda: activeml.DiscriminativeAL(greedy_selection=True, random_state=0),
        standardised,
        # The ridge of ours, which has it on the intercept as well.
        discriminator=lambda pool: SklearnClassifier(
            LogisticRegression(C=1 / (0.01 * len(pool.embedding)), class_weight="balanced")
        ),
    ),
    # These hold n x n distances.
    ("prob_cover", SCIKIT): _query(lambda: activeml.ProbCover(n_classes=10, random_state=0), unit_rows),
    ("max_herding", SCIKIT): _query(lambda: activeml.MaxHerding(random_state=0)),
}
SQUARE = frozenset({"prob_cover", "max_herding"})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars; garbage is collected after every chunk there, so what lives already is set aside."""
    gc.freeze()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        gc.unfreeze()


def batch_bald(pool: Pool, configurations: int) -> Found:
    """batchbald_redux, in float32 (its fastest), from log-probabilities `[n, m, c]`."""
    left = np.flatnonzero(pool.available)
    log_probs = torch.log_softmax(torch.tensor(pool.logits[:, left]).permute(1, 0, 2), -1).contiguous()
    with quiet():
        return None, left[get_batchbald_batch(log_probs, pool.k, configurations).indices]


def set_threads(pool: Pool, configurations: int) -> None:
    """One thread or all cores, whichever runs batchbald_redux faster on 200 rows."""
    few = pool._replace(logits=pool.logits[:, :200], available=pool.available[:200])
    harness.fastest_threads(lambda: batch_bald(few, configurations)[1])
