"""Trained policies as small, readable files; some come with the package."""

import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax.base import PyTree
from metaal_jax.models.policy import LinearNetwork, RowNetwork, SetNetwork
from metaal_jax.policies import features
from metaal_jax.policies.selector import RULE

NETWORKS: dict[str, Any] = {network.__name__: network for network in (LinearNetwork, RowNetwork, SetNetwork)}
# What flax adds to every module.
_OWN = ("parent", "name")
_TOO_LARGE = float(np.finfo(np.float32).max) + 2.0**103  # the least number that float32 rounds to infinity


class Saved(NamedTuple):
    """A trained policy: `policies.learned(saved.network, k=..., plan=saved.plan)` runs with `saved.params` for any `k`.

    Where `rules` are named, it is a selector: `policies.selector(rules, saved.network, k=...)` with these rules.

    Attributes:
      network: what `policies.learned` or `policies.selector` takes.
      params: its parameters.
      about: how it came to be: command, training set, what it reached there.
      rules: names of the rules that a selector chooses among, in its order; `()` for a policy that scores rows.
      plan: the `plan` to give to `learned`, the number of rows chosen at a time.
    """

    network: nn.Module
    params: PyTree
    about: dict[str, Any]
    rules: tuple[str, ...] = ()
    plan: int = 1


def shipped() -> tuple[str, ...]:
    """Names of the trained policies that come with the package."""
    folder = importlib.resources.files("metaal_jax.policies") / "shipped"
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".json")))


def save(
    path: str | os.PathLike[str],
    network: nn.Module,
    params: PyTree,
    about: dict[str, Any],
    *,
    rules: Sequence[str] = (),
    plan: int = 1,
) -> None:
    """Writes a trained policy to one JSON file, whole or not at all.

    Args:
      path: of the file.
      network: one of the networks of `metaal_jax.models`.
      params: its parameters.
      about: what is worth knowing of it, anything that JSON can hold.
      rules: names of a selector's rules.
      plan: the `plan` that suits the policy best, see `learned`.

    Raises:
      ValueError: for a network of another kind, parameters that are not finite or not those of the network, a `plan`
        that is no positive integer, or a path that cannot be written.
      TypeError: where JSON cannot hold `about`.
    """
    kind = type(network).__name__
    if NETWORKS.get(kind) is not type(network):
        raise ValueError(f"a policy is saved with one of {', '.join(NETWORKS)}; got {kind}")
    options = {f.name: getattr(network, f.name) for f in dataclasses.fields(network) if f.name not in _OWN}
    leaves = {
        jax.tree_util.keystr(place, simple=True, separator="/"): {
            "shape": list(leaf.shape),
            # Nine digits give a float32 back to the bit.
            "values": [float(f"{value:.9g}") for value in np.asarray(leaf, np.float32).reshape(-1)],
        }
        for place, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    held = {"about": about, "network": {"kind": kind, **options}, "rows": features.ROWS,
            "situation": features.SITUATION, "rules": list(rules), "plan": plan, "params": leaves}  # fmt: skip
    try:
        held = json.loads(json.dumps(held, default=_plain))
        held["check"] = _checksum(held)
        _parse(held)
    except _Wrong as error:
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
            f"the policy {os.fspath(path)} cannot be written ({error.strerror}); give another path"
        ) from error


def load(name: str | os.PathLike[str]) -> Saved:
    """A trained policy: one that comes with the package by its name, or any by the path of its file.

    >>> from metaal_jax import policies
    >>> saved = policies.load("cifar10")
    >>> policy = policies.learned(saved.network, k=1, plan=saved.plan)  # its parameters: saved.params

    Raises:
      ValueError: for an unknown name, a file that holds no policy or a damaged one, or a policy that was trained on
        other features than those of this version. The message is one line, begins with the name and says what is wrong.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"no policy {name!r}: give one of {', '.join(shipped())}, or the path of a saved policy")
    label = os.fspath(name)
    if label in shipped():
        place: Any = importlib.resources.files("metaal_jax.policies") / "shipped" / f"{label}.json"
    elif Path(name).exists():
        place = Path(name)
    else:
        raise ValueError(f"no policy {label!r}: give one of {', '.join(shipped())}, or the path of a saved policy")
    try:
        held = json.loads(place.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"{label} cannot be read ({error.strerror}); give a file that policies.save wrote") from error
    except (ValueError, RecursionError) as error:
        reason = "not a text file" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"{label} holds no policy ({reason}); give a file that policies.save wrote") from error
    try:
        return _parse(held)
    except _Wrong as error:
        raise ValueError(f"{label} holds no policy that can be used: {error}") from error


class _Wrong(ValueError):
    """What is wrong with a saved policy."""


def _parse(held: Any) -> Saved:
    """Checks everything that a file holds, and makes the policy of it; raises `_Wrong`."""
    _need(isinstance(held, dict), f"it must be an object, got {_short(held)}")
    for name, kind in (("network", dict), ("params", dict), ("about", dict), ("rows", list), ("situation", list)):
        _need(name in held, f"{name!r} is missing")
        _need(isinstance(held[name], kind), f"{name!r} must be {_KINDS[kind]}, got {_short(held[name])}")
    rules, plan = held.get("rules", []), held.get("plan", 1)
    _need(
        isinstance(rules, list) and all(isinstance(rule, str) and rule for rule in rules),
        f"'rules' must be a list of names, got {_short(rules)}",
    )
    _need(_is_integer(plan) and plan >= 1, f"'plan' must be a positive integer, got {_short(plan)}")
    if (tuple(held["rows"]), tuple(held["situation"])) != (features.ROWS, features.SITUATION):
        raise _Wrong("it was trained on other features than those of this version; train it again")
    params = _parameters(held["params"])
    # A selector sees how its rules fared, and which is which unless it was made without `identity`.
    widths = [2 * len(features.ROWS)]
    if rules:
        widths = [2 * len(features.ROWS) + len(RULE) + known for known in (len(rules), 0)]
    network = _network(held["network"], widths[0])
    wrong = _difference(network, widths[0], len(rules) or 2, params)
    if wrong and (len(widths) == 1 or _difference(network, widths[1], len(rules), params)):
        raise _Wrong(wrong)
    if "check" in held and held["check"] != _checksum(held):
        raise _Wrong(
            "it was changed after it was saved (its checksum differs); restore the file, or delete its 'check' if the "
            "change is meant"
        )
    tree: dict[str, Any] = {}
    for place, array in params.items():
        *above, last = place.split("/")
        inner = tree
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = jnp.asarray(array)
    return Saved(network, tree, held["about"], tuple(rules), plan)


_KINDS = {dict: "an object", list: "a list"}


def _network(held: Mapping[str, Any], width: int) -> nn.Module:
    """The network of its kind and options, the places of inputs checked against their number `width`."""
    kind = held.get("kind")
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise _Wrong(f"the network's 'kind' must be one of {', '.join(NETWORKS)}, got {_short(kind)}")
    known = [f.name for f in dataclasses.fields(NETWORKS[kind]) if f.name not in _OWN]
    options = {}
    for name, value in held.items():
        if name == "kind":
            continue
        _need(name in known, f"{kind} has no option {name!r}; its options are {', '.join(known)}")
        what = f"the network's {name!r}"
        if name in ("width", "points"):
            _need(_is_integer(value) and value >= 1, f"{what} must be a positive integer, got {_short(value)}")
            options[name] = value
            continue
        _need(isinstance(value, list), f"{what} must be a list, got {_short(value)}")
        if name == "prior":
            for place, factor in enumerate(value):
                _need(_is_finite(factor), f"{what} must hold finite numbers, got {_short(factor)} at place {place}")
            _need(len(value) <= width, f"{what} holds {len(value)} factors for {width} inputs")
        else:  # `ignored` and `situation`: places of inputs
            most = len(features.SITUATION) if name == "situation" else width
            for place in value:
                _need(
                    _is_integer(place) and 0 <= place < most,
                    f"{what} must hold numbers of features from 0 to {most - 1}, got {_short(place)}",
                )
        options[name] = tuple(value)
    network: nn.Module = NETWORKS[kind](**options)
    return network


def _parameters(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters by their places, checked one by one."""
    arrays = {}
    for name, leaf in leaves.items():
        _need(isinstance(leaf, dict) and {"shape", "values"} <= leaf.keys(), f"{name!r} must hold 'shape' and 'values'")
        shape, values = leaf["shape"], leaf["values"]
        _need(
            isinstance(shape, list) and all(_is_integer(size) and size >= 0 for size in shape),
            f"the shape of {name!r} must be a list of sizes, got {_short(shape)}",
        )
        _need(isinstance(values, list), f"the values of {name!r} must be a list, got {_short(values)}")
        for place, value in enumerate(values):
            _need(_is_finite(value), f"{name!r} must hold finite float32 numbers, got {_short(value)} at place {place}")
        _need(len(values) == math.prod(shape), f"{name!r} of shape {shape} has {len(values)} values")
        arrays[name] = np.asarray(values, np.float32).reshape(shape)
    return arrays


def _difference(network: nn.Module, width: int, rows: int, given: Mapping[str, np.ndarray]) -> str:
    """The first difference to the parameters that the network itself begins with; empty where there is none."""
    inputs = jnp.zeros((rows, width)), jnp.zeros(len(features.SITUATION)), jnp.ones(rows, bool)
    try:
        made = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    except Exception as error:  # a width beyond what an array may have, among others
        return f"the network cannot be made ({' '.join(str(error).split())[:200]})"
    wanted = {
        jax.tree_util.keystr(place, simple=True, separator="/"): tuple(leaf.shape)
        for place, leaf in jax.tree_util.tree_leaves_with_path(made)
    }
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            return f"the parameter {name!r} is missing"
        if name not in wanted:
            return f"the network has no parameter {name!r}"
        if given[name].shape != wanted[name]:
            return f"{name!r} must have the shape {list(wanted[name])}, got {list(given[name].shape)}"
    return ""


def _checksum(held: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in held.items() if name != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """NumPy's numbers as JSON holds them."""
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    raise TypeError(f"a policy's file holds what JSON can hold, got {type(value).__name__}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < _TOO_LARGE


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise _Wrong(message)
