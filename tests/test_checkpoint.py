"""Checkpoints: what was saved comes back, and whatever was done to the files, never something else."""

import itertools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import checkpoint
from metaal_jax.checkpoint import CheckpointError


def make_tree(scale=1):
    return {
        "params": {"kernel": scale * jnp.linspace(-1.0, 1.0, 600).reshape(20, 30), "bias": jnp.zeros(30)},
        "narrow": jnp.asarray([1.5, -2.25, 3.0], jnp.bfloat16),
        "counts": (jnp.int32(7), np.arange(5, dtype=np.int64), np.asarray([250, 3], np.uint8)),
        "flag": jnp.asarray([True, False]),
    }


def test_typed_keys_come_back(tmp_path):
    tree = {"keys": jax.random.split(jax.random.key(3), 4), "x": jnp.ones(2)}
    checkpoint.save(tmp_path / "keys", tree)
    for shape in (tree, like(tree)):
        back = checkpoint.restore(tmp_path / "keys", shape)
        assert back["keys"].dtype == tree["keys"].dtype
        assert (jax.random.key_data(back["keys"]) == jax.random.key_data(tree["keys"])).all()


def like(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def check_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert isinstance(a, np.ndarray | np.generic)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, np.asarray(b))


def check_message(error, *words):
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "whole"
    checkpoint.save(path, make_tree())
    return path


def test_round_trip(saved):
    check_equal(checkpoint.restore(saved, like(make_tree())), make_tree())
    check_equal(checkpoint.restore(str(saved), make_tree(2)), make_tree())  # only shapes are read of `like`
    assert [path.name for path in saved.parent.iterdir()] == ["whole"]


def test_a_state_with_tuples_comes_back_as_it_was(tmp_path):
    from metaal_jax.outer import MetaState

    state = MetaState(meta={"w": jnp.ones(3)}, opt_state=({"m": jnp.zeros(3)}, ()), step=jnp.int32(4))
    checkpoint.save(tmp_path / "state", state)
    check_equal(checkpoint.restore(tmp_path / "state", jax.eval_shape(lambda: state)), state)


def test_saving_again_replaces_and_sweeps_up(tmp_path, saved):
    path = tmp_path / "again"
    shutil.copytree(saved, path)
    for left_over in ("again.new", "again.new.orbax-checkpoint-tmp"):  # as a killed run leaves them
        (tmp_path / left_over).mkdir()
        (tmp_path / left_over / "part").write_text("x")
    checkpoint.save(path, make_tree(3))
    check_equal(checkpoint.restore(path, make_tree()), make_tree(3))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def damaged(content):
    """Cut to nothing, cut in the middle, cut by a byte, changed in a byte, taken away."""
    middle = len(content) // 2
    flipped = bytearray(content)
    for byte in flipped[middle : middle + 1]:
        flipped[middle] = byte ^ 0x10
    return [b"", content[:middle], content[:-1], bytes(flipped), None]


def test_every_damaged_file_is_noticed_or_harmless(tmp_path, saved):
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    messages = []
    for file, number in itertools.product(files, range(5)):
        copy = tmp_path / f"{len(messages)}"
        shutil.copytree(saved, copy)
        content = damaged((saved / file).read_bytes())[number]
        if content is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(content)
        try:
            check_equal(checkpoint.restore(copy, make_tree()), make_tree())
            messages.append(None)
        except CheckpointError as error:
            messages.append(str(error))
        if content is not None and content != (saved / file).read_bytes() and file.name != "contents.json":
            assert messages[-1] is not None, (file, number)
        shutil.rmtree(copy)
    noticed = [message for message in messages if message is not None]
    assert len(noticed) > 4 * len(files)
    assert all("is damaged" in message and "delete it" in message and "\n" not in message for message in noticed)


def other_trees():
    tree = make_tree()
    yield "a leaf more", {**tree, "extra": jnp.zeros(2)}
    yield "a leaf less", {name: leaf for name, leaf in tree.items() if name != "flag"}
    yield "another name", {**tree, "params": {"kernel": tree["params"]["kernel"], "shift": jnp.zeros(30)}}
    yield "another shape", {**tree, "narrow": jnp.zeros(4, jnp.bfloat16)}
    yield "a smaller shape", {**tree, "params": {**tree["params"], "kernel": jnp.zeros((20, 29))}}
    yield "another rank", {**tree, "flag": jnp.zeros((2, 1), bool)}
    yield "another type", {**tree, "params": {**tree["params"], "bias": jnp.zeros(30, jnp.int32)}}


@pytest.mark.parametrize("name", dict(other_trees()))
def test_of_another_model(saved, name):
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(saved, dict(other_trees())[name])
    check_message(error, str(saved), "delete it")


def test_one_that_orbax_wrote_alone(tmp_path, saved):
    """Without the list of contents it is still read, and what Orbax notices is still one line."""
    copy = tmp_path / "alone"
    shutil.copytree(saved, copy)
    (copy / "contents.json").unlink()
    check_equal(checkpoint.restore(copy, make_tree()), make_tree())
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(copy, {"other": jnp.zeros(3)})
    check_message(error, str(copy), "delete it")


def test_a_missing_one(tmp_path):
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(tmp_path / "nothing", make_tree())
    check_message(error, str(tmp_path / "nothing"), "no checkpoint at", "train again")


FULL = """RESOURCE_EXHAUSTED: Error writing local file "manifest.ocdbt": Failed to write 166 bytes to file 11:
No space left on device [os_error_code='28'] [source locations='tensorstore/internal/os/file_util.cc:1']"""


@pytest.mark.parametrize("when", ["asked beforehand", "found out by Orbax"])
def test_what_cannot_be_written_keeps_what_was_there(tmp_path, saved, monkeypatch, when):
    import orbax.checkpoint as ocp

    def fail(*arguments, **options):
        raise ValueError(FULL)

    path = tmp_path / "kept"
    shutil.copytree(saved, path)
    if when == "asked beforehand":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(CheckpointError) as error:
        checkpoint.save(path, make_tree(5))
    check_message(error, str(path), "(No space left on device)", "make room")
    check_equal(checkpoint.restore(path, make_tree()), make_tree())


def test_meta_parameters_come_back_with_the_config_that_made_them(tmp_path):
    tree = {
        "params": make_tree()["params"],
        "hyper": {"log_rate": jnp.float32(0.5)},
        "flags": {"on": jnp.ones(2, bool)},
    }
    checkpoint.save(tmp_path / "meta", tree, config={"learner": "maml", "steps": 3})
    check_equal(checkpoint.load(tmp_path / "meta"), tree)
    assert checkpoint.read_config(tmp_path / "meta") == {"learner": "maml", "steps": 3}
    checkpoint.save(tmp_path / "plain", tree)
    assert checkpoint.read_config(tmp_path / "plain") is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "meta" / "contents.json").write_text('{"config": ')
    for read in (checkpoint.load, checkpoint.read_config):
        with pytest.raises(CheckpointError, match="is torn"):
            read(tmp_path / "meta")
    (tmp_path / "plain" / "contents.json").unlink()
    with pytest.raises(CheckpointError, match="restore it into a known structure"):
        checkpoint.load(tmp_path / "plain")
