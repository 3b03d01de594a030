"""Shape exemplars: the same class for the same key, and the image operations against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from metaal_jax.tasks import shapes


def pictures(count=6, size=32, channels=3):
    """Smooth random colour pictures, uint8."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(count, size, size, channels)), (0, 3, 3, 0))
    low, high = noise.min((1, 2, 3), keepdims=True), noise.max((1, 2, 3), keepdims=True)
    return (255 * (noise - low) / (high - low)).astype(np.uint8)


PICTURES = pictures()
DRAW = jax.jit(jax.vmap(shapes.shape_exemplars(examples=5)))


@pytest.fixture(scope="module")
def drawn():
    """One class from each picture."""
    return DRAW(jax.random.split(jax.random.key(0), len(PICTURES)), PICTURES)


def test_shapes_dtypes_and_ink(drawn):
    x, ink = drawn
    assert x.shape == (6, 5, 28, 28, 1)
    assert x.dtype == jnp.uint8
    assert ink.shape == (6,)
    np.testing.assert_allclose(ink, (np.asarray(x) > 127).mean((1, 2, 3, 4)), rtol=1e-6)
    assert ((ink > 0.02) & (ink < 0.5)).sum() >= 4  # most pictures show something
    assert x.max() > 200


def test_the_same_key_the_same_bits_and_others_other_classes(drawn):
    keys = jax.random.split(jax.random.key(0), len(PICTURES))
    np.testing.assert_array_equal(DRAW(keys, PICTURES)[0], drawn[0])
    reverse = np.asarray(DRAW(keys[::-1], PICTURES[::-1])[0])[::-1]
    np.testing.assert_array_equal(reverse, drawn[0])  # whatever its neighbours are
    same_picture = DRAW(keys, np.stack([PICTURES[0]] * 6))[0]
    same_key = DRAW(jnp.stack([keys[0]] * 6), PICTURES)[0]
    for x in (same_picture, same_key, drawn[0]):
        assert len({np.asarray(one).tobytes() for one in x}) == 6
    assert len({np.asarray(one).tobytes() for one in drawn[0][0]}) == 5  # examples of one class differ


def test_examples_of_a_class_are_more_alike_than_classes(drawn):
    flat = np.asarray(drawn[0], np.float32).reshape(6, 5, -1)
    distance = np.linalg.norm(flat[:, None, :, None] - flat[None, :, None], axis=-1)  # [class, class, example, example]
    within = distance[np.arange(6), np.arange(6)].sum((1, 2)) / 20  # the diagonal is 0
    across = distance[~np.eye(6, dtype=bool)].reshape(6, -1).mean(1)
    assert within.mean() < 0.95 * across.mean()


def test_without_deformation_only_level_and_width_vary():
    """All examples are threshold sets of one picture: their ink is nested, and nothing moves."""
    options = {"examples": 8, "affine": 0.0, "elastic": 0.0, "filled": 1.0}
    draw = jax.jit(jax.vmap(shapes.shape_exemplars(**options)))
    x, ink = draw(jax.random.split(jax.random.key(3), 6), PICTURES)
    checked = 0
    for one, share in zip(np.asarray(x)[..., 0].astype(int), ink, strict=True):
        if not 0.05 < share < 0.6:
            continue
        checked += 1
        assert len({example.tobytes() for example in one}) > 1
        order = np.argsort(one.sum((1, 2)))
        steps = np.diff(one[order], axis=0)
        assert steps.min() >= -1  # every example holds the one with less ink
    assert checked >= 3


@pytest.mark.parametrize("size", [8, 20])
def test_size(size):
    draw = shapes.shape_exemplars(examples=2, size=size)
    shape = jax.eval_shape(draw, jax.random.key(0), jax.ShapeDtypeStruct((40, 30, 1), jnp.uint8))
    assert shape[0].shape == (2, size, size, 1)
    assert shape[0].dtype == jnp.uint8


def test_grey_and_float_pictures_are_the_colour_ones():
    grey = PICTURES[0, ..., 0]
    blurred = jax.jit(shapes._blurred, static_argnums=1)
    wanted = blurred(np.stack([grey] * 3, -1), 1.0)
    assert wanted.shape == (32, 32)
    for other in (grey, grey[..., None], grey.astype(np.float32) / 255):
        np.testing.assert_allclose(blurred(other, 1.0), wanted, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.3])
def test_blur_is_scipys(sigma):
    image = np.random.default_rng(1).random((11, 7)).astype(np.float32)
    wanted = ndimage.gaussian_filter(image.astype(np.float64), sigma, mode="nearest")
    np.testing.assert_allclose(jax.jit(shapes._blurred, static_argnums=1)(image, sigma), wanted, atol=1e-5)
    np.testing.assert_array_equal(shapes._blurred(jnp.asarray(image), 0.0), image)


def test_bilinear_is_scipys():
    rng = np.random.default_rng(2)
    image = rng.random((9, 13)).astype(np.float32)
    y, x = rng.uniform(-3, 12, 200), rng.uniform(-3, 16, 200)  # some of them beyond the border
    wanted = ndimage.map_coordinates(image.astype(np.float64), [y, x], order=1, mode="nearest")
    got = jax.jit(shapes._bilinear)(image, y.astype(np.float32), x.astype(np.float32))
    np.testing.assert_allclose(got, wanted, atol=2e-3)  # the last row is read 0.001 short of its end


def test_control_points_are_interpolated():
    matrix = shapes._interpolation(28, 4)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(matrix[0], [1, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(matrix[-1], [0, 0, 0, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"examples": 0}, "examples must be a positive integer, got 0"),
        ({"examples": 2, "size": 7}, "size must be an integer of at least 8, got 7"),
        ({"examples": 2, "crop": (6.0, 5.0)}, r"two rising half-widths, got \(6.0, 5.0\)"),
        ({"examples": 2, "crop": (0.0, 5.0)}, "two rising half-widths"),
        ({"examples": 2, "crop": (5.0, np.inf)}, "two rising half-widths"),
        ({"examples": 2, "crop": (5.0, 6.0, 7.0)}, "two rising half-widths"),
        ({"examples": 2, "filled": 1.5}, "filled must be a probability, got 1.5"),
        ({"examples": 2, "filled": np.nan}, "filled must be a probability, got nan"),
        ({"examples": 2, "affine": -1.0}, "affine must be finite and not negative, got -1.0"),
        ({"examples": 2, "elastic": np.inf}, "elastic must be finite"),
        ({"examples": 2, "smoothing": np.nan}, "smoothing must be finite"),
    ],
)
def test_numbers_out_of_range(options, said):
    with pytest.raises(ValueError, match=said):
        shapes.shape_exemplars(**options)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1, 3), (2, 5, 5, 3)])
def test_what_is_no_image(shape):
    with pytest.raises(ValueError, match="at least 2 x 2 pixels, got the shape"):
        shapes.shape_exemplars(examples=2)(jax.random.key(0), jnp.zeros(shape))
