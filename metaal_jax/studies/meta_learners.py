"""The meta-learners of the main job: how each is meta-trained on the source and how it adapts to the target."""

import functools

import flax.linen as nn
import optax

from metaal_jax import learners
from metaal_jax.base import Learner
from metaal_jax.studies.groups import Adaptation, MetaTraining

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


def make_meta_learner(name: str, model: nn.Module, adaptation: Adaptation, *, training: MetaTraining | None) -> Learner:
    """A meta-learner by name: as it is meta-trained or, where `training` is None, as it adapts to the target."""
    maml = functools.partial(learners.maml, model, head="prototypes", temperature=adaptation.temperature)
    anil = functools.partial(learners.anil, model, head="prototypes", temperature=adaptation.temperature)
    if name in ("maml", "fomaml"):
        if training is not None:
            return maml(optimizer=optax.sgd(training.inner_rate), steps=training.inner_steps, unroll=True,
                        first_order=training.first_order or name == "fomaml")  # fmt: skip
        inner = optax.partition(
            {"head": optax.adam(adaptation.adapt_rate), "body": optax.adam(adaptation.adapt_body_rate)},
            lambda params: {"params": {name: "head" if name == "head" else "body" for name in params["params"]}},
        )
        return maml(optimizer=inner, steps=adaptation.adapt_steps)
    if name == "anil":
        if training is not None:
            return anil(optimizer=optax.sgd(training.inner_rate), steps=training.inner_steps, unroll=True)
        return anil(optimizer=optax.adam(adaptation.adapt_rate), steps=adaptation.adapt_steps)
    if name == "meta_sgd":
        own = optax.sgd(adaptation.own_rate)
        return learners.meta_sgd(model, optimizer=own, steps=adaptation.own_steps, unroll=True)
    if name == "reptile":
        steps = adaptation.reptile_adapt_steps if training is None else adaptation.reptile_steps
        return learners.reptile(model, optimizer=optax.sgd(adaptation.reptile_rate), steps=steps,
                                minibatch=None if training is None else 10)  # fmt: skip
    if name == "implicit_maml":
        return learners.implicit_maml(model, optimizer=optax.sgd(adaptation.own_rate),
                                      steps=adaptation.implicit_steps, proximal=adaptation.proximal)  # fmt: skip
    if name == "protonet":
        return learners.protonet(model, temperature=adaptation.temperature, learn=("temperature",))
    if name == "r2d2":
        return learners.r2d2(model, scale=8.0, intercept=True)
    if name == "metaoptnet":
        return learners.metaoptnet(model, scale=8.0)
    raise ValueError(f"unknown meta-learner {name!r}; choose from {list(META_LEARNERS)}")


def meta_learner_of(learner: str) -> str | None:
    """Whose meta-training an arm's learner needs: its own, `maml`'s for `frozen`, none for `scratch` and `logistic`."""
    base = learner.partition("+")[0]
    return "maml" if base == "frozen" else base if base in META_LEARNERS else None


def semi_supervised(learner: Learner, kind: str, *, rows: int | None, chunk: int) -> Learner:
    """A learner that also learns from the pool's unlabelled rows, `pseudo` or `propagation`."""
    if kind == "pseudo":
        return learners.pseudo_labels(learner, rows=rows, chunk=chunk)
    return learners.label_propagation(learner, rows=rows, chunk=chunk)
