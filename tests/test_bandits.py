"""Bandits over query rules: the update and the reward against plain NumPy, and what they learn within a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import Learner, Prediction, acquisition, active_learner, check_policy, tasks
from metaal_jax.policies import bandits
from views import make_view, probabilities


def fixed(values):
    """A scorer that says what it was told."""
    return lambda key, view: jnp.asarray(values, jnp.float32)[view.row]


def preferring(rows, *, k, n=20):
    """A rule that wants the given rows, in that order, before all others from the last to the first."""
    scores = np.arange(n, dtype=float)
    scores[list(rows)] = 2 * n - np.arange(len(rows))
    return acquisition.top_k(fixed(scores), k=k)


@functools.partial(jax.jit, static_argnums=0)
def first_round(policy, key, view, params=()):
    begin_key, act_key = jax.random.split(key)
    return policy.act(act_key, params, policy.begin(begin_key, params, view), view)


class PaperExp4p:
    """EXP4.P in float64, an advice vector over the whole pool for each expert, one of the experts drawn a round."""

    def __init__(self, experts, horizon, delta, least):
        self.w, self.least = np.ones(experts), least
        self.c = np.sqrt(np.log(experts / delta) / (experts * horizon))

    def propose(self, batches, n):
        count = len(batches)
        self.p = (1 - count * self.least) * self.w / self.w.sum() + self.least
        self.xi = np.array([[(j in b) / max(len(b), 1) for j in range(n)] for b in batches])
        self.q = np.array([sum(p for p, b in zip(self.p, batches, strict=True) if j in b) for j in range(n)])

    def learn(self, reward, asked, answered):
        for i, xi in enumerate(self.xi):
            y = sum(xi[j] * reward / self.q[j] for j in asked if j in answered)
            v = sum(xi[j] / self.q[j] for j in range(len(xi)) if xi[j] > 0)
            self.w[i] *= np.exp(self.least / 2 * (y + v * self.c))


@pytest.mark.parametrize("k", [1, 3])
def test_the_update_is_that_of_the_paper(key, k):
    """Rules that overlap, rows that are not answered, rewards that change, a pool that runs out on the way."""
    n, horizon, delta, least = 20, 8, 0.2, 0.15
    rules = [preferring(rows, k=k) for rows in ((4, 9, 2, 11), (9, 4, 17, 3), (6, 5, 9, 1))]
    policy = bandits.exp4p(
        rules, k=k, horizon=horizon, delta=delta, exploration=least, reward=lambda view, probability: view.spent
    )
    act = jax.jit(policy.act)
    propose = jax.jit(lambda key, view: [rule.act(key, (), (), view)[0] for rule in rules])
    view = make_view(0, n=n, capacity=n, labelled=(0, 7), queried=range(12 + k, n))._replace(budget=jnp.float32(99))
    view = view._replace(labelled=view.labelled._replace(weight=jnp.asarray(view.labelled_index >= 0, jnp.float32)))
    state = policy.begin(key, (), view)
    plain, wanted_rows = PaperExp4p(3, horizon, delta, least), np.ones(n)
    rewards = np.random.default_rng(1).uniform(size=horizon)
    seen = set()
    for number, reward in enumerate(rewards):
        before = view.available
        decision, state = act(jax.random.fold_in(key, number), (), state, view)
        batches = [set(np.asarray(p.index)[np.asarray(p.valid)].tolist()) for p in propose(key, view)]
        plain.propose(batches, n)
        asked = np.asarray(decision.index)[np.asarray(decision.valid)].tolist()
        assert len(asked) == min(k, int(before.sum()))
        wanted_rows[asked] = plain.q[asked]
        np.testing.assert_allclose(state.rule_probability, plain.p, rtol=2e-5)
        np.testing.assert_allclose(jnp.exp(state.log_weight), plain.w / plain.w.max(), rtol=2e-5)
        np.testing.assert_allclose(state.row_probability, wanted_rows, rtol=2e-5)
        same = [p for p, batch in zip(plain.p, batches, strict=True) if batch == set(asked)]
        np.testing.assert_allclose(jnp.exp(decision.log_prob), sum(same), rtol=2e-5)
        seen.add((len(same), len(asked)))
        # Every third row gives no answer.
        answered = [j for j in asked if j % 3]
        place = int((view.labelled_index >= 0).sum()) + np.arange(len(answered))
        labelled = view.labelled._replace(weight=view.labelled.weight.at[place].set(1.0))
        view = view._replace(
            queried=view.queried.at[jnp.asarray(asked, int)].set(True),
            labelled=labelled,
            labelled_index=view.labelled_index.at[place].set(jnp.asarray(answered, jnp.int32)),
            spent=jnp.float32(reward),
        )
        plain.learn(reward, asked, answered)
    assert plain.p.max() > 1.05 * plain.p.min()
    assert len(seen) > 1


def test_the_reward_is_the_importance_weighted_accuracy():
    """Of the committee's consensus on answered rows; a sure row counts 1, one asked for with q counts 1 / q."""
    view = make_view(3, members=3, classes=3, labelled=(1, 8, 9, 12), capacity=7)
    y, weight = np.array([0, 2, 1, 2, 0, 0, 0]), np.array([1.0, 1, 0, 1, 0, 0, 0])
    labelled = view.labelled._replace(y=jnp.asarray(y), weight=jnp.asarray(weight, jnp.float32))
    probability = np.random.default_rng(0).uniform(0.05, 1, 20)
    probability[1] = 1.0
    guess = probabilities(np.asarray(view.prediction.logits, np.float64)).mean(0).argmax(-1)
    for flip in range(4):  # 0 to 3 of the three answered rows are right
        truth = y.copy()
        truth[[0, 1, 3]] = np.where(np.arange(3) < flip, guess[[1, 8, 12]], (guess[[1, 8, 12]] + 1) % 3)
        w = 1 / probability[[1, 8, 12]]
        wanted = (w * (np.arange(3) < flip)).sum() / w.sum()
        shown = view._replace(labelled=labelled._replace(y=jnp.asarray(truth)))
        got = bandits.importance_weighted_accuracy(shown, jnp.asarray(probability, jnp.float32))
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert bandits.importance_weighted_accuracy(make_view(0), jnp.ones(20)) == 0


def test_rules_are_drawn_by_their_probabilities_and_equal_batches_add_up(key):
    view = make_view(0)
    rules = [preferring(rows, k=2) for rows in ((3, 5), (5, 3), (8, 3))]
    policy = bandits.albl(rules, k=2, horizon=10, exploration=0.1)
    state = policy.begin(key, (), view)._replace(log_weight=jnp.log(jnp.asarray([0.2, 0.1, 0.7])))
    p = 0.7 * np.array([0.2, 0.1, 0.7]) + 0.1
    draw = jax.jit(jax.vmap(lambda key: policy.act(key, (), state, view)[0]))
    decision = draw(jax.random.split(key, 4000))
    first = decision.index[:, 0]
    counts = np.array([(first == row).sum() for row in (3, 5, 8)])
    assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 20  # 2 degrees of freedom
    np.testing.assert_allclose(jnp.exp(decision.log_prob), np.where(first == 8, p[2], p[0] + p[1]), rtol=1e-5)
    scores = np.asarray(rules[2].act(key, (), (), view)[0].scores)
    np.testing.assert_array_equal(decision.scores[np.argmax(first == 8)], scores)
    # A rule that draws reports the probability of its draw.
    sampled = acquisition.stochastic_top_k(fixed(np.zeros(20)), k=2, beta=0.0)
    decision, _ = first_round(bandits.albl([sampled], k=2, horizon=10), key, view)
    np.testing.assert_allclose(decision.log_prob, -np.log(20 * 19), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_the_contract(key, k):
    rules = [acquisition.top_k(scorer, k=k) for scorer in (acquisition.margin, acquisition.random)]
    policy = bandits.albl(rules, k=k, horizon=5)
    check_policy(policy, key, make_view(2, queried=(3, 5), labelled=(1, 8), padding=3), k=k)
    if k > 1:  # fewer rows than a batch are left
        check_policy(policy, key, make_view(2, queried=range(3, 18), labelled=(1, 19)), k=k)


# In the toy problem x is (kind of row, class). The model is right about every row if the row labelled last was of
# kind 1, and wrong about every row otherwise; a model without labels, or one that `shrugs`, says class 0.
def toy_learner(*, shrugs=False):
    def adapt(key, meta, batch, *, unlabelled=None, start=None):
        count = (batch.weight > 0).sum()
        kind = batch.x[jnp.maximum(count - 1, 0), 0]
        return jnp.where((count == 0) | shrugs, 0.0, 2.0 * (kind == 1) - 1)

    def predict(params, x):
        says = jnp.where(params == 0, 0.5 - jnp.arange(2)[None], params * (2 * (x[:, 1:] == jnp.arange(2)[None]) - 1.0))
        return Prediction(logits=jnp.broadcast_to(says, (len(x), 2))[None], embedding=x[None])

    return Learner(init=lambda key, x: (), adapt=adapt, predict=predict, meta_grad=None)


def of_kind(kind):
    return acquisition.top_k(lambda key, view: (view.x[:, 0] == kind).astype(jnp.float32), k=1)


def toy_run(policy, learner, *, rounds, rows):
    kind, y = jnp.arange(rows) % 3, jnp.arange(rows) // 3 % 2
    x = jnp.stack([kind, y], 1).astype(jnp.float32)
    problem = tasks.problem(x, y, x[:6], y[:6], initial=jnp.arange(2))
    active = active_learner(learner, policy, capacity=rounds + 2)

    def body(state, key):
        state, info = active.step(key, (), (), state, problem)
        return state, (info.index, info.log_prob, state.policy_state.rule_probability)

    def start(key):
        return active.init(key, (), (), problem)

    return start, body


def test_the_good_rule_is_found_and_equal_rules_stay_equal(key):
    """Of three rules one alone makes the model right; 100 rounds later it is drawn with more than 0.6, for all keys."""
    rounds = 100

    def final(rules, learner):
        policy = bandits.albl(rules, k=1, horizon=rounds)
        start, body = toy_run(policy, learner, rounds=rounds, rows=330)
        run = jax.jit(jax.vmap(lambda key: jax.lax.scan(body, start(key), jax.random.split(key, rounds))[1][2][-1]))
        return np.asarray(run(jax.random.split(key, 16)))

    good = final([of_kind(0), of_kind(1), of_kind(2)], toy_learner())
    assert good[:, 1].min() > 0.6
    alike = final([acquisition.top_k(acquisition.random, k=1)] * 3, toy_learner(shrugs=True))
    assert alike.min() > 0.2
    assert alike.max() < 0.5


def test_a_run_is_the_same_alone_in_a_batch_and_step_by_step(key):
    rounds = 12
    policy = bandits.albl([of_kind(0), of_kind(1), of_kind(2)], k=1, horizon=rounds)
    start, body = toy_run(policy, toy_learner(), rounds=rounds, rows=60)

    def run(key):
        return jax.lax.scan(body, start(key), jax.random.split(key, rounds))[1]

    keys = jax.random.split(key, 2)
    together = jax.jit(jax.vmap(run))(keys)
    one, begin, step = jax.jit(run), jax.jit(start), jax.jit(body)
    for i, own in enumerate(keys):
        alone = one(own)
        state, steps = begin(own), []
        for step_key in jax.random.split(own, rounds):
            state, out = step(state, step_key)
            steps.append(out)
        for a, b, c in zip(
            alone, jax.tree.map(lambda leaf, i=i: leaf[i], together), zip(*steps, strict=True), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5)
            np.testing.assert_allclose(a, jnp.stack(c), rtol=1e-5)
    assert len(np.unique(together[0][..., 0])) > rounds


def test_no_labels_no_rows_and_many_rounds_stay_finite(key):
    """A cold start pays nothing; an exhausted pool changes no weight; 5000 rounds of reward 1 do not overflow."""
    rules = [preferring((4,), k=3), preferring((9,), k=3)]
    policy = bandits.albl(rules, k=3, horizon=50)
    cold = make_view(0)
    decision, state = first_round(policy, key, cold)
    assert decision.valid.all()
    np.testing.assert_allclose(state.rule_probability, 0.5)
    gone = cold._replace(queried=jnp.ones(20, bool))
    moved = state._replace(log_weight=jnp.asarray([-1.0, 0.0]))
    act = jax.jit(policy.act)
    decision, moved = act(key, (), moved, gone)
    assert not decision.valid.any()
    assert decision.log_prob == pytest.approx(0, abs=1e-6)
    after = act(key, (), moved, gone)[1]
    np.testing.assert_array_equal(after.log_weight, moved.log_weight)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))

    view = cold._replace(labelled_index=jnp.asarray([4, 19, 18, -1, -1, -1]))
    view = view._replace(labelled=view.labelled._replace(weight=jnp.asarray([1.0, 1, 1, 0, 0, 0])))
    policy = bandits.exp4p(rules, k=3, horizon=5000, exploration=0.01, reward=lambda view, probability: jnp.ones(()))

    def body(state, key):
        decision, state = policy.act(key, (), state, view)
        return state, decision.log_prob

    run = jax.jit(lambda key: jax.lax.scan(body, policy.begin(key, (), view), jax.random.split(key, 5000)))
    state, log_prob = run(key)
    assert np.isfinite(log_prob).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert state.rule_probability.min() >= 0.01 * (1 - 1e-6)


def test_hyperparameters_are_vmapped_and_parameters_reach_their_rules(key):
    view = make_view(0)
    rules = [preferring((4,), k=1), preferring((9,), k=1)]

    def least(exploration, delta, horizon):
        policy = bandits.albl(rules, k=1, horizon=horizon, delta=delta, exploration=exploration)
        state = policy.begin(key, (), view)._replace(log_weight=jnp.asarray([-50.0, 0.0]))
        return policy.act(key, (), state, view)[1].rule_probability[0]

    got = jax.jit(jax.vmap(least))(jnp.asarray([0.1, 0.3]), jnp.asarray([0.1, 0.2]), jnp.asarray([5, 9]))
    np.testing.assert_allclose(got, [0.1, 0.3], rtol=1e-5)
    # The paper's own exploration, and rules whose parameters say which of two rules they are.
    got = jax.jit(lambda horizon: least(None, 0.1, horizon))(40)
    np.testing.assert_allclose(got, np.sqrt(np.log(2) / 80), rtol=1e-5)
    either = acquisition.one_of(rules)
    policy = bandits.albl([either, either], k=1, horizon=40)
    assert jax.tree.map(int, policy.init(key)) == ((0, ((), ())), (0, ((), ())))
    params = ((jnp.int32(1), ((), ())),) * 2
    assert first_round(policy, key, view, params)[0].index.tolist() == [9]


def test_arguments_are_checked(key):
    rules = [acquisition.top_k(acquisition.margin, k=2)] * 2
    good = {"k": 2, "horizon": 5}
    for name, wrong in {
        "no policies": lambda: bandits.albl([], **good),
        "k must be at least 1, got 0": lambda: bandits.albl(rules, k=0, horizon=5),
        "horizon must be at least 1 round, got 0": lambda: bandits.albl(rules, k=2, horizon=0),
        "delta must be above 0 and at most 1, got 0": lambda: bandits.albl(rules, **good, delta=0.0),
        "delta must be above 0 and at most 1, got 2": lambda: bandits.albl(rules, **good, delta=2.0),
        "exploration must be above 0 and at most 1 / 2, got 0.6": lambda: bandits.albl(rules, **good, exploration=0.6),
        "exploration must be above 0 and at most 1 / 2, got 0.0": lambda: bandits.albl(rules, **good, exploration=0.0),
        "every rule must ask for 3 rows, one asks for 2": lambda: first_round(
            bandits.albl(rules, k=3, horizon=5), key, make_view(0)
        ),
        "cannot choose 30 rows of a pool of 20": lambda: first_round(
            bandits.albl(rules, k=30, horizon=5), key, make_view(0)
        ),
    }.items():
        with pytest.raises(ValueError, match=name):
            wrong()
    bandits.albl(rules * 25, **good, exploration=jnp.float32(1 / 50))
