"""Adaptation by gradient steps: the inner loop of MAML's family."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax

from metaal_jax import losses
from metaal_jax.base import Batch, LossFn, PyTree, require, rows_of, take
from metaal_jax.learners.adaptation import (
    HYPER,
    Adaptation,
    apply,
    cleared,
    head_of,
    held_without_labels,
    init_of,
    judge_of,
    labelled_or,
    predict_of,
    support_statistics,
    without,
)
from metaal_jax.learners.heads import check_class_loss, prototype_head
from metaal_jax.learners.inner_loop import check_optimizer, check_remat, draw_rows, inner_loop

LEARNABLE = ("decay", "proximal", "temperature", "steps")
OPEN = 3.0  # logit at which a learned step starts: 95 % of it is taken


def gradient_steps(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    adapted: Literal["all", "head", "body"] = "all",
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    decay: float | Array = 0.0,
    proximal: float | Array = 0.0,
    rates: Literal["tensor", "parameter"] | None = None,
    per_step: bool = False,
    learn: Sequence[str] = (),
    per_step_norm: bool = False,
    statistics: Literal["batch", "support"] = "batch",
    minibatch: int | None = None,
    microbatch: int | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Adaptation:
    """Adaptation by `steps` steps of `optimizer` down the loss of the labelled rows, from the meta-parameters.

    Learned hyperparameters are kept in the entry `hyper` of the meta-parameters; the outer loop trains them with the
    initialisation.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: of the inner loop, any Optax transformation of gradients alone. The derivative of Adam-like ones is NaN
        where a gradient is exactly 0 (a constant input) unless they are given `eps_root > 0`.
      steps: inner steps; meta-training and later use may differ, unless something is learned per step.
      adapted: `"all"` parameters, the last layer alone (`"head"`; the embedding is then computed once), or all others
        (`"body"`). The last two need a last layer named `head`.
      head: `"meta"` starts the last layer from the meta-parameters; `"prototypes"` from the class means of the
        labelled rows' embeddings (Proto-MAML), which suits any number of labels per class. The steps then see the
        embedding less its mean over the labelled rows, because features after a ReLU share a large mean that makes the
        head's gradients nearly parallel; the result is folded back into the head. A class without a label is
        ruled out: its logit is -inf, and no step sees it. It needs a last layer named `head` with a bias. A warm start
        keeps the head it is given and adds the prototypes of classes that have had no label before.
      temperature: factor on the prototype head's logits, > 0.
      decay: adds `decay / 2` times the squared norm of the adapted parameters to the objective.
      proximal: adds `proximal / 2` times their squared distance from where they started: the meta-parameters, or
        `start` where it is given.
      rates: learns a factor on the updates of every tensor or every single parameter, from 1; may become negative.
      per_step: learns such factors for each step.
      learn: hyperparameters to learn, of `"temperature"`, `"decay"`, `"proximal"` (as logarithms, from the values
        given, which must then be above 0) and `"steps"`: each step is taken with a weight between 0 and 1 that never
        rises from step to step; their sum is the effective number of steps.
      per_step_norm: learns scale and bias of norm layers for each step; the inner loop does not move them.
      statistics: of `models.BatchNorm` layers when the adapted network predicts: those of the `"batch"` at hand
        (transductive) or of the labelled rows (`"support"`). Each inner step always uses those of its labelled rows.
      minibatch: rows drawn for each step, without replacement, from those of positive weight; None for all.
      microbatch: rows whose activations are held at a time in a step; None for all. The result is the same up to
        rounding; refused for models that say `normalises_by_batch`.
      remat: recomputes inner steps in the backward pass, see `inner_loop`; with `unroll=1`.
      unroll: of the scan over inner steps.
      loss: what the inner steps and the outer loop descend, a weighted mean over rows.
      score: of query rows, reported beside the loss.

    Returns:
      An `Adaptation`; make a `Learner` of it with `through`, `reptile_difference` or `implicit`.

    Raises:
      ValueError: for numbers out of range, unknown names or options that do not go together.

    Reference: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning, 2017; Li et al.: Meta-SGD, 2017 (`rates`); Antoniou,
    Edwards, Storkey: How to Train Your MAML, 2019 (`per_step`, `per_step_norm`); Raghu et al.: Rapid Learning or
    Feature Reuse, 2020 (`adapted`); Rajeswaran et al.: Meta-Learning with Implicit Gradients, 2019 (`proximal`).
    """
    require(steps >= 0, f"steps must not be negative, got {steps}")
    check_optimizer(optimizer)
    check_remat(remat, unroll)
    require(temperature > 0, f"temperature must be > 0, got {temperature}")
    require(decay >= 0, f"decay must be >= 0, got {decay}")
    require(proximal >= 0, f"proximal must be >= 0, got {proximal}")
    for name, value, allowed in (
        ("adapted", adapted, ("all", "head", "body")),
        ("head", head, ("meta", "prototypes")),
        ("rates", rates, (None, "tensor", "parameter")),
        ("statistics", statistics, ("batch", "support")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if unknown := sorted(set(learn) - set(LEARNABLE)):
        raise ValueError(f"learn: {unknown[0]!r} cannot be learned; choose from {LEARNABLE}")
    given = {"temperature": temperature, "decay": decay, "proximal": proximal}
    for name in given:
        if name in learn:
            require(given[name] > 0, f"a learned {name} starts from a value above 0, got {given[name]}")
    if "temperature" in learn and head == "meta":
        raise ValueError("temperature is that of prototypes; learn it with head='prototypes'")
    if per_step and rates is None:
        raise ValueError("per_step needs rates='tensor' or 'parameter'")
    if (per_step or per_step_norm or "steps" in learn) and steps == 0:
        raise ValueError("steps must be a positive integer where something is learned per step, got 0")
    if per_step_norm and adapted == "head":
        raise ValueError("per_step_norm: the embedding is computed once where only the head is adapted; leave it out")
    if head == "prototypes":
        check_class_loss("gradient_steps: head='prototypes'", loss)
    if head == "prototypes" and adapted == "body":
        raise ValueError("adapted='body' keeps the meta-parameters' head; give head='meta'")
    if minibatch is not None:
        require(minibatch >= 1, f"minibatch must be a positive integer, got {minibatch}")
    if microbatch is not None:
        require(microbatch >= 1, f"microbatch must be a positive integer, got {microbatch}")
        if getattr(model, "normalises_by_batch", False):
            raise ValueError("microbatch: a batch norm layer needs all rows at once; give another norm")
    learned = tuple(name for name in LEARNABLE if name in learn)
    per_parameter = (("rates",) if rates else ()) + (("norm",) if per_step_norm else ())

    # Which parameters the inner loop moves; the tree keeps the variables' structure, for optimisers that read names.
    def moves(name: tuple[str, ...]) -> bool:
        if name[0] != "params" or (per_step_norm and _is_norm(name)):
            return False
        return adapted == "all" or (name[1] == "head") == (adapted == "head")

    def free_of(variables: PyTree) -> PyTree:
        return _only(variables, moves)

    def init(key: Array, x: PyTree, /) -> PyTree:
        variables = init_of(model)(key, x)
        if adapted != "all" or head == "prototypes":
            head_of(variables)
        dtype = jax.tree.leaves(variables["params"])[0].dtype
        hyper: dict[str, Any] = {
            f"log_{name}": jnp.log(jnp.asarray(given[name], dtype)) for name in learned if name in given
        }
        if "steps" in learned:
            hyper["gates"] = jnp.full(steps, OPEN, dtype)
        lead = (steps,) if per_step else ()
        if rates is not None:
            hyper["rates"] = jax.tree.map(
                lambda leaf: jnp.ones(lead + (leaf.shape if rates == "parameter" else ()), leaf.dtype),
                free_of(variables),
            )
        if per_step_norm:
            norm = _only(variables, _is_norm)
            if not norm:
                raise ValueError(f"per_step_norm: {type(model).__name__} has no norm layer")
            hyper["norm"] = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (steps + 1, *leaf.shape)), norm)
        return {**variables, HYPER: hyper} if hyper else variables

    def current(hyper: PyTree, name: str) -> float | Array:
        return jnp.exp(hyper[f"log_{name}"]) if name in learned else given[name]

    def embed(variables: PyTree, batch: Batch) -> Array:
        if microbatch is None:
            return apply(model, variables, batch.x, batch.weight)[1]
        chunks, _ = _chunks(batch, microbatch)
        _, embedding = lax.map(jax.checkpoint(lambda part: apply(model, variables, part.x, part.weight)), chunks)
        return embedding.reshape(-1, embedding.shape[-1])[: rows_of(batch)]

    def begin(meta: PyTree, batch: Batch, start: PyTree = None) -> InnerProblem:
        hyper, batch = meta.get(HYPER, {}), cleared(batch)
        origin = without((HYPER,), meta) if start is None else without(("batch_stats",), start)
        variables, centre = origin, None
        if per_step_norm:
            variables = _merge(variables, jax.tree.map(lambda leaf: leaf[0], hyper["norm"]))
        z = embed(variables, batch) if head == "prototypes" or adapted == "head" else None
        absent = None
        if head == "prototypes":
            assert z is not None
            given_head = head_of(variables)
            total = batch.weight.sum()
            centre = (batch.weight @ z) / jnp.where(total > 0, total, 1.0)
            classes = given_head["bias"].shape[0]
            last = prototype_head(
                z - centre[None], batch.y, batch.weight, classes, temperature=current(hyper, "temperature")
            )
            absent, last = ruled_out(last)
            if start is not None:
                # Columns of classes that the given head ruled out, if they have a label now.
                closed, kept = ruled_out(given_head)
                fresh = closed & ~absent
                made = head_of(uncentred({"params": {"head": last}}, centre))
                columns = {"kernel": fresh[None], "bias": fresh}
                last = {name: jnp.where(columns[name], made[name], leaf) for name, leaf in kept.items()}
                absent, centre = closed & absent, None
            variables = {**variables, "params": {**variables["params"], "head": last}}
        return InnerProblem(batch, origin, hyper, variables, z if adapted == "head" else None, centre, absent)

    def fit(variables: PyTree, problem: InnerProblem, rows: Batch, embedding: Array | None) -> Array:
        """The loss of labelled rows; `embedding` is theirs where the body stays as it is."""

        def loss_of_logits(logits: Array, rows: Batch) -> Array:
            if problem.absent is not None:
                logits = jnp.where(problem.absent[None], -jnp.inf, logits)
            return loss(logits, rows.y, rows.weight)

        if embedding is not None:
            last = variables["params"]["head"]
            return loss_of_logits(embedding @ last["kernel"] + last["bias"][None], rows)

        def loss_of_rows(rows: Batch) -> Array:
            return loss_of_logits(apply(model, variables, rows.x, rows.weight)[0], rows)

        if microbatch is None:
            return loss_of_rows(rows)

        kind = jnp.result_type(rows.weight, *jax.tree.leaves(variables["params"]))

        def add(total: Array, part: tuple[Batch, Array]) -> tuple[Array, None]:
            return total + (part[1] * loss_of_rows(part[0])).astype(kind), None

        chunks = _chunks(rows, microbatch)
        weight = rows.weight.sum()
        total, _ = lax.scan(jax.checkpoint(add, prevent_cse=False), jnp.zeros((), kind), chunks)
        return total / jnp.where(weight > 0, weight, 1.0)

    def loss_of(free: PyTree, problem: InnerProblem, rows: Batch, embedding: Array | None, norm: PyTree) -> Array:
        variables = uncentred(_merge(_merge(problem.variables, free), norm), problem.centre)
        total = fit(variables, problem, rows, embedding)
        if "decay" in learned or not _is_zero(decay):
            total += 0.5 * current(problem.hyper, "decay") * _squares(free)
        if "proximal" in learned or not _is_zero(proximal):
            moved = jax.tree.map(jnp.subtract, free, free_of(problem.variables))
            total += 0.5 * current(problem.hyper, "proximal") * _squares(moved)
        return total

    def objective(free: PyTree, problem: InnerProblem) -> Array:
        return loss_of(free, problem, problem.batch, problem.embedding, {})

    def solve(key: Array, problem: InnerProblem, *, first_order: bool = False, path: bool = False) -> PyTree:
        problem = held_without_labels(problem.batch, problem)
        batch, hyper = problem.batch, problem.hyper
        first = free_of(problem.variables)
        each: dict[str, Any] = {}
        if minibatch is not None:
            each["key"] = jax.random.split(key, steps)
        if per_step_norm:
            each["norm"] = jax.tree.map(lambda leaf: leaf[:steps], hyper["norm"])

        def step_loss(free: PyTree, now: PyTree = None) -> Array:
            rows, embedding = batch, problem.embedding
            if minibatch is not None:
                index = draw_rows(now["key"], batch.weight, min(minibatch, rows_of(batch)))
                rows, embedding = take(batch, index), None if embedding is None else embedding[index]
            return loss_of(free, problem, rows, embedding, now["norm"] if per_step_norm else {})

        factors = None
        if rates is not None:
            factors = hyper["rates"]
            if not per_step:
                factors = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (steps, *leaf.shape)), factors)
        if "steps" in learned:
            gates = jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(hyper["gates"])))
            ungated = jax.tree.map(lambda leaf: jnp.ones(steps), first) if factors is None else factors
            factors = jax.tree.map(lambda leaf: leaf * gates.reshape((-1,) + (1,) * (leaf.ndim - 1)), ungated)
        return inner_loop(
            step_loss,
            first,
            optimizer=optimizer,
            steps=steps,
            each=each or None,
            factors=factors,
            first_order=first_order,
            path=path,
            remat=remat,
            unroll=unroll,
        )

    def assemble(free: PyTree, problem: InnerProblem, *, step: Array | int | None = None) -> PyTree:
        params = uncentred(_merge(problem.variables, free), problem.centre)
        if per_step_norm:
            last = steps if step is None else step
            params = _merge(params, jax.tree.map(lambda leaf: leaf[last], problem.hyper["norm"]))
        if problem.absent is not None:
            made = params["params"]["head"]
            made = {**made, "bias": jnp.where(problem.absent, -jnp.inf, made["bias"])}
            params = {**params, "params": {**params["params"], "head": made}}
        params = labelled_or(problem.batch, params, problem.origin)
        return support_statistics(model, params, problem.batch) if statistics == "support" else params

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        del unlabelled
        problem = begin(meta, batch, start)
        return assemble(solve(key, problem), problem)

    return Adaptation(
        init=init,
        adapt=adapt,
        predict=predict_of(model),
        judge=judge_of(model, loss, score),
        begin=begin,
        solve=solve,
        assemble=assemble,
        objective=objective,
        steps=steps,
        anchored="proximal" in learned or not _is_zero(proximal),
        bent=any(name in learned or not _is_zero(given[name]) for name in ("decay", "proximal")),
        moves_all=adapted == "all" and head == "meta" and not per_step_norm,
        learns=(*learned, *per_parameter),
    )


class InnerProblem(NamedTuple):
    """What the inner loop starts from.

    Attributes:
      batch: the labelled rows, cleared.
      origin: the parameters that are kept where there is no label.
      hyper: learned hyperparameters.
      variables: the model's variables before the first step.
      embedding: `[n, d]` of the labelled rows where the body stays as it is, else None.
      centre: `[d]`, what the steps see taken off the embedding, or None.
      absent: bool `[c]`, classes that are ruled out, or None. Their biases stand at 0 in here, so that norms, decay and
        optimisers meet finite numbers.
    """

    batch: Batch
    origin: PyTree
    hyper: PyTree
    variables: PyTree
    embedding: Array | None
    centre: Array | None
    absent: Array | None


def ruled_out(head: PyTree) -> tuple[Array, PyTree]:
    """Which classes a head rules out by a bias of -inf, bool `[c]`, and the head with 0 there."""
    absent = jnp.isneginf(head["bias"])
    return absent, {**head, "bias": jnp.where(absent, 0.0, head["bias"])}


def uncentred(variables: PyTree, centre: Array | None) -> PyTree:
    """A head for centred embeddings as one for the embeddings themselves."""
    if centre is None:
        return variables
    last = variables["params"]["head"]
    last = {**last, "bias": last["bias"] - centre @ last["kernel"]}
    return {**variables, "params": {**variables["params"], "head": last}}


def _is_zero(value: float | Array) -> bool:
    return not isinstance(value, Array) and value == 0


def _is_norm(name: tuple[str, ...]) -> bool:
    return name[0] == "params" and any("Norm" in part for part in name)


def _only(tree: PyTree, wanted: Callable[[tuple[str, ...]], bool]) -> PyTree:
    return unflatten_dict({name: leaf for name, leaf in flatten_dict(tree).items() if wanted(name)})


def _merge(tree: PyTree, part: PyTree) -> PyTree:
    """`tree` with the leaves of `part` in the place of its own."""
    return unflatten_dict({**flatten_dict(tree), **flatten_dict(part)})


def _squares(tree: PyTree) -> Array:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)), start=jnp.zeros((), jnp.float32))


def _chunks(batch: Batch, size: int) -> tuple[Batch, Array]:
    """Rows in chunks of `size`, the last one padded, and the weight of each chunk `[chunks]`."""
    extra = -rows_of(batch) % size

    def split(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1)).reshape(-1, size, *leaf.shape[1:])

    chunks = jax.tree.map(split, batch)
    return chunks, chunks.weight.sum(1)
