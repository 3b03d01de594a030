"""Rules that refit the learner with every row they consider: one adaptation for each row and label.

A rule for small pools, or for a random part of a large one: see `metaal_jax.acquisition.subsampled`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metaal_jax.acquisition.lifts import Scorer, check_count, contained, select_top
from metaal_jax.acquisition.uncertainty import entropy_of
from metaal_jax.base import (
    Batch,
    Decision,
    Learner,
    Policy,
    PoolView,
    PyTree,
    pad_batch,
    require,
    require_classes,
    rows_of,
    take,
)
from metaal_jax.losses import accuracy, consensus, cross_entropy, weighted_mean
from metaal_jax.rows import clean, row_noise

Loss = Literal["log", "zero_one"]


def append_row(batch: Batch, x: PyTree, y: Array) -> Batch:
    """`batch` with the row `x` of class `y` at the first place without weight, where the loop would put it."""
    place = (batch.weight > 0).argmin()
    return Batch(
        x=jax.tree.map(lambda buffer, row: buffer.at[place].set(row), batch.x, x),
        y=batch.y.at[place].set(y.astype(batch.y.dtype)),
        weight=batch.weight.at[place].set(1.0),
    )


def _values_of(value: Callable[[Array], Array], position: Array, count: Array, chunk: int) -> Array:
    """`value` of the first `count` of `position` `[r]`, `chunk` at a time; the others are 0 and cost nothing."""
    rows = position.shape[0]
    blocks = -(-rows // chunk)
    chunk = -(-rows // blocks)  # blocks of equal size leave the fewest places empty
    position = jnp.pad(position, (0, blocks * chunk - rows)).reshape(blocks, chunk)

    def body(block: Array, values: Array) -> Array:
        return values.at[block].set(jax.vmap(value)(position[block]))

    values: Array = lax.fori_loop(0, (count + chunk - 1) // chunk, body, jnp.zeros((blocks, chunk)))
    return values.reshape(-1)[:rows]


def _spread(values: Array, position: Array, count: Array, n: int) -> tuple[Array, Array]:
    """Values of the first `count` positions as scores `[n]`, the lowest of them elsewhere, and where they are."""
    known = jnp.arange(position.shape[0]) < count
    values = jnp.nan_to_num(values, nan=-jnp.inf)
    lowest = jnp.where(count > 0, jnp.where(known, values, jnp.inf).min(), 0.0)
    place = jnp.where(known, position, n)
    scores = jnp.full(n, lowest).at[place].set(values, mode="drop")
    return scores, jnp.zeros(n, bool).at[place].set(True, mode="drop")


def _check(name: str, loss: str, chunk: int) -> None:
    if loss not in get_args(Loss):
        raise ValueError(f"{name}: loss must be one of {get_args(Loss)}, got {loss!r}")
    require(chunk >= 1, f"{name}: chunk must be at least 1, got {chunk}")


def expected_error_reduction(learner: Learner, *, loss: Loss = "log", chunk: int = 16) -> Scorer:
    """The rows after whose labelling the learner expects the smallest loss on the rest of the pool.

    A row's score is `R(D) - sum_c p_c R(D + (x, c))`, how much its risk is expected to fall: the learner adapts from
    the meta-parameters to the labelled rows and this one with label `c`; its risk `R` is its own expected loss, a mean
    over all real rows that have not been asked for, the row itself among them, so that the risks of all rows are means
    over the same rows. With `p'` the refitted prediction the risk is the mean entropy of `p'` for `"log"`, the mean of
    `1 - max p'` for `"zero_one"`; `p` is the current prediction of the row. Committees are judged by their consensus.
    All refits use one key, so that they differ by the label and not by chance.

    The cost is `n * c` adaptations: use it on a part of the pool, `subsampled(...)`. Rows that cannot be asked for are
    not refitted and get the lowest score of the others. A cold start is nothing special: each refit sees one row.

    Args:
      learner: whose `adapt` and `predict` are used; it should be the one that runs in the loop.
      loss: `"log"` (nats) or `"zero_one"`.
      chunk: rows refitted side by side, each with `c` labels; memory grows with `chunk * c` predictions of the pool.

    Returns:
      A scorer, `[n]`, the expected fall of the risk (below 0 where labelling is expected to make the learner less
      certain), so that `stopping.not_worth_it` can weigh it against the cost.

    Raises:
      ValueError: for an unknown loss or a chunk below 1.

    Reference: Roy, McCallum: Toward Optimal Active Learning through Sampling Estimation of Error Reduction, 2001;
    Guo, Greiner: Optimistic Active Learning using Mutual Information, 2007.

    >>> from metaal_jax import acquisition, learners
    >>> learner = learners.linear(3, steps=16)
    >>> policy = acquisition.top_k(acquisition.expected_error_reduction(learner, loss="zero_one"), k=1)
    """
    _check("expected_error_reduction", loss, chunk)

    def expected_loss(log_probs: Array) -> Array:
        return entropy_of(log_probs) if loss == "log" else -jnp.expm1(log_probs.max(-1))

    def scorer(key: Array, view: PoolView) -> Array:
        require_classes("expected_error_reduction", view)
        asked = view.available
        view = clean(view, logits=True)
        log_probs = consensus(view.prediction.logits)
        probs = jnp.exp(log_probs)
        n, classes = probs.shape
        rest = ((view.weight > 0) & ~view.queried).astype(jnp.float32)
        now = weighted_mean(expected_loss(log_probs), rest)
        room = pad_batch(view.labelled, rows_of(view.labelled) + 1)

        def risk(position: Array, label: Array) -> Array:
            batch = append_row(room, take(view.x, position), label)
            params = learner.adapt(key, view.meta, batch, unlabelled=view.x)
            return weighted_mean(expected_loss(consensus(learner.predict(params, view.x).logits)), rest)

        def score(position: Array) -> Array:
            risks = jax.vmap(risk, in_axes=(None, 0))(position, jnp.arange(classes))
            return now - jnp.where(probs[position] > 0, probs[position] * risks, 0.0).sum()

        position = jnp.nonzero(view.available, size=n, fill_value=0)[0]
        count = view.available.sum()
        scores = _spread(_values_of(score, position, count, chunk), position, count, n)[0]
        return jnp.where(asked & ~view.available, jnp.nan, scores)

    return scorer


def value_of_label(learner: Learner, loss: Loss = "log") -> Callable[..., Array]:
    """What a label is worth: minus the loss on selection rows after adapting with it.

    Returns:
      `(key, view, labelled, position, y, selection) -> []`: the learner adapts from the view's meta-parameters to the
      batch `labelled`, which has room for one row more, and pool row `position` with class `y`; the value is minus the
      cross entropy (`"log"`) or the accuracy (`"zero_one"`) on the batch `selection`.
    """

    def measure(log_probs: Array, y: Array, weight: Array) -> Array:
        if loss == "zero_one":
            return accuracy(log_probs, y, weight)
        # A class without a label has probability 0 and the loss inf, whatever the others have: to tell labels apart all
        # the same, it counts as the smallest probability that a float holds.
        return -cross_entropy(jnp.maximum(log_probs, np.log(np.finfo(log_probs.dtype).tiny)), y, weight)

    def value(key: Array, view: PoolView, labelled: Batch, position: Array, y: Array, selection: Batch) -> Array:
        batch = append_row(labelled, take(view.x, position), y)
        params = learner.adapt(key, view.meta, batch, unlabelled=view.x)
        log_probs = consensus(learner.predict(params, selection.x).logits)
        return measure(log_probs, selection.y, selection.weight)

    return value


def greedy_oracle(
    learner: Learner, *, k: int, candidates: int | None = None, loss: Loss = "log", chunk: int = 16
) -> Policy:
    """Looks at the hidden labels and takes the row whose label helps most: the upper reference, as random is the lower.

    For every candidate row the learner adapts from the meta-parameters to the labelled rows and this one with its
    true label; the row after which the loss on the selection rows is lowest is taken. A batch is chosen greedily: the
    next row is refitted with those already picked. All refits use one key. It is greedy, so it is no bound: other
    sets of rows may be better still. It never sees the test rows; the selection rows must not be among them.

    The cost is `k * candidates` adaptations, `k * n` without `candidates`. From a cold start the first row is the best
    single one. Without a selection row of positive weight all rows are equal, and the key decides.

    Args:
      learner: whose `adapt` and `predict` are used; it should be the one that runs in the loop.
      k: rows a round.
      candidates: how many random available rows are tried for each pick, None for all.
      loss: `"log"`, the cross entropy, or `"zero_one"`, which is coarse: few selection rows mean many ties.
      chunk: rows refitted side by side.

    Returns:
      A `Policy` whose parameters are `(y, selection)`: the classes of the whole pool, int32, by row number
      (`PoolView.row`), so that a view may hold a part of it; and a `Batch`. The decision's scores are minus the losses
      of the first pick; rows that were not tried have the lowest of them.

    Raises:
      ValueError: for `k`, `candidates` or `chunk` below 1, an unknown loss, or parameters that are no such pair.

    Reference: Konyushkova, Sznitman, Fua: Learning Active Learning from Data, 2017 (the error reduction that is
    learned there); Zhou et al.: Towards Understanding the Behaviors of Optimal Deep Active Learning Algorithms, 2021.
    """
    require(k >= 1, f"greedy_oracle: k must be at least 1, got {k}")
    require(candidates is None or candidates >= 1, f"greedy_oracle: candidates must be at least 1, got {candidates}")
    _check("greedy_oracle", loss, chunk)

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        if len(policy_params) != 2:
            raise ValueError("greedy_oracle: the policy's parameters must be (y of the pool, selection batch)")
        truth, selection = policy_params
        n = view.row.shape[0]
        check_count(k, n)
        y = truth[view.row]
        adapt_key, pick_key = jax.random.split(key)

        value = value_of_label(learner, loss)

        def gain(labelled: Batch, position: Array) -> Array:
            return value(adapt_key, view, labelled, position, y[position], selection)

        def pick(carry: tuple[Batch, Array], key: Array) -> tuple[tuple[Batch, Array], tuple[Array, Array, Array]]:
            labelled, available = carry
            candidate_key, tie_key = jax.random.split(key)
            if candidates is None or candidates >= n:
                position, count = jnp.nonzero(available, size=n, fill_value=0)[0], available.sum()
            else:
                position, found = select_top(candidate_key, jnp.zeros(n), available, view.row, candidates)
                count = found.sum()
            values = _values_of(lambda position: gain(labelled, position), position, count, chunk)
            scores, tried = _spread(values, position, count, n)
            best = jnp.where(tried & (scores == scores.max()), row_noise(tie_key, view.row), -1).argmax()
            valid = available[best]
            longer = append_row(labelled, take(view.x, best), y[best])
            labelled = jax.tree.map(lambda new, old: jnp.where(valid, new, old), longer, labelled)
            return (labelled, available.at[best].set(False)), (best.astype(jnp.int32), valid, scores)

        room = pad_batch(view.labelled, rows_of(view.labelled) + k)
        _, (index, valid, scores) = lax.scan(pick, (room, view.available), jax.random.split(pick_key, k))
        return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=scores[0]), policy_state

    return contained(Policy(init=lambda key: (), begin=lambda key, policy_params, view: (), act=act))
