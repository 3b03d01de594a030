"""The main job's network as an embedding: meta-learned, or as it was before."""

import functools
from collections.abc import Callable

import jax
import optax
from jax import Array

from metaal_jax import learners
from metaal_jax.base import PyTree
from metaal_jax.learners import without_head
from metaal_jax.studies.arms import make_embed, make_model
from metaal_jax.studies.folder import RunFolder
from metaal_jax.studies.meta_training import make_meta_job, meta_networks
from metaal_jax.studies.setting import Setting

CHUNK = 100  # rows embedded at a time; few stay in a CPU's cache


def meta_network(setting: Setting, folder: RunFolder, *, seed: int, meta_run: str | None) -> PyTree:
    """The meta-learned network: restored from the run folder of a main job, or trained here with the same keys.

    Raises:
      UsageError: for a folder that keeps none, or that of another source, target or seed.
    """
    return meta_networks({"maml": make_meta_job(setting)}, setting, folder, seed=seed, meta_run=meta_run)["maml"]


def body_of(setting: Setting, network: PyTree) -> PyTree:
    """A meta-learned network without its last layer, for rows of the setting's shape."""
    return without_head(make_model(setting.classes, setting.shape), network, setting.row())


def untrained_body(setting: Setting, key: Array) -> PyTree:
    """The same of a network that learned nothing."""
    model = make_model(setting.classes, setting.shape)
    return learners.maml(model, optimizer=optax.identity(), steps=0).init(key, setting.row())


def make_embedding(setting: Setting) -> Callable[[PyTree, Array], Array]:
    """`(body, x) -> [n, d]`."""
    return make_embed(make_model(setting.classes, setting.shape), CHUNK)


def meta_embedding(setting: Setting, folder: RunFolder, *, seed: int, meta_run: str | None) -> Callable[[Array], Array]:
    """`x -> [n, d]` by the meta-learned network, compiled; see `meta_network`."""
    body = body_of(setting, meta_network(setting, folder, seed=seed, meta_run=meta_run))
    embed: Callable[[Array], Array] = jax.jit(functools.partial(make_embedding(setting), body))
    return embed
