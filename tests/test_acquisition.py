"""Query rules against plain float64 NumPy, and their indifference to how the pool is cut or ordered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import Decision, Learner, Policy, Prediction, acquisition, check_policy, parallel, policies
from views import make_view, probabilities, reorder


def plain_entropy(p):
    return -sum(q * np.log(q) for q in p if q > 0)


def plain_margin(members):
    best = np.sort(members.mean(0))
    return best[-2] - best[-1]


def plain_vote_entropy(members):
    return plain_entropy(np.bincount(members.argmax(-1), minlength=members.shape[-1]) / len(members))


def plain_mean_kl(members):
    centre = members.mean(0)
    return np.mean([sum(p * np.log(p / q) for p, q in zip(member, centre, strict=True)) for member in members])


def plain_bald(members):
    return plain_entropy(members.mean(0)) - np.mean([plain_entropy(member) for member in members])


SCORERS = {  # scorer, its definition: members' probabilities [m, c] of one row -> score
    "random": (acquisition.random, None),
    "least_confident": (acquisition.least_confident, lambda members: np.log(members.mean(0).max()) * -1),
    "margin": (acquisition.margin, plain_margin),
    "entropy": (acquisition.entropy, lambda members: plain_entropy(members.mean(0))),
    "vote_entropy": (acquisition.vote_entropy, plain_vote_entropy),
    "consensus_entropy": (acquisition.consensus_entropy, lambda members: plain_entropy(members.mean(0))),
    "mean_kl": (acquisition.mean_kl, plain_mean_kl),
    "bald": (acquisition.bald, plain_bald),
}

COMMITTEE = ("vote_entropy", "consensus_entropy", "mean_kl", "bald")  # rules that a single model cannot serve

POLICIES = {
    **{f"top_k of {name}": acquisition.top_k(scorer, k=4) for name, (scorer, _) in SCORERS.items()},
    "typical": acquisition.typical(k=4, neighbours=5),
    "typical, few anchors": acquisition.typical(k=4, neighbours=3, anchors=6),
}
POLICIES["one_of"] = acquisition.one_of([POLICIES["top_k of margin"], POLICIES["typical"]])


def asked(members):
    """The names of the scorers that look at this many members."""
    return [name for name in SCORERS if members > 1 or name not in COMMITTEE]


def all_scores(key, view):
    """Every scorer of the table that the members allow side by side, `[n, scorers]`."""
    names = asked(view.prediction.logits.shape[0])
    return jnp.stack([SCORERS[name][0](key, view) for name in names], axis=-1)


ALL_SCORES = jax.jit(all_scores)


@pytest.mark.parametrize("members", [1, 3])
def test_scores_against_their_definitions(key, members):
    view = make_view(0, members=members)
    got = ALL_SCORES(key, view)
    probs = probabilities(np.asarray(view.prediction.logits, np.float64))
    for column, name in enumerate(asked(members)):
        plain = SCORERS[name][1]
        if plain is not None:
            wanted = [plain(probs[:, i]) for i in range(20)]
            np.testing.assert_allclose(got[:, column], wanted, rtol=1e-4, atol=1e-6, err_msg=name)


def test_random_is_uniform_and_new_with_every_key(key):
    view = make_view(0, n=40)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: acquisition.random(key, view)))(jax.random.split(key, 500)))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert len(np.unique(draws)) > 0.99 * draws.size
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.15


def test_scores_of_one_row_do_not_depend_on_the_others(key):
    view = make_view(1, n=7)
    whole = ALL_SCORES(key, view)
    for i in range(7):
        one = slice(i, i + 1)
        alone = view._replace(
            **{name: getattr(view, name)[one] for name in ("x", "row", "weight", "queried", "cost")},
            prediction=jax.tree.map(lambda leaf, one=one: leaf[:, one], view.prediction),
        )
        np.testing.assert_allclose(ALL_SCORES(key, alone)[0], whole[i], rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(ALL_SCORES(key, reorder(view, order)), whole[order], rtol=1e-6, atol=1e-7)


LINEAR = Learner(
    init=None,
    adapt=None,
    predict=lambda params, x: Prediction(logits=jnp.einsum("nd,mdc->mnc", x, params), embedding=x[None]),
    meta_grad=None,
)


@pytest.mark.parametrize("n", [40, 37])
def test_whole_is_chunked_is_spread_over_devices(key, n):
    x, params = jax.random.normal(key, (n, 5)), 3 * jax.random.normal(jax.random.key(1), (3, 5, 4))
    row = 1000 + jax.random.permutation(key, n).astype(jnp.int32)

    def score(chunk):
        return jax.jit(lambda key: acquisition.score_pool(key, LINEAR, params, all_scores, x, row, chunk=chunk))(key)

    whole = score(None)
    assert whole.shape == (n, len(SCORERS))
    spread = parallel.pool_scorer(LINEAR, all_scores, chunk=None if n == 40 else 4)(key, params, x, row)
    for other in (score(8), spread):
        np.testing.assert_array_equal(other[:, 0], whole[:, 0])  # random bits: exactly
        np.testing.assert_allclose(other, whole, rtol=1e-4, atol=1e-5)
    predict = jax.jit(lambda: [acquisition.predict_pool(LINEAR, params, x, chunk=chunk) for chunk in (None, 8)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *predict())


def test_scores_of_sure_models_are_finite(key):
    rows = [[1e4, -1e4, 0, 0], [-1e4, -1e4, 1e4, 1e4], [0, 0, 0, 0], [1e4, 1e4, 1e4, 1e4], [1e4, 0, 0, 0]]
    logits = np.stack([rows, np.roll(rows, 1, axis=1), rows]).astype(np.float32)
    view = make_view(0, n=5)
    for members in (logits, logits[:1]):
        scores = ALL_SCORES(key, view._replace(prediction=view.prediction._replace(logits=jnp.asarray(members))))
        assert np.isfinite(scores).all()
    single = dict(zip(asked(1), np.asarray(scores).T, strict=True))
    np.testing.assert_allclose(single["entropy"], [0, np.log(2), np.log(4), np.log(4), 0], atol=1e-5)
    np.testing.assert_allclose(single["margin"], [-1, 0, 0, 0, -1], atol=1e-6)


def test_least_confident_does_not_saturate(key):
    """The largest probability is 1 in float32 for all three; its logarithm still orders them."""
    logits = jnp.asarray([[[30.0, 0.0], [20.0, 0.0], [25.0, 0.0]]])
    view = make_view(0, n=3)
    scores = acquisition.least_confident(key, view._replace(prediction=Prediction(logits, logits)))
    assert np.argsort(scores).tolist() == [0, 2, 1]
    np.testing.assert_allclose(scores, np.log1p(np.exp([-30.0, -20.0, -25.0])), rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_keep_the_contract(key, name):
    view = make_view(2, queried=(3, 5), labelled=(1, 8), padding=3)
    check_policy(POLICIES[name], key, view, k=4)


@pytest.mark.parametrize("name", ["top_k of entropy", "typical"])
@pytest.mark.parametrize("left", [(6, 11), ()])
def test_policies_ask_for_what_is_left(key, name, left):
    view = make_view(2, padding=3)
    check_policy(POLICIES[name], key, view._replace(queried=~jnp.isin(view.row, jnp.asarray(left, jnp.int32))), k=4)


def test_one_of_is_the_rule_whose_number_it_is_given(key):
    """In one program, and, with the number vmapped, in one call."""
    rules = [POLICIES["top_k of margin"], POLICIES["typical"]]
    both, traced = acquisition.one_of(rules), []
    view = make_view(4, queried=(3,), labelled=(1,))

    @jax.jit
    def pick(number):
        traced.append(number)
        params = (number, both.init(key)[1])
        return both.act(key, params, both.begin(key, params, view), view)[0].index

    wanted = [
        jax.jit(lambda rule=rule: rule.act(key, (), rule.begin(key, (), view), view)[0].index)() for rule in rules
    ]
    assert (wanted[0] != wanted[1]).any()
    for number in range(2):
        np.testing.assert_array_equal(pick(jnp.int32(number)), wanted[number])
    assert len(traced) == 1
    np.testing.assert_array_equal(jax.vmap(pick)(jnp.arange(2)), np.stack(wanted))
    with pytest.raises(ValueError, match="one_of"):
        acquisition.one_of([])


def decide(index, valid=None, scores=None):
    """A policy that does always the same."""

    def act(key, policy_state, view):
        mask = jnp.ones(len(index), bool) if valid is None else jnp.asarray(valid)
        return Decision(jnp.asarray(index), mask, jnp.zeros(()), jnp.zeros(20) if scores is None else scores)

    return Policy(
        init=lambda key: (),
        begin=lambda key, params, view: (),
        act=lambda key, params, state, view: (act(key, (), view), ()),
    )


BROKEN = {
    "repeats a row": (decide([4, 6, 4, 7]), "distinct"),
    "asks a queried row": (decide([4, 6, 3, 7]), "padded or already queried"),
    "asks a padding row": (decide([4, 6, 19, 7]), "padded or already queried"),
    "leaves rows out": (decide([4, 6, 9, 7], [True, True, True, False]), "4 rows can be asked for"),
    "wrong k": (decide([4, 6, 9]), "shapes"),
    "wrong scores": (decide([4, 6, 9, 7], scores=jnp.zeros(4)), "shapes"),
    "wide index": (decide(np.asarray([4.0, 6.0, 9.0, 7.0], np.float32)), "int32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_finds_what_is_wrong(key, name):
    view = make_view(2, queried=(3, 5), labelled=(1, 8), padding=3)
    check_policy(decide([4, 6, 9, 7]), key, view, k=4)
    policy, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_policy(policy, key, view, k=4)


SELECT = jax.jit(acquisition.select_top, static_argnums=4)


def test_ties_are_broken_by_the_key_and_not_by_position(key):
    scores = jnp.asarray([5.0, 1, 2, 2, 9, 2, 2, 7, 2, 0])  # three above, five tied for two places
    available, row = jnp.ones(10, bool), 50 + jnp.arange(10)
    keys = jax.random.split(key, 400)
    select = jax.jit(jax.vmap(lambda key, scores, row: acquisition.select_top(key, scores, available, row, 5)[0],
                              in_axes=(0, None, None)))  # fmt: skip
    chosen = np.asarray(select(keys, scores, row))
    assert (chosen[:, :3] == [4, 7, 0]).all()  # best first
    counts = np.bincount(chosen[:, 3:].ravel(), minlength=10)
    assert counts[[0, 1, 4, 7, 9]].sum() == 0
    wanted = 400 * 2 / 5
    assert ((counts[[2, 3, 5, 6, 8]] - wanted) ** 2 / wanted).sum() < 18.5  # 4 degrees of freedom, p = 0.001
    order = np.random.default_rng(1).permutation(10)
    moved = np.asarray(select(keys, scores[order], row[order]))
    np.testing.assert_array_equal(order[moved], chosen)


def test_select_top_against_brute_force(key):
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 4, size=(200, 12)).astype(np.float32)
    available = rng.random((200, 12)) < 0.6
    index, valid = jax.jit(
        jax.vmap(lambda key, s, a: acquisition.select_top(key, s, a, jnp.arange(12), 5), in_axes=(0, 0, 0))
    )(jax.random.split(key, 200), scores, available)
    for i in range(200):
        got = np.asarray(index[i])[np.asarray(valid[i])]
        assert len(got) == len(set(got.tolist())) == min(5, available[i].sum())
        assert available[i][got].all()
        best = np.sort(scores[i][available[i]])[::-1][:5]
        np.testing.assert_array_equal(scores[i][got], best)


def test_select_top_of_scores_that_are_not_finite(key):
    scores = jnp.asarray([jnp.nan, jnp.inf, 1.0, -jnp.inf, jnp.inf, 3.0])
    row = jnp.arange(6)
    index, valid = SELECT(key, scores, jnp.ones(6, bool), row, 6)
    assert valid.all()
    assert set(index[:2].tolist()) == {1, 4}
    assert index[2:4].tolist() == [5, 2]
    assert set(index[4:].tolist()) == {0, 3}
    index, valid = SELECT(key, jnp.full(6, jnp.nan), row != 2, row, 6)
    assert valid.sum() == 5
    assert sorted(index.tolist()) == list(range(6))
    assert not valid[index == 2].any()
    index, valid = SELECT(key, jnp.full(6, -jnp.inf), row == 4, row, 3)  # worst scores still beat what is not there
    assert index[valid].tolist() == [4]


@pytest.mark.parametrize("k", [0, 7])
def test_more_rows_than_the_pool_has(key, k):
    with pytest.raises(ValueError, match=f"cannot choose {k} rows of a pool of 6"):
        acquisition.select_top(key, jnp.zeros(6), jnp.ones(6, bool), jnp.arange(6), k)


def test_arguments_are_checked(key):
    for name, wrong in {
        "k": lambda: acquisition.top_k(acquisition.margin, k=0),
        "neighbours": lambda: acquisition.typical(k=1, neighbours=0),
        "anchors": lambda: acquisition.typical(k=1, anchors=0),
        "chunk": lambda: acquisition.predict_pool(LINEAR, jnp.zeros((1, 3, 2)), jnp.zeros((4, 3)), chunk=0),
        "pool of 20": lambda: acquisition.typical(k=21).act(key, (), (jnp.zeros((20, 2)), jnp.ones(20)), make_view(0)),
    }.items():
        with pytest.raises(ValueError, match=name):
            wrong()


def plain_typical(view, k, neighbours):
    """`typical` from its description, with every row of the pool an anchor."""
    z = np.asarray(view.prediction.embedding[0], np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    n, real = len(z), np.asarray(view.weight) > 0
    typicality = []
    for i in range(n):
        distances = sorted(np.linalg.norm(z[i] - z[j]) for j in range(n) if real[j] and j != i)
        typicality.append(1 / np.mean(distances[:neighbours]))
    covered = [int(i) for i in view.labelled_index if i >= 0]
    left = [i for i in range(n) if bool(view.available[i])]
    picks = []
    for _ in range(k):
        novelty = [min((np.linalg.norm(z[i] - z[j]) for j in covered), default=2.0) for i in range(n)]
        best = max(left, key=lambda i: typicality[i] * novelty[i])
        picks.append(best)
        left.remove(best)
        covered.append(best)
    return picks, np.asarray(typicality)


RULE = acquisition.typical(k=5, neighbours=4)


@jax.jit
def run_typical(key, view):
    state = RULE.begin(key, (), view)
    return RULE.act(key, (), state, view)[0], state[1]


@pytest.mark.parametrize("labelled", [(), (2,), (7, 1, 12)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_typical_against_numpy(key, seed, labelled):
    view = make_view(seed, queried=(4, 9), labelled=labelled, padding=3)
    decision, typicality = run_typical(key, view)
    picks, wanted = plain_typical(view, 5, 4)
    assert decision.index.tolist() == picks
    assert decision.valid.all()
    np.testing.assert_allclose(typicality[:17], wanted[:17], rtol=1e-3)
    if not labelled:  # a cold start begins with the most typical row that may be asked for
        assert picks[0] == max((i for i in range(17) if i not in (4, 9)), key=lambda i: wanted[i])


def test_typical_does_not_depend_on_the_order_of_the_pool(key):
    rule = acquisition.typical(k=5, neighbours=3, anchors=8)

    @jax.jit
    def pick(key, view):
        return rule.act(key, (), rule.begin(key, (), view), view)[0].index

    view = make_view(3, n=17, queried=(4,), labelled=(2, 11))
    order = np.random.default_rng(2).permutation(17)
    anchors = set()
    for one in jax.random.split(key, 4):
        index = pick(one, view)
        assert order[pick(one, reorder(view, order))].tolist() == index.tolist()
        anchors.add(tuple(index.tolist()))
    assert len(anchors) > 1  # other keys, other anchors


def test_typical_among_copies_of_one_row(key):
    """All typicality and novelty equal: still distinct rows, and the key decides which."""
    view = make_view(0)
    view = view._replace(prediction=view.prediction._replace(embedding=jnp.ones((1, 20, 5))))
    picks = {tuple(run_typical(one, view)[0].index.tolist()) for one in jax.random.split(key, 5)}
    assert all(len(set(pick)) == 5 for pick in picks)
    assert len(picks) > 1


@pytest.mark.parametrize("features", [2, 16])
def test_typicality_far_from_the_origin(key, features):
    """Four blobs plus 1000 in every coordinate: unit vectors that nearly agree, and differ by what they are."""
    rng = np.random.default_rng(0)
    corners = np.zeros((4, features))
    corners[:, :2] = 6 * np.asarray([[0, 0], [0, 1], [1, 0], [1, 1]])
    z = (np.repeat(corners, 50, axis=0) + rng.normal(size=(200, features)) + 1000).astype(np.float32)
    view = make_view(0, n=200)
    view = view._replace(prediction=view.prediction._replace(embedding=jnp.asarray(z[None])))
    unit = z.astype(np.float64) / np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True)
    between = np.linalg.norm(unit[:, None] - unit, axis=-1)
    wanted = 1 / np.sort(between, axis=1)[:, 1:21].mean(1)
    np.testing.assert_allclose(acquisition.typical(k=5).begin(key, (), view)[1], wanted, rtol=1e-3)


@pytest.mark.parametrize("wrong", ["cifar10", acquisition.margin, 3])
def test_what_is_no_policy_is_refused_with_what_to_type(wrong):
    """By whatever takes policies; a scorer is the usual mistake."""
    typed = {"cifar10": "policies.load", 3: "acquisition.typical"}.get(wrong, r"acquisition.top_k\(margin, k=10\)")
    rule = acquisition.typical(k=2)
    for takes in (
        lambda: acquisition.one_of([rule, wrong]),
        lambda: acquisition.planned(wrong, rows=2),
        lambda: acquisition.subsampled(wrong, rows=10),
        lambda: acquisition.epsilon_mixture(rule, wrong, epsilon=0.1),
        lambda: acquisition.switch_at([wrong, rule], labels=[3]),
        lambda: acquisition.with_learner(wrong, LINEAR),
        lambda: policies.exp4p([rule, wrong], k=2, horizon=3, reward=lambda view, probability: 0.0),
        lambda: policies.selector([wrong], None, k=2),
        lambda: policies.fixed(wrong, ()),
    ):
        with pytest.raises(ValueError, match=f"a Policy is wanted, got .*{typed}"):
            takes()


def test_what_is_no_scorer_is_refused():
    for wrong in (acquisition.typical(k=2), "margin"):
        for takes in (
            lambda wrong: acquisition.top_k(wrong, k=2),
            lambda wrong: acquisition.stochastic_top_k(wrong, k=2),
            lambda wrong: acquisition.diverse(wrong, k=2),
            lambda wrong: acquisition.class_balanced(wrong, k=2),
            lambda wrong: acquisition.cluster_balanced(wrong, k=2),
            acquisition.per_cost,
            acquisition.density_weighted,
            lambda wrong: acquisition.tempered(wrong, temperature=2.0),
            lambda wrong: acquisition.sum_of_ranks([acquisition.margin, wrong]),
        ):
            with pytest.raises(ValueError, match="a scorer is wanted"):
                takes(wrong)
