"""Base learners: their contract, and MAML's gradients against finite differences and derivations by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metaal_jax import Batch, Learner, Prediction, Task, check_learner, learners, models
from metaal_jax.base import empty_batch, pad_batch
from metaal_jax.losses import accuracy, cross_entropy

MLP = models.MLP(3, hidden=(8,))
CONV = models.Conv4(3, filters=8, blocks=1, norm="batch")
SGD, ADAMW = optax.sgd(0.3), optax.adamw(0.05, weight_decay=0.1)
BASE = learners.maml(MLP, optimizer=SGD, steps=2)
LINEAR = learners.maml(models.MLP(3, hidden=()), optimizer=SGD, steps=1)

LEARNERS = {  # learner, shape of a row
    "maml": (BASE, (4,)),
    "maml, prototypes": (learners.maml(MLP, optimizer=SGD, steps=2, head="prototypes"), (4,)),
    "maml, first order": (learners.maml(MLP, optimizer=SGD, steps=2, first_order=True), (4,)),
    "maml, remat": (learners.maml(MLP, optimizer=SGD, steps=2, remat=True), (4,)),
    "maml, no steps": (learners.maml(MLP, optimizer=SGD, steps=0, head="prototypes"), (4,)),
    "maml, Adam": (learners.maml(MLP, optimizer=optax.adam(0.05, eps_root=1e-8), steps=2, head="prototypes"), (4,)),
    "maml, batch norm": (learners.maml(CONV, optimizer=SGD, steps=1), (4, 4, 1)),
    "fine_tune": (learners.fine_tune(MLP, optimizer=ADAMW, steps=3), (4,)),
    "committee, bootstrap": (learners.committee(LINEAR, members=3), (4,)),
    "committee, initialisation": (learners.committee(LINEAR, members=3, source="initialisation"), (4,)),
    "committee, both": (learners.committee(LINEAR, members=3, source="both"), (4,)),
}


def example(key, shape=(4,), rows=7):
    return Batch(
        x=jax.random.normal(key, (rows, *shape), jnp.float32),
        y=jnp.arange(rows, dtype=jnp.int32) % 3,
        weight=jnp.ones(rows, jnp.float32),
    )


@pytest.mark.parametrize("name", LEARNERS)
def test_contract(key, name):
    learner, shape = LEARNERS[name]
    check_learner(learner, key, example(key, shape))


def linear(*, members=1):
    """A learner that keeps the contract in a few lines: a class-mean classifier, ready to be broken."""

    def adapt(key, meta, batch, *, unlabelled=None, start=None):
        x = jnp.where(batch.weight[:, None] > 0, batch.x, 0.0)
        return meta + (x.T * batch.weight) @ jax.nn.one_hot(batch.y, 3) / (1 + batch.weight.sum())

    def predict(params, x):
        return Prediction(logits=jnp.stack([x @ params] * members), embedding=x[None])

    def meta_grad(key, meta, task, *, step):
        query = task.query
        loss = cross_entropy(query.x @ adapt(key, meta, task.support), query.y, query.weight)
        return jnp.zeros_like(meta), {"loss": loss, "score": accuracy(query.x @ meta, query.y, query.weight)}

    return Learner(
        init=lambda key, x: jax.random.normal(key, (4, 3)), adapt=adapt, predict=predict, meta_grad=meta_grad
    )


GOOD = linear(members=2)
BROKEN = {  # what is wrong: (the learner, what the check says)
    "padding counts rows": (
        GOOD._replace(adapt=lambda key, meta, batch, **extra: meta + batch.x.T @ jax.nn.one_hot(batch.y, 3)),
        "padding rows .* of rows of other classes",
    ),
    "padding sets the scale": (
        GOOD._replace(adapt=lambda key, meta, batch, **extra: GOOD.adapt(key, meta, batch) / batch.weight.shape[0]),
        "padding of zeros",
    ),
    "padding is multiplied by 0": (
        GOOD._replace(
            adapt=lambda key, meta, batch, **extra: meta + (batch.x.T * batch.weight) @ jax.nn.one_hot(batch.y, 3)
        ),
        "padding rows .* of NaN changed the adapted parameters",
    ),
    "padding in the meta-gradient": (
        GOOD._replace(
            meta_grad=lambda key, meta, task, *, step: (
                0 * meta + task.query.weight @ task.query.x[:, :1],
                {"loss": 0.0, "score": 0.0},
            )
        ),
        "padding rows .* of NaN changed meta_grad",
    ),
    "NaN logits": (
        GOOD._replace(predict=lambda params, x: Prediction((jnp.nan * x @ params)[None], x[None])),
        "must not be NaN",
    ),
    "no labels divide by zero": (
        GOOD._replace(adapt=lambda key, meta, batch, **extra: meta + batch.weight.sum() / batch.weight.sum()),
        "without any label",
    ),
    "no Prediction": (GOOD._replace(predict=lambda params, x: (x @ params, x)), "must return a Prediction"),
    "no member axis": (GOOD._replace(predict=lambda params, x: Prediction(x @ params, x[None])), "logits must be"),
    "half precision": (
        GOOD._replace(predict=lambda params, x: Prediction((x @ params)[None].astype(jnp.bfloat16), x[None])),
        "float32",
    ),
    "embedding of other members": (
        GOOD._replace(predict=lambda params, x: Prediction(jnp.stack([x @ params] * 2), jnp.stack([x] * 3))),
        "embedding must be",
    ),
    "gradient of another structure": (
        GOOD._replace(meta_grad=lambda key, meta, task, *, step: ([meta], {"loss": 0.0, "score": 0.0})),
        "structure of meta",
    ),
    "no gradient on any task": (
        GOOD._replace(meta_grad=lambda *arguments, step: (jnp.full((4, 3), jnp.nan), {"loss": 0.0, "score": 0.0})),
        "not finite on a labelled task",
    ),
    "no gradient without labels": (
        GOOD._replace(
            meta_grad=lambda key, meta, task, *, step: (
                0 * meta / task.support.weight.sum(),
                {"loss": 0.0, "score": 0.0},
            )
        ),
        "not finite on a task without labels",
    ),
    "no score": (GOOD._replace(meta_grad=lambda key, meta, task, *, step: (meta, {"loss": 0.0})), "metrics need"),
}


def test_the_check_passes_what_is_right(key):
    check_learner(GOOD, key, example(key))


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_finds_what_is_wrong(key, name):
    learner, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_learner(learner, key, example(key))


class Smooth(nn.Module):
    """A float64 network without kinks, for finite differences."""

    @nn.compact
    def __call__(self, x, weight=None):
        x = nn.tanh(nn.Dense(5, param_dtype=jnp.float64)(x))
        return nn.Dense(3, param_dtype=jnp.float64, name="head")(x), x


@pytest.mark.parametrize("head", ["meta", "prototypes"])
def test_meta_gradient_equals_finite_differences(head):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(3), 3)
        support, query = (example(k, rows=6)._replace(x=jax.random.normal(k, (6, 4), jnp.float64)) for k in keys[:2])
        task = Task(support=pad_batch(support, 8), query=query)
        learner = learners.maml(Smooth(), optimizer=optax.sgd(0.5), steps=3, head=head)

        def loss(meta):
            params = learner.adapt(keys[2], meta, task.support)
            return cross_entropy(learner.predict(params, query.x).logits[0], query.y, query.weight)

        @jax.jit
        def compare(key):
            meta = learner.init(key, query.x)
            grads, metrics = learner.meta_grad(keys[2], meta, task, step=jnp.int32(0))
            flat, unravel = ravel_pytree(meta)
            steps = 1e-5 * jnp.eye(flat.size)
            up, down = (jax.vmap(lambda d, s=s: loss(unravel(flat + s * d)))(steps) for s in (1, -1))
            return ravel_pytree(grads)[0], (up - down) / 2e-5, metrics["loss"] - loss(meta)

        gradient, differences, gap = compare(keys[2])
        assert gradient.dtype == jnp.float64
        assert abs(gap) < 1e-12
        np.testing.assert_allclose(gradient, differences, atol=1e-8)
        body = gradient[:25]
        assert np.abs(body).max() > 1e-3  # or the comparison would be of zeros


def test_inner_loop_on_a_quadratic_by_hand(key):
    """loss = p'Ap/2 - b'p: a step is p - lr (Ap - b), so two steps have the Jacobian (I - lr A)^2; first order: I."""
    root = jax.random.normal(key, (3, 3))
    matrix, b, p, rate = root @ root.T, jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([0.3, 0.1, -0.4]), 0.05

    def two(p, first_order):
        def loss(p):
            return 0.5 * p @ matrix @ p - b @ p

        return learners.inner_loop(loss, p, optimizer=optax.sgd(rate), steps=2, first_order=first_order)

    @jax.jit
    def run(p):
        return two(p, False), jax.jacobian(two)(p, False), jax.jacobian(two)(p, True)

    end, full, first = run(p)
    one = p - rate * (matrix @ p - b)
    np.testing.assert_allclose(end, one - rate * (matrix @ one - b), rtol=1e-5)
    keep = np.eye(3) - rate * np.asarray(matrix)
    np.testing.assert_allclose(full, keep @ keep, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first, np.eye(3), atol=1e-7)


def test_first_order_is_exact_where_the_inner_loss_is_linear():
    slope = jnp.asarray([1.0, -2.0])

    def meta_loss(p, first_order):
        inner = {"optimizer": optax.sgd(0.1), "steps": 4, "first_order": first_order}
        return (learners.inner_loop(lambda p: slope @ p, p, **inner) ** 3).sum()

    start = jnp.asarray([0.7, 0.2])
    full, first = (jax.jit(jax.grad(meta_loss), static_argnums=1)(start, flag) for flag in (False, True))
    np.testing.assert_allclose(first, full, rtol=1e-6)
    np.testing.assert_allclose(full, 3 * (start - 0.4 * slope) ** 2, rtol=1e-5)


@pytest.fixture(scope="module")
def variants():
    """Meta-gradients of one task by variants of MAML, and FOMAML's by its definition; one program."""
    keys = jax.random.split(jax.random.key(5), 4)
    task = Task(support=example(keys[0]), query=example(keys[1]))
    made = {
        "maml": BASE,
        "remat": learners.maml(MLP, optimizer=SGD, steps=2, remat=True),
        "unroll": learners.maml(MLP, optimizer=SGD, steps=2, unroll=True),
        "first order": learners.maml(MLP, optimizer=SGD, steps=2, first_order=True),
    }

    @jax.jit
    def run(meta, task):
        def at_the_end(params):
            return cross_entropy(MLP.apply(params, task.query.x)[0], task.query.y, task.query.weight)

        grads = {name: learner.meta_grad(keys[2], meta, task, step=jnp.int32(0))[0] for name, learner in made.items()}
        grads["definition"] = jax.grad(at_the_end)(BASE.adapt(keys[2], meta, task.support))
        grads["no labels"] = BASE.meta_grad(
            keys[2], meta, Task(empty_batch(task.support.x, 4), task.query), step=jnp.int32(0)
        )[0]
        grads["pre-training"] = jax.grad(at_the_end)(meta)
        return grads

    meta = jax.jit(BASE.init)(keys[3], task.query.x)
    return {name: ravel_pytree(grads)[0] for name, grads in run(meta, task).items()}


@pytest.mark.parametrize(
    ("a", "b"),
    [("remat", "maml"), ("unroll", "maml"), ("first order", "definition"), ("no labels", "pre-training")],
)
def test_gradients_that_must_agree(variants, a, b):
    np.testing.assert_allclose(variants[a], variants[b], rtol=1e-4, atol=1e-6)


def test_first_order_differs_where_the_hessian_is_not_zero(variants):
    assert np.abs(variants["first order"] - variants["maml"]).max() > 1e-2


def test_fine_tune_trains_on_all_rows_of_a_task(key):
    a, b, init_key = jax.random.split(key, 3)
    task = Task(support=example(a, rows=4), query=example(b, rows=5))
    learner = learners.fine_tune(MLP, optimizer=SGD, steps=1)

    @jax.jit
    def run(key):
        meta = learner.init(key, task.query.x)
        both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), *task)
        wanted = jax.grad(lambda meta: cross_entropy(MLP.apply(meta, both.x)[0], both.y, both.weight))(meta)
        return learner.meta_grad(key, meta, task, step=jnp.int32(0))[0], wanted

    got, wanted = run(init_key)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-7), got, wanted)


@pytest.mark.parametrize("head", ["meta", "prototypes"])
def test_without_labels_the_predictor_is_metas_own(key, head):
    learner = learners.maml(MLP, optimizer=ADAMW, steps=3, head=head)
    batch = example(key)
    meta, start = (jax.jit(learner.init)(k, batch.x) for k in jax.random.split(key))
    adapt = jax.jit(learner.adapt)
    jax.tree.map(np.testing.assert_array_equal, adapt(key, meta, empty_batch(batch.x, 7)), meta)
    jax.tree.map(np.testing.assert_array_equal, adapt(key, meta, empty_batch(batch.x, 7), start=start), start)
    changed = adapt(key, meta, batch)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(meta), strict=True))


ROWS_WITH_PADDING = Batch(
    x=np.random.default_rng(8).normal(size=(9, 4)).astype(np.float32),
    y=np.asarray([0, 0, 0, 1, 1, 0, 1, 2, 2], np.int32),
    weight=np.asarray([1, 1, 2, 1, 0.5, 1, 1, 0, 0], np.float32),  # class 2 has padding only
)


def plain_mlp(params, x):
    """The embedding of `MLP` in NumPy or JAX."""
    layer = params["params"]["Dense_0"]
    return (x @ layer["kernel"] + layer["bias"]).clip(0)


def test_prototypes_without_steps_are_nearest_class_means(key):
    batch, rows = ROWS_WITH_PADDING, np.asarray(jax.random.normal(key, (20, 4)))
    learner = learners.maml(MLP, optimizer=SGD, steps=0, head="prototypes", temperature=0.5)
    meta = jax.tree.map(lambda leaf: leaf + 0.3, jax.jit(learner.init)(key, batch.x))  # a shared mean to take away
    got = np.asarray(jax.jit(learner.predict)(jax.jit(learner.adapt)(key, meta, batch), rows).logits[0])
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), meta)
    known, asked = plain_mlp(plain, batch.x.astype(np.float64)), plain_mlp(plain, rows.astype(np.float64))
    means = [np.average(known[batch.y == c], axis=0, weights=batch.weight[batch.y == c]) for c in range(2)]
    wanted = np.stack([-0.25 * ((asked - mean) ** 2).sum(-1) for mean in means], axis=-1)
    np.testing.assert_allclose(got[:, 0] - got[:, 1], wanted[:, 0] - wanted[:, 1], atol=1e-4)
    np.testing.assert_array_equal(got.argmax(-1), wanted.argmax(-1))
    assert len(set(got.argmax(-1))) == 2  # and never the class without a label


def test_prototypes_take_their_steps_on_the_centred_embedding(key):
    """The loop by hand: embeddings less the weighted mean at the start, the head from the class means, plain SGD."""
    batch, rows, rate = ROWS_WITH_PADDING, np.asarray(jax.random.normal(key, (6, 4))), 0.3
    learner = learners.maml(MLP, optimizer=optax.sgd(rate), steps=3, head="prototypes", temperature=0.5)

    @jax.jit
    def both(meta):
        z = plain_mlp(meta, batch.x)
        centre = batch.weight @ z / batch.weight.sum()
        member = jax.nn.one_hot(batch.y, 3) * batch.weight[:, None]
        means = member.T @ (z - centre) / jnp.maximum(member.sum(0), 1e-9)[:, None]
        absent = member.sum(0) == 0
        head = {
            "kernel": 0.5 * means.T,
            "bias": jnp.where(absent, -jnp.inf, -0.25 * (means**2).sum(-1)),
        }
        params = {"params": {**meta["params"], "head": head}}

        def logits(params, x):
            head = params["params"]["head"]
            return (plain_mlp(params, x) - centre) @ head["kernel"] + head["bias"]

        def loss(params):
            each = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch.x), batch.y % 2)
            return (batch.weight * each).sum() / batch.weight.sum()  # the rows of class 2 are padding

        for _ in range(3):
            params = jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params))
        adapted = learner.adapt(key, meta, batch)
        return logits(params, rows), learner.predict(adapted, rows).logits[0], adapted["params"], params["params"]

    meta = jax.tree.map(lambda leaf: leaf + 0.3, jax.jit(learner.init)(key, batch.x))
    wanted, got, adapted, by_hand = both(meta)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.isneginf(got[:, 2]).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), adapted["Dense_0"], by_hand["Dense_0"])
    assert np.abs(adapted["Dense_0"]["kernel"] - meta["params"]["Dense_0"]["kernel"]).max() > 1e-2


def test_start_goes_on_from_earlier_parameters(key):
    batch = example(key)
    meta = jax.jit(BASE.init)(key, batch.x)
    two, four = jax.jit(BASE.adapt), jax.jit(learners.maml(MLP, optimizer=SGD, steps=4).adapt)
    again = two(key, meta, batch, start=two(key, meta, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, four(key, meta, batch))


def test_prototype_head_is_the_nearest_prototype(key):
    x_key, z_key = jax.random.split(key)
    embedding, rows = (np.asarray(jax.random.normal(k, (9, 4))) for k in (x_key, z_key))
    y, weight = np.asarray([0, 0, 0, 1, 1, 0, 1, 2, 2]), np.asarray([1, 1, 2, 1, 0.5, 1, 1, 0, 0], np.float32)
    head = learners.heads.prototype_head(embedding, y, weight, 3, temperature=0.3)
    centres = [(weight * (y == c)) @ embedding / (weight * (y == c)).sum() for c in range(2)]
    wanted = np.asarray([[-0.15 * ((z - centre) ** 2).sum() for centre in centres] for z in rows])
    got = rows @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    shared = (wanted - got[:, :2]).mean(-1, keepdims=True)  # |z|^2 does not tell classes apart
    np.testing.assert_allclose(got[:, :2] + shared, wanted, atol=1e-5)
    assert np.isneginf(got[:, 2]).all()  # no label, no prototype


@pytest.mark.parametrize("source", ["bootstrap", "initialisation", "both"])
def test_members_disagree_by_the_named_source_and_by_nothing_else(key, source):
    batch = example(key)
    learner = learners.committee(BASE, members=3, source=source)

    @jax.jit
    def run(key, batch):
        meta = learner.init(key, batch.x)
        params = learner.adapt(key, meta, batch)
        mine = jax.tree.map(lambda leaf: leaf[0], meta) if source != "bootstrap" else meta
        same = jax.vmap(lambda key: BASE.predict(BASE.adapt(key, mine, batch), batch.x).logits)(
            jax.random.split(key, 3)
        )
        return learner.predict(params, batch.x), same

    prediction, same = run(key, batch)
    assert prediction.logits.shape == (3, 7, 3)
    assert prediction.embedding.shape == (3, 7, 8)
    spread = np.ptp(prediction.logits, axis=0)
    assert (spread.max(-1) > 1e-2).all()
    np.testing.assert_allclose(same[1:], np.stack([same[0]] * 2), atol=1e-6)  # keys alone make no difference
    unlabelled = run(key, batch._replace(weight=jnp.zeros(7)))[0].logits
    assert (np.ptp(unlabelled, axis=0).max() > 1e-2) == (source != "bootstrap")


WRONG = {
    "steps": lambda: learners.maml(MLP, optimizer=SGD, steps=-1),
    "temperature": lambda: learners.maml(MLP, optimizer=SGD, steps=1, temperature=0.0),
    "head": lambda: learners.maml(MLP, optimizer=SGD, steps=1, head="svm"),
    "members": lambda: learners.committee(BASE, members=1),
    "source": lambda: learners.committee(BASE, members=2, source="luck"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    with pytest.raises(ValueError, match=name):
        WRONG[name]()
