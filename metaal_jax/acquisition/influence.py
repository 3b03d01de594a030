"""Rules that look at how much a label would change the model: lengths of gradients, gains of a step, predicted losses.

In the formulas `p` is the predicted distribution of a row (the members' consensus), `z` its embedding (the members'
mean) and `e_c` the unit vector of class `c`. The gradient of the cross entropy with label `c` for a last linear layer
with a bias is `(p - e_c) [z, 1]^T`.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.disagreement import require_committee
from metaal_jax.acquisition.lifts import Scorer, contained, pick_in_turn
from metaal_jax.base import Decision, Learner, Policy, PoolView, PyTree, is_classes, require, require_classes
from metaal_jax.learners.loss_prediction import predict_loss
from metaal_jax.losses import consensus


def expected_gradient_length(learner: Learner, *, chunk: int = 64) -> Scorer:
    """Length of the gradient that a row's label would cause, expected under the prediction, over the whole network.

    The score is `sum_c p_c |grad -log p_c|`, where the gradient is that of the cross entropy of this row with label
    `c` with respect to all floating-point parameters, by one pullback of the log-probabilities for each class. It is
    exact for every learner that treats rows independently, each row being predicted alone. For a committee the loss
    is that of the consensus and the parameters are those of all members. From a cold start the parameters are the
    meta-parameters, and the rule is no different.

    Args:
      learner: whose `predict` is differentiated, at `view.params`.
      chunk: rows at a time; memory grows with `chunk * c` times the number of parameters.

    Returns:
      A scorer, `[n]`, in nats per unit of the parameters.

    Raises:
      ValueError: for a chunk below 1.

    Reference: Settles, Craven, Ray: Multiple-Instance Active Learning, 2008; Settles, Craven: An Analysis of Active
    Learning Strategies for Sequence Labeling Tasks, 2008.
    """
    require(chunk >= 1, f"expected_gradient_length: chunk must be at least 1, got {chunk}")

    def scorer(key: Array, view: PoolView) -> Array:
        del key
        require_classes("expected_gradient_length", view)
        leaves, structure = jax.tree.flatten(view.params)
        trained = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def score(x: PyTree) -> Array:
            def logits_of(floating: list[Array]) -> Array:
                merged = list(leaves)
                for i, leaf in zip(trained, floating, strict=True):
                    merged[i] = leaf
                rows = jax.tree.map(lambda leaf: leaf[None], x)
                return learner.predict(jax.tree.unflatten(structure, merged), rows).logits[:, 0]

            logits, pullback = jax.vjp(logits_of, [leaves[i] for i in trained])
            # d log p_c / d logits_mj = share_mc (delta_cj - p_mj), finite for classes of logit -inf, too.
            probs = jax.nn.softmax(logits)
            total = probs.sum(0)
            share = probs / jnp.where(total > 0, total, 1.0)[None]
            (grads,) = jax.vmap(pullback)(share.T[:, :, None] * (jnp.eye(total.shape[0])[:, None] - probs[None]))
            square = sum((grad.reshape(grad.shape[0], -1) ** 2).sum(-1) for grad in grads)
            return (total / logits.shape[0] * jnp.sqrt(square)).sum()

        lengths: Array = lax.map(score, view.x, batch_size=min(chunk, view.row.shape[0]))
        return lengths

    return scorer


def _length(embedding: Array) -> Array:
    """Length of `[z, 1]`: embedding `[n, d]` -> `[n]`."""
    return jnp.sqrt((embedding**2).sum(-1) + 1.0)


def head_gradient_length(key: Array, view: PoolView) -> Array:
    """`expected_gradient_length` of the last linear layer alone, in closed form, `[n]`.

    The score is `sum_c p_c |p - e_c| sqrt(|z|^2 + 1)`. A committee counts as one model with its consensus and mean
    embedding. From a cold start the embedding's length decides where the predictions are uniform.

    Reference: Settles, Craven, Ray: Multiple-Instance Active Learning, 2008.
    """
    del key
    require_classes("head_gradient_length", view)
    probs = jnp.exp(consensus(view.prediction.logits))
    best = jnp.arange(probs.shape[-1])[None] == probs.argmax(-1)[:, None]
    others = jnp.where(best, 0.0, probs)
    # |p - e_c|^2 of the most probable class is near 0, where 1 - 2 p_c + |p|^2 would cancel.
    of_best = others.sum(-1, keepdims=True) ** 2 + (others**2).sum(-1, keepdims=True)
    square = jnp.where(best, of_best, 1.0 - 2.0 * probs + (probs**2).sum(-1, keepdims=True))
    return (probs * jnp.sqrt(square)).sum(-1) * _length(view.prediction.embedding.mean(0))


def expected_model_change(key: Array, view: PoolView) -> Array:
    """Expected model change maximisation (EMCM) with the members' predictions as the possible labels, `[n]`.

    For targets, the paper's rule: the score is the mean over members of `|f - f_m| sqrt(|z|^2 + 1)`, the length of the
    squared error's gradient `(f - f_m) [z, 1]^T` if the member's output `f_m` were the label. For classes it is the
    mean of `|p - q_m| sqrt(|z|^2 + 1)`, `q_m` the member's distribution: the cross entropy with a soft label `q_m` has
    a gradient of the same form. Two things differ from the paper: the model is the last layer with its bias, and `f`
    or `p` is the members' mean instead of a separate model's prediction. Without a label the members may agree, and
    then the key decides.

    Raises:
      ValueError: for a single model.

    Reference: Cai, Zhang, Zhou: Maximizing Expected Model Change for Active Learning in Regression, 2013.
    """
    del key
    logits = view.prediction.logits
    require_committee("expected_model_change", logits)
    labels = jax.nn.softmax(logits) if is_classes(view.labelled.y) else logits
    change = jnp.sqrt(((labels - labels.mean(0, keepdims=True)) ** 2).sum(-1)).mean(0)
    return change * _length(view.prediction.embedding.mean(0))


def glister(learner: Learner, *, k: int, step_size: float | Array = 0.05) -> Policy:
    """GLISTER-Active: rows whose gradient step raises the log-likelihood of the validation rows most.

    One step of size `s` on row `i` with its most probable class `y` adds `s (e_y - p_i) [z_i, 1]^T` to the last
    layer. To first order this raises the validation rows' mean log-likelihood by the inner product with its gradient
    `G = sum_v w_v (e_{y_v} - p_v) [z_v, 1]^T`, `[c, d + 1]`: the score of the row. The best row is taken, its step
    is applied to the validation rows' logits, and the next row is judged by the new `G`; so a batch is not the same
    row many times over. The steps of the pool rows are those of the current model. Products of rows and `G` are
    formed, never the rows' gradients.

    From a cold start without validation rows all rows are equal, and the key decides.

    Args:
      learner: whose `predict` is asked for the validation rows, at `view.params`.
      k: rows a round.
      step_size: of the gradient step, > 0; it weighs the rows already picked, not the first pick.

    Returns:
      A `Policy` whose parameters are a validation `Batch`, or `()` to take the labelled rows instead, as the paper
      does for active learning. Committees count as one model with its consensus and mean embedding.

    Raises:
      ValueError: for `k < 1` or `step_size <= 0`.

    Reference: Killamsetty et al.: GLISTER: Generalization based Data Subset Selection for Efficient and Robust
    Learning, 2021.
    """
    require(k >= 1, f"glister: k must be at least 1, got {k}")
    require(step_size > 0, f"glister: step_size must be > 0, got {step_size}")

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        require_classes("glister", view)
        if len(policy_params) == 0:
            judges = view.labelled
            prediction = jax.tree.map(lambda leaf: leaf[:, view.labelled_index], view.prediction)
        else:
            judges = policy_params
            prediction = learner.predict(view.params, judges.x)
        log_probs, embedding = consensus(view.prediction.logits), view.prediction.embedding.mean(0)
        classes = log_probs.shape[-1]
        step = jax.nn.one_hot(log_probs.argmax(-1), classes) - jnp.exp(log_probs)
        # Padding, and what is not a number, judges nothing.
        judge_log_probs, judge_embedding = consensus(prediction.logits), prediction.embedding.mean(0)
        sound = (judges.weight > 0) & ~jnp.isnan(judge_log_probs).any(-1) & jnp.isfinite(judge_embedding).all(-1)
        judge_log_probs = jnp.where(sound[:, None], judge_log_probs, 0.0)
        judge_embedding = jnp.where(sound[:, None], judge_embedding, 0.0)
        mass = jnp.where(sound, judges.weight, 0.0)
        truth, total = jax.nn.one_hot(judges.y, classes), mass.sum()
        weight = mass / jnp.where(total > 0, total, 1.0)

        def score(judge_logits: Array) -> Array:
            residual = weight[:, None] * (truth - jax.nn.softmax(judge_logits))
            return (step * (embedding @ (residual.T @ judge_embedding).T + residual.sum(0, keepdims=True))).sum(-1)

        def update(judge_logits: Array, position: Array) -> Array:
            alike = judge_embedding @ embedding[position] + 1.0
            return judge_logits + step_size * alike[:, None] * step[position][None]

        return pick_in_turn(key, view, k, judge_log_probs, score, update), policy_state

    policy = Policy(init=lambda key: (), begin=lambda key, policy_params, view: (), act=act)
    return contained(policy, logits=True, embedding=True)


def predicted_loss(key: Array, view: PoolView) -> Array:
    """The loss that the learner predicts for each row, `[n]`; only its order has a meaning.

    It needs parameters of `learners.loss_predictor`; for a committee of such learners the mean of the members counts.
    From a cold start the loss predictor is as the meta-parameters have it: of use after pre-training, else arbitrary.

    Raises:
      ValueError: for parameters without a loss predictor.

    Reference: Yoo, Kweon: Learning Loss for Active Learning, 2019.
    """
    del key
    if not isinstance(view.params, dict) or "loss_head" not in view.params:
        raise ValueError("predicted_loss: the parameters have no loss_head; use learners.loss_predictor as the learner")
    loss_head, embedding = view.params["loss_head"], view.prediction.embedding
    if loss_head["out"]["bias"].ndim == 1:
        return predict_loss(loss_head, embedding[0])
    return jax.vmap(predict_loss)(loss_head, embedding).mean(0)
