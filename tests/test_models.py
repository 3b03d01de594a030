"""The networks against flax and NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import learners, models

CONVOLUTIONS = {  # features, kernel, strides, image height and width
    "stride 1, odd and even": ((3, 3), (1, 1), (7, 6)),
    "stride 2, odd and even": ((3, 3), (2, 2), (7, 6)),
    "stride 2, even and odd": ((3, 3), (2, 2), (8, 5)),
    "even kernel, unequal strides": ((2, 4), (1, 2), (5, 9)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_is_flax_conv(key, name):
    kernel, strides, size = CONVOLUTIONS[name]
    ours = [models.Conv(4, kernel_size=kernel, strides=strides, implementation=i) for i in ("patches", "lax")]
    modules = [nn.Conv(4, kernel, strides), *ours]
    x_key, bias_key, init_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (2, *size, 3))

    @jax.jit
    def run(x):
        params = [module.init(init_key, x)["params"] for module in modules]
        shared = {**params[0], "bias": jax.random.normal(bias_key, (4,))}  # zeros would hide a missing bias

        def loss(params, x, module):
            y = module.apply({"params": params}, x)
            return (jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)).mean(), y

        return params, [jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(shared, x, m) for m in modules]

    params, results = run(x)
    for mine, got in zip(params[1:], results[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, params[0])  # the same tree, the same draws from a key
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, results[0])


@pytest.mark.parametrize("implementation", ["patches", "lax"])
def test_conv_under_vmap_over_weights_inside_scan(key, implementation):
    conv, flax_conv = models.Conv(3, implementation=implementation), nn.Conv(3, (3, 3))
    x = jax.random.normal(key, (2, 5, 6, 3))
    params = jax.jit(jax.vmap(lambda key: flax_conv.init(key, x)))(jax.random.split(key, 4))

    def body(x, _):
        return jnp.tanh(jax.vmap(conv.apply)(params, x)), None

    many = jax.jit(lambda x: jax.lax.scan(body, x, length=3)[0])(jnp.stack([x] * 4))
    apply = jax.jit(flax_conv.apply)
    for member in range(4):
        one = x
        for _ in range(3):
            one = jnp.tanh(apply(jax.tree.map(lambda leaf, i=member: leaf[i], params), one))
        np.testing.assert_allclose(many[member], one, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_max_pool_is_flax_max_pool(key, size):
    x = jax.random.normal(key, (2, *size, 3))

    @jax.jit
    def both(x):
        pools = (models.max_pool, lambda x: nn.max_pool(x, (2, 2), (2, 2)))
        return [(pool(x), jax.grad(lambda x, pool=pool: (pool(x) ** 3).sum())(x)) for pool in pools]

    ours, theirs = both(x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_batch_norm_against_numpy_and_padding(key):
    x = np.asarray(jax.random.normal(key, (5, 3, 2, 4))) * 3 + 1
    norm = models.BatchNorm()
    variables = {"params": {"scale": jnp.arange(1.0, 5.0), "bias": jnp.arange(4.0)}}
    apply = jax.jit(norm.apply)
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5) * np.arange(1, 5) + np.arange(4)
    np.testing.assert_allclose(apply(variables, x), wanted, atol=1e-5)
    padded = np.concatenate([x, 100 + x[:2]])
    got = apply(variables, padded, jnp.asarray([1.0] * 5 + [0.0] * 2))
    np.testing.assert_allclose(got[:5], wanted, atol=1e-5)
    assert np.isfinite(apply(variables, padded, jnp.zeros(7))).all()


NETWORKS = {  # model, input shape of a row, width of the embedding
    "projection": (models.Projection(3), (7,), 7),
    "mlp": (models.MLP(3, hidden=(16, 8)), (8, 8, 1), 8),
    "linear": (models.MLP(3, hidden=()), (8, 8, 1), 64),
    "mlp bfloat16": (models.MLP(3, hidden=(16, 8), dtype=jnp.bfloat16), (8, 8, 1), 8),
    "conv4": (models.Conv4(3, filters=8), (28, 28, 1), 2 * 2 * 8),
    "conv4 odd": (models.Conv4(3, filters=8, norm="none"), (9, 17, 3), 1 * 2 * 8),
    "conv4 pooled": (models.Conv4(3, filters=8, downsample="pool", norm="batch"), (28, 28, 1), 8),
    "conv4 bfloat16": (models.Conv4(3, filters=8, dtype=jnp.bfloat16), (16, 16, 3), 8),
    "resnet12": (models.ResNet12(3, filters=(4, 6)), (9, 8, 3), 6),
    "resnet12 bfloat16": (models.ResNet12(3, filters=(4, 6), dtype=jnp.bfloat16), (8, 8, 1), 6),
    "conv4 bfloat16 batch": (models.Conv4(3, filters=8, norm="batch", dtype=jnp.bfloat16), (16, 16, 3), 8),
}


def test_projection_starts_as_the_identity(key):
    x = jax.random.normal(key, (5, 7))
    model = models.Projection(3)
    variables = model.init(key, x)
    np.testing.assert_array_equal(model.apply(variables, x)[1], x)
    turn = jax.random.normal(key, (7, 7))
    variables = {"params": {**variables["params"], "map": {"kernel": turn}}}
    np.testing.assert_allclose(model.apply(variables, x)[1], x + x @ turn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_dtypes(key, name, dtype):
    model, shape, width = NETWORKS[name]
    x = jax.ShapeDtypeStruct((5, *shape), dtype)
    variables = jax.eval_shape(model.init, key, x)
    assert "head" in variables["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, embedding = jax.eval_shape(model.apply, variables, x)
    assert logits.shape == (5, 3)
    assert embedding.shape == (5, width)
    assert logits.dtype == embedding.dtype == jnp.float32


def test_bfloat16_is_used_and_is_near_float32(key):
    x = jax.random.normal(key, (6, 10))
    wide, narrow = models.MLP(3), models.MLP(3, dtype=jnp.bfloat16)
    variables = jax.jit(wide.init)(key, x)
    a, b = (jax.jit(model.apply)(variables, x)[0] for model in (wide, narrow))
    assert (a != b).any()
    np.testing.assert_allclose(a, b, atol=0.05)


def test_conv4_implementations_agree_and_read_uint8(key):
    x = jax.random.randint(key, (3, 8, 8, 2), 0, 256).astype(jnp.uint8)
    make = {"filters": 8, "blocks": 2}
    model = models.Conv4(3, **make)
    variables = jax.jit(model.init)(key, x)
    logits, embedding = jax.jit(model.apply)(variables, x)
    other = jax.jit(models.Conv4(3, implementation="lax", **make).apply)(variables, x.astype(jnp.float32) / 255)
    np.testing.assert_allclose(other[0], logits, atol=1e-5)
    np.testing.assert_allclose(other[1], embedding, atol=1e-5)
    head = variables["params"]["head"]
    np.testing.assert_allclose(embedding @ head["kernel"] + head["bias"], logits, atol=1e-5)
    alone = jax.jit(model.apply)(variables, x[:1])
    np.testing.assert_allclose(alone[0], logits[:1], atol=1e-5)  # group norm: rows do not meet


@pytest.mark.parametrize("model", [models.MLP(3, hidden=(4,), zero_head=True), models.Conv4(3, 8, 1, zero_head=True)])
def test_zero_head_predicts_nothing(key, model):
    x = jax.random.normal(key, (2, 8, 8, 1))
    assert (jax.jit(lambda: model.init_with_output(key, x)[0][0])() == 0).all()


def test_resnet_block_by_its_formula(key):
    """Three convolutions with batch norm, the shortcut added before the last leaky ReLU, then pooling and the mean."""
    x = jax.random.normal(key, (4, 6, 6, 2))
    model = models.ResNet12(3, filters=(5,))

    @jax.jit
    def run(x):
        params = model.init(key, x)["params"]

        def layer(number, x):
            conv = models.Conv(5, kernel_size=(1, 1) if number == 0 else (3, 3), use_bias=False)
            x = conv.apply({"params": params[f"Conv_{number}"]}, x)
            return (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)

        def leaky(x):
            return jnp.where(x > 0, x, 0.1 * x)

        y = leaky(layer(3, leaky(layer(2, leaky(layer(1, x))))) + layer(0, x))
        y = nn.max_pool(y, (2, 2), (2, 2)).mean((1, 2))
        return model.apply({"params": params}, x), (y @ params["head"]["kernel"] + params["head"]["bias"], y)

    got, wanted = run(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, wanted)


WRONG = {
    "norm": lambda: models.Conv4(3, norm="layer"),
    "downsample": lambda: models.Conv4(3, downsample="average"),
    "need images of 16 pixels": lambda: jax.eval_shape(
        models.ResNet12(3).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    ),
    "groups": lambda: models.Conv4(3, filters=12, groups=8),
    "implementation": lambda: jax.eval_shape(
        models.Conv(3, implementation="fft").init, jax.random.key(0), jnp.zeros((1, 4, 4, 1))
    ),
    "blocks": lambda: jax.eval_shape(
        models.Conv4(3, downsample="pool").init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    with pytest.raises(ValueError, match=name):
        WRONG[name]()


class Own(nn.Module):
    """Somebody's network, put together from one strange layer."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x, weight=None):
        x = self.layer(nn.Dense(4)(x))
        return nn.Dense(3, name="head")(x), x


class Unweighted(nn.Module):
    """It takes no weights."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x), x


class Training(nn.Module):
    """Its second argument is another one."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name="head")(x), x


class Logits(nn.Module):
    """It returns no embedding."""

    @nn.compact
    def __call__(self, x, weight=None):
        return nn.Dense(3, name="head")(x)


class Several(nn.Module):
    """It takes whatever comes."""

    @nn.compact
    def __call__(self, *args):
        return nn.Dense(3, name="head")(args[0]), args[0]


FOREIGN = {
    "flax.linen.BatchNorm keeps running statistics.*use metaal_jax.models.BatchNorm": Own(
        nn.BatchNorm(use_running_average=False)
    ),
    "Dropout of flax.linen would never drop.*metaal_jax.models.Dropout": Own(nn.Dropout(0.5, deterministic=True)),
    "Unweighted must take the rows' weights: write `def __call__.self, x, weight=None.`": Unweighted(),
    "Training must take the rows' weights": Training(),
    "Logits must return .logits .n, c., embedding .n, d..*it returned": Logits(),
}
MADE = {
    "maml": lambda model: learners.maml(model, optimizer=optax.sgd(0.1), steps=1),
    "r2d2": learners.r2d2,
    "loss_predictor": lambda model: learners.loss_predictor(model, optimizer=optax.sgd(0.1), steps=1),
}


@pytest.mark.parametrize("message", FOREIGN)
@pytest.mark.parametrize("name", MADE)
def test_a_module_that_is_no_model_is_told_what_is_wanted(key, name, message):
    with pytest.raises(ValueError, match=message):
        MADE[name](FOREIGN[message]).init(key, jnp.zeros((2, 5)))


def test_other_layers_of_flax_are_welcome(key):
    for model in (Own(nn.Dropout(0.0, deterministic=True)), Own(nn.LayerNorm()), Own(nn.GroupNorm(2)), Several()):
        meta = MADE["maml"](model).init(key, jnp.zeros((2, 5)))
        assert "head" in meta["params"]


def test_batch_norm_with_nan_in_padding(key):
    x = jax.random.normal(key, (5, 4))
    norm, weight = models.BatchNorm(), jnp.asarray([1.0, 1, 1, 1, 1, 0, 0])
    variables = norm.init(key, x)

    def loss(scale, x):
        y = norm.apply({"params": {"scale": scale, "bias": jnp.zeros(4)}}, x, weight[: len(x)])
        return (jnp.sin(y[:5]) * jnp.arange(4)).sum()

    padded = jnp.concatenate([x, jnp.full((2, 4), jnp.nan)])
    for got, wanted in zip(*(jax.value_and_grad(loss)(variables["params"]["scale"], z) for z in (padded, x)),
                           strict=True):  # fmt: skip
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["RowNetwork", "LinearNetwork", "SetNetwork"])
def test_rows_that_do_not_count_may_hold_nan(key, name):
    """Scores, value and gradients as with zeros there; without any row that counts they are finite."""
    network = getattr(models, name)()
    rows, situation = jax.random.normal(key, (5, 4)), jnp.asarray([0.3, -1.0])
    mask = jnp.asarray([True, True, False, True, False])
    params = network.init(key, rows, situation, mask)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)

    @jax.jit
    def read(params, rows, mask):
        def total(params):
            scores, value = network.apply(params, rows, situation, mask)
            return jnp.where(mask, jnp.sin(scores), 0.0).sum() + value

        return jax.value_and_grad(total)(params)

    wanted = read(params, jnp.where(mask[:, None], rows, 0.0), mask)
    got = read(params, jnp.where(mask[:, None], rows, jnp.nan), mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read(params, jnp.nan * rows, mask & False)))
