"""What a learned policy sees: features of each pool row and of the situation that know no data set.

Every feature is a number whose meaning does not depend on the data set, the number of classes, the size of the pool or
the network: probabilities sorted or averaged over classes, entropies as a share of their maximum, kernel values of
embeddings of length 1, shares. Reordering rows reorders them, renaming classes leaves them alone, and all are
defined before the first label. Beside its value a network sees each row feature standardised over the rows that may
be asked for (`standardised`), so that "the most uncertain row of this pool" looks alike everywhere.

Geometry (which rows are alike, where the pool is dense) is that of the embedding when the run begins: exact for a
frozen embedding, and for one that moves with the labels the view of its meta-parameters. It is computed once a run,
linearly in the pool: similarity is measured to `anchors` random rows that stand for it.

Row features, `ROWS`:

    confidence       largest probability of the consensus
    margin           difference of the two largest probabilities
    entropy          of the consensus, divided by log c
    disagreement     of a committee (BALD), divided by log c; 0 for a single model
    change           expected gradient length of the last layer, divided by its mean over the pool
    flip             whether the predicted class is another one than a round ago
    rise             entropy less that of a round ago, divided by log c
    nearness         largest kernel value to a labelled row
    density          mean kernel value to the anchors
    typicality       mean of the `NEIGHBOURS` largest kernel values to the anchors
    coverage         mean over the anchors of how much the row raises their largest kernel value to a labelled row
    uncertain_cover  the same, each anchor weighed by 1 - margin: what the row says about what is not known yet
    around           mean of 1 - margin over the anchors, weighed by their kernel value to the row
    filled           how full the row's probable classes are: mean of s / (1 + s), with s = c * share of the labels
    dissent          how far the prediction is from the labels nearby: 1 - the chance that a label drawn by kernel
                     values to the labelled rows is a class drawn by the prediction

Situation features, `SITUATION`:

    spent            share of the budget
    labels           log(1 + labels a class) / 3
    seen             share of the classes that have a label
    balance          entropy of the labels' classes, divided by log c
    entropy, margin, disagreement     means over the pool
    covered          mean over the anchors of their largest kernel value to a labelled row
    flips            share of the pool whose predicted class changed since the last round
    surprise         share of the labelled rows that the model of the round before predicted wrong, a running mean
    classes          log(c) / 5
    batch            log(k) / 5, k the rows asked for in a round
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.coverage import squared_width
from metaal_jax.acquisition.diversity import directions, stand_ins
from metaal_jax.acquisition.influence import head_gradient_length
from metaal_jax.acquisition.uncertainty import entropy_of
from metaal_jax.base import PoolView, require, require_classes
from metaal_jax.losses import consensus, weighted_mean
from metaal_jax.rows import in_chunks, squared_distances

ROWS = ("confidence", "margin", "entropy", "disagreement", "change", "flip", "rise", "nearness", "density",
        "typicality", "coverage", "uncertain_cover", "around", "filled", "dissent")  # fmt: skip
SITUATION = ("spent", "labels", "seen", "balance", "entropy", "margin", "disagreement", "covered", "flips", "surprise",
             "classes", "batch")  # fmt: skip
NEIGHBOURS = 10
CHUNK = 1000
REMEMBERED = 0.8


class Geometry(NamedTuple):
    """Where the pool's rows lie, once a run.

    Attributes:
      embedding: float32 `[n, d]`, rows of length 1 seen from a point amid them, see `acquisition.diversity.directions`.
      kernel: float32 `[n, a]`, `exp(-|z_i - z_j|^2 / width)` to the anchors, 0 for anchors that do not exist.
      anchor: int32 `[a]`, pool rows.
      weight: float32 `[a]`, adding up to 1; 0 for anchors that do not exist.
      width: float32 `[]`, squared.
      density, typicality: float32 `[n]`.
    """

    embedding: Array
    kernel: Array
    anchor: Array
    weight: Array
    width: Array
    density: Array
    typicality: Array


class Memory(NamedTuple):
    """What is carried from round to round.

    Attributes:
      predicted: int32 `[n]`, the class predicted a round ago; -1 before the first round, or where classes tied.
      entropy: float32 `[n]`, divided by log c.
      labels: int32 `[]`, their number at that time.
      surprise: float32 `[]`, running share of labelled rows that had been predicted wrong.
    """

    predicted: Array
    entropy: Array
    labels: Array
    surprise: Array


class Observation(NamedTuple):
    """What a learned policy sees of `m` candidate rows, with all it takes to choose a batch of them.

    Attributes:
      position: int32 `[m]`, places in the pool.
      available: bool `[m]`.
      reference: float32 `[m]`, how many of the rows that may be asked for each candidate stands for when means are
        taken anew, see `picked`.
      rows: float32 `[m, len(ROWS)]`.
      mean, scale: float32 `[len(ROWS)]`, mean and standard deviation over all rows that may be asked for.
      situation: float32 `[len(SITUATION)]`.
      kernel: float32 `[m, a]`, similarity to the anchors.
      covered: float32 `[a]`, the anchors' largest similarity to a labelled row.
      interest: float32 `[a]`, 1 - margin of the anchors.
      weight: float32 `[a]`, of the anchors.
      embedding: float32 `[m, d]`, as in the geometry.
      width: float32 `[]`, of the kernel.
    """

    position: Array
    available: Array
    reference: Array
    rows: Array
    mean: Array
    scale: Array
    situation: Array
    kernel: Array
    covered: Array
    interest: Array
    weight: Array
    embedding: Array
    width: Array


def pool_geometry(key: Array, view: PoolView, *, anchors: int = 1000) -> Geometry:
    """The pool's geometry by the view's embedding; linear in the pool.

    As all functions here, it expects a clean view (`rows.clean`).

    Args:
      key: draws the anchors among the real rows; the draw belongs to rows.
      view: the pool as the run begins.
      anchors: how many, fewer where the pool has fewer rows.

    Raises:
      ValueError: for `anchors < 1`.
    """
    require(anchors >= 1, f"pool_geometry: anchors must be at least 1, got {anchors}")
    embedding = directions(view)
    anchor, found = stand_ins(key, view, anchors)
    width = squared_width(embedding[anchor], found)
    kernel = jnp.exp(-squared_distances(embedding, embedding[anchor]) / width) * found[None]
    itself = jnp.arange(embedding.shape[0])[:, None] == anchor[None]
    others = jnp.clip(found.sum() - (itself & found[None]).any(-1), 1, NEIGHBOURS)
    nearest = lax.top_k(jnp.where(itself, 0.0, kernel), min(NEIGHBOURS, anchor.shape[0]))[0].sum(-1) / others
    weight = (found / jnp.maximum(found.sum(), 1)).astype(jnp.float32)
    return Geometry(
        embedding=embedding, kernel=kernel, anchor=anchor, weight=weight, width=width, density=kernel @ weight,
        typicality=nearest,
    )  # fmt: skip


def fresh_memory(view: PoolView) -> Memory:
    """The memory before the first round; initial labels do not count as surprises."""
    require_classes("features", view)
    n, c = view.prediction.logits.shape[1:]
    return Memory(
        predicted=jnp.full(n, -1, jnp.int32),
        entropy=jnp.zeros(n),
        labels=(view.labelled.weight > 0).sum(dtype=jnp.int32),
        surprise=jnp.float32(1.0 - 1.0 / c),
    )


def remember(memory: Memory, view: PoolView) -> Memory:
    """The memory after this round."""
    log_probs = consensus(view.prediction.logits)
    return Memory(
        predicted=_predicted(log_probs),
        entropy=entropy_of(log_probs) / _log_classes(log_probs),
        labels=(view.labelled.weight > 0).sum(dtype=jnp.int32),
        surprise=_surprise(memory, view),
    )


def observe(
    geometry: Geometry, memory: Memory, view: PoolView, *, k: int, position: Array | None = None
) -> Observation:
    """The features of a view; what it costs is linear in the pool.

    Args:
      geometry: of this run.
      memory: of the rounds before.
      view: the pool.
      k: rows asked for in a round.
      position: int32 `[m]`, the candidates; None for the whole pool. Means are taken over the whole pool anyway.
    """
    log_probs = consensus(view.prediction.logits)
    probs = jnp.exp(log_probs)
    n, c = probs.shape
    log_c = _log_classes(log_probs)
    real = (view.weight > 0).astype(jnp.float32)
    confidence = probs.max(-1)
    # The second largest without a sort.
    margin = confidence - jnp.where(jnp.arange(c)[None] == probs.argmax(-1)[:, None], 0.0, probs).max(-1)
    entropy = entropy_of(log_probs) / log_c
    each = entropy_of(jax.nn.log_softmax(view.prediction.logits)).mean(0) / log_c
    disagreement = jnp.maximum(entropy - each, 0.0) if view.prediction.logits.shape[0] > 1 else jnp.zeros(n)
    change = head_gradient_length(jax.random.key(0), view)
    change = change / jnp.maximum(weighted_mean(change, real), 1e-9)
    predicted, known = _predicted(log_probs), memory.predicted >= 0
    flip = (known & (predicted >= 0) & (predicted != memory.predicted)).astype(jnp.float32)
    rise = jnp.where(known, entropy - memory.entropy, 0.0)

    labelled = view.labelled_index >= 0
    answered = (view.labelled.weight > 0) & labelled
    own = jnp.maximum(view.labelled_index, 0)
    covered = jnp.where(labelled[None], geometry.kernel[own].T, 0.0).max(-1, initial=0.0)
    interest = jnp.where(geometry.weight > 0, 1.0 - margin[geometry.anchor], 0.0)
    doubt = geometry.weight * interest
    truth = jax.nn.one_hot(view.labelled.y, c) * answered[:, None]
    count = truth.sum(0)
    share = c * count / jnp.maximum(count.sum(), 1.0)
    filled = probs @ (share / (1.0 + share))
    known = geometry.embedding[own]

    def places(part: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        embedding, kernel, probs = part
        near = jnp.exp(-squared_distances(embedding, known) / geometry.width) * labelled[None]
        # One part in a hundred for "any class", so that far from all labels nothing is said.
        nearby = (near @ truth + 0.01 / c) / (near @ answered.astype(jnp.float32) + 0.01)[:, None]
        gain = jnp.maximum(kernel - covered[None], 0.0)
        dissent = 1.0 - (probs * nearby).sum(-1)
        return near.max(-1, initial=0.0), gain @ geometry.weight, gain @ doubt, kernel @ doubt, dissent

    # Chunks whose kernels fit the cache.
    parts = in_chunks(places, (geometry.embedding, geometry.kernel, probs), CHUNK)
    nearness, coverage, uncertain_cover, around, dissent = parts
    around = around / jnp.maximum(geometry.density, 1e-9)

    rows = jnp.stack(
        [confidence, margin, entropy, disagreement, change, flip, rise, nearness, geometry.density,
         geometry.typicality, coverage, uncertain_cover, around, filled, dissent], axis=-1
    )  # fmt: skip
    available = view.available
    weight = available.astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    # Padding has no features, whatever its zeros would give.
    rows = jnp.where((view.weight > 0)[:, None], rows, 0.0)
    mean = weight @ rows / total
    scale = jnp.sqrt(weight @ (rows - mean[None]) ** 2 / total)

    shares = count / jnp.maximum(count.sum(), 1.0)
    balance = -jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), 0.0).sum() / log_c

    def average(values: Array) -> Array:
        return weighted_mean(values, real)

    situation = jnp.stack(
        [view.spent / jnp.maximum(view.budget, 1e-9), jnp.log1p(count.sum() / c) / 3.0, (count > 0).mean(), balance,
         average(entropy), average(margin), average(disagreement), covered @ geometry.weight, average(flip),
         _surprise(memory, view), jnp.float32(jnp.log(c) / 5.0), jnp.float32(jnp.log(k) / 5.0)]
    )  # fmt: skip

    def mine(leaf: Array) -> Array:
        return leaf if position is None else leaf[position]

    place = jnp.arange(n, dtype=jnp.int32) if position is None else position
    return Observation(
        position=place, available=mine(available), reference=mine(weight), rows=mine(rows), mean=mean,
        scale=scale, situation=situation, kernel=mine(geometry.kernel), covered=covered, interest=interest,
        weight=geometry.weight, embedding=mine(geometry.embedding), width=geometry.width,
    )  # fmt: skip


def inputs(observation: Observation) -> Array:
    """What a network sees of each candidate, float32 `[m, 2 * len(ROWS)]`: the features, and standardised.

    Standardised features are compressed by the inverse hyperbolic sine, which keeps their order where a row stands far
    out; one that is the same for all rows is 0.
    """
    rows, mean, scale = observation.rows, observation.mean, observation.scale
    spread = scale > 1e-5
    z = jnp.where(spread[None], (rows - mean[None]) / jnp.where(spread, scale, 1.0)[None], 0.0)
    return jnp.concatenate([rows, jnp.arcsinh(z)], axis=-1)


def picked(observation: Observation, place: Array) -> Observation:
    """The observation after candidate `place` was chosen for the same batch: it is gone, and covers what lies around.

    Nearness and the coverages are those with the row among the labelled, and so are their means and standard
    deviations, by the reference weights; all else waits for the label.
    """
    covered = jnp.maximum(observation.covered, observation.kernel[place])
    gain = jnp.maximum(observation.kernel - covered[None], 0.0)
    distance = squared_distances(observation.embedding, observation.embedding[place][None])[:, 0]
    nearness = jnp.maximum(observation.rows[:, NEARNESS], jnp.exp(-distance / observation.width))
    new = (nearness, gain @ observation.weight, gain @ (observation.weight * observation.interest))
    available = observation.available.at[place].set(False)
    reference = observation.reference.at[place].set(0.0)
    weight = reference / jnp.maximum(reference.sum(), 1.0)
    rows, mean, scale = observation.rows, observation.mean, observation.scale
    for column, values in zip((NEARNESS, COVERAGE, UNCERTAIN_COVER), new, strict=True):
        middle = weight @ values
        rows = rows.at[:, column].set(values)
        mean = mean.at[column].set(middle)
        scale = scale.at[column].set(jnp.sqrt(weight @ (values - middle) ** 2))
    return observation._replace(
        rows=rows, mean=mean, scale=scale, covered=covered, available=available, reference=reference
    )


def _predicted(log_probs: Array) -> Array:
    """The most probable class, int32 `[n]`; -1 where several are, so that none of them counts by its number."""
    ties = (log_probs == log_probs.max(-1, keepdims=True)).sum(-1) > 1
    return jnp.where(ties, -1, log_probs.argmax(-1)).astype(jnp.int32)


def _log_classes(log_probs: Array) -> Array:
    return jnp.log(jnp.maximum(log_probs.shape[-1], 2))


def wrong_share(memory: Memory, view: PoolView) -> tuple[Array, Array]:
    """Of the rows labelled since the last round: the share that was predicted wrong, and whether there are any."""
    labelled = (view.labelled.weight > 0) & (view.labelled_index >= 0)
    number = jnp.cumsum(labelled) - 1
    before = memory.predicted[jnp.maximum(view.labelled_index, 0)]
    new = labelled & (number >= memory.labels) & (before >= 0)
    return weighted_mean((before != view.labelled.y).astype(jnp.float32), new.astype(jnp.float32)), new.any()


def _surprise(memory: Memory, view: PoolView) -> Array:
    wrong, new = wrong_share(memory, view)
    return jnp.where(new, REMEMBERED * memory.surprise + (1.0 - REMEMBERED) * wrong, memory.surprise)


NEARNESS, COVERAGE, UNCERTAIN_COVER = (ROWS.index(name) for name in ("nearness", "coverage", "uncertain_cover"))
