"""Learners that also learn from the unlabelled rows of the pool: pseudo-labels and label propagation."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import xlogy

from metaal_jax.base import Batch, Learner, PyTree, is_classes, require, rows_of, take
from metaal_jax.learners.adaptation import cleared
from metaal_jax.losses import class_targets, clear_padding, consensus
from metaal_jax.rows import nearest_neighbours, place_in_group, predict_pool, row_noise

Choice = Literal["certain", "random"]
TOLERANCE = 1e-4  # relative residual of each entry, as a share of 1 - alpha, at which propagation stops
# (params, batch, unlabelled, known bool [n]) -> (what speaks for each class [n, c], certainty [n] from 0 to 1)
Guess = Callable[[PyTree, Batch, PyTree, Array], tuple[Array, Array]]


def pseudo_labels(
    learner: Learner,
    *,
    rows: int | None,
    rounds: int = 1,
    strength: float | Array = 1.0,
    threshold: float | Array = 0.0,
    choose: Choice = "certain",
    chunk: int | None = None,
) -> Learner:
    """Self-training: the learner's own predictions for the pool are the labels of its next adaptation.

    `adapt` adapts to the labelled rows, predicts the unlabelled ones, takes `rows` of them with their predicted class
    as further examples and adapts again, from the same start and with the same key. A row's confidence is its largest
    probability (of a committee, of the members' mean) among the classes that have labels; it weighs
    `strength * confidence`, against 1 of a label.

    See `label_propagation` for what both wrappers do about padding, rows that are labelled already and derivatives.

    Args:
      learner: the base learner.
      rows: how many rows get a pseudo-label, static; fewer where the pool has fewer, None for all. They are spread
        evenly over the predicted classes, as long as each has rows left.
      rounds: how often rows are predicted and adapted to.
      strength: factor on the pseudo-labelled rows' weights, at least 0; may be traced.
      threshold: rows whose confidence is not above it weigh nothing, from 0 to 1; may be traced.
      choose: within a class `"certain"` rows come first, or they come in `"random"` order.
      chunk: pool rows predicted at a time, None for all at once.

    Returns:
      A `Learner` with the base learner's `init`, `predict` and `meta_grad`.

    Raises:
      ValueError: for numbers out of range or an unknown `choose`; from `adapt` for labels that are no classes.

    Reference: Lee: Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks,
    2013; Li, Sun, Liu, Zhou, Zheng, Chua, Schiele: Learning to Self-Train for Semi-Supervised Few-Shot Classification,
    2019.
    """
    require((threshold >= 0) & (threshold <= 1), f"pseudo_labels: threshold must be from 0 to 1, got {threshold}")

    def guess(params: PyTree, batch: Batch, unlabelled: PyTree, known: Array) -> tuple[Array, Array]:
        del known
        probs = jnp.exp(consensus(predict_pool(learner, params, unlabelled, chunk=chunk).logits))
        known_classes = _mass("pseudo_labels", batch, probs.shape[-1]).sum(0) > 0
        probs = jnp.where(known_classes[None], probs, 0.0)
        return probs, probs.max(-1)

    return _with_guesses(
        "pseudo_labels", learner, guess, rows=rows, rounds=rounds, strength=strength, threshold=threshold, choose=choose
    )


def label_propagation(
    learner: Learner,
    *,
    rows: int | None,
    neighbours: int = 10,
    alpha: float | Array = 0.97,
    steps: int = 1000,
    rounds: int = 1,
    strength: float | Array = 1.0,
    choose: Choice = "random",
    chunk: int | None = None,
) -> Learner:
    """Spreads labels over the pool along a graph of nearest neighbours, then learns from them.

    `adapt` adapts to the labelled rows and embeds them and the pool. Row `i` of this graph is linked to its nearest
    `neighbours` with the weights `exp(-d_ij^2 / s_i^2)`, `s_i` the distance to the last of them, so that neither the
    scale nor the mean of the embedding matters. With `W` the weights plus their transpose and `D` its row sums,

        F = (I - alpha D^-1/2 W D^-1/2)^-1 Y

    where `Y` holds the labelled rows' one-hot labels times their weights, divided by the sum of the weights of their
    class: without that, classes with many labels would spread into others. A row gets the class of its largest entry
    of `F` and the certainty `1 - H(p) / log c`, `p` its row of `F` divided by its sum. Then, as in `pseudo_labels`,
    the base learner adapts to the labelled rows and `rows` others that weigh `strength * certainty`.

    Both wrappers keep to the following:

    * `unlabelled=None` and a batch without labels give the base learner's own answer.
    * Pool rows whose input equals a labelled row's get no pseudo-label: their label is known. Nor do rows of zeros and
      rows with NaN or infinities: nothing tells `adapt` which rows of `unlabelled` are padding, so these count as
      padding, and anything else as a real row.
    * Labels are classes or class probabilities `[n, c]`, which is what is guessed; targets are refused.
    * Pseudo-labels are constants: derivatives of the adapted parameters pass through the last adaptation only.
    * `meta_grad` is the base learner's own, which looks at no pool: the wrappers are for using a meta-trained learner.
    * A committee inside the wrapper learns from the members' consensus, its embeddings stand side by side; a wrapped
      learner in a committee learns from its own guesses. Bootstrap committees want the second.

    Time is that of the distances, `O(n^2 d)` an adaptation, memory `O(n (neighbours + c + d))`.

    Args:
      learner: the base learner.
      rows: how many rows get a pseudo-label, static; fewer where the pool has fewer, None for all. They are spread
        evenly over the classes, as long as each has rows left.
      neighbours: of each row.
      alpha: how far labels spread, between 0 and 1; may be traced.
      steps: most steps of the solver, a safeguard: it stops by itself, see `propagate`.
      rounds: how often rows are embedded, propagated and adapted to; more than one is of use where adapting changes
        the embedding.
      strength: factor on the pseudo-labelled rows' weights, at least 0; may be traced.
      choose: within a class rows come in `"random"` order, or the most `"certain"` come first; those are next to
        labelled rows and tell little that is new.
      chunk: pool rows embedded at a time, None for all at once.

    Returns:
      A `Learner` with the base learner's `init`, `predict` and `meta_grad`.

    Raises:
      ValueError: for numbers out of range or an unknown `choose`; from `adapt` for labels that are no classes.

    Reference: Zhou, Bousquet, Lal, Weston, Schölkopf: Learning with Local and Global Consistency, 2004; Iscen, Tolias,
    Avrithis, Chum: Label Propagation for Deep Semi-supervised Learning, 2019; Zelnik-Manor, Perona: Self-Tuning
    Spectral Clustering, 2004.
    """
    require((alpha > 0) & (alpha < 1), f"label_propagation: alpha must be between 0 and 1, got {alpha}")
    for name, value in (("neighbours", neighbours), ("steps", steps)):
        require(value >= 1, f"label_propagation: {name} must be a positive integer, got {value}")

    def guess(params: PyTree, batch: Batch, unlabelled: PyTree, known: Array) -> tuple[Array, Array]:
        own, pool = learner.predict(params, batch.x), predict_pool(learner, params, unlabelled, chunk=chunk)
        embedding = jnp.concatenate([own.embedding, pool.embedding], axis=1)
        embedding = embedding.swapaxes(0, 1).reshape(embedding.shape[1], -1)
        labels = _mass("label_propagation", batch, own.logits.shape[-1])
        labels = jnp.pad(labels, [(0, known.shape[0]), (0, 0)])
        present = jnp.concatenate([batch.weight > 0, ~known])
        spread = propagate(embedding, present, labels, neighbours=neighbours, alpha=alpha, steps=steps)
        spread = spread[batch.weight.shape[0] :]
        total = spread.sum(-1)
        probs = spread / jnp.where(total > 0, total, 1.0)[:, None]
        certainty = 1.0 + xlogy(probs, probs).sum(-1) / jnp.log(max(labels.shape[1], 2))
        return spread, jnp.where(total > 0, jnp.clip(certainty, 0.0, 1.0), 0.0)

    return _with_guesses(
        "label_propagation", learner, guess, rows=rows, rounds=rounds, strength=strength, threshold=0.0, choose=choose
    )


def propagate(
    embedding: Array, present: Array, labels: Array, *, neighbours: int, alpha: float | Array, steps: int
) -> Array:
    """Spreads labels along the graph of nearest neighbours; see `label_propagation` for the formula.

    The system is solved by Chebyshev's semi-iteration, which needs no more than the bounds `1 - alpha` and `1 + alpha`
    of its eigenvalues. Labels fade exponentially along the graph, and a class is a comparison of what has faded, so it
    goes on until the residual of every entry is small against that entry, not against the largest one. The error of an
    entry is then rounding of its own size, as all operations are sums over neighbours.

    Args:
      embedding: `[n, d]`.
      present: bool `[n]`, False for rows that are not in the graph.
      labels: `[n, c]`, one-hot labels times weights, 0 for unlabelled rows.
      neighbours: of each row; fewer where there are fewer rows.
      alpha: between 0 and 1.
      steps: most steps of the solver. It needs about `log(1 / tolerance) / sqrt(2 (1 - alpha))`, and as many as the
        longest way from a label: a hundred for `alpha = 0.97`.

    Returns:
      `F`, float32 `[n, c]`, not negative; 0 for rows that no label reaches.

    Reference: Golub, Varga: Chebyshev Semi-iterative Methods, 1961.
    """
    mean = jnp.where(present[:, None], embedding, 0.0).sum(0) / jnp.maximum(present.sum(), 1)
    # Without their mean, distances lose less to rounding.
    centred = jnp.where(present[:, None], embedding - mean[None], 0.0)
    index, distance = nearest_neighbours(centred, present, neighbours=neighbours)
    linked = jnp.isfinite(distance) & present[:, None]
    reach = jnp.where(linked, distance, 0.0).max(-1, keepdims=True)
    weight = jnp.where(linked, jnp.exp(-distance / jnp.where(reach > 0, reach, 1.0)), 0.0)

    def along_links(values: Array) -> Array:
        """`W values`, one neighbour of each row at a time: memory does not grow with the number of neighbours."""

        def add(total: Array, link: tuple[Array, Array]) -> tuple[Array, None]:
            to, weight = link[0], link[1][:, None]
            return (total + weight * values[to]).at[to].add(weight * values), None

        return lax.scan(add, jnp.zeros_like(values), (index.T, weight.T))[0]

    degree = along_links(jnp.ones((embedding.shape[0], 1), labels.dtype))
    root = jnp.where(degree > 0, lax.rsqrt(jnp.where(degree > 0, degree, 1.0)), 0.0)
    mass = labels.sum(0)
    target = labels / jnp.where(mass > 0, mass, 1.0)[None]

    def unsettled(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        spread, residual, change, _, step = carry
        return (step < steps) & (jnp.abs(residual) > TOLERANCE * (1 - alpha) * jnp.abs(spread + change)).any()

    def improve(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        spread, residual, change, share, step = carry
        spread, residual = spread + change, residual - change + alpha * root * along_links(root * change)
        following = 1.0 / (2.0 / alpha - share)
        change = following * share * change + 2.0 * following / alpha * residual
        return spread, residual, change, following, step + 1

    begin = (jnp.zeros_like(target), target, target, jnp.asarray(alpha, target.dtype), jnp.zeros((), jnp.int32))
    spread, _, change, _, _ = lax.while_loop(unsettled, improve, begin)
    return jnp.maximum(spread + change, 0.0)


def _with_guesses(
    name: str,
    learner: Learner,
    guess: Guess,
    *,
    rows: int | None,
    rounds: int,
    strength: float | Array,
    threshold: float | Array,
    choose: Choice,
) -> Learner:
    """The learner that adapts to the labelled rows and to others with the labels that `guess` gives them."""
    require(rows is None or rows >= 1, f"{name}: rows must be a positive integer or None, got {rows}")
    require(rounds >= 1, f"{name}: rounds must be a positive integer, got {rounds}")
    require(strength >= 0, f"{name}: strength must be at least 0, got {strength}")
    if choose not in ("certain", "random"):
        raise ValueError(f"{name}: choose must be 'certain' or 'random', got {choose!r}")

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        batch = cleared(batch)

        def fit(batch: Batch) -> PyTree:
            return learner.adapt(key, meta, batch, unlabelled=unlabelled, start=start)

        if unlabelled is None:
            return fit(batch)
        unlabelled = clear_padding(unlabelled, jnp.zeros(rows_of(unlabelled)))
        params = fit(batch)
        known = _known(batch, unlabelled)
        # The base learner gets the key itself; this number is none that it would split or fold off.
        noise = row_noise(jax.random.fold_in(key, 0x50534C42), jnp.arange(known.shape[0]))
        for _ in range(rounds):
            speaks, certainty = guess(*lax.stop_gradient((params, batch, unlabelled)), known)
            weight = jnp.where((certainty > threshold) & ~known, strength * certainty, 0.0)
            extra = _examples(unlabelled, speaks, weight, noise, rows=rows, choose=choose)
            if not is_classes(batch.y):
                extra = extra._replace(y=jax.nn.one_hot(extra.y, batch.y.shape[1], dtype=batch.y.dtype))
            # Labelled rows last: noise that belongs to positions then knows nothing of padding behind them.
            params = fit(jax.tree.map(lambda *parts: jnp.concatenate(parts), extra, batch))
        return params

    return Learner(init=learner.init, adapt=adapt, predict=learner.predict, meta_grad=learner.meta_grad)


def _examples(x: PyTree, speaks: Array, weight: Array, noise: Array, *, rows: int | None, choose: Choice) -> Batch:
    """`rows` of the pool as examples of their likeliest class, evenly over the classes."""
    label = speaks.argmax(-1).astype(jnp.int32)
    everything = Batch(x=x, y=label, weight=weight)
    if rows is None or rows >= weight.shape[0]:
        return everything
    classes = speaks.shape[-1]
    group = jnp.where(weight > 0, label, classes)
    place = place_in_group(group, weight if choose == "certain" else jnp.zeros_like(weight), noise, groups=classes + 1)
    return take(everything, jnp.lexsort((noise, place, weight == 0))[:rows])


def _mass(name: str, batch: Batch, classes: int) -> Array:
    """What the labels say of each class times the rows' weights, `[n, c]`."""
    target, weight = class_targets(name, batch.y, batch.weight, classes)
    return target * weight[:, None]


def _known(batch: Batch, unlabelled: PyTree) -> Array:
    """Which rows need no pseudo-label, bool `[n]`: those equal to a labelled one, and zeros, which are padding."""
    mark = _fingerprint(unlabelled)
    return ((mark[:, None] == _fingerprint(batch.x)[None]) & (batch.weight > 0)[None]).any(-1) | (mark == 0)


def _fingerprint(x: PyTree) -> Array:
    """A number for each row's bytes, uint32 `[n]`: 0 for zeros, the same for equal rows and hardly ever for others."""
    total = jnp.zeros(rows_of(x), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(x)):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        octets = lax.bitcast_convert_type(leaf, jnp.uint8).reshape(leaf.shape[0], -1).astype(jnp.uint32)
        # Odd factors: rows that differ in one byte never meet.
        factor = jax.random.bits(jax.random.key(number), (octets.shape[1],), jnp.uint32) | 1
        total += (octets * factor[None]).sum(-1, dtype=jnp.uint32)
    return total
