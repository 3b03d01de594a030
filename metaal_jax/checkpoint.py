"""Checkpoints with Orbax: pytrees of arrays, saved atomically and restored into a known structure.

While `model` is being saved, the folder `.model.saving` beside it holds what is under way: `new`, and for an instant
`old`. Whenever a run is killed, `model`, `new` or `old` is whole; reading takes the first of them that is, and the next
save sweeps up the rest. Nothing else beside `model` is touched.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax.base import PyTree

_CONTENTS = "contents.json"  # what the checkpoint holds and the checksums of its files; written last
# Files that Orbax leaves in every checkpoint of its own.
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")
_FORM = 2  # 1: the tree as Orbax stores it; 2: a flat list of its leaves that hold anything
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)))


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another structure; the message is one line and says what to do."""


def save(path: str | os.PathLike[str], tree: PyTree, *, config: Any = None) -> None:
    """Saves a pytree of arrays to the folder `path`, replacing the checkpoint that is there once the new one is whole.

    Whenever the program is killed, `restore` finds either the old checkpoint or the new one. Typed keys of any
    generator, Python numbers and arrays without rows are saved too, as an `ActiveState` needs. One program at a time
    may save to a path.

    Args:
      path: the folder: a new one, an empty one, or an earlier checkpoint.
      tree: what to save.
      config: what made it, anything that JSON can hold; `read_config` gives it back.

    Raises:
      CheckpointError: where it cannot be written, say because the disk is full or because `path` is a folder of other
        things; what was there before is kept.
      TypeError: for a config that JSON cannot hold, or a leaf that is no array of numbers; nothing is written.
    """
    given = json.loads(json.dumps(config))
    arrays, keys = _arrays(tree)
    target = _place(path)
    work = _work(target)
    needed = sum(leaf.nbytes for leaf in arrays.values()) + 2**18
    try:
        _check_ours(target, work)
        _recover(target, work)
        work.mkdir(parents=True)
        # Asked first, since threads below Orbax print tracebacks of their own when a write fails.
        if shutil.disk_usage(target.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(work / "new", arrays)
        forms = {name: _form(leaf) for name, leaf in arrays.items()}
        contents = {"form": _FORM, "config": given, "leaves": forms, "keys": keys, "files": _checksums(work / "new")}
        contents["check"] = _check(contents)
        with open(work / "new" / _CONTENTS, "w") as file:
            file.write(json.dumps(contents, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.replace(target, work / "old")
        os.replace(work / "new", target)
    except CheckpointError:
        raise
    # The storage below Orbax reports a full disk as a ValueError with the system's reason somewhere in it.
    except Exception as error:
        with contextlib.suppress(OSError):
            _recover(target, work)
        reason = next((text for text in _FULL if text in str(error)), _one_line(error))
        raise CheckpointError(
            f"the checkpoint {target} cannot be written ({reason}); make room or give another folder"
        ) from error
    shutil.rmtree(work, ignore_errors=True)


def restore(path: str | os.PathLike[str], like: PyTree) -> Any:
    """Restores a pytree saved by `save`.

    Leaves are NumPy arrays, so that nothing is put on a device that the caller did not choose; `jax.device_put` of the
    whole tree puts them there. Typed keys come back as JAX arrays of the generator that they were saved with.

    Args:
      path: the folder.
      like: a pytree of the same structure, shapes and dtypes; only these are read, `jax.eval_shape` gives one.

    Returns:
      The saved tree in the structure of `like`.

    Raises:
      CheckpointError: for a missing, truncated or otherwise damaged checkpoint, or one of another structure.
    """
    folder = _find(path)
    contents = _contents(folder)
    leaves = dict(_named(like))
    wanted = {name: _form(_data_of(leaf)) for name, leaf in leaves.items()}
    held: dict[str, str] = wanted
    keys, form = {}, 1
    if contents is not None:  # else Orbax wrote it alone
        held, keys, form = contents["leaves"], contents.get("keys", {}), contents.get("form", 1)
        _check_files(folder, contents["files"])
        described = {name: _described(held[name], keys.get(name)) for name in held}
        asked = {name: _described(wanted[name], _generator(leaf, keys.get(name))) for name, leaf in leaves.items()}
        if form == 1:  # it held keys of the default generator alone, and did not say so
            asked = wanted
        other = sorted(n for n in described.keys() | asked.keys() if described.get(n) != asked.get(n))
        if other:
            raise CheckpointError(
                f"the checkpoint {folder} is of another model ({other[0] or 'the array'}: it holds "
                f"{described.get(other[0], 'nothing')}, wanted is {asked.get(other[0], 'nothing')}); delete it to "
                "compute it again, or give another folder"
            )
    try:
        found = _read(folder, held) if form == _FORM else dict(_named(_read_tree(folder, like)))
        back = [
            jax.random.wrap_key_data(jnp.asarray(found[name]), impl=keys.get(name)) if _is_key(leaf) else found[name]
            for name, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), back)
    # Orbax and the storage below it raise a different type for every kind of damage.
    except Exception as error:
        reason = f"it has no {_CONTENTS}" if contents is None else _one_line(error)
        raise CheckpointError(
            f"the checkpoint {folder} is damaged or of another model ({reason}); delete it to compute it "
            "again, or give another folder"
        ) from error


def load(path: str | os.PathLike[str]) -> Any:
    """Restores a checkpoint of nested dictionaries, such as meta-parameters, whatever its shapes are.

    Tuples and records come back as dictionaries, by the numbers or names of their fields; what holds no leaf is left
    out. A checkpoint of a single array gives the array.

    Raises:
      CheckpointError: as `restore`; or a checkpoint without its list of contents.
    """
    folder = _find(path)
    contents = _contents(folder)
    if contents is None:
        raise CheckpointError(f"the checkpoint {folder} has no {_CONTENTS}; restore it into a known structure")
    like: dict[str, Any] = {}
    try:
        for name, form in contents["leaves"].items():
            impl = contents.get("keys", {}).get(name)
            leaf = jax.ShapeDtypeStruct(*_shape(form))
            if impl is not None:
                leaf = jax.eval_shape(lambda data, impl=impl: jax.random.wrap_key_data(data, impl=impl), leaf)
            if name == "":
                return restore(path, leaf)
            *above, last = (part.replace("~1", "/").replace("~0", "~") for part in name.split("/"))
            place = like
            for part in above:
                place = place.setdefault(part, {})
            place[last] = leaf
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _torn(folder) from error
    return restore(path, like)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether `restore` finds a checkpoint here, be it what a killed `save` left; it may still be damaged.

    >>> exists("no/such/folder")
    False
    """
    with contextlib.suppress(CheckpointError):
        return bool(_find(path))
    return False


def read_config(path: str | os.PathLike[str]) -> Any:
    """The config that a checkpoint was saved with, None where there was none.

    Raises:
      CheckpointError: for a missing checkpoint or a torn list of contents.
    """
    contents = _contents(_find(path))
    return None if contents is None else contents.get("config")


def _place(path: str | os.PathLike[str]) -> Path:
    """The folder that a path names, where a link points to."""
    target = Path(os.path.abspath(path))
    return target.resolve() if target.is_symlink() else target


def _work(target: Path) -> Path:
    return target.parent / f".{target.name}.saving"


def _find(path: str | os.PathLike[str]) -> Path:
    """The folder to read: the checkpoint itself, or what a killed `save` left of it."""
    target = _place(path)
    if target.is_dir():
        return target
    new, old = _work(target) / "new", _work(target) / "old"
    if not target.exists():
        with contextlib.suppress(CheckpointError):  # `new` is whole once it has its list, which is written last
            if _contents(new) is not None:
                return new
        if old.is_dir():  # it was whole when it was moved there
            return old
    raise CheckpointError(f"no checkpoint at {target}; give the folder that a run wrote, or train again")


def _check_ours(target: Path, work: Path) -> None:
    """Refuses to replace anything but a checkpoint, and to use a work folder that holds anything else."""
    if target.is_dir():
        held = {file.name for file in target.iterdir()}
        contents = None
        with contextlib.suppress(CheckpointError):
            contents = _contents(target)
        if contents is not None:
            listed = {name.split("/")[0] for name in contents["files"]}
            other = held - listed - {_CONTENTS, *_ORBAX}
        else:  # none, or one that is torn
            other = set() if held & set(_ORBAX) else held
        if other:
            found = f"holds other things than a checkpoint ({sorted(other)[0]})"
            raise CheckpointError(f"the folder {target} {found}; move them away, or give another folder")
    elif target.exists():
        raise CheckpointError(f"{target} is a file, not the folder of a checkpoint; give another path")
    if work.exists() and any(file.name.split(".")[0] not in ("new", "old") for file in work.iterdir()):
        raise CheckpointError(f"the folder {work} holds other things than a checkpoint being saved; move it away")


def _recover(target: Path, work: Path) -> None:
    """Puts what a killed `save` left in its place, and sweeps up the rest."""
    if not target.exists():
        with contextlib.suppress(CheckpointError):
            os.replace(_find(target), target)
    shutil.rmtree(work, ignore_errors=True)


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    # By number: names may hold what a file's name may not. Orbax refuses arrays without rows; their form is enough.
    filled = {str(place): array for place, array in enumerate(arrays.values()) if array.size}
    if not filled:
        folder.mkdir()
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, filled)


def _read(folder: Path, forms: dict[str, str]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    empty = {str(place): np.empty(*_shape(form)) for place, form in enumerate(forms.values())}
    filled = {place: array for place, array in empty.items() if array.size}
    if filled:
        with ocp.StandardCheckpointer() as checkpointer:
            empty |= checkpointer.restore(folder, filled)
    return {name: np.asarray(empty[str(place)]) for place, name in enumerate(forms)}


def _read_tree(folder: Path, like: PyTree) -> Any:
    import orbax.checkpoint as ocp

    shapes = jax.tree.map(lambda leaf: np.empty(*_shape(_form(_data_of(leaf)))), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, shapes)


def _contents(folder: Path) -> dict[str, Any] | None:
    """The list of contents, None where there is none; raises a CheckpointError for one that is torn."""
    try:
        text = (folder / _CONTENTS).read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _torn(folder) from error
    try:
        contents = json.loads(text)
        good = all(isinstance(contents[name], dict) for name in ("leaves", "files"))
        good = good and isinstance(contents.get("keys", {}), dict)
        for form in contents["leaves"].values():
            _shape(form)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _torn(folder) from error
    if not good or ("check" in contents and contents["check"] != _check(contents)):
        raise _torn(folder)
    if contents.get("form", 1) not in (1, _FORM):
        raise CheckpointError(
            f"the checkpoint {folder} is of a form that this version cannot read; update the package, or delete it"
        )
    return contents


def _torn(folder: Path) -> CheckpointError:
    return CheckpointError(f"the checkpoint {folder} is damaged ({_CONTENTS} is torn); delete it to compute it again")


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """Compares the files with their checksums: Orbax does not notice every kind of damage."""
    try:
        found = _checksums(folder)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {folder} cannot be read ({_one_line(error)})") from error
    torn = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    if torn:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({torn[0]} is not as it was written); delete it to compute it again"
        )


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.dtype(np.float32)), jax.dtypes.prng_key)


def _generator(leaf: Any, held: str | None) -> str | None:
    """The name of a key's generator, of which a shape knows its type alone; None where the leaf is no key."""
    if not _is_key(leaf):
        return None
    with contextlib.suppress(Exception):  # a generator that this process does not know
        if held and jax.eval_shape(lambda: jax.random.key(0, impl=held)).dtype == leaf.dtype:
            return held
    return str(leaf.dtype)


def _described(form: str, generator: str | None) -> str:
    return form if generator is None else f"{form} of {generator} keys"


def _named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """The leaves by their places, as a JSON pointer writes them."""
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = (jax.tree_util.keystr((part,), simple=True) for part in place)
        yield "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts), leaf


def _arrays(tree: PyTree) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The leaves as NumPy arrays, keys by their data, and the generators of the keys."""
    arrays, keys = {}, {}
    for name, leaf in _named(tree):
        if _is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[name] = np.asarray(leaf)
        if not _storable(arrays[name].dtype):
            raise TypeError(
                f"a checkpoint holds arrays of numbers, got {type(leaf).__name__} of type {arrays[name].dtype} at "
                f"{name or 'the top'!r}; leave it out, or give it as config"
            )
    return arrays, keys


def _storable(dtype: np.dtype) -> bool:
    """Whether Orbax can store numbers of this type: NumPy's own, and the narrow ones of `ml_dtypes`."""
    own = dtype.kind in "biufc" and dtype.name not in ("float128", "complex256")
    return own or dtype.name in ("bfloat16", "int4") or dtype.name.startswith("float8_")


def _data_of(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)


def _form(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _shape(form: str) -> tuple[tuple[int, ...], np.dtype]:
    dtype, shape = form.removesuffix("]").split("[")
    return tuple(int(n) for n in shape.split(",") if n), np.dtype(dtype)


def _checksums(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / _CONTENTS
    }


def _check(contents: dict[str, Any]) -> str:
    """The checksum of the list itself."""
    rest = {name: value for name, value in contents.items() if name != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
