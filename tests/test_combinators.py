"""Lifts and combinators against plain NumPy, and what they do to the rules they are made of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata

from metaal_jax import Learner, Prediction, acquisition, check_policy, tasks
from metaal_jax.acquisition.lifts import descending_rank
from metaal_jax.loop import active_learner
from views import make_view, probabilities, reorder


def fixed(values):
    """A scorer that says what it was told."""
    return lambda key, view: jnp.asarray(values, jnp.float32)[view.row]


def decide(policy, key, view, params=()):
    begin_key, act_key = jax.random.split(key)
    return policy.act(act_key, params, policy.begin(begin_key, params, view), view)[0]


VIEW = make_view(0, n=6, members=1, capacity=3)
SCORES = np.array([0.5, 0.1, 2.0, 0.0, 1.0, 0.4])
LOGITS = {
    "softmax": lambda s, r, beta: beta * s,
    "power": lambda s, r, beta: beta * np.log(np.maximum(s, 1e-30)),
    "rank": lambda s, r, beta: -beta * np.log(r),
}


def plackett_luce(logits, order, left):
    weight, left, total = np.exp(logits), list(left), 0.0
    for i in order:
        total += np.log(weight[i] / weight[left].sum())
        left.remove(i)
    return total


@pytest.mark.parametrize("kind", LOGITS)
def test_stochastic_batches_have_the_probabilities_of_the_paper(key, kind):
    """Frequencies of ordered pairs against Plackett-Luce, and the recorded log-probability of each."""
    view = VIEW._replace(queried=VIEW.row == 4)
    policy = acquisition.stochastic_top_k(fixed(SCORES), k=2, kind=kind, beta=1.5)
    draws = jax.jit(jax.vmap(lambda key: decide(policy, key, view)))(jax.random.split(key, 4000))
    left = [0, 1, 2, 3, 5]
    ranks = np.zeros(6)
    ranks[left] = rankdata(-SCORES[left])
    logits = LOGITS[kind](SCORES, np.maximum(ranks, 1), 1.5)
    pairs = [tuple(pair) for pair in np.asarray(draws.index).tolist()]
    wanted = {pair: plackett_luce(logits, pair, left) for pair in itertools.permutations(left, 2)}
    assert set(pairs) <= set(wanted)
    for pair, log_prob in zip(pairs[:200], np.asarray(draws.log_prob)[:200], strict=True):
        np.testing.assert_allclose(log_prob, wanted[pair], rtol=1e-4, atol=1e-4)
    counts = np.array([pairs.count(pair) for pair in wanted])
    expected = 4000 * np.exp(list(wanted.values()))
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert statistic < common.sum() + 4.5 * np.sqrt(2 * common.sum())  # far in the tail of chi-squared


@pytest.mark.parametrize("kind", ["softmax", "power"])
def test_the_log_probability_has_a_gradient(key, kind):
    """With respect to the scores and beta, by finite differences, also with fewer rows left than are wanted."""
    for queried in (VIEW.queried, VIEW.row != 2):
        view = VIEW._replace(queried=queried)

        def log_prob(scores, beta, view=view):
            policy = acquisition.stochastic_top_k(lambda key, view: scores, k=2, kind=kind, beta=beta)
            return decide(policy, key, view).log_prob

        scores, beta = jnp.asarray(SCORES + 0.3, jnp.float32), jnp.float32(0.7)
        value = jax.jit(log_prob)
        got = jax.jit(jax.grad(log_prob, argnums=(0, 1)))(scores, beta)
        step = 1e-2
        for i in range(6):
            ahead, behind = (value(scores.at[i].add(sign * step), beta) for sign in (1, -1))
            np.testing.assert_allclose(got[0][i], (ahead - behind) / (2 * step), atol=3e-3)
        difference = (value(scores, beta + step) - value(scores, beta - step)) / (2 * step)
        np.testing.assert_allclose(got[1], difference, atol=3e-3)


def test_descending_ranks_against_scipy():
    scores = jnp.asarray([3.0, 1, 1, 7, -jnp.inf, 1, 3])
    available = jnp.asarray([True, True, True, True, True, False, True])
    got = np.asarray(jax.jit(descending_rank)(scores, available))
    np.testing.assert_allclose(got[np.asarray(available)], rankdata([-3, -1, -1, -7, np.inf, -3]))
    assert got[5] == 7


def test_ranks_are_combined(key):
    view = VIEW._replace(queried=VIEW.row == 5)
    a, b = np.array([1.0, 2, 3, 4, 5, 9]), np.array([50.0, 40, 10, 30, 20, 99])
    ranks = rankdata(-a[:5]), rankdata(-b[:5])
    total = acquisition.sum_of_ranks([fixed(a), fixed(b)], weights=[2.0, 1.0])(key, view)
    np.testing.assert_allclose(total[:5], -(2 * ranks[0] + ranks[1]))
    product = acquisition.product_of_ranks([fixed(a), fixed(b)])(key, view)
    np.testing.assert_allclose(product[:5], -np.log(ranks[0] * ranks[1]), rtol=1e-6)


def plain_diverse(view, scores, k, balance):
    z = np.asarray(view.prediction.embedding[0], np.float64)
    available = np.flatnonzero(np.asarray(view.available))
    low, high = scores[available].min(), scores[available].max()
    scaled = (scores - low) / (high - low)
    covered, picks = [int(i) for i in view.labelled_index if i >= 0], []
    for _ in range(k):

        def value(i):
            if not covered:
                return scaled[i]
            nearest = min(np.linalg.norm(z[i] - z[j]) for j in covered)
            share = (18 - len(covered)) / 18 if balance is None else balance
            return share * (1 - 1 / (1 + nearest)) + (1 - share) * scaled[i]

        best = max((i for i in available if i not in picks), key=value)
        picks.append(best)
        covered.append(best)
    return picks


@pytest.mark.parametrize("labelled", [(), (2, 11)])
def test_diverse_against_numpy(key, labelled):
    view = make_view(4, queried=(3,), labelled=labelled, padding=2)
    scores = np.random.default_rng(0).normal(size=20)
    for balance in (0.6, None):
        policy = acquisition.diverse(fixed(scores), k=5, balance=balance)
        got = jax.jit(lambda key, view, p=policy: decide(p, key, view))(key, view)
        assert got.index.tolist() == plain_diverse(view, scores, 5, balance)
    # Another distance, here one that sees the first feature only.
    policy = acquisition.diverse(fixed(scores), k=5, balance=1.0, distance=lambda z, row: jnp.abs(z[:, 0] - row[0]))
    flat = view._replace(prediction=view.prediction._replace(embedding=view.prediction.embedding[..., :1]))
    if labelled:
        assert decide(policy, key, view).index.tolist() == plain_diverse(flat, scores, 5, 1.0)


def test_class_balance_comes_before_the_score(key):
    view = make_view(4, members=1, classes=3, labelled=(1, 8, 9), queried=(3,), padding=2)
    labelled = view.labelled._replace(y=jnp.asarray([0, 0, 1, 0, 0, 0]), weight=jnp.asarray([1.0, 1, 1, 0, 0, 0]))
    view = view._replace(labelled=labelled)
    scores = np.random.default_rng(1).normal(size=20)
    predicted = np.asarray(view.prediction.logits[0]).argmax(-1)
    counts, left, wanted = np.array([2, 1, 0]), np.flatnonzero(np.asarray(view.available)).tolist(), []
    for _ in range(8):
        least = min(counts[predicted[i]] for i in left)
        best = max((i for i in left if counts[predicted[i]] == least), key=lambda i: scores[i])
        wanted.append(best)
        left.remove(best)
        counts[predicted[best]] += 1
    decision = decide(acquisition.class_balanced(fixed(scores), k=8), key, view)
    assert decision.index.tolist() == wanted


def test_temperature_divides_the_logits(key):
    view = make_view(1, members=2)
    got = acquisition.tempered(acquisition.entropy, temperature=2.5)(key, view)
    p = probabilities(np.asarray(view.prediction.logits, np.float64) / 2.5).mean(0)
    np.testing.assert_allclose(got, -(p * np.log(p)).sum(-1), rtol=1e-5)


def test_ratio_is_the_second_over_the_first(key):
    view = make_view(1, members=1)
    p = np.sort(probabilities(np.asarray(view.prediction.logits[0], np.float64)))
    np.testing.assert_allclose(acquisition.ratio(key, view), p[:, -2] / p[:, -1], rtol=1e-5)


def test_a_subsample_is_drawn_afresh_and_holds_the_labelled_rows(key):
    """The rule meets random available rows, and its memory of labelled rows stays right."""
    view = make_view(3, n=20, queried=(4,), labelled=(2, 11), padding=3)
    seen = []

    def scorer(key, view):
        jax.debug.callback(lambda *arrays: seen.append([np.asarray(a) for a in arrays]),
                           view.row, view.weight, view.available, view.labelled_index)  # fmt: skip
        return view.row.astype(jnp.float32)

    policy = acquisition.subsampled(acquisition.top_k(scorer, k=3), rows=7)
    run = jax.jit(lambda key: decide(policy, key, view))
    drawn = set()
    for one in jax.random.split(key, 20):
        decision = run(one)
        jax.effects_barrier()
        row, weight, available, labelled_index = seen[-1]
        assert len(row) == 6 + 7
        assert row[labelled_index[:2]].tolist() == [2, 11]
        assert (labelled_index[2:] == -1).all()
        assert weight.tolist() == [1, 1, 0, 0, 0, 0] + [1] * 7
        assert not available[:6].any()
        sample = row[6:].tolist()
        assert len(set(sample)) == 7
        assert all(bool(view.available[i]) for i in sample)
        assert decision.index.tolist() == sorted(sample, reverse=True)[:3]
        assert np.flatnonzero(np.isfinite(decision.scores)).tolist() == sorted(sample)
        drawn |= set(sample)
    assert drawn == set(range(17)) - {2, 4, 11}
    few = view._replace(queried=view.row > 1)
    decision = decide(policy, key, few)
    assert sorted(decision.index[decision.valid].tolist()) == [0, 1]
    order = np.random.default_rng(1).permutation(20)
    moved = decide(policy, key, reorder(view, order))
    assert order[moved.index].tolist() == run(key).index.tolist()
    with pytest.raises(ValueError, match="cannot choose 3 rows of a pool of 2"):
        decide(acquisition.subsampled(acquisition.top_k(scorer, k=3), rows=2), key, view)


def test_a_mixture_takes_its_share_from_the_other_rule(key):
    view = make_view(0, n=20, members=1)
    down, up = (acquisition.top_k(fixed(sign * np.arange(20.0)), k=5) for sign in (1, -1))
    policy = acquisition.epsilon_mixture(down, up, epsilon=0.3)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: decide(policy, key, view).index))(jax.random.split(key, 500)))
    other = (draws < 10).sum(1)
    for index, m in zip(draws, other, strict=True):
        assert index.tolist() == [19, 18, 17, 16, 15][: 5 - m] + [0, 1, 2, 3, 4][:m]
    counts = np.bincount(other, minlength=6)
    wanted = 500 * np.array([0.16807, 0.36015, 0.3087, 0.1323, 0.02835, 0.00243])
    assert ((counts - wanted) ** 2 / wanted).sum() < 25  # 5 degrees of freedom
    check_policy(policy, key, make_view(2, queried=(3, 5), labelled=(1, 8), padding=3), k=5)
    # Both rules want the same rows: the other's are new ones.
    twice = decide(acquisition.epsilon_mixture(down, down, epsilon=0.5), key, view)
    assert sorted(twice.index.tolist()) == [15, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="batches of 5 and of 2"):
        decide(acquisition.epsilon_mixture(down, acquisition.top_k(fixed(SCORES), k=2), epsilon=0.5), key, view)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_rules_change_over_at_their_number_of_labels(key, count):
    view = make_view(0, labelled=tuple(range(count)), capacity=6)
    rules = [acquisition.top_k(fixed(np.roll(np.arange(20.0), shift)), k=1) for shift in (0, 5, 9)]
    policy = acquisition.switch_at(rules, labels=[2, 3])
    wanted = {0: 19, 1: 19, 2: 4, 3: 8, 5: 8}[count]
    assert decide(policy, key, view).index.tolist() == [wanted]


def test_a_plan_is_asked_for_row_by_row(key):
    """In its order, whatever the scores say by then; rows that were answered elsewhere drop out; then a new plan."""
    scores = np.roll(np.arange(20.0), 7)
    batch = acquisition.top_k(fixed(scores), k=4)
    policy = acquisition.planned(batch, rows=4)
    check_policy(policy, key, make_view(0, labelled=(1, 2), queried=(5,), padding=3), k=1)
    check_policy(acquisition.planned(batch, rows=4, k=2), key, make_view(0, queried=(5,)), k=2)
    wanted = decide(batch, key, make_view(0)).index.tolist()
    act = jax.jit(policy.act)
    state, queried, asked = policy.begin(key, (), make_view(0)), [], []
    for turn in range(5):
        decision, state = act(jax.random.fold_in(key, turn), (), state, make_view(turn, queried=tuple(queried)))
        assert decision.valid.all()
        assert decision.scores.argmax() == decision.index[0]
        asked.append(int(decision.index[0]))
        queried.append(asked[-1])
        if turn == 1:
            queried.append(wanted[2])
    assert asked[:3] == [wanted[0], wanted[1], wanted[3]]
    assert asked[3:] == [row for row in np.argsort(-scores) if row not in wanted][:2]
    nothing = act(key, (), state, make_view(0, queried=tuple(range(20))))[0]
    assert not nothing.valid.any()
    with pytest.raises(ValueError, match="asks for 4 rows, the plan is of 6"):
        decide(acquisition.planned(batch, rows=6), key, make_view(0))


CLASSES = 3
NEAREST = Learner(
    init=lambda key, x: jax.random.normal(key, (CLASSES, x.shape[-1])),
    adapt=lambda key, meta, batch, **_: meta + batch.weight.sum(),
    predict=lambda params, x: Prediction(logits=jnp.stack([x @ params.T, -x @ params.T]), embedding=x[None]),
    meta_grad=None,
)


def test_a_policy_sees_another_learner(key):
    """Its predictions, parameters and, with a start of its own, meta-parameters drawn once for the whole run."""
    view = make_view(0, members=1, labelled=(3, 4))
    view = view._replace(labelled=view.labelled._replace(weight=jnp.arange(6.0) < 2), meta=jnp.ones((CLASSES, 3)))
    seen = {}

    def scorer(key, view):
        seen.update(members=view.prediction.logits.shape[0], meta=view.meta, params=view.params)
        return view.prediction.logits[0, :, 0]

    shared = acquisition.with_learner(acquisition.top_k(scorer, k=2), NEAREST)
    decide(shared, key, view)
    assert seen["members"] == 2
    np.testing.assert_array_equal(seen["params"], 3.0)
    own = acquisition.with_learner(acquisition.top_k(scorer, k=2), NEAREST, own_start=True)
    state = own.begin(key, (), view)
    first = own.act(key, (), state, view)
    meta = seen["meta"]
    own.act(jax.random.key(5), (), first[1], view)
    np.testing.assert_array_equal(seen["meta"], meta)
    assert not np.array_equal(meta, view.meta)


def test_gain_per_cost(key):
    view = VIEW._replace(cost=jnp.asarray([1.0, 0.1, 8, 1, 2, 0]))
    np.testing.assert_allclose(
        acquisition.per_cost(fixed(SCORES))(key, view)[:5], SCORES[:5] / [1, 0.1, 8, 1, 2], rtol=1e-6
    )
    assert decide(acquisition.top_k(acquisition.per_cost(fixed(SCORES)), k=2), key, view).index[0] == 5
    with pytest.raises(ValueError, match="must not be negative"):
        acquisition.per_cost(fixed(-SCORES))(key, view)


def test_a_budget_in_units_of_cost(key):
    """Rows are bought best first while they can be paid; a row too dear does not bar the cheaper ones behind it."""
    x = jnp.arange(8.0)[:, None]
    y = jnp.arange(8) % 3
    cost = jnp.asarray([1.0, 1, 2, 5, 2, 1, 4, 3])
    problem = tasks.problem(x, y, x, y, cost=cost)
    policy = acquisition.top_k(fixed(np.arange(8.0)), k=8)
    active = active_learner(NEAREST, policy, capacity=8, budget=9.0)
    meta = NEAREST.init(key, x)
    state = active.init(key, meta, (), problem)
    decision, state = active.ask(key, meta, (), state, problem)
    # 7 costs 3, 6 costs 4, 5 costs 1; then 1 is left: 4, 3 and 2 are too dear, 1 costs 1.
    assert decision.index[decision.valid].tolist() == [7, 6, 5, 1]
    state = active.tell(key, meta, state, problem, decision, y[decision.index], jnp.ones(8))
    assert float(state.spent) == 9.0
    assert not active.ask(key, meta, (), state, problem)[0].valid.any()
    poor = active_learner(NEAREST, policy, capacity=8, budget=0.5)
    with pytest.raises(ValueError, match=r"a budget of 0.5 buys nothing, the cheapest label costs 1"):
        poor.init(key, meta, (), problem)
    state = jax.jit(lambda: poor.init(key, meta, (), problem))()  # inside a program: nothing is ever asked
    assert not poor.ask(key, meta, (), state, problem)[0].valid.any()
    start = tasks.problem(x, y, x, y, cost=cost, initial=jnp.asarray([3, 6]))
    with pytest.raises(ValueError, match=r"the initial set costs 9.0, more than the budget of 4"):
        active_learner(NEAREST, policy, capacity=8, budget=4.0).init(key, meta, (), start)
    with pytest.raises(ValueError, match=r"costs must not be negative, got -5"):
        active.init(key, meta, (), problem._replace(cost=-cost))
    for bad in (-cost, cost.at[0].set(jnp.nan), cost[:3]):
        with pytest.raises(ValueError, match="cost"):
            tasks.problem(x, y, x, y, cost=bad)


def test_arguments_are_checked():
    margin = acquisition.margin
    rule = acquisition.top_k(margin, k=1)
    for name, wrong in {
        "temperature": lambda: acquisition.tempered(margin, temperature=0.0),
        "beta": lambda: acquisition.stochastic_top_k(margin, k=1, beta=-1.0),
        "kind": lambda: acquisition.stochastic_top_k(margin, k=1, kind="soft"),
        "k must": lambda: acquisition.stochastic_top_k(margin, k=0),
        "class_balanced: k": lambda: acquisition.class_balanced(margin, k=0),
        "balance": lambda: acquisition.diverse(margin, k=1, balance=1.5),
        "rows": lambda: acquisition.subsampled(rule, rows=0),
        "probability": lambda: acquisition.epsilon_mixture(rule, rule, epsilon=1.2),
        "no scorers": lambda: acquisition.sum_of_ranks([]),
        "as many weights": lambda: acquisition.product_of_ranks([margin], weights=[1.0, 2.0]),
        "multiple of k=3": lambda: acquisition.planned(rule, rows=10, k=3),
        "need 1 points": lambda: acquisition.switch_at([rule, rule], labels=[1, 2]),
        "ascend": lambda: acquisition.switch_at([rule, rule, rule], labels=[5, 5]),
    }.items():
        with pytest.raises(ValueError, match=name):
            wrong()


def test_scores_of_nan_and_factors_of_infinity(key):
    scores = np.array([np.nan, 0.5, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4])
    view = make_view(0, n=8, members=1, capacity=8)
    for kind in LOGITS:
        decision = decide(acquisition.stochastic_top_k(fixed(scores), k=8, kind=kind, beta=jnp.inf), key, view)
        assert decision.index.tolist() == [2, 6, 4, 1, 7, 3, 5, 0]
        assert decision.log_prob == 0
        drawn = decide(acquisition.stochastic_top_k(fixed(scores), k=8, kind=kind, beta=2.0), key, view)
        assert drawn.index[-1] == 0
        assert np.isfinite(drawn.log_prob)
    decision = decide(acquisition.diverse(fixed(scores), k=4, balance=0.0), key, view)
    assert decision.index.tolist() == [2, 6, 4, 1]
    ranked = acquisition.sum_of_ranks([fixed(scores), fixed(-np.arange(8.0))])
    assert decide(acquisition.top_k(ranked, k=8), key, view).index[-1] == 0
    for rule in (acquisition.class_balanced(fixed(scores), k=8), acquisition.cluster_balanced(fixed(scores), k=8)):
        assert decide(rule, key, view).index[-1] == 0


def test_rows_that_cost_nothing_come_first(key):
    """Whatever their score; among them the higher score does."""
    view = make_view(0, n=6, members=1, capacity=6)._replace(cost=jnp.asarray([1.0, 2.0, 0.0, 1e-6, 0.0, 4.0]))
    rule = acquisition.top_k(acquisition.per_cost(fixed(np.array([5.0, 4.0, 0.0, 9.0, 3.0, np.nan]))), k=6)
    assert decide(rule, key, view).index.tolist() == [4, 2, 3, 0, 1, 5]
