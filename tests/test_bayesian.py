"""Posteriors: the contract of learners, masks that stay the same, and Laplace's covariance against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaal_jax as ml
from metaal_jax import Batch, acquisition, check_learner, learners, models
from metaal_jax.base import empty_batch
from metaal_jax.learners.bayesian import class_curvature, full_spread, kron_spread
from metaal_jax.learners.inner_loop import inner_loop

SGD, ADAMW = optax.sgd(0.3), optax.adamw(0.05, weight_decay=0.1)
MLP = models.MLP(3, hidden=(8,), dropout=0.4)
TUNED = learners.fine_tune(models.MLP(3, hidden=(5,)), optimizer=ADAMW, steps=3)
DROPPED = learners.mc_dropout(MLP, optimizer=ADAMW, steps=3, members=4)
CONV = models.Conv4(3, filters=8, blocks=1, dropout=0.2)

LEARNERS = {  # learner, shape of a row
    "mc_dropout": (DROPPED, (4,)),
    "mc_dropout, Conv4": (learners.mc_dropout(CONV, optimizer=SGD, steps=1, members=3), (4, 4, 1)),
    "laplace, kron": (learners.laplace(TUNED, members=4), (4,)),
    "laplace, full": (learners.laplace(TUNED, members=4, hessian="full"), (4,)),
    "laplace, prototypes": (
        learners.laplace(learners.maml(MLP, optimizer=SGD, steps=2, head="prototypes"), members=4, prior_precision=2.0),
        (4,),
    ),
}


def example(key, shape=(4,), rows=7):
    return Batch(
        x=jax.random.normal(key, (rows, *shape)), y=jnp.arange(rows, dtype=jnp.int32) % 3, weight=jnp.ones(rows)
    )


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_keep_the_contract(key, name):
    learner, shape = LEARNERS[name]
    check_learner(learner, key, example(key, shape))


def test_a_loss_with_noise_gets_a_key_in_each_step(key):
    got = inner_loop(
        lambda p, key: p * jax.random.normal(key),
        jnp.zeros(()),
        optimizer=optax.sgd(1.0),
        steps=3,
        each=jax.random.split(key, 3),
    )
    np.testing.assert_allclose(got, -sum(jax.random.normal(k) for k in jax.random.split(key, 3)), rtol=1e-5)


def identity_mlp(width, rate):
    """A network whose logits are the masked inputs, `[n, width]` of ones."""
    model = models.MLP(width, hidden=(width,), dropout=rate)
    layer = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    return model, {"params": {"Dense_0": layer, "head": layer}}


def test_masks_of_rows_and_of_members(key):
    model, variables = identity_mlp(400, 0.25)
    ones = jnp.ones((6, 400))
    apply = jax.jit(lambda stream, key, x: model.apply(variables, x, rngs={stream: key})[0], static_argnums=0)
    rows, shared = apply("dropout", key, ones), apply("mask", key, ones)
    for logits in (rows, shared):
        kept = np.asarray(logits) > 0
        np.testing.assert_allclose(logits, kept / 0.75, rtol=1e-6)  # what is kept makes up for what is not
        assert abs(kept.mean(1) - 0.75).max() < 0.12  # five standard deviations
    assert (shared == shared[:1]).all()
    assert len(np.unique(np.asarray(rows), axis=0)) == 6
    np.testing.assert_array_equal(apply("dropout", key, ones[:4]), rows[:4])  # later rows change no earlier one
    np.testing.assert_array_equal(model.apply(variables, ones)[0], ones)  # no random stream, no dropout


def test_conv4_drops_whole_channels(key):
    model = models.Conv4(2, filters=8, blocks=1, norm="none", dropout=0.5)
    x = jnp.ones((3, 6, 6, 1)) * jnp.asarray([1.0, 2, 3])[:, None, None, None]
    variables = model.init(key, x)
    plain, dropped = (model.apply(variables, x, rngs=rngs)[1].reshape(3, 9, 8) for rngs in ({}, {"mask": key}))
    alive = np.asarray(plain[0]).max(0) > 0
    kept = np.asarray(dropped).max(1) > 0
    assert (kept == kept[0]).all()  # one mask for all rows
    assert 0 < kept[0].sum() < alive.sum()
    np.testing.assert_allclose(dropped, np.where(kept[0], 2 * plain, 0), rtol=1e-6)


def test_members_are_networks(key):
    """The same row gets the same answer wherever it stands and however the pool is cut; members differ."""
    batch = example(key)
    params = DROPPED.adapt(key, DROPPED.init(key, batch.x), batch)
    x = jnp.concatenate([batch.x, batch.x[::-1]])
    whole = DROPPED.predict(params, x)
    np.testing.assert_allclose(whole.logits[:, 7:], whole.logits[:, 6::-1], atol=1e-6)
    chunked = acquisition.predict_pool(DROPPED, params, x, chunk=4)
    np.testing.assert_allclose(chunked.logits, whole.logits, atol=1e-6)
    assert np.asarray(whole.logits).std(0).mean() > 0.05
    assert whole.embedding.shape == (1, 14, 8)


def test_many_masks_surround_the_network_without_them(key):
    """After the last hidden layer dropout is linear: the members' mean tends to the prediction without dropout."""
    learner = learners.mc_dropout(MLP, optimizer=ADAMW, steps=3, members=4000)
    batch = example(key)
    params = learner.adapt(key, learner.init(key, batch.x), batch)
    members = np.asarray(learner.predict(params, batch.x).logits)
    variables = {"params": params["params"]}
    error = members.mean(0) - MLP.apply(variables, batch.x)[0]
    assert (abs(error) < 5 * members.std(0) / np.sqrt(4000) + 1e-5).all()


def test_dropout_trains_with_new_masks(key):
    """Other keys, other parameters; a warm start goes on from them; without labels they stay."""
    batch = example(key)
    meta = DROPPED.init(key, batch.x)
    adapt = jax.jit(DROPPED.adapt)
    one, other = (adapt(jax.random.key(i), meta, batch)["params"]["head"]["kernel"] for i in (1, 2))
    assert abs(one - other).max() > 1e-4
    params = adapt(key, meta, batch)
    warm = DROPPED.adapt(key, meta, empty_batch(batch.x, 5), start=params)
    jax.tree.map(np.testing.assert_array_equal, warm["params"], params["params"])


def softmax_curvature(logits):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return np.diag(p) - np.outer(p, p)


def plain_gauss_newton(logits, z, weight):
    """Sum over rows of J^T H J, J being the derivative of the logits in the flattened `[d + 1, c]` head."""
    total, classes = 0, logits.shape[1]
    for i in range(len(z)):
        jacobian = np.kron(z[i], np.eye(classes))
        total = total + weight[i] * jacobian.T @ softmax_curvature(logits[i]) @ jacobian
    return total


def plain_kron(logits, z, weight):
    inputs = sum(w * np.outer(row, row) for w, row in zip(weight, z, strict=True)) / weight.sum()
    return np.kron(inputs, sum(w * softmax_curvature(row) for w, row in zip(weight, logits, strict=True)))


SPREADS = {"kron": (jax.jit(kron_spread), plain_kron), "full": (jax.jit(full_spread), plain_gauss_newton)}


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", SPREADS)
def test_covariance_against_numpy(name, rows):
    """The spread is linear in its noise: the images of the unit vectors are a root of the covariance."""
    rng = np.random.default_rng(0)
    logits, weight = 2 * rng.normal(size=(rows, 3)), rng.uniform(0.5, 2, rows)
    z = np.concatenate([2 * rng.normal(size=(rows, 4)), np.ones((rows, 1))], axis=1)
    spread, plain = SPREADS[name]
    curvature = class_curvature(jnp.asarray(logits, jnp.float32))
    noise = jnp.eye(15).reshape(15, 5, 3)
    root = np.asarray(spread(curvature, jnp.float32(z), jnp.float32(weight), 0.7, noise)).reshape(15, 15)
    wanted = np.linalg.inv(plain(logits, z, weight) + 0.7 * np.eye(15))
    np.testing.assert_allclose(root.T @ root, wanted, atol=2e-5)
    if rows == 1:  # one row is one Kronecker product
        np.testing.assert_allclose(plain_kron(logits, z, weight), plain_gauss_newton(logits, z, weight), atol=1e-9)


def test_the_gauss_newton_matrix_is_the_hessian_of_a_linear_head():
    rng = np.random.default_rng(1)
    head, z, y = rng.normal(size=(3, 3)), rng.normal(size=(4, 3)), np.asarray([0, 1, 2, 1])

    def loss(flat):
        logits = z @ flat.reshape(3, 3)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()

    hessian = jax.jit(jax.hessian(loss))(jnp.float32(head.ravel()))
    np.testing.assert_allclose(hessian, plain_gauss_newton(z @ head, z, np.ones(4)), atol=1e-5)


@pytest.mark.parametrize("hessian", ["kron", "full"])
def test_heads_are_drawn_around_the_adapted_one(key, hessian):
    learner = learners.laplace(TUNED, members=4000, hessian=hessian, prior_precision=4.0)
    batch = example(key)._replace(weight=jnp.asarray([1.0, 1, 1, 2, 1, 0, 0]))
    meta = learner.init(key, batch.x)
    adapt = jax.jit(learner.adapt)
    params = adapt(key, meta, batch)
    mean = TUNED.adapt(jax.random.split(key)[0], meta, batch)
    inner = TUNED.predict(mean, batch.x)
    head, heads = mean["params"]["head"], params["heads"]
    drawn = np.concatenate([heads["kernel"], heads["bias"][:, None]], axis=1).reshape(4000, -1)
    centre = np.concatenate([head["kernel"], head["bias"][None]]).ravel()
    z = np.concatenate([inner.embedding[0], np.ones((7, 1))], axis=1).astype(np.float64)
    precision = SPREADS[hessian][1](np.asarray(inner.logits[0], np.float64), z, np.asarray(batch.weight, np.float64))
    wanted = np.linalg.inv(precision + 4.0 * np.eye(18))
    assert (abs(drawn.mean(0) - centre) < 5 * np.sqrt(np.diag(wanted) / 4000)).all()
    error = np.sqrt((wanted**2 + np.outer(np.diag(wanted), np.diag(wanted))) / 4000)
    assert (abs(np.cov(drawn.T) - wanted) < 5.5 * error).all()
    logits = learner.predict(params, batch.x).logits
    wanted = [z @ one.reshape(6, 3) for one in drawn[:5]]
    np.testing.assert_allclose(logits[:5], wanted, atol=1e-4)
    nothing = adapt(key, meta, batch._replace(weight=jnp.zeros(7)))["heads"]
    np.testing.assert_allclose(np.asarray(nothing["kernel"]).std(0), 0.5, rtol=0.08)  # the prior's


@pytest.mark.parametrize("hessian", ["kron", "full"])
def test_gradients_of_weights_pass_through_the_mean_alone(key, hessian):
    """Equal eigenvalues (here of empty columns) have no derivative; the spread must not be asked for it."""
    plain = learners.fine_tune(models.MLP(3, hidden=()), optimizer=optax.sgd(0.1), steps=3)
    learner, batch = learners.laplace(plain, members=3, hessian=hessian), example(key)
    batch = batch._replace(x=batch.x.at[:, :3].set(0.0))
    meta = learner.init(key, batch.x)

    @jax.jit
    @jax.grad
    def gradient(weight):
        params = learner.adapt(key, meta, batch._replace(weight=weight))
        return (learner.predict(params, batch.x).logits ** 2).sum()

    for weight in (batch.weight, jnp.full_like(batch.weight, 0.5)):
        got = np.asarray(gradient(weight))
        assert np.isfinite(got).all()
        assert (got != 0).any()


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e2, 1e4])
@pytest.mark.parametrize("sure", [0.0, 1.0, 1e4])
def test_spreads_are_finite(key, name, size, sure):
    spread = SPREADS[name][0]
    keys = jax.random.split(key, 3)
    z, curvature = (
        size * jax.random.normal(keys[0], (40, 9)),
        class_curvature(sure * jax.random.normal(keys[1], (40, 5))),
    )
    noise = jax.random.normal(keys[2], (6, 9, 5))
    for weight in (jnp.ones(40), jnp.zeros(40), jnp.zeros(40).at[3].set(1.0)):
        drawn = spread(curvature, z, weight, 0.01, noise)
        assert np.isfinite(drawn).all()
        assert abs(drawn).max() < 10 * 5  # no wider than the prior


def test_arguments_are_checked(key):
    multi, batch = learners.committee(TUNED, members=2), example(key)
    nameless = TUNED._replace(adapt=lambda key, meta, batch, **_: {"params": {"last": ()}})
    for message, wrong in {
        "mc_dropout: the model needs an attribute dropout above 0, MLP has 0": lambda: learners.mc_dropout(
            models.MLP(3), optimizer=SGD, steps=1, members=2
        ),
        "mc_dropout: steps": lambda: learners.mc_dropout(MLP, optimizer=SGD, steps=-1, members=2),
        "mc_dropout: members": lambda: learners.mc_dropout(MLP, optimizer=SGD, steps=1, members=1),
        "laplace: members": lambda: learners.laplace(TUNED, members=1),
        "laplace: prior_precision": lambda: learners.laplace(TUNED, members=2, prior_precision=0.0),
        "laplace: hessian": lambda: learners.laplace(TUNED, members=2, hessian="diagonal"),
        "named 'head'": lambda: learners.laplace(nameless, members=2).adapt(key, (), batch),
        "single model": lambda: learners.laplace(multi, members=2).adapt(key, multi.init(key, batch.x), batch),
        "MLP: dropout must": lambda: models.MLP(3, dropout=1.0),
        "there is none": lambda: models.MLP(3, hidden=(), dropout=0.5),
        "Conv4: dropout must": lambda: models.Conv4(3, dropout=-0.1),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize("name", ["batch_bald", "epig"])
def test_posteriors_in_a_compiled_run(key, name):
    """Whole runs, each one program: BatchBALD with Laplace's members, EPIG with masks and target rows of one's own."""
    x = jax.random.normal(key, (40, 4))
    y = (x[:, 0] > 0).astype(jnp.int32)
    problem = ml.tasks.problem(x, y, x, y)
    learner, policy, params = {
        "batch_bald": (LEARNERS["laplace, kron"][0], acquisition.batch_bald(k=2), ()),
        "epig": (DROPPED, acquisition.epig(DROPPED, k=2), x[:5] + 1),
    }[name]
    active = ml.active_learner(learner, policy, capacity=6)

    def run(key, problem, params):
        keys = jax.random.split(key, 3)
        meta = learner.init(keys[0], problem.x)
        state = active.init(keys[1], meta, params, problem)

        def body(state, key):
            return active.step(key, meta, params, state, problem)

        return jax.lax.scan(body, state, jax.random.split(keys[2], 3))[1]

    trace = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(jax.random.split(key, 2), problem, params)
    assert trace.valid.all()
    assert all(len(set(row.ravel().tolist())) == 6 for row in np.asarray(trace.index))
    assert np.isfinite(trace.test.accuracy).all()
