"""Rules that measure information in nats between predictions: joint rules for the draws of a posterior.

They read the members' logits only. What is labelled is in them already: the posterior is conditioned on it.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.disagreement import bald, require_committee
from metaal_jax.acquisition.lifts import check_count, contained, fixed_rule, select_top
from metaal_jax.acquisition.uncertainty import entropy_of
from metaal_jax.base import Decision, Learner, Policy, PoolView, PyTree, require, require_classes
from metaal_jax.losses import consensus, weighted_mean
from metaal_jax.rows import row_noise

BLOCK_ELEMENTS = 2**20  # floats of the largest intermediate array, which a processor's cache can hold


def _block(elements: int, n: int) -> int:
    """How many of `n` rows are looked at together when each takes so many elements."""
    return max(1, min(n, BLOCK_ELEMENTS // elements))


def _entropy_terms(probs: Array) -> Array:
    return jnp.where(probs > 0, -probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0)


def _product(a: Array, b: Array) -> Array:
    """A matrix product of probabilities in full float32, which graphics cards do not take by default."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def epig(learner: Learner | None = None, *, k: int, targets: int = 200) -> Policy:
    """Expected predictive information gain: the rows whose labels tell most about the labels of target rows.

    The score of row `i` is the mean over target rows `j` of the mutual information of their two predictions,
    `H(y_i) + H(y_j) - H(y_i, y_j)` with `p(y_i, y_j) = mean_m p_m(y_i) p_m(y_j)`, in nats. Unlike `bald` it ignores
    what is unknown yet does not matter to the targets. The `k` best rows are taken, ties broken by the key.

    The targets are `targets` random rows of the pool that have not been asked for, or, with a learner, rows of one's
    own: the policy's parameters (its `policy_params`, leaves `[t, ...]` like the pool's), which the learner predicts
    from the parameters of the view. The members of both predictions must be the same draws, so those of a learner must
    be fixed by its parameters, as those of `committee`, `mc_dropout` and `laplace` are. A cold start changes nothing:
    what the members say then counts.

    Args:
      learner: predicts the targets given as policy parameters; None for targets from the pool.
      k: rows a round.
      targets: random target rows of the pool; fewer where the pool has fewer. Without meaning when a learner is given.

    Returns:
      A `Policy` without state. Its time grows with `n * t * m * c * c`, its memory with `n * m * c`.

    Raises:
      ValueError: for arguments below 1; from `act` for a single model, for a learner without targets among the policy
        parameters, for targets without a learner, and for targets that have another number of members.

    Reference: Bickford Smith et al.: Prediction-Oriented Bayesian Active Learning, 2023.
    """
    for name, value in (("k", k), ("targets", targets)):
        require(value >= 1, f"epig: {name} must be at least 1, got {value}")

    def targets_of(policy_params: PyTree, key: Array, view: PoolView) -> tuple[Array, Array]:
        """Logits `[m, t, c]` of the targets and their weights `[t]`."""
        logits = view.prediction.logits
        given = bool(jax.tree.leaves(policy_params))
        if learner is None:
            require(not given, "epig: target rows among the policy parameters need epig(learner, ...)")
            n = logits.shape[1]
            real = view.weight > 0
            rest = real & ~view.queried
            rest = jnp.where(rest.any(), rest, real)
            index, found = select_top(key, jnp.zeros(n), rest, view.row, min(targets, n))
            return logits[:, index], found.astype(logits.dtype)
        require(given, "epig: with a learner the policy parameters are the target rows, got none")
        theirs = learner.predict(view.params, policy_params).logits
        require(
            theirs.shape[0] == logits.shape[0],
            f"epig: the targets have {theirs.shape[0]} members, the pool {logits.shape[0]}; give the run's own learner",
        )
        sound = ~jnp.isnan(theirs).any((0, 2))
        return jnp.where(sound[:, None], theirs, 0.0), sound.astype(theirs.dtype)

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        require_classes("epig", view)
        require_committee("epig", view.prediction.logits)
        target_key, tie_key = jax.random.split(key)
        target_logits, weight = targets_of(policy_params, target_key, view)
        logits = view.prediction.logits
        members, n, classes = logits.shape
        theirs = jax.nn.softmax(target_logits).reshape(members, -1)
        target_entropy = weighted_mean(entropy_of(consensus(target_logits)), weight)
        share = jnp.repeat(weight / jnp.maximum(weight.sum(), 1.0), classes)

        def joint_entropy(probs: Array) -> Array:
            """Mean over the targets of the entropy of the pair, for one row's probabilities `[m, c]`."""
            return (_entropy_terms(_product(probs.T, theirs) / members) @ share).sum()

        probs = jax.nn.softmax(logits).swapaxes(0, 1)
        joint = lax.map(joint_entropy, probs, batch_size=_block(classes * theirs.shape[1], n))
        scores = jnp.maximum(entropy_of(consensus(logits)) + target_entropy - joint, 0.0)
        index, valid = select_top(tie_key, scores, view.available, view.row, k)
        return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=scores), policy_state

    policy = Policy(init=lambda key: (), begin=lambda key, policy_params, view: (), act=act)
    return contained(policy, logits=True)


def batch_bald(*, k: int, configurations: int = 10_000) -> Policy:
    """BatchBALD: the batch whose labels together tell most about the parameters, chosen greedily.

    The next row is the one with the largest mutual information of its label and the parameters, given the labels of
    the rows chosen before: the mean over configurations of those labels of

        H(sum_m w_m p_m(y)) - sum_m w_m H(p_m(y)),

    `w` being the members' posterior after the configuration. That is the growth of the paper's joint mutual
    information. All configurations are summed while they are few, later ones are drawn from the joint prediction,
    equally many from each member; the weights then come from sums of log-probabilities, so nothing underflows. A row's
    gain only shrinks as others are chosen: a row whose gain was already below the best one is not looked at again
    (Minoux's accelerated greedy algorithm), which leaves most of the pool out. Where configurations are drawn,
    these bounds are estimates, as the gains are.

    Rows do not depend on their order in the pool, as the draws for a chosen row belong to that row. From a cold start
    the batch is the most informative one under the members as they are.

    Args:
      k: rows a round.
      configurations: largest number of label configurations that are summed; beyond it so many are drawn, at least one
        a member. More make the later picks more exact and cost time in proportion.

    Returns:
      A `Policy` without state. The decision's scores are those of `bald`, from which the first row is taken.

    Raises:
      ValueError: for arguments below 1; from `act` for a single model or more rows than the pool has.

    Reference: Kirsch, van Amersfoort, Gal: BatchBALD: Efficient and Diverse Batch Acquisition for Deep Bayesian Active
    Learning, 2019; Minoux: Accelerated Greedy Algorithms for Maximizing Submodular Set Functions, 1978.
    """
    for name, value in (("k", k), ("configurations", configurations)):
        require(value >= 1, f"batch_bald: {name} must be at least 1, got {value}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        del policy_state
        require_classes("batch_bald", view)
        require_committee("batch_bald", view.prediction.logits)
        log_probs = jax.nn.log_softmax(view.prediction.logits)
        members, n, classes = log_probs.shape
        check_count(k, n)
        draw_key, tie_key = jax.random.split(key)
        probs, entropies = jnp.exp(log_probs), entropy_of(log_probs)
        noise = row_noise(tie_key, view.row)
        drawn_from = jnp.arange(-(-configurations // members) * members) % members
        steps = sum(classes**chosen <= configurations for chosen in range(k if classes > 1 else 1))

        def gains(posterior: Array, weight: Array, rows: Array) -> Array:
            mean = _product(posterior, probs[:, rows].reshape(members, -1))
            entropy = (weight @ _entropy_terms(mean)).reshape(-1, classes).sum(-1)
            return jnp.maximum(entropy - (weight @ posterior) @ entropies[:, rows], 0.0)

        def pick(bound: Array, available: Array, posterior: Array, weight: Array) -> tuple[Array, Array]:
            """The row with the largest gain, and the gains: exact where they were looked at, else upper bounds."""
            block = _block(posterior.shape[0] * classes, n)

            def open_rows(bound: Array, seen: Array) -> tuple[Array, Array]:
                best = jnp.where(seen & available, bound, -jnp.inf).max()
                return jnp.where(available & ~seen, bound, -jnp.inf), best

            def unsettled(state: tuple[Array, Array]) -> Array:
                bound, seen = state
                rest, best = open_rows(bound, seen)
                return (available & ~seen).any() & (rest.max() >= best)

            def look(state: tuple[Array, Array]) -> tuple[Array, Array]:
                bound, seen = state
                _, rows = lax.top_k(open_rows(bound, seen)[0], block)
                bound = bound.at[rows].set(gains(posterior, weight, rows))
                return bound, seen.at[rows].set(True)

            bound, seen = lax.while_loop(unsettled, look, (bound, jnp.zeros(n, bool)))
            _, best = open_rows(bound, seen)
            row = jnp.where(available & seen & (bound == best), noise, -1).argmax()
            return row.astype(jnp.int32), bound

        def draw(joint: Array, row: Array) -> Array:
            """Adds a chosen row's label, drawn from each configuration's member, to the log-likelihoods `[s, m]`."""
            theirs = log_probs[:, row]
            label = jax.random.categorical(jax.random.fold_in(draw_key, view.row[row]), theirs[drawn_from])
            return joint + theirs[:, label].T

        scores = bald(key, view)
        bound, available = jnp.nan_to_num(scores, nan=-jnp.inf), view.available
        kind = view.prediction.logits.dtype
        exact, drawn = jnp.zeros((1, members), kind), jnp.zeros((drawn_from.shape[0], members), kind)
        first = []
        for _ in range(steps):
            likelihood = jax.nn.logsumexp(exact, axis=1)
            # Labels that no member holds possible, those of classes without a label so far, have no posterior.
            possible = (likelihood > -jnp.inf)[:, None]
            posterior = jnp.where(possible, jax.nn.softmax(jnp.where(possible, exact, 0.0)), 0.0)
            row, bound = pick(bound, available, posterior, jax.nn.softmax(likelihood))
            first.append((row, available[row]))
            available = available.at[row].set(False)
            exact = (exact[:, None] + log_probs[:, row].T[None]).reshape(-1, members)
            drawn = draw(drawn, row)

        def sampled(state: tuple[Array, Array, Array], _: None) -> tuple[PyTree, tuple[Array, Array]]:
            bound, available, drawn = state
            weight = jnp.full(drawn.shape[0], 1.0 / drawn.shape[0], kind)
            row, bound = pick(bound, available, jax.nn.softmax(drawn), weight)
            return (bound, available.at[row].set(False), draw(drawn, row)), (row, available[row])

        _, rest = lax.scan(sampled, (bound, available, drawn), length=k - steps)
        index, valid = (jnp.concatenate([jnp.stack(a), b]) for a, b in zip(zip(*first, strict=True), rest, strict=True))
        return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=scores)

    return fixed_rule(act, logits=True)
