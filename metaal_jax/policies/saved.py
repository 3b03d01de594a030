"""Trained policies as small, readable files; some come with the package."""

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax import files
from metaal_jax.base import PyTree
from metaal_jax.files import Wrong, is_finite, is_integer, need, short
from metaal_jax.models.policy import LinearNetwork, RowNetwork, SetNetwork
from metaal_jax.policies import features
from metaal_jax.policies.selector import RULE

NETWORKS: dict[str, Any] = {network.__name__: network for network in (LinearNetwork, RowNetwork, SetNetwork)}


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
    options = {name: getattr(network, name) for name in files.fields_of(network)}
    held = {"about": about, "network": {"kind": kind, **options}, "rows": features.ROWS,
            "situation": features.SITUATION, "rules": list(rules), "plan": plan,
            "params": {name: files.digits(leaf) for name, leaf in files.flat(params).items()}}  # fmt: skip
    files.save(FORM, path, held)


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
    return files.load(FORM, label, place)


def _parse(held: Any) -> Saved:
    """Checks everything that a file holds, and makes the policy of it; raises `files.Wrong`."""
    files.need_entries(held, network=dict, params=dict, about=dict, rows=list, situation=list)
    rules, plan = held.get("rules", []), held.get("plan", 1)
    need(
        isinstance(rules, list) and all(isinstance(rule, str) and rule for rule in rules),
        f"'rules' must be a list of names, got {short(rules)}",
    )
    need(is_integer(plan) and plan >= 1, f"'plan' must be a positive integer, got {short(plan)}")
    if (tuple(held["rows"]), tuple(held["situation"])) != (features.ROWS, features.SITUATION):
        raise Wrong("it was trained on other features than those of this version; train it again")
    params = {name: files.array(name, leaf) for name, leaf in held["params"].items()}
    # A selector sees how its rules fared, and which is which unless it was made without `identity`.
    widths = [2 * len(features.ROWS)]
    if rules:
        widths = [2 * len(features.ROWS) + len(RULE) + known for known in (len(rules), 0)]
    network = _network(held["network"], widths[0])
    wrong = _difference(network, widths[0], len(rules) or 2, params)
    if wrong and (len(widths) == 1 or _difference(network, widths[1], len(rules), params)):
        raise Wrong(wrong)
    return Saved(network, files.nested(params), held["about"], tuple(rules), plan)


FORM = files.Form("policy", "policies.save", _parse)


def _network(held: Mapping[str, Any], width: int) -> nn.Module:
    """The network of its kind and options, the places of inputs checked against their number `width`."""
    kind = files.kind_of(held, NETWORKS)
    options = {}
    for name, value in held.items():
        if name == "kind":
            continue
        what = f"the network's {name!r}"
        if name in ("width", "points"):
            need(is_integer(value) and value >= 1, f"{what} must be a positive integer, got {short(value)}")
            options[name] = value
            continue
        need(isinstance(value, list), f"{what} must be a list, got {short(value)}")
        if name == "prior":
            for place, factor in enumerate(value):
                need(is_finite(factor), f"{what} must hold finite numbers, got {short(factor)} at place {place}")
            need(len(value) <= width, f"{what} holds {len(value)} factors for {width} inputs")
        else:  # `ignored` and `situation`: places of inputs
            most = len(features.SITUATION) if name == "situation" else width
            for place in value:
                need(
                    is_integer(place) and 0 <= place < most,
                    f"{what} must hold numbers of features from 0 to {most - 1}, got {short(place)}",
                )
        options[name] = tuple(value)
    network: nn.Module = kind(**options)
    return network


def _difference(network: nn.Module, width: int, rows: int, given: Mapping[str, np.ndarray]) -> str:
    """The first difference to the parameters that the network itself begins with; empty where there is none."""
    inputs = jnp.zeros((rows, width)), jnp.zeros(len(features.SITUATION)), jnp.ones(rows, bool)
    return files.difference(network.init, given, jax.random.key(0), *inputs)
