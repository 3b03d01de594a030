"""One table for all query strategies: whatever metaal_jax.names knows must keep these promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import Batch, Prediction, learners, models, policies
from metaal_jax.names import ADAPTIVE, ALIASES, NEEDS, STRATEGIES, Given, find, listing, strategy
from views import HOLE, make_view, reorder

N, K, CAPACITY, CLASSES = 24, 4, 6, 4

MODEL = models.MLP(CLASSES, hidden=())
LEARNER = learners.fine_tune(MODEL, optimizer=optax.sgd(0.3), steps=2)
NEED = Given(
    refit=LEARNER,
    k=K,
    rounds=3,
    classes=CLASSES,
    learner=LEARNER,
    loss_learner=learners.loss_predictor(MODEL, optimizer=optax.sgd(0.3), steps=2, hidden=4),
)
META = LEARNER.init(jax.random.key(0), jnp.zeros((1, 3)))
TRUTH = np.arange(N) % CLASSES
SELECTION = Batch(jax.random.normal(jax.random.key(1), (8, 3)), jnp.arange(8) % CLASSES, jnp.ones(8))


def view_of(seed, members, *, labelled=(), y=TRUTH, logits=None, same=False, **options):
    """A pool for any strategy: random predictions, labelled rows with their labels, parameters of a linear layer."""
    view = make_view(seed, N, members=members, classes=CLASSES, labelled=labelled, capacity=CAPACITY, **options)
    if same:
        view = view._replace(
            x=jnp.ones_like(view.x),
            prediction=jax.tree.map(lambda leaf: leaf[:, :1] + jnp.zeros_like(leaf), view.prediction),
        )
    if logits is not None:
        view = view._replace(prediction=view.prediction._replace(logits=jnp.asarray(logits, jnp.float32)))
    known = np.zeros(CAPACITY, int)
    known[: len(labelled)] = labelled
    weight = jnp.asarray(np.arange(CAPACITY) < len(labelled), jnp.float32)
    batch = Batch(x=view.x[known] * weight[:, None], y=jnp.asarray(y[known], jnp.int32), weight=weight)
    return view._replace(labelled=batch, meta=META, params=META, budget=jnp.float32(100))


LEFT = jnp.asarray([0, 7, 20])


def filled(view, rows, value=HOLE):
    """The view with a value in all that `rows` hold."""
    return view._replace(
        x=jnp.where(rows[:, None], value, view.x),
        prediction=jax.tree.map(lambda leaf: jnp.where(rows[:, None], value, leaf), view.prediction),
        labelled=view.labelled._replace(
            x=jnp.where((rows[view.labelled_index] & (view.labelled_index >= 0))[:, None], value, view.labelled.x)
        ),
    )


def cases(members):
    """Pools of one shape, so that one program serves them all."""
    rng = np.random.default_rng(5)
    # No cluster of k_means has two rows, which would be equally near to its centre: rounding would choose.
    base = view_of(14, members, queried=(3, 5), labelled=(1, 8))
    order = rng.permutation(N)
    padded = view_of(2, members, queried=(3, 5), labelled=(1, 8), padding=4)
    absent = np.where(np.arange(CLASSES) < 2, rng.normal(size=(members, N, CLASSES)), -np.inf)
    sure = np.where(rng.random((members, N, CLASSES)) < 0.5, 1e4, -1e4)
    return {
        "base": base,
        "same again": base,
        "other inputs": base._replace(x=base.x + jax.random.normal(jax.random.key(9), base.x.shape)),
        "permuted": reorder(base, order),
        "padded": padded,
        "padded with NaN": filled(padded, jnp.arange(N) >= N - 4),
        "padded with junk": filled(padded, jnp.arange(N) >= N - 4, 1e30),
        # A row that holds NaN is as if it were not there, and comes last.
        "one row less": base._replace(weight=base.weight.at[7].set(0.0)),
        "one NaN row": filled(base, base.row == 7),
        "one labelled NaN row": filled(base, base.row == 8),
        "a NaN row and two others": filled(base, base.row == 7)._replace(queried=~jnp.isin(base.row, LEFT)),
        "only NaN rows": filled(base, jnp.ones(N, bool)),
        "classes without a label": view_of(2, members, labelled=(1, 8), logits=absent),
        "cold": view_of(2, members),
        "three left": base._replace(queried=~jnp.isin(base.row, LEFT)),
        "none left": base._replace(queried=jnp.ones(N, bool)),
        "identical rows": view_of(2, members, labelled=(1, 8), same=True),
        "one class": view_of(2, members, labelled=(1, 8), y=np.zeros(N, int),
                             logits=np.broadcast_to(np.eye(CLASSES)[0] * 30, (members, N, CLASSES))),
        "two rows": view_of(2, members, padding=N - 2),
        "sure": view_of(2, members, labelled=(1, 8), logits=sure),
    }, order  # fmt: skip


CASES = {members: cases(members) for members in (1, 3)}


def decide(policy, params):
    def run(key, view):
        begin_key, act_key = jax.random.split(key)
        return policy.act(act_key, params, policy.begin(begin_key, params, view), view)[0]

    return run


def policy_of(name, need=NEED):
    params = (jnp.asarray(TRUTH, jnp.int32), SELECTION) if find(name).held_out else ()
    return find(name).build(need), params


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_keep_the_contract(key, name):
    views, order = CASES[3 if find(name).committee else 1]
    run = decide(*policy_of(name))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *views.values())
    decisions = jax.jit(jax.vmap(run, in_axes=(None, 0)))(key, stacked)
    got = {case: jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), decisions) for i, case in enumerate(views)}
    for case, decision in got.items():
        assert (decision.index.shape, decision.index.dtype) == ((K,), np.int32), case
        assert decision.scores.shape == (N,), case
        chosen, available = decision.index[decision.valid], np.asarray(views[case].available)
        assert len(set(chosen.tolist())) == len(chosen) == min(K, available.sum()), case
        assert available[chosen].all(), case
        assert not np.isnan(decision.scores[available]).any(), case
        assert np.isfinite(decision.log_prob), case
    assert (got["same again"].index == got["base"].index).all()
    same = (got["other inputs"].index == got["base"].index).all()
    assert same == ("x" not in find(name).needs), "whether it reads the inputs"
    np.testing.assert_array_equal(got["padded with NaN"].index, got["padded"].index)
    np.testing.assert_array_equal(got["padded with junk"].index, got["padded"].index)
    np.testing.assert_array_equal(got["one NaN row"].index, got["one row less"].index)
    real = np.arange(N) != 7
    np.testing.assert_allclose(got["one NaN row"].scores[real], got["one row less"].scores[real], rtol=1e-5)
    assert got["one NaN row"].scores[7] == -np.inf
    last = got["a NaN row and two others"]
    assert last.index[last.valid][-1] == 7
    np.testing.assert_array_equal(order[got["permuted"].index], got["base"].index)  # noise belongs to rows
    one = jax.jit(run)
    alone = one(key, views["base"])
    np.testing.assert_array_equal(alone.index, got["base"].index)  # vmapped = single
    # Ties are broken by the key: among identical rows another key takes other rows.
    picks = {tuple(np.asarray(one(k, views["identical rows"]).index).tolist()) for k in jax.random.split(key, 4)}
    assert len(picks) > 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_more_rows_than_the_pool_has(key, name):
    policy, params = policy_of(name, NEED._replace(k=N + CAPACITY + 1))
    view = CASES[3 if find(name).committee else 1][0]["base"]
    with pytest.raises(ValueError, match="cannot choose 31 rows of a pool of"):
        jax.eval_shape(decide(policy, params), key, view)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if find(name).committee])
def test_rules_for_committees_refuse_a_single_model(key, name):
    with pytest.raises(ValueError, match="committee"):
        jax.eval_shape(decide(*policy_of(name)), key, CASES[1][0]["base"])


READ = {"logits": "prediction.logits", "embedding": "prediction.embedding", "labels": "labelled.y"}


@pytest.mark.parametrize("name", [*STRATEGIES, *ADAPTIVE, "learned:cifar10", "learned:cifar10_selector"])
def test_the_needs_are_what_a_strategy_reads(key, name):
    """By the compiler: what the decision does not depend on is no need, and what it depends on is one.

    The inputs are read by all, for NaN; see the contract for those that read their values.
    """
    found, view = find(name), CASES[3 if find(name).committee else 1][0]["base"]
    chooser, params = (
        find(name).build(NEED),
        found.params(view) if not found.held_out else (jnp.asarray(TRUTH), SELECTION),
    )
    flat, tree = jax.tree.flatten(view)
    traced = jax.make_jaxpr(lambda *flat: decide(chooser, params)(key, jax.tree.unflatten(tree, flat)).index)(*flat)
    _, used = jax.interpreters.partial_eval.dce_jaxpr(traced.jaxpr, [True])
    read = {
        jax.tree_util.keystr(path).strip(".")
        for (path, _), one in zip(jax.tree_util.tree_leaves_with_path(view), used, strict=True)
        if one
    }
    needs = {"logits" if need == "committee" else need for need in found.needs}
    assert {need for need, place in READ.items() if place in read} == needs & set(READ)
    assert set(found.needs) <= set(NEEDS)


@pytest.mark.parametrize("name", policies.shipped())
def test_the_start_of_a_trained_policy_is_its_network_before_training(key, name):
    before, after = (find(f"learned:{name}{mark}") for mark in ("~start", ""))
    want = find(f"learned:{name}").build(NEED).init(key)
    assert jax.tree.map(jnp.shape, before.params(None)) == jax.tree.map(jnp.shape, after.params(None))
    np.testing.assert_array_equal(jax.tree.leaves(after.params(None))[0], jax.tree.leaves(want)[0])
    leaves = zip(jax.tree.leaves(before.params(None)), jax.tree.leaves(after.params(None)), strict=True)
    assert any((a != b).any() for a, b in leaves)


def test_the_start_of_cifar10_is_uncertain_herding(key):
    """From the prior alone, the first rows are those of the rule that it starts from."""
    view = CASES[1][0]["base"]
    start, rule = (
        decide(find(name).build(NEED), find(name).params(view)) for name in ("cifar10~start", "uncertain_herding")
    )
    np.testing.assert_array_equal(jax.jit(start)(key, view).index, jax.jit(rule)(key, view).index)


def test_what_is_not_given_is_named():
    for name, found in STRATEGIES.items():
        for need in set(found.needs) & set(Given._fields):
            rest = {field: value for field, value in NEED._asdict().items() if field != need}
            with pytest.raises(ValueError, match=f"{name} needs .*: give {need}="):
                strategy(name, **rest)
    with pytest.raises(ValueError, match="unknown strategy 'bagde'; did you mean badge"):
        strategy("bagde", k=3)


def test_every_strategy_has_a_line_in_the_help():
    text = listing()
    assert all(f"{name}: {strategy.line}" in text for name, strategy in STRATEGIES.items())
    assert len({strategy.line for strategy in STRATEGIES.values()}) == len(STRATEGIES)
    assert set(ALIASES.values()) <= set(STRATEGIES)


def test_a_posterior_is_shown_only_where_it_is_asked(key):
    """A committee's strategy made with a posterior works on the view of a single model."""
    view = CASES[1][0]["base"]
    posterior = learners.committee(LEARNER, members=3)
    policy = find("bald").build(NEED, posterior)
    decision = jax.jit(decide(policy, ()))(key, view)
    assert decision.valid.all()
    assert isinstance(view.prediction, Prediction)
    prediction = posterior.predict(posterior.adapt(key, META, view.labelled), view.x)
    assert prediction.logits.shape == (3, N, CLASSES)
