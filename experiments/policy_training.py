"""Acquisition policies trained by any way, in pieces that a run folder keeps, and judged by whole episodes.

What `learn_policy.py` and the scripts that compare trainings share; `config` is that of `learn_policy.py`.
"""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from forms import Kind, kinds_of, make_sampler
from metaal_jax import checkpoint, learners, models, policies
from metaal_jax.base import Batch, Learner, Policy, PyTree
from metaal_jax.names import ALIASES, STRATEGIES, Given, build, find
from metaal_jax.policies import features
from metaal_jax.policies.episodes import episode
from metaal_jax.studies.folder import RunFolder, round_to
from metaal_jax.studies.usage import UsageError, names, strategy_names
from strategies import linear_learners

BASELINE = "max_herding"
# Options that say how long, where and with which keys a program is run.
UNCOMPILED = ("seed", "minutes", "pieces", "out", "resume", "data_dir", "save_results", "save_policy")
POLICIES = {
    "linear": "scores rows, linear in the features, with factors that move with some of the situation's",
    "row": "scores every row by a small network",
    "set": "scores every row in view of the others",
    "selector": "chooses among rules in every round, linear as well",
}
LEARNERS = {
    "linear": "logistic regression, as in strategies.py",
    "ridge": "ridge regression on a linear map of the embedding; both can be meta-trained",
}
TRAINED = {
    "policy": "the policy alone",
    "learner": "the learner's meta-parameters alone, under the policy's start",
    "both": "both at once",
}


def _evolution(config: Any, kind: Kind, network: Any, common: dict[str, Any]) -> policies.PolicyTrainer:
    policy = make_chooser(config, kind, network, anchors=config.anchors)
    return policies.evolution(policy=policy, problems=config.problems, pairs=config.episodes // 2,
                              deviation=config.deviation, **common)  # fmt: skip


def _drawing(config: Any, kind: Kind, network: Any, candidates: int) -> Policy:
    """The policy with batches drawn by its probabilities, among that many rows a round."""
    options = {} if config.policy == "selector" else {"candidates": candidates}
    return make_chooser(config, kind, network, anchors=config.anchors, sample=True, **options)


def _reinforce(config: Any, kind: Kind, network: Any, common: dict[str, Any]) -> policies.PolicyTrainer:
    return policies.reinforce(policy=_drawing(config, kind, network, config.candidates),
                              problems=config.problems, rollouts=config.episodes, **common)  # fmt: skip


def _ppo(config: Any, kind: Kind, network: Any, common: dict[str, Any]) -> policies.PolicyTrainer:
    episodes = max(config.problems * config.episodes // 4, 1)
    parts = math.gcd(4, episodes * (kind.budget // kind.batch))
    return policies.ppo(policy=_drawing(config, kind, network, config.candidates), episodes=episodes,
                        minibatches=parts, **common)  # fmt: skip


def _supervised(config: Any, kind: Kind, network: Any, common: dict[str, Any]) -> policies.PolicyTrainer:
    return policies.supervised(policy=_drawing(config, kind, network, config.tried), target=config.way,
                               refit=learners_of(config, kind.ways)[1], episodes=config.problems,
                               expert_steps=config.piece_steps // 2, **common)  # fmt: skip


def _pathwise(config: Any, kind: Kind, network: Any, common: dict[str, Any]) -> policies.PolicyTrainer:
    joint = config.train != "policy"
    if joint:
        groups = {"policy": common["optimizer"] if config.train == "both" else optax.set_to_zero(),
                  "learner": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learner_rate))}  # fmt: skip
        common = {**common, "optimizer": optax.partition(groups, ("policy", "learner"))}
    # Logistic regression leaves out classes without a label, so its derivative does not see what a class's first label
    # is worth. A learner that is trained as well may say less and less: see `pathwise`.
    own = config.learner == "ridge" and config.train != "both"
    refit = None if own else _with_own_start(ridge_learner(config, kind.ways))
    return policies.pathwise(policy=_drawing(config, kind, network, config.candidates), problems=config.problems,
                             joint=joint, refit=refit, **common)  # fmt: skip


def _with_own_start(learner: Learner) -> Learner:
    """The learner with meta-parameters of its own, before any training, in place of those it is given."""

    def adapt(key: jax.Array, meta: PyTree, batch: Batch, *, unlabelled: PyTree | None = None) -> PyTree:
        del meta
        return learner.adapt(key, learner.init(jax.random.key(0), batch.x), batch, unlabelled=unlabelled)

    return learner._replace(adapt=adapt)


class Way(NamedTuple):
    """A way to train.

    Attributes:
      line: what it does, for `--help`.
      make: `(config, kind, network, what all trainers take) -> trainer`.
      rate: factor of the learning rate.
      sharpness: factor of the scores of rows that training begins with. What is learned from draws is how to draw; what
        is used are the rows with the best scores. Sharp scores draw little else. A selector's scores have none.
    """

    line: str
    make: Callable[..., policies.PolicyTrainer]
    rate: float = 1.0
    sharpness: float = 1.0


WAYS = {
    "evolution": Way("evolution strategies: the parameters are varied, whole episodes compared", _evolution),
    "reinforce": Way("policy gradient, other episodes of the same problem as baseline", _reinforce, sharpness=4.0),
    # Sixteen updates a step, from the same episodes, want smaller ones.
    "ppo": Way("clipped policy gradient with a learned value", _ppo, rate=0.2, sharpness=4.0),
    "regression": Way("what a label is worth, measured by refitting, as a regression (LAL)", _supervised),
    "imitation": Way("the greedy oracle imitated, with data aggregation", _supervised),
    "classification": Way("whether a row's label helps, as a classifier", _supervised),
    "pathwise": Way(
        "gradients through a relaxed choice, the learner's adaptation and the loss", _pathwise, rate=0.2, sharpness=4.0
    ),
}


def rules_of(config: Any, option: str) -> tuple[str, ...]:
    """The rules of the report or a selector's, `rules` or `arms`."""
    text = getattr(config, option)
    rules = tuple(ALIASES.get(name, name) for name in strategy_names(text))
    plain = [name for name in rules if name in STRATEGIES and not find(name).committee and not find(name).costly
             and name != "predicted_loss"]  # fmt: skip
    if BASELINE not in rules or len(plain) < len(rules):
        raise UsageError(f"--{option} {text!r} must hold {BASELINE}, and none that asks more than one plain model")
    return rules


def moving_of(config: Any) -> tuple[str, ...]:
    """The features of the situation that a linear policy's factors move with."""
    return names(config.situation, features.SITUATION, "situation")


def make_network(config: Any) -> Any:
    """The network that scores rows, or a selector's rules, before training."""
    prior = policies.prior(uncertain_cover=config.start * WAYS[config.way].sharpness)
    if config.policy in ("row", "set"):
        return {"row": models.RowNetwork, "set": models.SetNetwork}[config.policy](prior=prior)
    moving = tuple(features.SITUATION.index(name) for name in moving_of(config))
    # A single model has no disagreement: its factors would be noise.
    place = features.ROWS.index("disagreement")
    ignored = (place, place + len(features.ROWS))
    if config.policy == "selector":
        prior = policies.favoured(rules_of(config, "arms").index(BASELINE), config.start)
    return models.LinearNetwork(ignored=ignored, situation=moving, prior=prior)


def learners_of(config: Any, ways: int) -> tuple[Learner, Learner]:
    """The learner, and its quicker form for what refits it by the thousand."""
    if config.learner == "ridge":
        return (ridge_learner(config, ways),) * 2
    return linear_learners(ways, ridge=config.linear_ridge, steps=config.solver_steps, refit_steps=config.refit_steps)


def ridge_learner(config: Any, ways: int) -> Learner:
    """Ridge regression on a linear map of the embedding, which is smooth in the weights of its rows."""
    return learners.r2d2(models.Projection(ways), ridge=config.ridge, scale=config.scale, intercept=True, absent=None)


def need_of(config: Any, kind: Kind) -> Given:
    """What rules are made from in a kind of problems."""
    learner, refit = learners_of(config, kind.ways)
    return Given(k=kind.batch, rounds=kind.budget // kind.batch, classes=kind.ways, learner=learner, refit=refit,
                loss_learner=learner)  # fmt: skip


def make_chooser(config: Any, kind: Kind, network: Any, **options: Any) -> Policy:
    """The policy as it will be used, or with the options of its training."""
    if config.policy == "selector":
        rules = [build(name, need_of(config, kind)) for name in rules_of(config, "arms")]
        return policies.selector(rules, network, k=kind.batch, **options)
    return policies.learned(network, k=kind.batch, **options)


def make_trainer(config: Any, kind: Kind, network: Any) -> policies.PolicyTrainer:
    """The way to train, on one kind of problems."""
    rate = config.policy_rate * WAYS[config.way].rate * (0.1 if config.policy in ("row", "set") else 1.0)
    common = {
        "learner": learners_of(config, kind.ways)[0], "sampler": make_sampler(config, kind),
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        "budget": kind.budget, "k": kind.batch, "chunk": 1 if jax.default_backend() == "cpu" else None,
    }  # fmt: skip
    return WAYS[config.way].make(config, kind, network, common)


def make_trainers(config: Any, network: Any) -> policies.PolicyTrainer:
    """The way to train on all kinds in turn, or, where the learner is trained as well, on the only one."""
    trainers = [make_trainer(config, kind, network) for kind in kinds_of(config.kinds)]
    return policies.in_turn(trainers) if config.train == "policy" else trainers[0]


def first_metas(config: Any, forms: PyTree) -> tuple[PyTree, ...]:
    """The learners' meta-parameters before training, of each kind of problems."""
    metas = []
    for kind in kinds_of(config.kinds):
        rows = jax.eval_shape(make_sampler(config, kind), jax.random.key(0), forms).x
        metas.append(need_of(config, kind).learner.init(jax.random.key(config.seed), jnp.zeros(rows.shape)))
    return tuple(metas)


Areas = Callable[[jax.Array, PyTree, PyTree, PyTree, int], jax.Array]


def areas(config: Any, kind: Kind, policy: Policy) -> Areas:
    """`(key, meta, params, forms, number) -> accuracy [number, rounds]`: the same problems for all policies."""
    learner, sampler = need_of(config, kind).learner, make_sampler(config, kind)
    play = episode(learner, policy, budget=kind.budget, k=kind.batch, record=False)

    @functools.partial(jax.jit, static_argnums=4)
    def run(key: jax.Array, meta: PyTree, params: PyTree, forms: PyTree, number: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            problem_key, run_key = jax.random.split(key)
            return play(run_key, meta, params, sampler(problem_key, forms)).accuracy

        return jax.lax.map(one, jax.random.split(key, number), batch_size=8)

    return run


def compiled_from(config: Any) -> Any:
    """The config without what no program depends on: runs that differ in nothing else share theirs."""
    return dataclasses.replace(config, **dict.fromkeys(UNCOMPILED))


def areas_of(config: Any, kind: Kind, *, network: Any = None, rule: str = "", plan: int = 1) -> Areas:
    """`areas` of a network's policy, planned or not, or of a rule; one program for all who ask for it."""
    return _areas_of(compiled_from(config), kind, network, rule, plan)


@functools.cache
def _areas_of(config: Any, kind: Kind, network: Any, rule: str, plan: int) -> Areas:
    options = {"plan": plan} if plan > 1 else {}
    chooser = build(rule, need_of(config, kind)) if rule else make_chooser(config, kind, network, **options)
    return areas(config, kind, chooser)


class Programs(NamedTuple):
    """What a training compiles: the trainer's `init`, and its `run` over the steps of a piece."""

    init: Callable
    run: Callable


@functools.cache
def programs_of(config: Any, network: Any) -> Programs:
    """The programs of a config, see `compiled_from`."""
    trainer = make_trainers(config, network)
    return Programs(jax.jit(trainer.init), jax.jit(functools.partial(trainer.run, steps=config.piece_steps)))


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
      params: the policy's parameters that validation chose.
      metas: the learners' meta-parameters of the same piece, for each kind of problems.
      best: that piece.
      records: a line for each piece.
    """

    params: PyTree
    metas: tuple[PyTree, ...]
    best: int
    records: list[dict]


def train(config: Any, folder: RunFolder, network: Any, forms: tuple) -> Trained:
    """Trains in pieces until the time is spent, or goes on from the last piece that the folder holds.

    `forms` are those of training, of validation and of the report.
    """
    kinds = kinds_of(config.kinds)
    judges = [areas_of(config, kind, network=network) for kind in kinds]
    programs, metas = programs_of(compiled_from(config), network), first_metas(config, forms[0])
    alone = config.train != "policy"
    init_key, run_key, validation_key = jax.random.split(jax.random.key(config.seed), 3)
    data = forms[0] if alone else (forms[0],) * len(kinds)
    state = programs.init(init_key, metas[0] if alone else metas, data)
    # Compiled here, so that the time to train is time spent on training.
    run = programs.run.lower(run_key, state, data).compile()
    path = lambda piece, what="params": folder.path / "checkpoints" / f"{what}_{piece:02d}"  # noqa: E731
    shape = state
    records: list[dict] = []

    def metas_of(state: policies.TrainState) -> tuple[PyTree, ...]:
        return (state.meta,) if alone else state.meta

    def validated(state: policies.TrainState) -> dict[str, float]:
        found = [judge(validation_key, meta, state.params, forms[1], config.validation_problems).mean()
                 for judge, meta in zip(judges, metas_of(state), strict=True)]  # fmt: skip
        return {"validation": round_to(np.mean(found)),
                **{f"validation_{number}": round_to(value) for number, value in enumerate(found)}}  # fmt: skip

    def keep(piece: int) -> None:
        checkpoint.save(path(piece), (state.params, state.meta))
        checkpoint.save(path(piece, "state"), state)
        # The state may be large, with what a trainer remembers; the one before is for a run that is killed here.
        shutil.rmtree(path(piece - 2, "state"), ignore_errors=True)

    def begin() -> list[dict]:
        keep(0)
        return [{"series": "train", "at": 0, "seconds": 0.0, **validated(state)}]

    records += folder.step("piece-00", begin)
    loaded = 0
    for piece in tqdm(range(1, config.pieces + 1), desc=f"{config.way}"):

        def compute(piece: int = piece, last: dict = records[-1]) -> list[dict]:
            nonlocal state, loaded
            if loaded != piece - 1:
                state = jax.device_put(checkpoint.restore(path(piece - 1, "state"), shape))
            start, steps, seconds = time.perf_counter(), 0, 0.0
            while steps == 0 or seconds < config.piece_seconds:
                state, metrics = jax.block_until_ready(run(run_key, state, data))
                steps += config.piece_steps
                seconds = time.perf_counter() - start
            loaded = piece
            keep(piece)
            return [{"series": "train", "at": last["at"] + steps, "seconds": round(last["seconds"] + seconds, 1),
                     **validated(state),
                     **{name: round_to(values.mean()) for name, values in metrics.items()}}]  # fmt: skip

        if not folder.done(f"piece-{piece:02d}") and records[-1]["seconds"] >= 60 * config.minutes:
            break
        records += folder.step(f"piece-{piece:02d}", compute)
        for name in sorted(set(records[-1]) - {"series", "at"}):
            folder.board(f"train/{name}", records[-1][name], records[-1]["at"])
    best = int(np.argmax([record["validation"] for record in records]))
    params, meta = jax.device_put(checkpoint.restore(path(best), (shape.params, shape.meta)))
    return Trained(params, (meta,) if alone else meta, best, records)
