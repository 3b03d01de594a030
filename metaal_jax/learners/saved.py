"""Meta-trained learners: what one is made of, and one file that holds it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from metaal_jax import files, inputs
from metaal_jax.base import Learner, PyTree
from metaal_jax.files import Wrong, is_finite, is_integer, need, short
from metaal_jax.learners.closed_form import protonet, r2d2
from metaal_jax.learners.maml import anil, maml
from metaal_jax.learners.transfer import without_head
from metaal_jax.models import MLP, Conv4, Projection, ResNet12

NETWORKS: dict[str, Any] = {network.__name__: network for network in (MLP, Projection, Conv4, ResNet12)}
FLOATS = ("bfloat16", "float16", "float32")


class MetaLearner(NamedTuple):
    """A meta-learner by name, one that finds its last layer from the labels: it fits tasks of any number of classes.

    Attributes:
      line: what it does.
      make: `(model, **settings) -> Learner`.
      settings: its hyperparameters and their defaults, all above 0.
    """

    line: str
    make: Callable[..., Learner]
    settings: Mapping[str, float]


def _maml(model: nn.Module, *, rate: float, steps: int, temperature: float) -> Learner:
    return maml(model, optimizer=optax.sgd(rate), steps=steps, head="prototypes", temperature=temperature, unroll=True)


def _anil(model: nn.Module, *, rate: float, steps: int, temperature: float) -> Learner:
    return anil(model, optimizer=optax.sgd(rate), steps=steps, head="prototypes", temperature=temperature, unroll=True)


def _protonet(model: nn.Module, *, temperature: float) -> Learner:
    return protonet(model, temperature=temperature, learn=("temperature",))


def _r2d2(model: nn.Module, *, ridge: float, scale: float) -> Learner:
    return r2d2(model, ridge=ridge, scale=scale, intercept=True)


META_LEARNERS: dict[str, MetaLearner] = {
    "maml": MetaLearner("MAML from prototypes", _maml, {"rate": 0.1, "steps": 5, "temperature": 0.1}),
    "anil": MetaLearner("the same, the last layer alone adapted", _anil, {"rate": 0.1, "steps": 5, "temperature": 0.1}),
    "protonet": MetaLearner("nearest class mean on a meta-learned embedding", _protonet, {"temperature": 0.1}),
    "r2d2": MetaLearner("ridge regression on a meta-learned embedding", _r2d2, {"ridge": 1.0, "scale": 8.0}),
}


class Trained(NamedTuple):
    """A meta-trained learner with all that a new task needs; `metaal_jax.meta_train` makes one.

    Attributes:
      name: one of `learners.META_LEARNERS`.
      network: what it was trained with: a network of `metaal_jax.models`, for as many classes as its tasks had.
      settings: the meta-learner's hyperparameters.
      meta: its meta-parameters.
      row: shape of a row, as a person has it: `(columns,)`, `(height, width)` or `(height, width, channels)`.
      centre, scale: float32 `[columns]` or `[channels]`, what rows are standardised by.
      about: how it came to be, and what it reached on held-out tasks; anything that JSON can hold.
    """

    name: str
    network: Any
    settings: Mapping[str, float]
    meta: PyTree
    row: tuple[int, ...]
    centre: np.ndarray
    scale: np.ndarray
    about: dict[str, Any]

    def learner(self, classes: int) -> Learner:
        """The learner for a task of so many classes; its meta-parameters are `start(classes)`.

        Raises:
          ValueError: for less than one class.
        """
        return META_LEARNERS[self.name].make(self._network(classes), **self.settings)

    def start(self, classes: int) -> PyTree:
        """The meta-parameters for a task of so many classes: the body that was trained and a last layer of zeros.

        Raises:
          ValueError: for less than one class.
        """
        return without_head(self._network(classes), self.meta, jnp.zeros((1, *network_row(self.row))))

    def prepare(self, x: ArrayLike) -> Array:
        """Rows as the network wants them: float32, standardised, images with a last axis of channels.

        Args:
          x: numbers `[n, ...]`, rows of the shape `row`, in the units of the tasks that it was trained on.

        Raises:
          ValueError: for rows of another shape, no numbers, or a cell that is NaN, infinite or beyond float32.
        """
        given: Any = x if hasattr(x, "dtype") else np.asarray(x)
        if given.ndim == 0 or given.shape[1:] != self.row:
            sizes = ", ".join(map(str, self.row))
            raise ValueError(f"prepare: rows must be [n, {sizes}], as in the training, got {list(given.shape)}")
        rows = inputs.rows("prepare", given)
        ready: Array = (rows.reshape(-1, *network_row(self.row)).astype(jnp.float32) - self.centre) / self.scale
        if not inputs.is_traced(ready) and not bool(jnp.isfinite(ready).all()):
            row = int(np.argwhere(~np.isfinite(np.asarray(ready)))[0][0])
            raise ValueError(f"prepare: row {row} is beyond what float32 holds; give rows in the units of the training")
        return ready

    def table(self) -> str:
        """What it reached on held-out tasks, beside logistic regression on the same rows, as a Markdown table."""
        lines = [
            f"| shots | {self.name} | logistic regression | difference |",
            "|-------|------|---------------------|------------|",
        ]
        for found in self.about.get("held_out", []):
            cells = (_shown(found[name], sign) for name, sign in (("learner", ""), ("linear", ""), ("difference", "+")))
            lines.append(f"| {found['shots']} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        about = self.about
        held = about.get("held_out", [])
        lines = [
            f"{self.name} on rows of shape {list(self.row)}, meta-trained on {about.get('tasks')} tasks in "
            f"{about.get('steps')} steps"
        ]
        if held:
            tested = f"accuracy in % on {held[0]['tasks']} held-out tasks"
            lines += [f"{tested}, by labelled rows a class, with its 95 % interval over tasks", self.table()]
        return "\n".join(lines + [f"- {line}" for line in about.get("left_out", [])])

    def __repr__(self) -> str:
        return f"<Trained: {str(self).splitlines()[0]}>"

    def _network(self, classes: int) -> nn.Module:
        if not is_integer(classes) or classes < 1:
            raise ValueError(f"Trained: classes must be a positive integer, got {classes!r}")
        return self.network.clone(classes=classes)


def network_row(row: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a row as networks take it: images without channels get a last axis."""
    return (*row, 1) if len(row) == 2 else row


def save(path: str | os.PathLike[str], trained: Trained) -> None:
    """Writes a meta-trained learner to one JSON file, whole or not at all.

    Raises:
      ValueError: for a network that is none of `metaal_jax.models`, anything else that `load` would refuse, or a path
        that cannot be written; a file that was there is kept.
      TypeError: where JSON cannot hold `about`.
    """
    if not isinstance(trained, Trained):
        raise ValueError(f"save: give what meta_train returned, got {type(trained).__name__}")
    network, kind = trained.network, type(trained.network).__name__
    if NETWORKS.get(kind) is not type(network):
        raise ValueError(f"save: a learner is saved with one of {', '.join(NETWORKS)}; got {kind}")
    options = {name: getattr(network, name) for name in files.fields_of(network)}
    if options.get("dtype") is not None:
        options["dtype"] = jnp.dtype(options["dtype"]).name
    held = {
        "name": trained.name,
        "network": {"kind": kind, **options},
        "settings": dict(trained.settings),
        "row": list(trained.row),
        "centre": files.digits(trained.centre),
        "scale": files.digits(trained.scale),
        "about": trained.about,
        "meta": {name: files.packed(leaf) for name, leaf in files.flat(trained.meta).items()},
    }
    files.save(FORM, path, held)


def load(path: str | os.PathLike[str]) -> Trained:
    """The meta-trained learner of a file that `save` wrote.

    Raises:
      ValueError: for a file that is not there, holds something else or is damaged. The message is one line, begins with
        the path and says what is wrong.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"load: give the path of a file that learners.save wrote, got {type(path).__name__}")
    return files.load(FORM, os.fspath(path), Path(path))


def _parse(held: Any) -> Trained:
    """Checks everything that a file holds, and makes the learner of it; raises `files.Wrong`."""
    files.need_entries(held, network=dict, settings=dict, row=list, centre=dict, scale=dict, about=dict, meta=dict)
    name = held.get("name")
    if not isinstance(name, str) or name not in META_LEARNERS:
        raise Wrong(f"'name' must be one of {', '.join(META_LEARNERS)}, got {short(name)}")
    settings = _settings(name, held["settings"])
    row = held["row"]
    need(
        1 <= len(row) <= 3 and all(is_integer(size) and 1 <= size < 2**31 for size in row),
        f"'row' must be the shape of a row, one to three sizes, got {short(row)}",
    )
    meta = {place: files.array(place, leaf, "base64") for place, leaf in held["meta"].items()}
    network = _network(held["network"], len(meta))
    ready = network_row(tuple(row))
    centre, scale = (files.array(what, held[what]) for what in ("centre", "scale"))
    for what, values in (("centre", centre), ("scale", scale)):
        need(values.shape == ready[-1:], f"{what!r} must have the shape {list(ready[-1:])}, got {list(values.shape)}")
    need(bool((scale > 0).all()), f"'scale' must hold numbers above 0, got {short(float(scale.min()))}")
    rows = jax.ShapeDtypeStruct((1, *ready), jnp.float32)
    try:
        learner = META_LEARNERS[name].make(network, **settings)
    except ValueError as error:
        raise Wrong(f"the learner cannot be made ({error})") from error
    wrong = files.difference(lambda x: learner.init(jax.random.key(0), x), meta, rows)
    if wrong:
        raise Wrong(wrong)
    return Trained(name, network, settings, files.nested(meta), tuple(row), centre, scale, held["about"])


FORM = files.Form("learner", "learners.save", _parse)


def _settings(name: str, held: Mapping[str, Any]) -> dict[str, float]:
    known = META_LEARNERS[name].settings
    check_settings(name, held)
    for missing in known.keys() - held.keys():
        raise Wrong(f"the setting {missing!r} of {name} is missing")
    return dict(held)


def check_settings(name: str, given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for settings that are not the meta-learner's, or out of range."""
    known = META_LEARNERS[name].settings
    for setting, value in given.items():
        need(setting in known, f"{name} has no setting {setting!r}; its settings are {', '.join(known)}")
        if is_integer(known[setting]):
            need(is_integer(value) and 1 <= value <= 1000,
                 f"the setting {setting!r} must be an integer from 1 to 1000, got {short(value)}")  # fmt: skip
        need(is_finite(value) and value > 0, f"the setting {setting!r} must be a number above 0, got {short(value)}")


def _network(held: Mapping[str, Any], tensors: int) -> nn.Module:
    """The network of its kind and options; no more blocks than there are `tensors`, which would take forever to see."""
    kind = files.kind_of(held, NETWORKS)
    options: dict[str, Any] = {}
    for name, field in files.fields_of(kind).items():
        what = f"the network's {name!r}"
        need(name in held, f"{what} is missing")
        value, usual = held[name], field.default
        if name == "dtype":
            need(value in (None, *FLOATS), f"{what} must be null or one of {', '.join(FLOATS)}, got {short(value)}")
            value = None if value is None else jnp.dtype(value)
        elif isinstance(usual, bool):
            need(isinstance(value, bool), f"{what} must be true or false, got {short(value)}")
        elif isinstance(usual, str):
            need(isinstance(value, str), f"{what} must be text, got {short(value)}")
        elif isinstance(usual, tuple):
            need(isinstance(value, list) and all(is_integer(one) and one >= 1 for one in value),
                 f"{what} must be a list of positive integers, got {short(value)}")  # fmt: skip
            need(len(value) <= tensors, f"{what} names {len(value)} layers, and there are {tensors} parameters")
            value = tuple(value)
        elif isinstance(usual, float):
            need(is_finite(value), f"{what} must be a finite number, got {short(value)}")
        else:
            need(is_integer(value) and value >= 1, f"{what} must be a positive integer, got {short(value)}")
            need(name != "blocks" or value <= tensors, f"{what} is {value}, and there are {tensors} parameters")
        options[name] = value
    try:
        network: nn.Module = kind(**options)
    except ValueError as error:
        raise Wrong(f"the network cannot be made ({error})") from error
    return network


def _shown(found: Mapping[str, float], sign: str) -> str:
    mean, low, high = (f"{100 * found[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
