"""Trained things as JSON files: written whole or not at all, and everything in them checked when they are read.

What is wrong with a file is said in one line that begins with its name.
"""

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax.base import PyTree

T = TypeVar("T")
Held = dict[str, Any]
TOO_LARGE = float(np.finfo(np.float32).max) + 2.0**103  # the least number that float32 rounds to infinity
_KINDS: dict[type, str] = {dict: "an object", list: "a list"}


class Wrong(ValueError):
    """What is wrong with the content of a file."""


class Form(NamedTuple, Generic[T]):
    """A kind of file.

    Attributes:
      noun: what it holds, for messages.
      writer: the public function that writes it, for messages.
      parse: makes the thing of what the file holds; raises `Wrong`.
    """

    noun: str
    writer: str
    parse: Callable[[Any], T]


def save(form: Form[Any], path: str | os.PathLike[str], held: Held) -> None:
    """Writes what can be read again, with a checksum.

    Raises:
      ValueError: for what `load` would refuse, or a path that cannot be written; what was there is kept.
      TypeError: for what JSON cannot hold.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, np.integer | np.floating | np.bool_):
            return value.item()
        raise TypeError(f"a {form.noun}'s file holds what JSON can hold, got {type(value).__name__}")

    try:
        held = json.loads(json.dumps(held, default=plain))
        held["check"] = _checksum(held)
        form.parse(held)
    except Wrong as error:
        raise ValueError(f"save: {error}") from error
    part = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(held) + "\n")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ValueError(
            f"the {form.noun} {os.fspath(path)} cannot be written ({error.strerror}); give another path"
        ) from error


def load(form: Form[T], label: str, place: Any) -> T:
    """Reads what `save` wrote.

    Args:
      form: the kind of file.
      label: its name in messages.
      place: something with `read_bytes`, such as a `Path`.

    Raises:
      ValueError: for a file that cannot be read, holds something else, or is damaged.
    """
    try:
        held = json.loads(place.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"{label} cannot be read ({error.strerror}); give a file that {form.writer} wrote") from error
    except (ValueError, RecursionError) as error:
        reason = "not a text file" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"{label} holds no {form.noun} ({reason}); give a file that {form.writer} wrote") from error
    try:
        made = form.parse(held)
        if "check" in held and held["check"] != _checksum(held):
            raise Wrong(
                "it was changed after it was saved (its checksum differs); restore the file, or delete its 'check' if "
                "the change is meant"
            )
    except Wrong as error:
        raise ValueError(f"{label} holds no {form.noun} that can be used: {error}") from error
    return made


def need(condition: bool, message: str) -> None:
    """Raises `Wrong(message)` unless the condition holds."""
    if not condition:
        raise Wrong(message)


def need_entries(held: Any, **kinds: type) -> None:
    """Raises `Wrong` unless `held` is an object with entries of these names and kinds."""
    need(isinstance(held, dict), f"it must be an object, got {short(held)}")
    for name, kind in kinds.items():
        need(name in held, f"{name!r} is missing")
        need(isinstance(held[name], kind), f"{name!r} must be {_KINDS[kind]}, got {short(held[name])}")


def fields_of(network: Any) -> dict[str, dataclasses.Field[Any]]:
    """The options of a Flax module or its class, less what Flax adds to every module."""
    return {field.name: field for field in dataclasses.fields(network) if field.name not in ("parent", "name")}


def kind_of(held: Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
    """The class of a network from the `kind` that a file names, its other entries options of that class."""
    kind = held.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise Wrong(f"the network's 'kind' must be one of {', '.join(kinds)}, got {short(kind)}")
    known = fields_of(kinds[kind])
    for name in held:
        need(name in known or name == "kind", f"{kind} has no option {name!r}; its options are {', '.join(known)}")
    return kinds[kind]


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a number that float32 can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < TOO_LARGE


def short(value: Any) -> str:
    """What a message shows of a value."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def flat(tree: PyTree) -> dict[str, Any]:
    """The leaves of nested dictionaries by their places, `a/b/c`."""
    return {
        jax.tree_util.keystr(place, simple=True, separator="/"): leaf
        for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: Mapping[str, np.ndarray]) -> PyTree:
    """What `flat` made flat, as JAX arrays in nested dictionaries."""
    tree: dict[str, Any] = {}
    for place, array in leaves.items():
        *above, last = place.split("/")
        inner = tree
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = jnp.asarray(array)
    return tree


def digits(leaf: Any) -> Held:
    """A float32 array as people can read it; nine digits give it back to the bit."""
    values = np.asarray(leaf, np.float32)
    return {"shape": list(values.shape), "values": [float(f"{value:.9g}") for value in values.reshape(-1)]}


def packed(leaf: Any) -> Held:
    """A float32 array of many numbers: its little-endian bytes in base64."""
    values = np.asarray(leaf, "<f4")
    return {"shape": list(values.shape), "base64": base64.b64encode(values.tobytes()).decode()}


def array(name: str, leaf: Any, form: str = "values") -> np.ndarray:
    """The float32 array that `digits` (`"values"`) or `packed` (`"base64"`) wrote, checked."""
    need(isinstance(leaf, dict) and {"shape", form} <= leaf.keys(), f"{name!r} must hold 'shape' and {form!r}")
    shape, values = leaf["shape"], leaf[form]
    need(
        isinstance(shape, list) and all(is_integer(size) and 0 <= size < 2**31 for size in shape),
        f"the shape of {name!r} must be a list of sizes, got {short(shape)}",
    )
    if form == "base64":
        values = _unpacked(name, values)
    need(isinstance(values, list), f"the values of {name!r} must be a list, got {short(values)}")
    for place, value in enumerate(values):
        need(is_finite(value), f"{name!r} must hold finite float32 numbers, got {short(value)} at place {place}")
    need(len(values) == math.prod(shape), f"{name!r} of shape {shape} has {len(values)} values")
    return np.asarray(values, np.float32).reshape(shape)


def difference(make: Callable[..., PyTree], given: Mapping[str, np.ndarray], *like: Any) -> str:
    """The first difference of leaves to those that `make` makes of things like these, by shapes; empty for none."""
    try:
        made = jax.eval_shape(make, *like)
    except Exception as error:  # a width beyond what an array may have, among others
        return f"the network cannot be made ({' '.join(str(error).split())[:200]})"
    wanted = {name: tuple(leaf.shape) for name, leaf in flat(made).items()}
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            return f"the parameter {name!r} is missing"
        if name not in wanted:
            return f"the network has no parameter {name!r}"
        if given[name].shape != wanted[name]:
            return f"{name!r} must have the shape {list(wanted[name])}, got {list(given[name].shape)}"
    return ""


def _unpacked(name: str, text: Any) -> list[float]:
    need(isinstance(text, str), f"the base64 of {name!r} must be text, got {short(text)}")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Wrong(f"the base64 of {name!r} is damaged ({error})") from error
    need(len(content) % 4 == 0, f"the base64 of {name!r} holds {len(content)} bytes, which are no float32 numbers")
    numbers: list[float] = np.frombuffer(content, "<f4").tolist()
    return numbers


def _checksum(held: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in held.items() if name != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
