"""Checkpoints: what was saved comes back, and whatever was done to the files, never something else."""

import itertools
import json
import os
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import Batch, checkpoint
from metaal_jax.checkpoint import CheckpointError


def make_tree(scale=1):
    return {
        "params": {"kernel": scale * jnp.linspace(-1.0, 1.0, 600).reshape(20, 30), "bias": jnp.zeros(30)},
        "narrow": jnp.asarray([1.5, -2.25, 3.0], jnp.bfloat16),
        "counts": (jnp.int32(7), np.arange(5, dtype=np.int64), np.asarray([250, 3], np.uint8)),
        "flag": jnp.asarray([True, False]),
    }


def like(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def check_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert isinstance(a, np.ndarray | np.generic)
        assert a.dtype == np.asarray(b).dtype
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


def test_saving_again_replaces_and_leaves_the_neighbours_alone(tmp_path, saved):
    path = tmp_path / "again"
    shutil.copytree(saved, path)
    neighbours = ["again.new", "again.new_experiment", "again.old", ".again"]
    for neighbour in neighbours:
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "part").write_text("x")
    for left_over in ("new", "new.orbax-checkpoint-tmp", "old"):  # of a killed run
        (tmp_path / ".again.saving" / left_over).mkdir(parents=True)
    checkpoint.save(path, make_tree(3))
    check_equal(checkpoint.restore(path, make_tree()), make_tree(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*neighbours, "again"])
    assert all((tmp_path / neighbour / "part").read_text() == "x" for neighbour in neighbours)


NUMBERS = jnp.arange(3.0)
KINDS = {  # what a tree may hold
    "a bare array": NUMBERS,
    "no leaf": {"a": (), "b": None},
    "scalars": (1, 2.5, True, np.float32(3), jnp.bfloat16(1.5)),
    "None and empty tuples": {"a": None, "b": (), "c": [NUMBERS, ((), None)]},
    "no rows": {"x": np.zeros((0, 3), np.uint8), "y": jnp.zeros(0, jnp.int32), "z": NUMBERS},
    "nothing but no rows": np.zeros((2, 0)),
    "names with a slash": {"a/b": NUMBERS, "a": {"b": 2 * NUMBERS}, "~1": 3 * NUMBERS},
    "numbers as names": {0: NUMBERS, 10: 2 * NUMBERS, 9: 3 * NUMBERS},
    "narrow types": [NUMBERS.astype(t) for t in ("float16", "float8_e4m3fn", "int4", "complex64", "bool")],
    "wide types": [np.arange(3, dtype=t) for t in ("int64", "uint64", "float64", "complex128")],
    "not contiguous": np.arange(12.0).reshape(3, 4).T[::2],
    "NaN and infinity": np.asarray([np.nan, np.inf, -np.inf, -0.0]),
    "a batch of no rows": Batch(x={"a": jnp.zeros((0, 2))}, y=jnp.zeros(0, jnp.int32), weight=jnp.zeros(0)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tree_comes_back(tmp_path, name):
    tree = KINDS[name]
    checkpoint.save(tmp_path / "tree", tree)
    check_equal(checkpoint.restore(tmp_path / "tree", jax.tree.map(np.asarray, tree)), tree)
    check_equal(checkpoint.restore(tmp_path / "tree", tree), tree)
    checkpoint.save(tmp_path / "tree", checkpoint.restore(tmp_path / "tree", tree))
    check_equal(checkpoint.restore(tmp_path / "tree", tree), tree)
    if name in ("a bare array", "names with a slash", "no rows"):
        check_equal(checkpoint.load(tmp_path / "tree"), tree)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_come_back(tmp_path, impl):
    key = jax.random.key(3, impl=impl)
    tree = {"keys": jax.random.split(key, 4), "none": jax.random.split(key, 4)[:0], "one": key, "x": jnp.ones(2)}
    checkpoint.save(tmp_path / "keys", tree)
    for back in (
        checkpoint.restore(tmp_path / "keys", tree),
        checkpoint.restore(tmp_path / "keys", like(tree)),
        checkpoint.load(tmp_path / "keys"),
    ):
        for name in ("keys", "none", "one"):
            assert (back[name].dtype, back[name].shape) == (tree[name].dtype, tree[name].shape)
            assert (jax.random.key_data(back[name]) == jax.random.key_data(tree[name])).all()
        assert (jax.random.uniform(back["one"]) == jax.random.uniform(key)).all()
    other = jax.random.key(3, impl="rbg" if impl != "rbg" else "unsafe_rbg")
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(tmp_path / "keys", {**tree, "one": other})
    check_message(error, "one: it holds uint32", f"of {impl} keys", f"of {other.dtype} keys")


@pytest.mark.parametrize(
    ("leaf", "said"),
    [("words", "str of type <U5"), (object(), "object of type object"), (np.asarray(["a"]), "ndarray of type <U1")],
)
def test_what_is_no_number_is_named(tmp_path, leaf, said):
    with pytest.raises(TypeError, match="arrays of numbers") as error:
        checkpoint.save(tmp_path / "tree", {"a": NUMBERS, "b": {"c": leaf}})
    check_message(error, said, "at 'b/c'", "leave it out")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_refused(tmp_path, saved):
    def refused(path, *said):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        with pytest.raises(CheckpointError) as error:
            checkpoint.save(path, NUMBERS)
        check_message(error, str(path), *said)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text("words")
    refused(docs, "other things", "page.md", "another folder")
    (docs / "contents.json").write_text('{"pages": ["page.md"]}')  # not the list of a checkpoint
    refused(docs, "other things")
    refused(docs / "page.md", "is a file")
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    refused(tmp_path / "model", "other things", "notes.txt")
    (tmp_path / ".run.saving").mkdir()
    (tmp_path / ".run.saving" / "mine.txt").write_text("words")
    with pytest.raises(CheckpointError, match=r"\.run\.saving holds other things"):
        checkpoint.save(tmp_path / "run", NUMBERS)
    refused(Path("/"), "other things")
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", NUMBERS)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    checkpoint.save(tmp_path / "link", 2 * NUMBERS)
    check_equal(checkpoint.restore(tmp_path / "empty", NUMBERS), 2 * NUMBERS)


class Killed(BaseException):
    """Where a real kill would end the process; no `except Exception` sees it."""


@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
def test_killed_at_any_point_one_of_the_two_is_whole(tmp_path, monkeypatch, first):
    """Dies before and after each step that changes the disk; then what is there is read, and saved once more."""

    def write(folder, arrays):  # what Orbax does is not looked at here, and takes most of the time
        folder.mkdir()
        for number, array in enumerate(arrays.values()):
            np.save(folder / f"{number}.npy", array)

    def read(folder, forms):
        return {name: np.load(folder / f"{number}.npy") for number, name in enumerate(forms)}

    monkeypatch.setattr(checkpoint, "_write", write)
    monkeypatch.setattr(checkpoint, "_read", read)
    count = itertools.count()

    def dying(function, point):
        def run(*arguments, **options):
            if next(count) == point:
                raise Killed
            result = function(*arguments, **options)
            if next(count) == point:
                raise Killed
            return result

        return run

    def forget(folder, **options):  # as `shutil.rmtree`, one file at a time, and killed between two of them
        for file in sorted(Path(folder).rglob("*"), reverse=True):
            steps["unlink"](file) if file.is_file() else file.rmdir()
        if Path(folder).exists():
            Path(folder).rmdir()

    steps = {}
    states = set()
    for point in itertools.count():
        path = tmp_path / f"{point}" / "model"
        if not first:
            checkpoint.save(path, NUMBERS, config="old")
        count = itertools.count()
        steps["unlink"] = dying(Path.unlink, point)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace, point))
            patch.setattr(checkpoint, "_write", dying(checkpoint._write, point))
            patch.setattr(checkpoint, "_checksums", dying(checkpoint._checksums, point))
            patch.setattr(os, "fsync", dying(os.fsync, point))
            patch.setattr(shutil, "rmtree", forget)
            try:
                checkpoint.save(path, 2 * NUMBERS, config="new")
            except Killed:
                ended = False
            else:
                ended = True
        config = None
        if not checkpoint.exists(path):
            assert first
            with pytest.raises(CheckpointError, match="no checkpoint at"):
                checkpoint.restore(path, NUMBERS)
        else:
            config = checkpoint.read_config(path)
            check_equal(checkpoint.restore(path, NUMBERS), {"old": NUMBERS, "new": 2 * NUMBERS}[config])
            check_equal(checkpoint.load(path), {"old": NUMBERS, "new": 2 * NUMBERS}[config])
        states.add((config, *sorted(file.name for file in path.parent.glob("*/*[wd]")), path.exists()))
        with monkeypatch.context() as patch:  # a second kill, while the next one is written
            patch.setattr(checkpoint, "_checksums", dying(checkpoint._checksums, next(count) + 1))
            with pytest.raises(Killed):
                checkpoint.save(path, 3 * NUMBERS, config="third")
        if config is not None:
            assert checkpoint.read_config(path) == config
        checkpoint.save(path, 3 * NUMBERS, config="third")
        assert checkpoint.read_config(path) == "third"
        assert [file.name for file in path.parent.iterdir()] == ["model"]
        if ended:
            break
    assert point > (7 if first else 12)
    assert ("new", "new", False) in states if first else ("new", "new", "old", False) in states


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
    """Without a list of contents it is still read, and what Orbax notices is still one line; so in the older form."""
    import orbax.checkpoint as ocp

    alone = tmp_path / "alone"
    tree = jax.tree.map(np.asarray, make_tree())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(alone, tree)
    check_equal(checkpoint.restore(alone, make_tree()), make_tree())
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(alone, {"other": jnp.zeros(3)})
    check_message(error, str(alone), "has no contents.json", "delete it")
    older = {"config": 3, "leaves": {n: checkpoint._form(leaf) for n, leaf in checkpoint._named(tree)},
             "files": checkpoint._checksums(alone)}  # fmt: skip
    (alone / "contents.json").write_text(json.dumps(older))
    check_equal(checkpoint.restore(alone, make_tree()), make_tree())
    assert checkpoint.read_config(alone) == 3
    checkpoint.save(alone, NUMBERS)
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (copy / "contents.json").unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(copy, make_tree())
    check_message(error, str(copy), "has no contents.json", "delete it")


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


def test_a_config_that_was_changed_by_hand_is_noticed(tmp_path):
    checkpoint.save(tmp_path / "meta", NUMBERS, config={"steps": 3})
    contents = tmp_path / "meta" / "contents.json"
    contents.write_text(contents.read_text().replace('"steps": 3', '"steps": 7'))
    for read in (checkpoint.load, checkpoint.read_config):
        with pytest.raises(CheckpointError, match="is torn"):
            read(tmp_path / "meta")
