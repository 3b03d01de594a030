"""Rules that need several members: their values, and the refusal of a single model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import Learner, Prediction, acquisition
from metaal_jax.acquisition import information
from views import make_view, probabilities, reorder

SCORERS = {
    name: getattr(acquisition, name)
    for name in ("vote_entropy", "variation_ratio", "consensus_entropy", "mean_kl", "mean_std", "bald")
}


def entropy(p):
    p = np.asarray(p, np.float64).ravel()
    return -sum(q * np.log(q) for q in p if q > 0)


def decide(policy, params=()):
    return jax.jit(lambda key, view: policy.act(key, params, policy.begin(key, params, view), view)[0])


def test_variation_ratio_and_mean_std_against_their_definitions(key):
    view = make_view(0, members=5)
    probs = probabilities(np.asarray(view.prediction.logits, np.float64))
    votes = [np.bincount(probs[:, i].argmax(-1), minlength=4) for i in range(20)]
    ratio, std = jax.jit(lambda key, view: [SCORERS[name](key, view) for name in ("variation_ratio", "mean_std")])(
        key, view
    )
    np.testing.assert_allclose(ratio, [1 - v.max() / 5 for v in votes], atol=1e-6)
    wanted = [
        np.mean([np.sqrt(np.mean((p[:, j] - p[:, j].mean()) ** 2)) for j in range(4)]) for p in probs.swapaxes(0, 1)
    ]
    np.testing.assert_allclose(std, wanted, rtol=1e-5)


def test_members_that_agree_and_members_that_do_not(key):
    one, other = [1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]
    view = make_view(0, n=2, classes=3)
    logits = jnp.asarray([[one, one], [one, other]])  # row 0: agreement; row 1: two sure members against each other
    view = view._replace(prediction=view.prediction._replace(logits=logits))
    wanted = {"variation_ratio": 0.5, "mean_std": 1 / 3}
    for name, scorer in SCORERS.items():
        np.testing.assert_allclose(scorer(key, view), [0, wanted.get(name, np.log(2))], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", [*SCORERS, "epig", "batch_bald"])
def test_a_single_model_is_refused(key, name):
    view = make_view(0, members=1)
    policy = acquisition.top_k(SCORERS[name], k=2) if name in SCORERS else getattr(acquisition, name)(k=2)
    with pytest.raises(ValueError, match=f"{name}: a single model .*committee.*mc_dropout.*laplace"):
        policy.act(key, (), (), view)


def plain_epig(probs, targets):
    """From the definition: members' probabilities `[m, n, c]` and target rows -> `[n]`."""
    scores = []
    for i in range(probs.shape[1]):
        pairs = [np.mean([np.outer(p[i], p[j]) for p in probs], axis=0) for j in targets]
        scores.append(np.mean([entropy(p.sum(1)) + entropy(p.sum(0)) - entropy(p) for p in pairs]))
    return scores


@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_epig_against_numpy(key, monkeypatch, block):
    monkeypatch.setattr(information, "BLOCK_ELEMENTS", block)
    view = make_view(1, n=15, queried=(4,), labelled=(2,), padding=3)
    decision = decide(acquisition.epig(k=4, targets=50))(key, view)
    probs = probabilities(np.asarray(view.prediction.logits, np.float64))
    wanted = np.asarray(plain_epig(probs, [i for i in range(12) if i not in (2, 4)]))
    np.testing.assert_allclose(decision.scores[:12], wanted[:12], rtol=1e-4, atol=1e-6)
    left = np.asarray(view.available)
    assert decision.index.tolist() == sorted(np.flatnonzero(left), key=lambda i: -wanted[i])[:4]


LINEAR = Learner(
    init=None,
    adapt=None,
    predict=lambda params, x: Prediction(logits=jnp.einsum("nd,mdc->mnc", x, params), embedding=x[None]),
    meta_grad=None,
)


def test_epig_for_target_rows_of_ones_own(key):
    view = make_view(2, n=15)
    params = jax.random.normal(key, (3, 3, 4))
    view = view._replace(params=params, prediction=LINEAR.predict(params, view.x))
    x = 2 * jax.random.normal(jax.random.key(1), (6, 3)) + 1
    policy = acquisition.epig(LINEAR, k=3)
    run = jax.jit(lambda x, key, view: policy.act(key, x, policy.begin(key, x, view), view)[0].scores)
    both = np.concatenate([LINEAR.predict(params, rows).logits for rows in (view.x, x)], axis=1).astype(np.float64)
    np.testing.assert_allclose(
        run(x, key, view), plain_epig(probabilities(both), range(15, 21))[:15], rtol=1e-4, atol=1e-6
    )
    whole = decide(acquisition.epig(k=3, targets=15))(key, view)
    np.testing.assert_allclose(run(view.x, key, view), whole.scores, rtol=1e-5, atol=1e-6)
    few = acquisition.epig(k=3, targets=2)
    draws = jax.jit(jax.vmap(lambda key: few.act(key, (), (), view)[0].scores))(jax.random.split(key, 300))
    np.testing.assert_allclose(draws.mean(0), whole.scores, rtol=0.15)  # random targets estimate all of them
    assert draws.std(0).min() > 0


def test_epig_says_what_is_wrong_with_its_targets(key):
    view = make_view(2)._replace(params=jnp.zeros((2, 3, 4)))
    for message, policy, params in (
        ("with a learner the policy parameters are", acquisition.epig(LINEAR, k=2), ()),
        ("need epig\\(learner", acquisition.epig(k=2), view.x),
        ("targets have 2 members, the pool 3", acquisition.epig(LINEAR, k=2), view.x),
    ):
        with pytest.raises(ValueError, match=message):
            policy.act(key, params, (), view)


def joint_information(probs, rows):
    """Mutual information of the labels of `rows` and the member: the paper's joint score, over all configurations."""
    joint = 0.0
    for labels in itertools.product(range(probs.shape[2]), repeat=len(rows)):
        p = np.mean(np.prod([probs[:, i, y] for i, y in zip(rows, labels, strict=True)], axis=0))
        joint -= p * np.log(p) if p > 0 else 0
    return joint - sum(np.mean([entropy(p) for p in probs[:, i]]) for i in rows)


def plain_batch_bald(probs, available, k):
    """Greedy picks, and each one's joint score."""
    picks, scores, left = [], [], list(np.flatnonzero(available))
    for _ in range(k):
        joint = [joint_information(probs, [*picks, i]) for i in left]
        scores.append(max(joint))
        picks.append(left.pop(int(np.argmax(joint))))
    return picks, scores


@pytest.mark.parametrize("block", [1, 200, 2**20])  # floats: a row at a time, a few, the whole pool
def test_batch_bald_against_numpy(key, monkeypatch, block):
    monkeypatch.setattr(information, "BLOCK_ELEMENTS", block)
    run = decide(acquisition.batch_bald(k=4, configurations=27))
    for seed in (0, 1):
        view = make_view(seed, n=25, classes=3, members=6, queried=(3, 5), labelled=(1,), padding=3)
        decision = run(key, view)
        probs = probabilities(np.asarray(view.prediction.logits, np.float64))
        assert decision.index.tolist() == plain_batch_bald(probs, view.available, 4)[0]
        assert decision.valid.all()
        np.testing.assert_allclose(decision.scores[:22], acquisition.bald(key, view)[:22], rtol=1e-6)


def test_drawn_configurations_find_a_row_as_good_as_the_best(key):
    """The third and fourth pick rest on 60 configurations, drawn from 64 and 512."""
    run = decide(acquisition.batch_bald(k=4, configurations=60))
    shares = []
    for seed in range(4):
        view = make_view(seed, n=30, classes=8, members=4)
        probs = probabilities(np.asarray(view.prediction.logits, np.float64))
        picks = run(jax.random.fold_in(key, seed), view).index.tolist()
        before = joint_information(probs, picks[:3])
        gains = [joint_information(probs, [*picks[:3], i]) - before for i in range(30) if i not in picks[:3]]
        gain = joint_information(probs, picks) - before
        shares.append((gain - np.mean(gains)) / (max(gains) - np.mean(gains)))
    assert min(shares) > 0.8  # 0 is a random row, 1 the best


def test_batch_bald_takes_no_copies_of_what_it_has(key):
    """Three copies of the row that tells most: a ranking by BALD takes them all, the batch takes one."""
    view = make_view(5, n=12, members=6)
    logits = np.array(view.prediction.logits) / 4
    logits[:, :3] = 8 * np.eye(4)[[0, 0, 0, 1, 1, 1], None]  # three members against three
    view = view._replace(prediction=view.prediction._replace(logits=jnp.asarray(logits)))
    ranked = decide(acquisition.top_k(acquisition.bald, k=3))(key, view)
    assert set(ranked.index.tolist()) == {0, 1, 2}
    run = decide(acquisition.batch_bald(k=3))
    first = set()
    for one in jax.random.split(key, 8):
        picks = run(one, view).index.tolist()
        assert len({0, 1, 2} & set(picks)) == 1
        first.add(picks[0])
    assert len(first) > 1  # which of the copies, the key decides


def test_drawn_configurations_belong_to_rows(key):
    run = decide(acquisition.batch_bald(k=6, configurations=5))
    view = make_view(3, n=17, queried=(4,), labelled=())
    order = np.random.default_rng(2).permutation(17)
    for one in jax.random.split(key, 4):
        assert order[run(one, reorder(view, order)).index].tolist() == run(one, view).index.tolist()


def test_extreme_logits_underflow_nowhere(key):
    """Ten rows of which every configuration has probability 0 in float32 under some member."""
    logits = 1e4 * jax.random.normal(key, (3, 12, 4))
    view = make_view(0, n=12)._replace(budget=jnp.float32(20))
    view = view._replace(prediction=view.prediction._replace(logits=logits))
    for policy in (acquisition.batch_bald(k=10, configurations=64), acquisition.epig(k=10)):
        decision = decide(policy)(key, view)
        assert np.isfinite(decision.scores).all()
        assert decision.valid.all()
        assert len(set(decision.index.tolist())) == 10


def test_arguments_are_checked():
    for name, wrong in {
        "epig: k": lambda: acquisition.epig(k=0),
        "targets": lambda: acquisition.epig(k=1, targets=0),
        "batch_bald: k": lambda: acquisition.batch_bald(k=0),
        "configurations": lambda: acquisition.batch_bald(k=1, configurations=0),
    }.items():
        with pytest.raises(ValueError, match=name):
            wrong()


def test_rows_of_nan_come_last_and_labels_without_a_class_yet_are_no_news(key):
    view = make_view(0, n=8, members=3, capacity=8)
    logits = view.prediction.logits.at[:, 2].set(jnp.nan)
    index = decide(acquisition.epig(k=8))(key, view._replace(prediction=view.prediction._replace(logits=logits))).index
    assert index[-1] == 2
    # A class whose logit is -inf is as good as no class, for draws of labels, too.
    more = jnp.pad(view.prediction.logits, ((0, 0), (0, 0), (0, 2)), constant_values=-jnp.inf)
    wider = view._replace(prediction=view.prediction._replace(logits=more))
    for rule in (acquisition.epig(k=4), acquisition.batch_bald(k=4, configurations=10_000)):
        few, many = decide(rule)(key, view), decide(rule)(key, wider)
        np.testing.assert_array_equal(few.index, many.index)
        np.testing.assert_allclose(few.scores, many.scores, rtol=1e-5)
