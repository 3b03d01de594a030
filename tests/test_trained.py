"""Meta-trained learners as files: saved, loaded, damaged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import learners, models
from metaal_jax.base import Batch

CENTRE, SCALE = np.asarray([1.0, -2.0, 0.5], np.float32), np.asarray([0.5, 3.0, 1.0], np.float32)


def made(name="r2d2", network=None, row=(3,), about=None, **settings):
    """A learner with meta-parameters that no `init` gives."""
    network = models.MLP(2, hidden=(4,)) if network is None else network
    settings = {**learners.META_LEARNERS[name].settings, **settings}
    ready = (*row, 1) if len(row) == 2 else row
    fresh = jax.eval_shape(
        learners.META_LEARNERS[name].make(network, **settings).init, jax.random.key(0), jnp.zeros((1, *ready))
    )
    draw = np.random.default_rng(0)
    meta = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), fresh)
    centre, scale = (CENTRE, SCALE) if row == (3,) else (np.zeros(ready[-1:], np.float32), np.ones(ready[-1:], "f4"))
    return learners.Trained(name, network, settings, meta, row, centre, scale, about or {"way": "by hand"})


LEARNERS = {
    **{name: made(name) for name in learners.META_LEARNERS},
    "linear body": made("protonet", models.MLP(3, hidden=())),
    "projection": made("r2d2", models.Projection(5)),
    "half precision": made("maml", models.MLP(3, hidden=(4, 5), dtype=jnp.bfloat16), steps=2, rate=0.5),
    "images": made("protonet", models.Conv4(3, filters=4, groups=2, blocks=2, norm="batch"), row=(8, 8)),
    "colours": made("r2d2", models.ResNet12(3, filters=(2, 3)), row=(4, 4, 3)),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_saved_and_loaded_to_the_bit(tmp_path, name):
    trained = LEARNERS[name]
    learners.save(tmp_path / "deep" / "mine.json", trained)
    found = learners.load(tmp_path / "deep" / "mine.json")
    assert found.network == trained.network
    assert (found.name, found.settings, found.row, found.about) == (
        trained.name, trained.settings, trained.row, trained.about)  # fmt: skip
    assert jax.tree.structure(found.meta) == jax.tree.structure(trained.meta)
    for a, b in zip(jax.tree.leaves(found[3:7]), jax.tree.leaves(trained[3:7]), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["mine.json"]


@pytest.mark.parametrize("name", learners.META_LEARNERS)
def test_it_fits_tasks_of_any_number_of_classes(name):
    trained = LEARNERS[name]
    draw = np.random.default_rng(1)
    y = np.arange(15) % 5
    x = trained.prepare(draw.normal(size=(5, 3))[y] * 5 + 0.1 * draw.normal(size=(15, 3)))
    learner, meta = trained.learner(5), trained.start(5)
    assert jax.tree.structure(meta) == jax.tree.structure(trained.meta)
    np.testing.assert_array_equal(meta["params"]["Dense_0"]["kernel"], trained.meta["params"]["Dense_0"]["kernel"])
    assert meta.get("hyper", {}).keys() == trained.meta.get("hyper", {}).keys()
    logits = jax.jit(lambda weight: learner.predict(learner.adapt(
        jax.random.key(0), meta, Batch(x, jnp.asarray(y), weight)), x).logits[0])  # fmt: skip
    assert (logits(jnp.zeros(15)) == 0).all()  # nothing is known of any class
    assert logits(jnp.ones(15)).shape == (15, 5)
    assert (logits(jnp.ones(15)).argmax(-1) == y).mean() > 0.5


def test_rows_are_standardised_as_in_the_training():
    trained = LEARNERS["r2d2"]
    x = np.random.default_rng(0).normal(size=(4, 3))
    for given in (x, x.astype(np.float32), jnp.asarray(x), x.tolist()):
        np.testing.assert_allclose(trained.prepare(given), (x - CENTRE) / SCALE, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(trained.prepare)(jnp.asarray(x)), trained.prepare(x))
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)
    ready = LEARNERS["images"].prepare(pictures)
    assert (ready.shape, ready.dtype) == ((5, 8, 8, 1), jnp.float32)
    np.testing.assert_array_equal(ready[..., 0], pictures)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((4, 2)), r"prepare: rows must be \[n, 3\], as in the training, got \[4, 2\]"),
        (np.zeros(3), r"got \[3\]"),
        (3.0, r"got \[\]"),
        (np.zeros((4, 3, 1)), r"got \[4, 3, 1\]"),
        (np.zeros((0, 3)), "prepare: x has no rows"),
        (np.full((2, 3), "a"), "prepare: x holds strings"),
        (np.asarray([[0, 1, 2], [0, np.inf, 1]]), r"prepare: x\[1, 1\] is inf"),
        (np.asarray([[0.0, 1, 1e39]]), r"prepare: x\[0, 2\] is 1e\+39, beyond what float32 holds"),
        (np.asarray([[0, 0, 0], [3e38, 1, 2]]), "prepare: row 1 is beyond what float32 holds"),
    ],
)
def test_prepare_says_what_it_wants(x, said):
    with pytest.raises(ValueError, match=said):
        LEARNERS["r2d2"].prepare(x)


@pytest.mark.parametrize("classes", [0, -1, 2.0, "3", True, None])
def test_a_number_of_classes_is_wanted(classes):
    for make in (LEARNERS["r2d2"].learner, LEARNERS["r2d2"].start):
        with pytest.raises(ValueError, match="classes must be a positive integer"):
            make(classes)


def test_its_table_is_what_it_reached():
    one = {"mean": 0.5, "low": 0.45, "high": 0.55}
    held = [{"shots": 1, "tasks": 7, "learner": one, "linear": one, "difference": {"mean": 0.01, "low": -0.02,
                                                                                   "high": 0.03}}]  # fmt: skip
    trained = made(about={"tasks": 30, "steps": 9, "held_out": held, "left_out": ["task 3: left out"]})
    assert trained.table().splitlines()[-1] == "| 1 | 50.0 [45.0, 55.0] | 50.0 [45.0, 55.0] | +1.0 [-2.0, +3.0] |"
    assert "30 tasks in 9 steps" in str(trained)
    assert "7 held-out tasks" in str(trained)
    assert str(trained).splitlines()[-1] == "- task 3: left out"
    assert "\n" not in repr(trained)
    assert trained.table() in str(trained)


def change(*place, value):
    def changed(held):
        inner = held
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = value
        return held

    return changed


def remove(*place):
    def changed(held):
        inner = held
        for part in place[:-1]:
            inner = inner[part]
        del inner[place[-1]]
        return held

    return changed


KERNEL = ("meta", "params/Dense_0/kernel")
NAN = {"shape": [3, 4], "base64": "AADAfwAAwH8AAMB/AADAfwAAwH8AAMB/AADAfwAAwH8AAMB/AADAfwAAwH8AAMB/"}
DAMAGED = {  # what was done to the file of an r2d2, what the message says
    "NaN": (change(*KERNEL, value=NAN), "kernel' must hold finite float32 numbers, got nan at place 0"),
    "no base64": (change(*KERNEL, "base64", value="?"), "the base64 of 'params/Dense_0/kernel' is damaged"),
    "half a base64": (change(*KERNEL, "base64", value="AAA"), "is damaged"),
    "letters of another alphabet": (change(*KERNEL, "base64", value="äöü="), "is damaged"),
    "half a number": (change(*KERNEL, "base64", value="AAAA"), "holds 3 bytes"),
    "a number less": (change(*KERNEL, "base64", value="AAAAAA=="), r"kernel' of shape \[3, 4\] has 1 values"),
    "a list for base64": (change(*KERNEL, "base64", value=[1.0]), r"must be text, got \[1.0\]"),
    "a missing leaf": (remove(*KERNEL), "parameter 'params/Dense_0/kernel' is missing"),
    "an extra leaf": (change("meta", "params/more", value={"shape": [0], "base64": ""}), "no parameter 'params/more'"),
    "another shape": (change(*KERNEL, value={"shape": [1], "base64": "AAAAAA=="}), r"must have the shape \[3, 4\]"),
    "a negative size": (change(*KERNEL, "shape", value=[-3, -4]), "must be a list of sizes"),
    "a huge size": (change(*KERNEL, value={"shape": [10**30, 0], "base64": ""}), "must be a list of sizes"),
    "no shape": (remove(*KERNEL, "shape"), "must hold 'shape' and 'base64'"),
    "a leaf that is a number": (change(*KERNEL, value=3), "must hold 'shape' and 'base64'"),
    "no parameters": (change("meta", value={}), "is missing|there are 0 parameters"),
    "parameters as a list": (change("meta", value=[]), r"'meta' must be an object, got \[\]"),
    "no hyperparameter": (remove("meta", "hyper/log_ridge"), "'hyper/log_ridge' is missing"),
    "an unknown learner": (change("name", value="reptile"), "'name' must be one of maml, .*, got 'reptile'"),
    "no learner": (remove("name"), "'name' must be one of .*, got None"),
    "a learner that is a list": (change("name", value=[]), r"'name' must be one of .*, got \[\]"),
    "another learner": (change("name", value="maml"), "maml has no setting 'ridge'"),
    "an unknown setting": (change("settings", "rate", value=1.0), "r2d2 has no setting 'rate'; its settings are"),
    "a missing setting": (remove("settings", "ridge"), "the setting 'ridge' of r2d2 is missing"),
    "a setting of 0": (change("settings", "ridge", value=0), "the setting 'ridge' must be a number above 0, got 0"),
    "a setting NaN": (change("settings", "scale", value=float("nan")), "'scale' must be a number above 0, got nan"),
    "a setting of text": (change("settings", "scale", value="8"), "got '8'"),
    "an unknown network": (change("network", "kind", value="LSTM"), "'kind' must be one of MLP, .*, got 'LSTM'"),
    "no kind": (remove("network", "kind"), "'kind' must be one of .*, got None"),
    "an unknown option": (change("network", "parent", value=1), "MLP has no option 'parent'; its options are classes"),
    "a missing option": (remove("network", "hidden"), "the network's 'hidden' is missing"),
    "other widths": (change("network", "hidden", value=[5]), "must have the shape"),
    "huge widths": (change("network", "hidden", value=[10**12]), "cannot be made|must have the shape"),
    "many widths": (change("network", "hidden", value=[4] * 10**4), "names 10000 layers, and there are 6 parameters"),
    "a width of 0": (change("network", "hidden", value=[0]), "must be a list of positive integers"),
    "a width that is no list": (change("network", "hidden", value=4), "must be a list of positive integers, got 4"),
    "no classes": (change("network", "classes", value=0), "'classes' must be a positive integer, got 0"),
    "other classes": (change("network", "classes", value=3), "must have the shape"),
    "a dropout of 2": (change("network", "dropout", value=2.0), "cannot be made .*dropout must be"),
    "a dropout of text": (change("network", "dropout", value="a"), "'dropout' must be a finite number, got 'a'"),
    "a start that is a number": (change("network", "zero_head", value=1), "'zero_head' must be true or false, got 1"),
    "an unknown type": (change("network", "dtype", value="int8"), "'dtype' must be null or one of .*, got 'int8'"),
    "a type that is a list": (change("network", "dtype", value=[]), "'dtype' must be null or"),
    "other columns": (change("row", value=[2]), r"'centre' must have the shape \[2\], got \[3\]"),
    "a row of no size": (change("row", value=[]), "'row' must be the shape of a row"),
    "a row of text": (change("row", value=["3"]), "'row' must be the shape of a row"),
    "a row of half a column": (change("row", value=[2.5]), "'row' must be the shape of a row"),
    "a row as a number": (change("row", value=3), "'row' must be a list, got 3"),
    "centre NaN": (change("centre", "values", 1, value=float("nan")), "'centre' must hold finite .* got nan"),
    "scale 0": (change("scale", "values", 1, value=0.0), "'scale' must hold numbers above 0, got 0.0"),
    "no scale": (remove("scale"), "'scale' is missing"),
    "about as text": (change("about", value="words"), "'about' must be an object, got 'words'"),
    "a list": (lambda held: [held], "must be an object"),
    "null": (lambda held: None, "must be an object, got None"),
    "another scale": (change("scale", "values", 1, value=4.0), "was changed after it was saved"),
    "another report": (change("about", "way", value="magic"), "was changed after it was saved"),
    "another checksum": (change("check", value=3), "was changed after it was saved"),
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "mine.json"
    learners.save(path, LEARNERS["r2d2"])
    return path.read_text()


def refused(path, match):
    with pytest.raises(ValueError, match=match) as error:
        learners.load(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path, text, name):
    changed, said = DAMAGED[name]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed(json.loads(text))))
    refused(path, said)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("blocks", 10**9, "'blocks' is 1000000000, and there are"),
        ("groups", 3, "4 filters do not divide into 3 groups"),
        ("norm", "layer", "norm must be one of"),
        ("implementation", "magic", "cannot be made"),
        ("downsample", "pool", "must have the shape|cannot be made"),
    ],
)
def test_networks_that_cannot_be_are_refused(tmp_path, name, value, said):
    path = tmp_path / "mine.json"
    learners.save(path, made("protonet", models.Conv4(2, filters=4, groups=2, blocks=2), row=(6, 6)))
    held = json.loads(path.read_text())
    held["network"][name] = value
    path.write_text(json.dumps(held))
    refused(path, said)


def test_what_is_no_such_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "mine.json"
    for content, said in (
        (b"", "holds no learner"),
        (text.encode()[:300], "holds no learner .*; give a file that learners.save wrote"),
        (b"\x00\xff\xfe learner", "not a text file"),
        (b"[" * 100_000, "holds no learner"),
    ):
        path.write_bytes(content)
        refused(path, said)
    refused(tmp_path, "cannot be read .*directory")
    refused(tmp_path / "missing.json", r"cannot be read \(No such file")
    for given in (7, None, LEARNERS["r2d2"]):
        with pytest.raises(ValueError, match=r"load: give the path of a file that learners.save wrote, got"):
            learners.load(given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"meta": jax.tree.map(lambda leaf: leaf * jnp.nan, LEARNERS["r2d2"].meta)}, "must hold finite float32"),
        ({"meta": LEARNERS["maml"].meta}, "the parameter 'hyper/log_ridge' is missing"),
        ({"network": models.SetNetwork()}, "saved with one of MLP, .*; got SetNetwork"),
        ({"name": "reptile"}, "'name' must be one of"),
        ({"settings": {}}, "the setting '.*' of r2d2 is missing"),
        ({"row": (4,)}, "'centre' must have the shape"),
        ({"scale": -SCALE}, "'scale' must hold numbers above 0"),
    ],
)  # fmt: skip
def test_save_refuses_what_load_would(tmp_path, changes, said):
    (tmp_path / "mine.json").write_text("what was there")
    with pytest.raises(ValueError, match=f"save: .*{said}"):
        learners.save(tmp_path / "mine.json", LEARNERS["r2d2"]._replace(**changes))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("mine.json", "what was there")]


def test_save_says_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "mine.json"):
        with pytest.raises(ValueError, match=r"the learner .* cannot be written \(.*\); give another path"):
            learners.save(path, LEARNERS["r2d2"])
    with pytest.raises(TypeError, match="a learner's file holds what JSON can hold, got object"):
        learners.save(tmp_path / "mine.json", LEARNERS["r2d2"]._replace(about={"way": object()}))
    with pytest.raises(ValueError, match="give what meta_train returned, got dict"):
        learners.save(tmp_path / "mine.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
