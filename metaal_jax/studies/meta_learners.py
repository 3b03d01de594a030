"""The meta-learners of the main job: how each is meta-trained on the source and how it adapts to the target."""

from typing import Any

import flax.linen as nn
import optax

from metaal_jax import learners
from metaal_jax.base import Learner

META_LEARNERS = {
    "maml": "MAML from prototypes: the network adapted from its meta-learned initialisation",
    "fomaml": "the same with first-order meta-gradients",
    "anil": "the same, the last layer alone adapted",
    "meta_sgd": "MAML with a meta-learned last layer and step size for every parameter",
    "reptile": "Reptile",
    "implicit_maml": "MAML with implicit gradients",
    "protonet": "nearest class means on a meta-learned embedding",
    "r2d2": "ridge regression on a meta-learned embedding",
    "metaoptnet": "a support vector machine on a meta-learned embedding",
}
SEMI_SUPERVISED = {
    "pseudo": "pseudo-labels for pool rows",
    "propagation": "labels propagated over the pool",
}
# Their last layer is meta-learned: tasks have as many classes as the target, and may begin without a label.
OWN_HEAD = ("meta_sgd", "reptile", "implicit_maml")


def make_meta_learner(name: str, model: nn.Module, config: Any, *, testing: bool) -> Learner:
    """A meta-learner by name, as it is meta-trained or as it adapts to the target."""
    train = {"optimizer": optax.sgd(config.inner_rate), "steps": config.inner_steps, "unroll": True}
    prototypes = {"head": "prototypes", "temperature": config.temperature}
    if name in ("maml", "fomaml"):
        if not testing:
            first_order = config.first_order or name == "fomaml"
            return learners.maml(model, first_order=first_order, **prototypes, **train)
        inner = optax.partition(
            {"head": optax.adam(config.adapt_rate), "body": optax.adam(config.adapt_body_rate)},
            lambda params: {"params": {name: "head" if name == "head" else "body" for name in params["params"]}},
        )
        return learners.maml(model, optimizer=inner, steps=config.adapt_steps, **prototypes)
    if name == "anil":
        if not testing:
            return learners.anil(model, **prototypes, **train)
        return learners.anil(model, optimizer=optax.adam(config.adapt_rate), steps=config.adapt_steps, **prototypes)
    if name == "meta_sgd":
        return learners.meta_sgd(model, optimizer=optax.sgd(config.own_rate), steps=config.own_steps, unroll=True)
    if name == "reptile":
        inner = optax.sgd(config.reptile_rate)
        steps = config.reptile_adapt_steps if testing else config.reptile_steps
        return learners.reptile(model, optimizer=inner, steps=steps, minibatch=None if testing else 10)
    if name == "implicit_maml":
        return learners.implicit_maml(
            model, optimizer=optax.sgd(config.own_rate), steps=config.implicit_steps, proximal=config.proximal
        )
    if name == "protonet":
        return learners.protonet(model, temperature=config.temperature, learn=("temperature",))
    if name == "r2d2":
        return learners.r2d2(model, scale=8.0, intercept=True)
    if name == "metaoptnet":
        return learners.metaoptnet(model, scale=8.0)
    raise ValueError(f"unknown meta-learner {name!r}; choose from {list(META_LEARNERS)}")


def meta_learner_of(learner: str) -> str | None:
    """Whose meta-training an arm's learner needs: its own, `maml`'s for `frozen`, none for `scratch` and `logistic`."""
    base = learner.partition("+")[0]
    return "maml" if base == "frozen" else base if base in META_LEARNERS else None


def semi_supervised(learner: Learner, kind: str, config: Any) -> Learner:
    """A learner that also learns from the pool's unlabelled rows."""
    rows, chunk = config.pool_rows, config.chunk
    if kind == "pseudo":
        return learners.pseudo_labels(learner, rows=rows, chunk=chunk)
    return learners.label_propagation(learner, rows=rows, chunk=chunk)
