"""Learning from the pool: graphs and pseudo-labels against plain NumPy, and what must not change anything."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.scipy.special import xlogy
from sklearn.datasets import make_moons

import metaal_jax as ml
from metaal_jax import Batch, Learner, Prediction, check_learner, learners, models
from metaal_jax.base import empty_batch
from metaal_jax.learners.semi_supervised import label_propagation, propagate, pseudo_labels
from metaal_jax.losses import cross_entropy
from metaal_jax.rows import nearest_neighbours, place_in_group, squared_distances

LINEAR, SGD = models.MLP(3, hidden=()), optax.sgd(0.3)
TUNED = learners.fine_tune(LINEAR, optimizer=SGD, steps=3)
DEEP = learners.fine_tune(models.MLP(3, hidden=(5,)), optimizer=SGD, steps=3)
PROTOTYPES = learners.maml(LINEAR, optimizer=optax.identity(), steps=0, head="prototypes")
DROPPED = learners.mc_dropout(models.MLP(3, hidden=(5,), dropout=0.4), optimizer=SGD, steps=2, members=3)
WRAPPED = {
    "pseudo_labels": pseudo_labels(TUNED, rows=6, rounds=2, chunk=4),
    "pseudo_labels of dropout": pseudo_labels(DROPPED, rows=6),
    "label_propagation": label_propagation(DEEP, rows=6, neighbours=3, rounds=2, chunk=4),
    "label_propagation of a committee": label_propagation(
        learners.committee(DEEP, members=3, source="initialisation"), rows=None, neighbours=3
    ),
}


def prototypes_of(batch, x, classes=3):
    """Logits of a nearest-class-mean rule."""
    member = jax.nn.one_hot(batch.y, classes) * batch.weight[:, None]
    count = member.sum(0)
    centres = member.T @ batch.x / jnp.maximum(count, 1e-6)[:, None]
    return jnp.where(count > 0, -0.5 * squared_distances(x, centres), -jnp.inf)


# Its adapted parameters are the batch it was given, so that a test sees what a wrapper learned from.
RECORDER = Learner(
    init=lambda key, x: (),
    adapt=lambda key, meta, batch, *, unlabelled=None, start=None: batch,
    predict=lambda batch, x: Prediction(logits=prototypes_of(batch, x)[None], embedding=x[None]),
    meta_grad=lambda key, meta, task, *, step: ((), {}),
)


def example(key, rows=6, width=4):
    return Batch(
        x=jax.random.normal(key, (rows, width), jnp.float32),
        y=jnp.arange(rows, dtype=jnp.int32) % 3,
        weight=jnp.ones(rows, jnp.float32),
    )


@pytest.mark.parametrize("name", WRAPPED)
def test_contract_with_a_pool(key, name):
    pool = jax.random.normal(jax.random.fold_in(key, 1), (20, 4), jnp.float32)
    learner, batch = WRAPPED[name], example(key)

    def adapt(key, meta, batch, *, unlabelled=None, start=None):
        return learner.adapt(key, meta, batch, unlabelled=pool, start=start)

    check_learner(learner._replace(adapt=adapt), key, batch)


@pytest.mark.parametrize("wrap", [pseudo_labels, label_propagation])
def test_without_a_pool_or_a_label_nothing_changes(key, wrap):
    batch, pool = example(key), jax.random.normal(jax.random.fold_in(key, 1), (20, 4))
    nothing, meta = empty_batch(batch.x, 6), TUNED.init(key, batch.x)

    @jax.jit
    def both(batch, pool):
        return wrap(TUNED, rows=6).adapt(key, meta, batch, unlabelled=pool), TUNED.adapt(key, meta, batch)

    for same in (both(batch, None), both(nothing, pool)):
        jax.tree.map(np.testing.assert_array_equal, *same)
    changed, base = both(batch, pool)
    assert abs(ravel_pytree(changed)[0] - ravel_pytree(base)[0]).max() > 1e-3


def problem_with_known_rows(key):
    """Labels of the classes 0 and 2; pool rows 3 and 5 are labelled, row 7 is zeros, row 9 near class 1's place."""
    keys = jax.random.split(key, 2)
    batch = example(keys[0], rows=6, width=2)._replace(y=jnp.asarray([0, 2, 0, 2, 1, 2], jnp.int32))
    batch = batch._replace(weight=jnp.asarray([1.0, 1.0, 0.5, 1.0, 0.0, 1.0]))
    pool = jax.random.normal(keys[1], (40, 2))
    pool = pool.at[3].set(batch.x[0]).at[5].set(batch.x[5]).at[7].set(0.0).at[9].set(batch.x[4])
    return batch, pool


@pytest.mark.parametrize(("rows", "threshold"), [(10, 0.6), (14, 0.7), (None, 0.7)])
def test_pseudo_labels_by_hand(key, rows, threshold):
    batch, pool = problem_with_known_rows(key)
    learner = pseudo_labels(RECORDER, rows=rows, strength=0.5, threshold=threshold)
    union = jax.jit(learner.adapt)(key, (), batch, unlabelled=pool)
    for whole, part in zip(union, batch, strict=True):
        np.testing.assert_array_equal(whole[-6:], part)
    x, y, weight = (np.asarray(leaf)[:-6] for leaf in union)
    assert len(x) == (rows or 40)
    x, y, weight = x[weight > 0], y[weight > 0], weight[weight > 0]

    probs = np.asarray(jax.nn.softmax(prototypes_of(batch, pool)))[:, [0, 2]]
    label, confidence = np.array([0, 2])[probs.argmax(1)], probs.max(1)
    possible = [i for i in range(40) if confidence[i] > threshold and i not in (3, 5, 7)]
    ranked = [sorted((i for i in possible if label[i] == c), key=lambda i: -confidence[i]) for c in (0, 2)]
    if rows == 10:
        assert min(map(len, ranked)) > 5
        wanted = ranked[0][:5] + ranked[1][:5]
    elif rows == 14:  # one class has too few
        ranked.sort(key=len)
        assert len(ranked[0]) < 7 < len(ranked[1])
        wanted = ranked[0] + ranked[1][: 14 - len(ranked[0])]
    else:
        wanted = possible
    found = [int(abs(np.asarray(pool) - row).sum(1).argmin()) for row in x]
    assert sorted(found) == sorted(wanted)
    np.testing.assert_array_equal(y, label[found])
    np.testing.assert_allclose(weight, 0.5 * confidence[found], rtol=1e-5)


def reference(z, labels, neighbours, alpha):
    """Zhou's closed form on the graph of the nearest neighbours, in float64."""
    z = np.asarray(z, np.float64)
    n = len(z)
    distance = ((z[:, None] - z) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    links = np.zeros((n, n))
    for i in range(n):
        nearest = np.argsort(distance[i])[:neighbours]
        links[i, nearest] = np.exp(-distance[i, nearest] / distance[i, nearest].max())
    links = links + links.T
    root = 1 / np.sqrt(links.sum(1))
    labels = np.asarray(labels, np.float64) / np.maximum(labels.sum(0), 1e-12)
    return np.linalg.solve(np.eye(n) - alpha * root[:, None] * links * root, labels)


def test_propagation_equals_the_closed_form(key):
    z = 5.0 + jax.random.normal(key, (30, 3))
    labels = jnp.zeros((30, 3)).at[jnp.arange(5), jnp.asarray([0, 0, 0, 2, 2])].set(jnp.asarray([1, 1, 0.5, 1, 1]))
    present = (jnp.arange(30) < 10) | (jnp.arange(30) >= 14)
    run = jax.jit(lambda z, alpha: propagate(z, present, labels, neighbours=4, alpha=alpha, steps=100))
    kept = np.flatnonzero(present)
    for alpha in (0.5, 0.97):
        got, want = run(z, alpha), reference(z[kept], labels[kept], 4, alpha)
        np.testing.assert_allclose(got[kept], want, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(got[10:14], 0.0)
    np.testing.assert_allclose(run(3.0 * z - 7.0, 0.97), run(z, 0.97), rtol=1e-3, atol=1e-5)


def test_label_propagation_by_hand(key):
    batch, pool = problem_with_known_rows(key)
    learner = label_propagation(RECORDER, rows=None, neighbours=5, alpha=0.9, steps=100, strength=2.0)
    union = jax.jit(learner.adapt)(key, (), batch, unlabelled=pool)
    kept, known = [0, 1, 2, 3, 5], [3, 5, 7]
    rest = np.setdiff1d(np.arange(40), known)
    labels = jax.nn.one_hot(batch.y, 3) * batch.weight[:, None]
    spread = reference(
        jnp.concatenate([batch.x[jnp.asarray(kept)], pool[rest]]),
        jnp.concatenate([labels[jnp.asarray(kept)], jnp.zeros((37, 3))]),
        5,
        0.9,
    )[5:]
    probs = spread / spread.sum(1, keepdims=True)
    np.testing.assert_array_equal(union.y[:40][rest], probs.argmax(1))
    certainty = 1 + np.asarray(xlogy(probs, probs)).sum(1) / np.log(3)
    np.testing.assert_allclose(union.weight[:40][rest], 2.0 * certainty, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(union.weight[:40][np.asarray(known)], 0.0)


def test_random_choice_differs_by_key_and_a_tie_is_not_broken_by_position(key):
    batch, pool = problem_with_known_rows(key)
    twice = jnp.concatenate([pool, pool[jnp.asarray([11] * 30)]])  # 31 equal rows: the certainty ties
    keys = jax.random.split(key, 8)
    for learner, x in (
        (label_propagation(RECORDER, rows=6, neighbours=5), pool),
        (pseudo_labels(RECORDER, rows=6), twice + 1e-7 * jnp.arange(70)[:, None] * (jnp.arange(70) >= 40)[:, None]),
    ):
        chosen = jax.jit(jax.vmap(lambda k, x=x, a=learner.adapt: a(k, (), batch, unlabelled=x).x[:6]))(keys)
        assert len({row.tobytes() for row in np.asarray(chosen)}) > 1


@pytest.mark.parametrize("alpha", [0.9, 0.97, 0.995])
def test_labels_reach_the_other_end_of_two_moons(alpha):
    """400 rows, one label at each outer end: what arrives is a millionth of what left, and still decides."""
    x, y = make_moons(400, noise=0.05, random_state=0)
    ends = [np.where(y == 0, x[:, 0], np.inf).argmin(), np.where(y == 1, x[:, 0], -np.inf).argmax()]
    labels = np.zeros((400, 2), np.float32)
    labels[ends, [0, 1]] = 1.0
    run = jax.jit(lambda x: propagate(x, jnp.ones(400, bool), labels, neighbours=10, alpha=alpha, steps=1000))
    got, wanted = np.asarray(run(x.astype(np.float32))), reference(x, labels, 10, alpha)
    assert (got.max(1) > 0).all()
    assert wanted.max(1).min() < 2e-2
    np.testing.assert_array_equal(got.argmax(1), y)
    reached = wanted > 1e-15
    np.testing.assert_allclose(got[reached], wanted[reached], rtol=2e-3)
    np.testing.assert_array_equal(got[~reached], 0.0)


def test_propagation_can_be_vmapped(key):
    z = jax.random.normal(key, (3, 30, 2)) * jnp.asarray([1.0, 5.0, 0.1])[:, None, None]
    labels = jnp.zeros((30, 2)).at[0, 0].set(1.0).at[1, 1].set(1.0)

    def run(z, alpha):
        return propagate(z, jnp.ones(30, bool), labels, neighbours=3, alpha=alpha, steps=1000)

    alpha = jnp.asarray([0.3, 0.97, 0.9])
    together = jax.jit(jax.vmap(run))(z, alpha)
    for i in range(3):
        np.testing.assert_allclose(together[i], run(z[i], alpha[i]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("wrap", [pseudo_labels, label_propagation])
def test_probabilities_of_0_and_1_are_classes(key, wrap):
    batch, pool = example(key), jax.random.normal(jax.random.fold_in(key, 1), (20, 4))
    learner, soft = wrap(TUNED, rows=8), batch._replace(y=jax.nn.one_hot(batch.y, 3))
    meta = learner.init(key, batch.x)
    a, b = (learner.adapt(key, meta, one, unlabelled=pool) for one in (batch, soft))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.parametrize("wrap", [pseudo_labels, label_propagation])
def test_padding_at_the_end_of_the_pool_changes_nothing(key, wrap):
    batch = example(key)
    pool = jax.random.normal(jax.random.fold_in(key, 1), (20, 4))
    learner = wrap(TUNED, rows=8)
    meta = learner.init(key, batch.x)
    adapt = jax.jit(learner.adapt)
    plain = adapt(key, meta, batch, unlabelled=pool)
    for bad in (0.0, jnp.nan, jnp.inf):
        padded = adapt(key, meta, batch, unlabelled=jnp.pad(pool, [(0, 5), (0, 0)], constant_values=bad))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), padded, plain)
    # Labelled rows that stand in the pool, too, are not learned twice.
    twice = adapt(key, meta, batch, unlabelled=jnp.concatenate([pool, batch.x]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), twice, plain)


def test_rows_are_compared_by_all_their_bytes(key):
    x = {
        "image": jnp.zeros((3, 2, 2), jnp.uint8).at[0, 0, 0].set(9),
        "number": jnp.arange(3.0),
        "flag": jnp.ones(3) > 0,
    }
    pool = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), x)
    pool["image"] = pool["image"].at[4, 1, 1].set(1)
    pool["number"] = pool["number"].at[5].set(jnp.nextafter(jnp.float32(2.0), jnp.float32(3.0)))
    recorder = RECORDER._replace(
        predict=lambda batch, x: Prediction(
            logits=jnp.zeros((1, x["number"].size, 3)), embedding=x["number"][None, :, None]
        )
    )
    batch = Batch(x=x, y=jnp.zeros(3, jnp.int32), weight=jnp.ones(3))
    union = pseudo_labels(recorder, rows=None).adapt(key, (), batch, unlabelled=pool)
    np.testing.assert_array_equal(union.weight[:6] > 0, [False, False, False, False, True, True])


def stripes(key, rows):
    """Three long parallel stripes: classes that hang together, though rows of different classes may be nearer."""
    keys = jax.random.split(key, 2)
    y = jnp.arange(rows, dtype=jnp.int32) % 3
    along = 12.0 * jax.random.uniform(keys[0], (rows,))
    return jnp.stack([along, 2.0 * y + 0.15 * jax.random.normal(keys[1], (rows,))], axis=1), y


def test_the_pool_helps(key):
    x, y = stripes(key, 240)
    # The labels lie at opposite ends, so the class means mislead.
    ends = jnp.stack([x[y == c][(-1) ** c * x[y == c][:, 0].argsort()[0 if c != 1 else -1]] for c in range(3)])
    batch = Batch(x=ends, y=jnp.arange(3, dtype=jnp.int32), weight=jnp.ones(3))
    tuned = learners.fine_tune(LINEAR, optimizer=optax.adam(0.3), steps=100)
    meta = tuned.init(key, x)

    def accuracy(learner):
        params = jax.jit(learner.adapt)(key, meta, batch, unlabelled=x)
        return float((learner.predict(params, x).logits[0].argmax(-1) == y).mean())

    assert accuracy(PROTOTYPES) < 0.75
    assert accuracy(label_propagation(tuned, rows=None)) > 0.97
    assert accuracy(pseudo_labels(tuned, rows=90, rounds=3)) >= accuracy(tuned) - 0.02


@pytest.mark.parametrize("wrap", [pseudo_labels, label_propagation])
def test_derivatives_in_soft_weights(key, wrap):
    batch = example(key)._replace(weight=jnp.asarray([1.0, 0.3, 0.0, 1.0, 0.7, 0.0]))
    pool = jax.random.normal(jax.random.fold_in(key, 1), (20, 4))
    learner = wrap(PROTOTYPES, rows=8, neighbours=3) if wrap is label_propagation else wrap(PROTOTYPES, rows=8)
    meta = learner.init(key, batch.x)

    def loss(weight, x, meta):
        params = learner.adapt(key, meta, batch._replace(weight=weight), unlabelled=x)
        return cross_entropy(learner.predict(params, batch.x).logits[0], batch.y, jnp.ones(6))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(batch.weight, pool, meta)
    assert np.isfinite(ravel_pytree(grads)[0]).all()
    assert abs(grads[0][jnp.asarray([0, 1, 3, 4])]).min() > 1e-6


def test_runs_can_be_vmapped(key):
    x, y = stripes(key, 45)
    problem = ml.tasks.problem(x, y, x, y)
    learner = label_propagation(PROTOTYPES, rows=20, neighbours=4, choose="certain")
    policy = ml.acquisition.top_k(ml.acquisition.margin, k=3)
    active = ml.active_learner(learner, policy, capacity=6)

    def run(key):
        keys = jax.random.split(key, 3)
        meta = learner.init(keys[0], x)
        state = active.init(keys[1], meta, (), problem)
        return jax.lax.scan(lambda s, k: active.step(k, meta, (), s, problem), state, jax.random.split(keys[2], 2))[1]

    keys = jax.random.split(key, 2)
    many, single = jax.jit(jax.vmap(run))(keys), jax.jit(run)(keys[1])
    np.testing.assert_array_equal(many.index[1], single.index)
    np.testing.assert_allclose(many.test.accuracy[1], single.test.accuracy, atol=1e-6)
    assert (many.count[:, -1] == 6).all()


def test_memory_is_linear_in_the_pool():
    def temporary(n):
        spread = jax.jit(
            lambda z, present, labels: propagate(z, present, labels, neighbours=10, alpha=0.9, steps=5)
        ).lower(jnp.zeros((n, 2)), jnp.ones(n, bool), jnp.zeros((n, 3)))
        return spread.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8000) < 2.5 * temporary(4000) < 4 * 4000**2  # an n x n matrix


def test_nearest_neighbours_in_blocks(key):
    x = jax.random.normal(key, (23, 3))
    present = jnp.arange(23) % 4 != 1
    find = jax.jit(nearest_neighbours, static_argnames=("neighbours", "chunk"))
    index, distance = find(x, present, neighbours=5, chunk=7)
    z = np.asarray(x, np.float64)
    exact = ((z[:, None] - z) ** 2).sum(-1)
    exact[:, ~np.asarray(present)] = np.inf
    np.fill_diagonal(exact, np.inf)
    np.testing.assert_array_equal(index, exact.argsort(1)[:, :5])
    np.testing.assert_allclose(distance, np.sort(exact, 1)[:, :5], rtol=1e-4)
    _, few = find(x[:3], jnp.asarray([True, True, False]), neighbours=5, chunk=7)
    np.testing.assert_array_equal(np.isinf(few), [[False, True], [False, True], [False, False]])


def test_places_in_groups():
    group, scores = jnp.asarray([1, 0, 1, 1, 0, 3]), jnp.asarray([2.0, 1, 5, 2, 7, 0])
    place = place_in_group(group, scores, jnp.asarray([9, 0, 0, 3, 0, 0]), groups=4)
    np.testing.assert_array_equal(place, [2, 1, 0, 1, 0, 0])


@pytest.mark.parametrize(
    ("wrap", "options", "message"),
    [
        (pseudo_labels, {"rows": 0}, "rows must be a positive integer"),
        (pseudo_labels, {"rounds": 0}, "rounds must be a positive integer"),
        (pseudo_labels, {"strength": -1.0}, "strength must be at least 0"),
        (pseudo_labels, {"threshold": 1.5}, "threshold must be from 0 to 1"),
        (pseudo_labels, {"choose": "best"}, "choose must be 'certain' or 'random'"),
        (label_propagation, {"neighbours": 0}, "neighbours must be a positive integer"),
        (label_propagation, {"alpha": 1.0}, "alpha must be between 0 and 1"),
        (label_propagation, {"steps": 0}, "steps must be a positive integer"),
        (label_propagation, {"rows": -1}, "label_propagation: rows must be"),
    ],
)
def test_wrong_arguments(wrap, options, message):
    with pytest.raises(ValueError, match=message):
        wrap(TUNED, **{"rows": 5, **options})
