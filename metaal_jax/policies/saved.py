"""Trained policies as small, readable files; some come with the package."""

import dataclasses
import importlib.resources
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax.base import PyTree, require
from metaal_jax.models.policy import LinearNetwork, RowNetwork, SetNetwork
from metaal_jax.policies import features

NETWORKS: dict[str, Any] = {network.__name__: network for network in (LinearNetwork, RowNetwork, SetNetwork)}
# What flax adds to every module.
_OWN = ("parent", "name")


class Saved(NamedTuple):
    """A trained policy: `policies.learned(saved.network, k=..., plan=saved.plan)` runs with `saved.params` for any `k`.

    Where `rules` are named, it is a selector: `policies.selector(rules, saved.network, k=...)` with these rules.

    Attributes:
      network: what `policies.learned` or `policies.selector` takes.
      params: its parameters.
      about: how it came to be: command, training set, what it reached there.
      rules: names of the rules that a selector chooses among, in its order; `()` for a policy that scores rows.
      plan: what to give `learned` as such.
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
    """Writes a trained policy to one JSON file.

    Args:
      path: of the file.
      network: one of the networks of `metaal_jax.models`.
      params: its parameters.
      about: what is worth knowing of it, anything that JSON can hold.
      rules: names of a selector's rules.
      plan: what the policy is best given as such, see `learned`.

    Raises:
      ValueError: for a network of another kind, or a plan below 1.
    """
    require(plan >= 1, f"save: plan must be at least 1, got {plan}")
    kind = type(network).__name__
    if kind not in NETWORKS:
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(held) + "\n")


def load(name: str | os.PathLike[str]) -> Saved:
    """A trained policy: one that comes with the package by its name, or any by the path of its file.

    >>> from metaal_jax import policies
    >>> saved = policies.load("cifar10")
    >>> policy = policies.learned(saved.network, k=1, plan=saved.plan)  # its parameters: saved.params

    Raises:
      ValueError: for an unknown name, a file that holds no policy, or one trained on other features than those of this
        version.
    """
    if str(name) in shipped():
        text = (importlib.resources.files("metaal_jax.policies") / "shipped" / f"{name}.json").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise ValueError(f"no policy {str(name)!r}: give one of {', '.join(shipped())}, or the path of a saved policy")
    try:
        held = json.loads(text)
        options, leaves = dict(held["network"]), held["params"]
        seen = (tuple(held["rows"]), tuple(held["situation"]))
        kind = NETWORKS[options.pop("kind")]
        network = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
        arrays = {
            place: np.asarray(leaf["values"], np.float32).reshape(leaf["shape"]) for place, leaf in leaves.items()
        }
        about, rules, plan = dict(held["about"]), tuple(held.get("rules", ())), int(held.get("plan", 1))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} holds no policy ({error}); give a file that policies.save wrote") from error
    if seen != (features.ROWS, features.SITUATION):
        raise ValueError(f"the policy {name} was trained on other features than this version's; train it again")
    params: dict[str, Any] = {}
    for place, array in arrays.items():
        *above, last = place.split("/")
        inner = params
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = jnp.asarray(array)
    return Saved(network, params, about, rules, plan)
