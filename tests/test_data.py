"""The host-side data layer: sources, checks, conversion, cache, streams, prefetching."""

import io
import json
import socket
import subprocess
import sys
import threading
import time
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from metaal_jax import data
from metaal_jax.data import DataError, check_arrays, convert_images, load, prefetch, stream
from metaal_jax.data.prepare import main as prepare_main

ROWS, CLASSES = 30, 3


def picture(pixels, form="png"):
    """uint8 [h, w, c] -> the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, form)
    return file.getvalue()


def write_tfds(
    root,
    name="tiny_shapes",
    *,
    x,
    y,
    shards=(20, 10),
    shape=(12, 12, 3),
    form="array_record",
    raw=None,
    pixel="uint8",
    second=None,
):
    """Writes a prepared TFDS set as a real `download_and_prepare` leaves it; returns the path of its first shard.

    `second` are labels of another name, `kind`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    dimensions = [str(size or -1) for size in shape]
    kinds = "tensorflow_datasets.core.features"
    features = {
        "image": {
            "image": {"dtype": pixel, "shape": {"dimensions": dimensions}},
            "pythonClassName": f"{kinds}.image_feature.Image",
        },
        "label": {
            "classLabel": {"numClasses": str(CLASSES)},
            "pythonClassName": f"{kinds}.class_label_feature.ClassLabel",
        },
    }
    if second is not None:
        features["kind"] = features["label"]
    keys = {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}}
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "numBytes": "4321",
        "shardLengths": [str(size) for size in shards],
    }
    info = {"name": name, "version": "1.0.0", "fileFormat": form, "splits": [split], "supervisedKeys": keys}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": f"{kinds}.features_dict.FeaturesDict",
                "featuresDict": {"features": features},
            }
        )
    )
    raw = [picture(pixels) for pixels in x] if raw is None else raw
    start, paths = 0, []
    for number, size in enumerate(shards):
        paths.append(folder / f"{name}-train.{form}-{number:05d}-of-{len(shards):05d}")
        writer = ArrayRecordWriter(str(paths[-1]), "group_size:1")
        for row in range(start, start + size):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(raw[row])
            example.features.feature["label"].int64_list.value.append(int(y[row]))
            if second is not None:
                example.features.feature["kind"].int64_list.value.append(int(second[row]))
            writer.write(example.SerializeToString())
        writer.close()
        start += size
    return paths[0]


@pytest.fixture
def shapes():
    random = np.random.RandomState(1)
    return random.randint(0, 256, (ROWS, 12, 12, 3)).astype(np.uint8), random.randint(0, CLASSES, ROWS)


@pytest.fixture
def tiny(tmp_path, shapes):
    """A small prepared set in `tmp_path`, and what it holds."""
    write_tfds(tmp_path, x=shapes[0], y=shapes[1])
    return tmp_path, *shapes


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def luma(x):
    return np.rint(x[..., 0] * 0.299 + x[..., 1] * 0.587 + x[..., 2] * 0.114)


def area_mean(x, factor):
    n, h, w, c = x.shape
    return x.reshape(n, h // factor, factor, w // factor, factor, c).astype(float).mean((2, 4))


# Embedded digits and files


def test_digits_are_scaled_and_split_once_and_for_all():
    from sklearn.datasets import load_digits

    train, test = load("digits", "train"), load("digits", "test")
    assert train.x.shape == (1438, 8, 8, 1)
    assert test.x.shape == (359, 8, 8, 1)
    assert train.x.dtype == np.uint8
    assert train.y.dtype == np.int32
    assert train.classes == 10
    whole = load_digits()
    both = np.concatenate([train.x, test.x])[..., 0].reshape(-1, 64)
    expected = np.rint(whole.data / 16 * 255).astype(np.uint8)
    rows = lambda x, y: sorted(zip(map(bytes, x), y.tolist(), strict=True))  # noqa: E731
    assert rows(both, np.concatenate([train.y, test.y])) == rows(expected, whole.target)
    assert train.x.max() == 255
    # The split is part of every published figure: these rows must never change.
    assert train.y[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]


def test_npz_with_and_without_a_test_split(tmp_path, shapes):
    x, y = shapes
    np.savez(tmp_path / "both.npz", x=x, y=y, x_test=x[:4], y_test=[0, 1, 2, 7])
    train, test = load(tmp_path / "both.npz", "train"), load(str(tmp_path / "both.npz"), "test")
    np.testing.assert_array_equal(train.x, x)
    np.testing.assert_array_equal(train.y, y)
    np.testing.assert_array_equal(test.x, x[:4])
    assert train.classes == test.classes == 8  # the largest label of both splits
    np.savez(tmp_path / "one.npz", x=x, y=y)
    train, test = load(tmp_path / "one.npz", "train"), load(tmp_path / "one.npz", "test")
    assert (len(train.y), len(test.y)) == (24, 6)
    assert sorted(map(bytes, np.concatenate([train.x, test.x]))) == sorted(map(bytes, x))
    np.testing.assert_array_equal(load(tmp_path / "one.npz", "test").x, test.x)
    np.savez(tmp_path / "rows.npz", x=np.arange(50.0).reshape(10, 5), y=np.arange(10) % 2)
    rows = load(tmp_path / "rows.npz", "train")
    assert rows.x.dtype == np.float32
    assert rows.x.shape == (8, 5)
    np.testing.assert_array_equal(rows.x[:, 0] // 5 % 2, rows.y)  # x and y still belong together


def test_check_arrays_brings_every_form_to_one():
    y = [0, 1]
    assert check_arrays(np.zeros((2, 4, 4), np.int64), y).x.dtype == np.uint8
    assert check_arrays(np.zeros((2, 4, 4), bool), y).x.shape == (2, 4, 4, 1)
    assert check_arrays(np.zeros((2, 4, 4, 3), np.float64), y).x.dtype == np.float32
    assert check_arrays(np.zeros((2, 5), np.uint8), y).x.dtype == np.float32
    assert check_arrays(np.zeros((2, 5)), y, classes=7).classes == 7
    x = np.zeros((2, 4, 4, 1), np.uint8)
    assert check_arrays(x, y).x is x


# Errors: one line that names what was given and what to do

IMAGES = np.zeros((4, 5, 5, 1), np.uint8)
LABELS = np.arange(4)
NAN = np.where(np.arange(8).reshape(4, 2) == 5, np.nan, 0.0)


@pytest.mark.parametrize(
    ("x", "y", "classes", "said"),
    [
        (IMAGES, LABELS - 1, None, ["label -1", "row 0", "renumber"]),
        (IMAGES, LABELS, 3, ["label 3", "row 3", "0 to 2"]),
        (IMAGES, LABELS.astype(np.uint64) + 2**40, None, [str(2**40), "renumber"]),
        (IMAGES, LABELS + 0.5, None, ["float64", "row 0 holds 0.5", "np.unique"]),
        (IMAGES, LABELS + 0.0, None, ["float64", "all of them whole", "np.unique"]),
        (IMAGES, np.where(LABELS == 2, np.nan, LABELS), None, ["row 2 holds nan", "np.unique"]),
        (IMAGES, LABELS > 1, None, ["bool", "np.unique"]),
        (IMAGES, np.array(list("abcd")), None, ["<U1", "the first is", "'a'", "np.unique"]),
        (IMAGES, np.array(["a", None, 3, 2.0], object), None, ["object", "the first is 'a'", "np.unique"]),
        (IMAGES, LABELS + 10**6, None, ["label 1000003 in row 3", "1000004 classes of 4 rows", "np.unique"]),
        (IMAGES, np.ma.masked_equal(LABELS, 1), None, ["y has 1 masked", "row 1"]),
        (
            np.ma.masked_equal(IMAGES + np.eye(5, dtype=np.uint8)[..., None], 1),
            LABELS,
            None,
            ["x has 20 masked", "row 0, pixel (0, 0, 0)", "drop those rows"],
        ),
        (sparse.csr_array(np.eye(4)), LABELS, None, ["x is a sparse matrix", "x.toarray()"]),
        (IMAGES, LABELS, 2.5, ["classes must be a positive integer", "got 2.5"]),
        (IMAGES, np.eye(4, dtype=int), None, ["(4, 4)", "argmax"]),
        (IMAGES, LABELS, 0, ["classes must be a positive integer", "got 0"]),
        (IMAGES, LABELS[:3], None, ["4 rows", "y has 3", "cut both"]),
        (IMAGES[:0], LABELS[:0], None, ["empty", "at least one row"]),
        (IMAGES[:, :0], LABELS, None, ["empty", "(4, 0, 5, 1)"]),
        (NAN, LABELS, None, ["1 NaN or infinite", "the first in row 2, column 1", "nan_to_num"]),
        (np.where(np.arange(100.0).reshape(4, 5, 5) == 57, np.nan, 0.0), LABELS, None, ["row 2, pixel (1, 2, 0)"]),
        (np.where(np.isnan(NAN), -np.inf, NAN), LABELS, None, ["infinite", "row 2"]),
        (np.full((4, 2), 1e300), LABELS, None, ["infinite", "float32"]),
        (IMAGES.astype(int) + 256, LABELS, None, ["256 to 256", "0 to 255", "rescale"]),
        (np.zeros(4), LABELS, None, ["(4,)", "[n, d]"]),
        (np.zeros((4, 2), complex), LABELS, None, ["complex128", "convert"]),
        (np.array([[None]] * 4), LABELS, None, ["object", "convert"]),
        ([[1], [2, 3]], [0, 1], None, ["not an array", "rows of one shape"]),
    ],
)
def test_bad_arrays(x, y, classes, said):
    with pytest.raises(DataError) as raised:
        check_arrays(x, y, classes=classes, name="the pool")
    check_message(raised.value, ["the pool", *said])


def check_message(error, said):
    message = str(error)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_bad_files(tmp_path):
    def refused(said, split="train", **arrays):
        path = tmp_path / "given.npz"
        if arrays:
            np.savez(path, **arrays)
        with pytest.raises(DataError) as raised:
            load(path, split)
        check_message(raised.value, ["given.npz", *said])

    refused(["no such file", str(tmp_path), "np.savez"])
    refused(["holds images, y", "np.savez(path, x=x, y=y)"], images=IMAGES, y=LABELS)
    refused(["x_test and y_test"], x=IMAGES, y=LABELS, x_test=IMAGES)
    refused(["4 rows", "5 is the least", "x_test"], x=IMAGES, y=LABELS)
    refused(["no split 'valid'", "'train' or 'test'"], split="valid", x=IMAGES, y=LABELS)
    refused(["y has 3"], x=IMAGES, y=LABELS[:3], x_test=IMAGES, y_test=LABELS)
    refused(["label -1", "'y_test'"], x=IMAGES, y=LABELS, x_test=IMAGES, y_test=LABELS - 1)
    refused(["Object arrays", "np.savez"], x=np.array([None, {}]), y=LABELS)
    refused(["bool", "np.unique"], x=IMAGES, y=LABELS > 1)
    refused(["NaN", "row 2, column 1"], x=NAN, y=LABELS)
    refused(
        ["rows of x are uint8 [5, 5, 1], those of x_test float32 [2]"],
        x=IMAGES,
        y=LABELS,
        x_test=NAN[:2],
        y_test=LABELS[:2],
    )
    # What is wrong with the split that is not asked for comes out, too.
    refused(["split 'test'", "NaN", "row 2, column 1"], x=NAN[:2], y=LABELS[:2], x_test=NAN, y_test=LABELS)
    refused(["9 classes of 6 rows"], x=NAN[:2], y=LABELS[:2], x_test=NAN, y_test=LABELS + 5)
    with open(tmp_path / "given.npz", "wb") as file:
        np.save(file, IMAGES)
    refused(["cannot be read", "a single array", "np.savez"])
    (tmp_path / "given.npz").write_bytes(b"")
    refused(["cannot be read", "np.savez"])
    (tmp_path / "given.npz").write_bytes(b"this is no archive")
    refused(["cannot be read", "np.savez"])
    np.savez(tmp_path / "given.npz", x=IMAGES, y=LABELS)
    whole = (tmp_path / "given.npz").read_bytes()
    (tmp_path / "given.npz").write_bytes(whole[: len(whole) // 2])
    refused(["cannot be read", "np.savez"])


@pytest.mark.parametrize(
    ("name", "split", "arguments", "said"),
    [
        ("fashion_mnst", "train", {}, ["'fashion_mnst'", "did you mean 'fashion_mnist'"]),
        ("digit", "train", {}, ["did you mean 'digits'"]),
        ("qqqqqq", "train", {}, ["'qqqqqq'", "list_builders"]),
        ("huggingface:mnist", "train", {}, ["'huggingface:mnist'", "name:1.2.3"]),
        ("pool.npy", "train", {}, ["'pool.npy'", "ends in .npz"]),
        ("mnist/fog", "train", {}, ["'mnist/fog'", "no config 'fog'", "'mnist' alone"]),
        ("mnist_corrupted/fogg", "train", {}, ["'fogg'", "only: fog", "'mnist_corrupted' alone"]),
        ("mnist:1.2.3", "train", {}, ["1.2.3", "only: 3.", "'mnist' alone"]),
        ("imdb_reviews", "train", {}, ["not image classification", "label, text", "mnist"]),
        ("celeb_a", "train", {}, ["not image classification", "landmarks", "mnist"]),
        ("digits", "validation", {}, ["'digits'", "'validation'", "'train' or 'test'"]),
        ("digits", None, {}, ["split must be a string, got None", "'train'"]),
        (7, "train", {}, ["name must be", "got 7", "'digits'"]),
        ("digits", "train", {"data_dir": 3}, ["data_dir must be the path of a folder or None, got 3"]),
        ("digits", "train", {"cache_dir": b"x"}, ["cache_dir must be the path of a folder"]),
        ("mnist", "train", {"label": 3}, ["label must be the name of a class label or None, got 3"]),
        ("digits", "train", {"image_shape": (28, 28)}, ["(28, 28)", "(28, 28, 1)"]),
        ("digits", "train", {"image_shape": (28, 28, 2)}, ["(28, 28, 2)", "(28, 28, 1)"]),
        ("digits", "train", {"image_shape": (0, 28, 1)}, ["(0, 28, 1)", "(28, 28, 1)"]),
        ("digits", "train", {"image_shape": (7.5, 28, 1)}, ["(7.5, 28, 1)", "(28, 28, 1)"]),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_bad_requests(tmp_path, name, split, arguments, said):
    with pytest.raises(DataError) as raised:
        load(name, split, **{"data_dir": tmp_path, **arguments})
    check_message(raised.value, said)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["mnist", "omniglot", "mnist_corrupted/fog", "mnist:3.0.1"])
def test_an_unprepared_set_is_named_at_once_with_the_remedy(tmp_path, name, caplog):
    start = time.perf_counter()
    with pytest.raises(DataError) as raised:
        load(name, "train", data_dir=tmp_path / "empty")
    assert time.perf_counter() - start < 10
    command = f"python -m metaal_jax.data.prepare {name} --data-dir {tmp_path / 'empty'}"
    check_message(
        raised.value,
        [repr(name), "not prepared", str(tmp_path / "empty"), "pip install 'metaal_jax[prepare]'", command],
    )
    assert not caplog.records


def test_another_prepared_version_is_named(tmp_path, shapes):
    write_tfds(tmp_path, "mnist", x=shapes[0], y=shapes[1])
    with pytest.raises(DataError, match=r"prepared there: mnist/1\.0\.0"):
        load("mnist", "train", data_dir=tmp_path)
    assert load("mnist:1.0.0", "train", data_dir=tmp_path).classes == CLASSES


def test_prepare_says_that_it_needs_tensorflow(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert prepare_main(["mnist", "--data-dir", str(tmp_path)]) == 1
    check_message(capsys.readouterr().err.strip(), ["'mnist'", "needs TensorFlow", "pip install 'metaal_jax[prepare]'"])
    assert prepare_main(["mnits", "--data-dir", str(tmp_path)]) == 1
    assert "did you mean 'mnist'" in capsys.readouterr().err
    assert prepare_main(["tiny_shapes", "--data-dir", str(tiny[0])]) == 0
    assert str(tiny[0] / "tiny_shapes" / "1.0.0") in capsys.readouterr().out


# A picture of 60,000 x 60,000 pixels, as its head says.
HEAD = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\r" + HEAD + zlib.crc32(HEAD).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("change", "split", "said"),
    [
        ({}, "valid", ["no split 'valid'", "'train'"]),
        ({}, "train[", ["no split 'train['", "'train[:10%]'"]),
        ({}, "train[3:3]", ["'train[3:3]'", "empty", "at least one row"]),
        ({"y": np.arange(ROWS) - 1}, "train", ["label -1", "row 0", "0 to 2"]),
        ({"y": np.arange(ROWS)}, "train", ["label 3", "row 3", "0 to 2"]),
        ({"raw": [BOMB] * ROWS}, "train", ["row 0", "cannot be decoded"]),
        ({"shape": (None, None, 3)}, "train", ["(None, None, 3)", "image_shape=(64, 64, 3)"]),
        ({"shape": (12, 10, 3)}, "train", ["row 0", "12x12", "12x10", "image_shape"]),
        ({"raw": [b"no picture"] * ROWS}, "train", ["row 0", "cannot be decoded", "prepare it again"]),
        ({"raw": [picture(np.ones((12, 12, 3), np.uint8))[:-30]] * ROWS}, "train", ["row 0", "cannot be decoded"]),
        ({"form": "tfrecord"}, "train", ["tfrecord", "array_record", "metaal_jax.data.prepare"]),
        ({"pixel": "uint16"}, "train", ["uint16", "not 8 bits", ".npz"]),
    ],
)
def test_bad_prepared_sets(tmp_path, shapes, change, split, said):
    write_tfds(tmp_path, **{"x": shapes[0], "y": shapes[1], **change})
    with pytest.raises(DataError) as raised:
        load("tiny_shapes", split, data_dir=tmp_path)
    check_message(raised.value, ["'tiny_shapes'", *said])


def test_a_torn_record_file_is_reported(tmp_path, shapes):
    path = write_tfds(tmp_path, x=shapes[0], y=shapes[1])
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError) as raised:
        load("tiny_shapes", "train", data_dir=tmp_path)
    check_message(raised.value, ["'tiny_shapes'", "records cannot be read", "prepare the set again"])


# Prepared sets, their conversion and cache


def test_prepared_sets_read_whole_and_in_parts(tiny):
    root, x, y = tiny
    whole = load("tiny_shapes", "train", data_dir=root)
    np.testing.assert_array_equal(whole.x, x)
    np.testing.assert_array_equal(whole.y, y)
    assert whole.classes == CLASSES
    assert whole.y.dtype == np.int32
    part = load("tiny_shapes:1.0.0", "train[15:25]", data_dir=root)  # spans two shards
    np.testing.assert_array_equal(part.x, x[15:25])
    np.testing.assert_array_equal(part.y, y[15:25])
    inverted = load("tiny_shapes", "train", data_dir=root, invert=True)
    np.testing.assert_array_equal(inverted.x, 255 - x)


def test_sets_of_varying_size_are_brought_to_one(tmp_path, shapes):
    x, y = shapes
    raw = [picture(np.full((10 + row, 30 - row, 3), row * 8, np.uint8)) for row in range(ROWS)]
    write_tfds(tmp_path, x=None, y=y, raw=[*raw[:29], picture(x[0], "jpeg")], shape=(None, None, 3))
    given = load("tiny_shapes", "train[:29]", data_dir=tmp_path, image_shape=(6, 7, 1)).x
    np.testing.assert_array_equal(given, np.broadcast_to(np.arange(29)[:, None, None, None] * 8, (29, 6, 7, 1)))


def test_images_are_converted_by_luma_area_and_repetition(tiny):
    root, x, _ = tiny
    grey = load("tiny_shapes", "train", data_dir=root, image_shape=(12, 12, 1)).x
    np.testing.assert_allclose(grey[..., 0].astype(float), luma(x), atol=1)
    small = load("tiny_shapes", "train", data_dir=root, image_shape=(4, 4, 3)).x
    np.testing.assert_allclose(small.astype(float), area_mean(x, 3), atol=1)
    both = load("tiny_shapes", "train", data_dir=root, image_shape=(4, 4, 1), invert=True).x
    np.testing.assert_allclose(255.0 - both, area_mean(luma(x)[..., None], 3), atol=1)
    np.testing.assert_array_equal(convert_images(x, (4, 4, 1), invert=True), both)
    np.testing.assert_array_equal(convert_images(grey, (12, 12, 3)), np.repeat(grey, 3, -1))
    assert convert_images(x, None) is x
    opaque = np.concatenate([x, np.full((ROWS, 12, 12, 1), 9, np.uint8)], -1)
    np.testing.assert_array_equal(convert_images(opaque, (12, 12, 3)), x)
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None] * 30, (1, 8, 8))[..., None]
    larger = convert_images(ramp, (16, 16, 1))[0, :, 0, 0].astype(float)
    expected = np.interp((np.arange(16) + 0.5) / 2 - 0.5, np.arange(8), np.arange(8) * 30)
    np.testing.assert_allclose(larger, expected, atol=1)
    for wrong in (x.astype(np.float32), x[..., 0], x[:0], x.tolist()):
        with pytest.raises(DataError, match=r"images must be uint8 \[n, h, w, c\]"):
            convert_images(wrong, (4, 4, 1))
    with pytest.raises(DataError, match="5 channels"):
        convert_images(np.zeros((2, 3, 3, 5), np.uint8), (3, 3, 1))


def test_rows_of_features_cannot_become_images(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.zeros((10, 5)), y=np.arange(10))
    with pytest.raises(DataError, match=r"float32 of shape .* uint8"):
        load(tmp_path / "rows.npz", "train", image_shape=(8, 8, 1))


def cache_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_cache_gives_the_first_read_again(tiny, monkeypatch):
    root, x, _ = tiny
    first = load("tiny_shapes", "train", data_dir=root, image_shape=(4, 4, 1))
    assert len(cache_files(root / "metaal_jax_cache")) == 1
    monkeypatch.setattr("metaal_jax.data.tfds._pixels", None)  # nothing is decoded from here on
    again = load("tiny_shapes", "train", data_dir=root, image_shape=(4, 4, 1))
    np.testing.assert_array_equal(first.x, again.x)
    np.testing.assert_array_equal(first.y, again.y)
    monkeypatch.undo()
    # Split, shape and polarity each have a file of their own.
    np.testing.assert_array_equal(load("tiny_shapes", "train", data_dir=root).x, x)
    np.testing.assert_array_equal(load("tiny_shapes", "train[:30]", data_dir=root, invert=True).x, 255 - x)
    assert len(cache_files(root / "metaal_jax_cache")) == 3


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "other rows", "other labels", "folder"])
def test_a_damaged_cache_is_rebuilt(tiny, tmp_path, damage):
    root, x, _ = tiny
    cache = tmp_path / "cache"
    load("tiny_shapes", "train", data_dir=root, cache_dir=cache)
    (path,) = cache_files(cache)
    sound = path.read_bytes()
    if damage == "torn":
        path.write_bytes(sound[: len(sound) * 2 // 3])
    elif damage == "flipped":
        path.write_bytes(sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other rows":
        np.savez(path, x=x[:5], y=np.zeros(5, np.int32))
    elif damage == "other labels":
        np.savez(path, x=x, y=np.full(ROWS, CLASSES, np.int32))
    else:
        path.unlink()
        (cache / (path.name + ".left-over.part")).write_bytes(b"of a killed run")
    np.testing.assert_array_equal(load("tiny_shapes", "train", data_dir=root, cache_dir=cache).x, x)
    with np.load(path) as rebuilt:
        np.testing.assert_array_equal(rebuilt["x"], x)


def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    root, x, _ = tiny
    (root / "metaal_jax_cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    np.testing.assert_array_equal(load("tiny_shapes", "train", data_dir=root).x, x)
    assert len(cache_files(tmp_path / "home")) == 1  # the second choice
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "metaal_jax_cache"))
    np.testing.assert_array_equal(load("tiny_shapes", "train", data_dir=root).x, x)  # no cache at all
    with pytest.raises(DataError, match=r"cannot be written .* give another"):
        load("tiny_shapes", "train", data_dir=root, cache_dir=root / "metaal_jax_cache" / "below")


def test_importing_the_package_imports_neither_tfds_nor_sklearn():
    code = (
        "import sys, metaal_jax.data, metaal_jax.data.prepare\n"
        "assert not {'tensorflow_datasets', 'sklearn', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Streams and prefetching


@pytest.mark.parametrize("seed", [None, 3])
def test_a_stream_gives_every_row_of_load_once(tiny, seed):
    root, *_ = tiny
    whole = load("tiny_shapes", "train", data_dir=root, image_shape=(4, 4, 1))
    batches = list(
        stream("tiny_shapes", "train", batch_size=8, image_shape=(4, 4, 1), shuffle_seed=seed, data_dir=root)
    )
    assert {batch.x.shape for batch in batches} == {(8, 4, 4, 1)}
    rows, weight = (np.concatenate([getattr(batch, key) for batch in batches]) for key in ("row", "weight"))
    assert weight.tolist() == [1.0] * ROWS + [0.0] * 2
    assert rows[ROWS:].tolist() == [ROWS] * 2
    assert (rows[:ROWS].tolist() == list(range(ROWS))) == (seed is None)
    assert sorted(rows[:ROWS].tolist()) == list(range(ROWS))
    np.testing.assert_array_equal(np.concatenate([batch.x for batch in batches])[:ROWS], whole.x[rows[:ROWS]])
    np.testing.assert_array_equal(np.concatenate([batch.y for batch in batches])[:ROWS], whole.y[rows[:ROWS]])
    assert not batches[-1].x[6:].any()
    first = batches[0]
    assert (first.x.dtype, first.y.dtype, first.row.dtype, first.weight.dtype) == tuple(
        map(np.dtype, (np.uint8, np.int32, np.int64, np.float32))
    )


def test_the_order_of_a_stream_belongs_to_its_seed():
    order = lambda seed, workers: np.concatenate(  # noqa: E731
        [batch.row for batch in stream("digits", "test", batch_size=50, shuffle_seed=seed, workers=workers)]
    )
    np.testing.assert_array_equal(order(1, 1), order(1, 4))
    assert (order(1, 2) != order(2, 2)).any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, ["batch_size must be a positive integer, got 0"]),
        ({"batch_size": 2.5}, ["batch_size must be a positive integer, got 2.5"]),
        ({"batch_size": 4, "workers": 0}, ["workers must be a positive integer, got 0"]),
        (
            {"batch_size": 4, "shuffle_seed": -1},
            ["shuffle_seed must be None or an integer from 0 to 2**32 - 1, got -1"],
        ),
        ({"batch_size": True}, ["batch_size must be a positive integer, got True"]),
        ({"batch_size": 4, "shuffle_seed": True}, ["shuffle_seed must be", "got True"]),
        ({"batch_size": 4, "invert": "no"}, ["invert must be True, False or None, got 'no'"]),
        ({"batch_size": 4, "image_shape": (1, 1)}, ["(1, 1)"]),
    ],
)
def test_bad_streams_are_refused_at_the_call(arguments, said):
    with pytest.raises(DataError) as raised:
        stream("digits", "test", **arguments)
    check_message(raised.value, said)
    with pytest.raises(DataError, match="size must be a positive integer, got 0"):
        prefetch([], size=0)


def test_a_stream_names_the_row_of_the_set(tmp_path, shapes):
    """And not its place in the batch."""
    write_tfds(tmp_path, x=shapes[0], y=np.where(np.arange(ROWS) == 17, 7, 1))
    with pytest.raises(DataError, match="label 7 in row 17 "):
        list(stream("tiny_shapes", "train", batch_size=5, data_dir=tmp_path))


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("metaal_jax")]


def test_a_stream_reports_a_bad_record_and_ends_its_threads(tmp_path, shapes):
    x, y = shapes
    raw = [picture(pixels) for pixels in x]
    raw[17] = b"no picture"
    write_tfds(tmp_path, x=x, y=y, raw=raw)
    batches = stream("tiny_shapes", "train", batch_size=5, data_dir=tmp_path)
    for _ in range(3):
        next(batches)
    with pytest.raises(DataError, match="row 17 cannot be decoded"):
        next(batches)
    assert not ours()
    batches = stream("tiny_shapes", "train", batch_size=5, data_dir=tmp_path)
    next(batches)
    assert ours()
    del batches
    assert not ours()


def test_prefetch_keeps_order_and_puts_on_the_device():
    device = jax.devices()[-1]
    items = [{"x": np.full((3,), number, np.uint8), "row": np.arange(2)} for number in range(20)]
    given = list(prefetch(iter(items), size=3, device=device))
    assert [int(item["x"][0]) for item in given] == list(range(20))
    assert all(isinstance(leaf, jax.Array) and leaf.devices() == {device} for leaf in jax.tree.leaves(given))
    assert list(prefetch([])) == []
    assert not ours()


def test_prefetch_works_ahead_but_not_further_than_asked():
    made = []

    def numbers():
        for number in range(100):
            made.append(number)
            yield np.int32(number)

    items = prefetch(numbers(), size=3)
    assert not made  # nothing before the first use
    assert int(next(items)) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 5  # one used, three waiting, one in the hand of the thread
    items.close()
    assert not ours()
    assert len(made) <= 6


def test_prefetch_passes_exceptions_in_their_place():
    def broken():
        yield np.zeros(2)
        yield np.ones(2)
        raise KeyError("the third batch")

    items = prefetch(broken())
    assert float(next(items).sum()) == 0
    assert float(next(items).sum()) == 2
    with pytest.raises(KeyError, match="the third batch") as raised:
        next(items)
    assert raised.traceback[-1].name == "broken"
    assert not ours()
    with pytest.raises(TypeError):  # what cannot be put on a device
        list(prefetch([object()]))


def test_prefetch_ends_its_thread_and_closes_its_iterator():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield np.zeros(2)
        finally:
            closed.set()

    items = prefetch(endless(), size=1)
    next(items)
    del items
    assert closed.is_set()
    assert not ours()
    for batch in prefetch(stream("digits", "test", batch_size=10)):
        assert batch.x.shape == (10, 8, 8, 1)
        break
    del batch
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ours()


def test_prefetch_follows_the_default_device_of_its_caller():
    device = jax.devices()[-1]
    with jax.default_device(device):
        items = prefetch([np.zeros(2)])
    assert next(items).devices() == {device}
    items.close()


@pytest.mark.parametrize(("name", "rows", "columns", "classes"),
                         [("wine", 178, 13, 3), ("iris", 150, 4, 3), ("breast_cancer", 569, 30, 2)])  # fmt: skip
def test_tables_come_whole_in_their_own_units(name, rows, columns, classes):
    from sklearn import datasets

    parts = [load(name, split) for split in ("train", "test")]
    assert [len(part.y) for part in parts] == [rows - rows // 5, rows // 5]
    assert {part.x.shape[1:] for part in parts} == {(columns,)}
    assert parts[0].x.dtype == np.float32
    assert parts[0].classes == classes
    whole = getattr(datasets, f"load_{name}")()
    tagged = lambda x, y: sorted(map(tuple, np.column_stack([np.float32(x), y]).tolist()))  # noqa: E731
    both = (np.concatenate(leaves) for leaves in ((parts[0].x, parts[1].x), (parts[0].y, parts[1].y)))
    assert tagged(*both) == tagged(whole.data, whole.target)
    with pytest.raises(DataError, match="one label alone"):
        load(name, "train", label="kind")


def test_another_label_of_a_set(tmp_path, shapes):
    x, y = shapes
    write_tfds(tmp_path, x=x, y=y, second=(y + 1) % CLASSES)
    usual = load("tiny_shapes", "train", data_dir=tmp_path)
    other = load("tiny_shapes", "train", label="kind", data_dir=tmp_path)
    np.testing.assert_array_equal(usual.y, y)
    np.testing.assert_array_equal(other.y, (y + 1) % CLASSES)
    np.testing.assert_array_equal(other.x, x)
    # Both are kept, apart.
    np.testing.assert_array_equal(load("tiny_shapes", "train", data_dir=tmp_path).y, y)
    np.testing.assert_array_equal(load("tiny_shapes", "train", label="kind", data_dir=tmp_path).y, other.y)
    streamed = next(stream("tiny_shapes", "train", batch_size=ROWS, label="kind", data_dir=tmp_path))
    np.testing.assert_array_equal(streamed.y, other.y)
    with pytest.raises(DataError) as raised:
        load("tiny_shapes", "train", label="colour", data_dir=tmp_path)
    check_message(raised.value, ["no class label 'colour'", "'kind', 'label'"])


# The real sets, where they are prepared


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Loads a real set, decoded once; skips where it is not prepared."""
    cache_dir = tmp_path_factory.mktemp("cache")

    def read(name, split, **arguments):
        try:
            return load(name, split, cache_dir=cache_dir, **arguments)
        except DataError as error:
            if "is not prepared" in str(error):
                pytest.skip(str(error))
            raise

    return read


@pytest.mark.real_data
def test_mnist(real):
    train, test = real("mnist", "train"), real("mnist", "test")
    assert train.x.shape == (60000, 28, 28, 1)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(train.y).tolist() == counts
    assert np.bincount(test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.x.mean() == pytest.approx(33.3184, abs=1e-4)
    assert train.x.std() == pytest.approx(78.5675, abs=1e-4)


@pytest.mark.real_data
def test_cifar10(real):
    train, test = real("cifar10", "train"), real("cifar10", "test")
    assert train.x.shape == (50000, 32, 32, 3)
    assert np.bincount(train.y).tolist() == [5000] * 10
    assert np.bincount(test.y).tolist() == [1000] * 10
    means = [train.x[..., channel].mean() / 255 for channel in range(3)]
    np.testing.assert_allclose(means, [0.49139968, 0.48215841, 0.44653091], atol=1e-7)


@pytest.mark.real_data
def test_omniglot_becomes_bright_ink_on_28x28(real):
    train = real("omniglot", "train", image_shape=(28, 28, 1))
    test = real("omniglot", "test", image_shape=(28, 28, 1))
    assert train.x.shape == (19280, 28, 28, 1)
    assert test.x.shape == (13180, 28, 28, 1)
    assert train.classes == test.classes == 1623
    names = [np.unique(split.y, return_counts=True) for split in (train, test)]
    assert [len(labels) for labels, _ in names] == [964, 659]
    assert all((counts == 20).all() for _, counts in names)
    assert not set(names[0][0]) & set(names[1][0])
    ink = np.concatenate([train.x, test.x]).mean() / 255
    assert ink == pytest.approx(0.0805, abs=5e-4)  # the area mean keeps the share of ink of the 105x105 originals
    paper = real("omniglot", "train[:20]", image_shape=(28, 28, 1), invert=False)
    np.testing.assert_array_equal(255 - paper.x, train.x[:20])


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "label", "groups"), [("cifar100", "coarse_label", 20), ("omniglot", "alphabet", 50)])
def test_classes_belong_to_groups(real, name, label, groups):
    fine, coarse = (real(name, "test[:1500]", image_shape=(28, 28, 1), label=kind) for kind in (None, label))
    assert coarse.classes == groups
    assert len(np.unique(coarse.y)) > 1
    pairs = set(zip(fine.y.tolist(), coarse.y.tolist(), strict=True))
    assert len(pairs) == len(np.unique(fine.y))


@pytest.mark.real_data
def test_a_real_stream_equals_load(real):
    whole = real("mnist", "test")
    for batch in stream("mnist", "test", batch_size=1000, shuffle_seed=5):
        np.testing.assert_array_equal(batch.x, whole.x[batch.row])
        np.testing.assert_array_equal(batch.y, whole.y[batch.row])


def test_the_exported_names_are_there():
    assert all(hasattr(data, name) for name in data.__all__)
