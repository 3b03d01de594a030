"""Trains an acquisition policy on a source's problems: what to have labelled is learned, and used on other sets.

Claim: a policy trained on problems made from CIFAR-10 alone chooses better than every rule, on held-out problems and
on a new task (`evaluate_policy.py`).

    python experiments/learn_policy.py --meta-run runs/cifar10-mnist               # by evolution strategies
    python experiments/learn_policy.py --meta-run runs/cifar10-mnist --way reinforce --minutes 15

The main job's meta-learned network embeds everything once. A problem's classes are each composed of one to three forms,
in uneven shares: shapes drawn from the source's images at several strengths of distortion, without any label, or, of
sources such as Omniglot, the source's own classes. A linear layer is trained on the embedding after every batch, as in
`strategies.py`, and the policy is rewarded with the area under the learning curve. Problems of forms that training does
not see choose the checkpoint; problems of still other forms are what is reported, paired with rules on the same
problems. (Of a source's own classes with too few of them, the held-out forms are other images of the same classes.) The
new task is not looked at. How many pieces there are is a matter of time: the seed decides what each of them gives.

Expected: see experiments/results/policies/ and the README.
"""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import meta_active
from arms import make_embed, make_model, standardised, without_head
from metaal_jax import checkpoint, exemplars, models, policies, tasks
from metaal_jax.base import Learner, Policy, Problem, PyTree
from metaal_jax.metrics import interval
from metaal_jax.policies import features
from metaal_jax.policies.episodes import episode
from registry import ALIASES, Need, find, make_policy, strategy_names
from report import write_results
from runs import RunFolder, UsageError, arguments, command, environment, main, names, round_to
from strategies import linear_learners, main_config, main_network

WAYS = {
    "evolution": "evolution strategies: the parameters are varied, whole episodes compared",
    "reinforce": "policy gradient, other episodes of the same problem as baseline",
    "ppo": "clipped policy gradient with a learned value",
    "regression": "what a label is worth, measured by refitting, as a regression (LAL)",
    "imitation": "the greedy oracle imitated, with data aggregation",
    "classification": "whether a row's label helps, as a classifier",
}
NETWORKS = ("linear", "row", "set")
BASELINE = "max_herding"
# A run may go on for longer: what is there stays as it is.
FREE = frozenset({"out", "resume", "data_dir", "save_results", "save_policy", "minutes", "pieces"})


@dataclass(frozen=True)
class Config:
    """Trains an acquisition policy on a source's problems."""

    way: Annotated[str, tyro.conf.arg(help="One of: " + "; ".join(f"{n}: {t}" for n, t in WAYS.items()))] = "evolution"
    source: str = "cifar10"
    """Data set that problems are made from; the one that the main job's network was meta-trained on."""
    target: str = "mnist"
    """Data set that the main job was for: it decides the shape of rows, and is not looked at."""
    meta_run: str | None = None
    """Run folder of the main job for this source and target, whose network embeds. None trains it here."""
    network: str = "linear"
    """What scores rows: linear (in the features, with factors that move with the situation), row or set."""
    start: float = 1.0
    """Factor of the feature uncertain_cover with which scores begin."""
    minutes: float = 8.0
    """Time to train; it is checked after each piece."""
    pieces: int = 40
    """Most pieces of the training, each followed by a validation and a checkpoint."""
    piece_steps: int = 10
    """Steps of the trainer in a piece."""

    batch_size: int = 10
    """Rows that a policy asks for in a round."""
    budget: int = 100
    """Labels of an episode."""
    ways: int = 10
    """Classes of a problem."""
    parts: int = 3
    """Most forms of a class."""
    pool: int = 600
    """Pool rows of a problem."""
    test: int = 400
    """Its test rows."""
    held_out: int = 100
    """Its validation rows, which imitation and regression measure labels by."""
    imbalance: float = 10.0
    """How many times rarer its rarest class may be than its most frequent one."""
    forms: int = 560
    """Shape classes for training, at each strength."""
    validation_forms: int = 140
    """Shape classes for validation, and as many others for the report, at each strength."""
    examples: int = 120
    """Examples of each."""
    strengths: str = "0.6,0.9,1.2,1.5,1.8"
    """Strengths of their distortion; a problem's forms share one."""
    validation_problems: int = 160
    """Problems that choose the checkpoint."""
    report_problems: int = 200
    """Problems of the report."""
    rules: str = "random,margin,typiclust,max_herding"
    """Comma-separated rules in the report; max_herding, the one that counts, among them."""

    problems: int = 8
    """Problems of a step."""
    episodes: int = 16
    """Episodes of each problem in a step (evolution and reinforce); ppo and the supervised ways run one."""
    deviation: float = 0.15
    """Of evolution's noise on the parameters."""
    policy_rate: float = 0.05
    """Learning rate of the policy (Adam); the row and set networks take a tenth of it."""
    anchors: int = 200
    """Rows that stand for the pool in training."""
    candidates: int = 48
    """Rows a round that imitation, regression and classification try and that policy gradients choose from."""
    steps: int = 50
    """Steps of the linear layer."""
    rate: float = 1e-2
    """Their learning rate."""
    decay: float = 0.1
    """Their weight decay."""
    refit_steps: int = 20
    """Steps of the linear layer where labels are tried."""

    meta_seed: int = 0
    """Seed of the main job's run."""
    seed: int = 0
    """Decides everything that is drawn."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str | None = None
    """Run folder; by default runs/policies/SOURCE-WAY."""
    resume: bool = False
    """Go on with the run in the folder."""
    save_results: str | None = None
    """Also write the results to this JSON file."""
    save_policy: str | None = None
    """Also write the policy to this JSON file."""


def check(config: Config) -> None:
    """Checks what can be checked without data."""
    for text, known, what in ((config.way, WAYS, "way"), (config.network, NETWORKS, "network")):
        if names(text, known, what) != (text,):
            raise UsageError(f"--{what} {text!r}: give one; choose from {', '.join(known)}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and not field.name.endswith("seed") and value < 1:
            raise UsageError(f"--{field.name.replace('_', '-')} {value} must be at least 1")
    if config.way in ("evolution", "reinforce") and (config.episodes < 2 or config.episodes % 2):
        raise UsageError(f"--episodes {config.episodes} must be an even number from 2 on")
    strengths_of(config)
    if config.candidates < config.batch_size:
        raise UsageError(f"--candidates {config.candidates} are fewer than --batch-size {config.batch_size}")
    rules = rules_of(config)
    plain = [name for name in rules if not find(name).committee and not find(name).costly and name != "predicted_loss"]
    if BASELINE not in rules or len(plain) < len(rules):
        raise UsageError(f"--rules {config.rules!r} must hold {BASELINE}, and none that asks more than one plain model")
    if config.budget > config.pool:
        raise UsageError(f"--budget {config.budget} labels are more than --pool {config.pool} rows")


def rules_of(config: Config) -> tuple[str, ...]:
    """The rules of the report."""
    return tuple(ALIASES.get(name, name) for name in strategy_names(config.rules))


def strengths_of(config: Config) -> list[float]:
    """The strengths of distortion."""
    try:
        found = [float(part) for part in config.strengths.split(",")]
    except ValueError:
        raise UsageError(f"--strengths {config.strengths!r} must be numbers with commas between them") from None
    if min(found) <= 0:
        raise UsageError(f"--strengths {config.strengths!r} must be above 0")
    return found


def main_job(config: Config) -> Config:
    """The config with the seed of the main job."""
    return dataclasses.replace(config, seed=config.meta_seed)


def make_network(config: Config) -> Any:
    """The network that scores rows, before training."""
    prior = policies.prior(uncertain_cover=config.start)
    if config.network == "linear":
        moving = tuple(features.SITUATION.index(name) for name in ("labels", "margin"))
        # A single model has no disagreement: its factors would be noise.
        place = features.ROWS.index("disagreement")
        ignored = (place, place + len(features.ROWS))
        return models.LinearNetwork(ignored=ignored, situation=moving, prior=prior)
    return {"row": models.RowNetwork, "set": models.SetNetwork}[config.network](prior=prior)


def make_trainer(config: Config, sampler: Callable, network: Any) -> policies.PolicyTrainer:
    """The way to train, on the linear layer."""
    learner, refit = linear_learners(config, config.ways)
    k = config.batch_size
    rate = config.policy_rate * (1.0 if config.network == "linear" else 0.1)
    common: dict[str, Any] = {
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), "budget": config.budget, "k": k,
        "chunk": 1 if jax.default_backend() == "cpu" else None,
    }  # fmt: skip
    greedy = functools.partial(policies.learned, network, k=k, anchors=config.anchors)
    drawn = greedy(sample=True, candidates=config.candidates)
    if config.way == "evolution":
        return policies.evolution(learner, greedy(), sampler, problems=config.problems, pairs=config.episodes // 2,
                                  deviation=config.deviation, **common)  # fmt: skip
    if config.way == "reinforce":
        return policies.reinforce(learner, drawn, sampler, problems=config.problems, rollouts=config.episodes, **common)
    if config.way == "ppo":
        parts = math.gcd(4, config.problems * (config.budget // k))
        return policies.ppo(learner, drawn, sampler, episodes=config.problems, minibatches=parts, **common)
    return policies.supervised(learner, drawn, sampler, target=config.way, refit=refit, episodes=config.problems,
                               expert_steps=config.piece_steps // 2, **common)  # fmt: skip


def embedded_forms(config: Config, setting: Any, folder: RunFolder) -> tuple[PyTree, PyTree, PyTree]:
    """The forms that problems are composed of, embedded: for training, validation and report.

    `ClassData` with leaves `[s, ...]`; `s` counts strengths of distortion, 1 for a source's own classes.
    """
    meta = main_network(main_job(config), setting, folder)
    model = make_model(setting.classes, setting.shape, main_config(config))
    meta = without_head(model, meta, jnp.zeros((1, *setting.shape), setting.train_source.x.dtype))
    embed = jax.jit(functools.partial(make_embed(model, 100), meta))
    found = []
    if setting.kinds == ("shapes",):
        held = setting.validation_source.x
        wanted = ((setting.train_source.x, config.forms), *[(held, config.validation_forms)] * 2)
        for part, (images, count) in enumerate(wanted):
            key = jax.random.fold_in(jax.random.key(config.seed), part)
            banks = [draw_forms(jax.random.fold_in(key, i), images, count, config.examples, strength, embed)
                     for i, strength in enumerate(tqdm(strengths_of(config), desc="drawing forms"))]  # fmt: skip
            found.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks))
        return found[0], found[1], found[2]
    held = setting.validation_source
    # Every other class is for validation; where they are too few, every other image of each.
    by_class = len(np.unique(held.y)) >= 2 * config.ways * config.parts
    turn = np.unique(held.y, return_inverse=True)[1] if by_class else np.argsort(np.argsort(held.y, kind="stable"))
    for rows, part in ((slice(None), setting.train_source), (turn % 2 == 0, held), (turn % 2 == 1, held)):
        x = part.x[rows]
        z = np.concatenate([np.asarray(embed(x[i : i + 5000])) for i in range(0, len(x), 5000)])
        found.append(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tasks.class_data(z, part.y[rows])))
    return found[0], found[1], found[2]


def draw_forms(
    key: jax.Array, images: np.ndarray, count: int, examples: int, strength: float, embed: Callable
) -> tasks.ClassData:
    """`count` shape classes at one strength of distortion, embedded; those that show nothing are left out."""
    draw = jax.jit(jax.vmap(exemplars.shape_exemplars(
        examples=examples, size=images.shape[1], affine=strength, elastic=0.1 * strength)))  # fmt: skip
    at_once, found, held = 50, [], 0
    for turn in range(20 * (count // at_once + 1)):
        pick_key, draw_key = jax.random.split(jax.random.fold_in(key, turn))
        row = np.asarray(jax.random.randint(pick_key, (at_once,), 0, len(images)))
        x, ink = draw(jax.random.split(draw_key, at_once), images[row])
        shown = np.asarray((ink > 0.05) & (ink < 0.5))
        z = np.asarray(embed(x.reshape(-1, *x.shape[2:]))).reshape(at_once, examples, -1)
        found.append(z[shown])
        held += int(shown.sum())
        if held >= count:
            break
    else:
        raise UsageError("the source's images show too few shapes; give another --source")
    z = np.concatenate(found)[:count]
    return tasks.class_data(z.reshape(count * examples, -1), np.repeat(np.arange(count), examples))


def make_sampler(config: Config) -> Callable[[jax.Array, PyTree], Problem]:
    """`(key, forms) -> Problem`, embedded rows that are standardised by the pool."""
    composed = tasks.composed_problems(
        ways=config.ways, parts=config.parts, pool=config.pool, test=config.test, validation=config.held_out,
        imbalance=config.imbalance,
    )  # fmt: skip

    def sample(key: jax.Array, forms: PyTree) -> Problem:
        which_key, key = jax.random.split(key)
        which = jax.random.randint(which_key, (), 0, forms.y.shape[0])
        problem = composed(key, jax.tree.map(lambda leaf: leaf[which], forms))
        return standardised(lambda x: x, problem)[0]

    return sample


def areas(config: Config, policy: Policy, learner: Learner, sampler: Callable) -> Callable[..., jax.Array]:
    """`(key, params, forms, number) -> accuracy [number, rounds]`: the same problems and keys for all policies."""
    play = episode(learner, policy, budget=config.budget, k=config.batch_size, record=False)

    @functools.partial(jax.jit, static_argnames="number")
    def run(key: jax.Array, params: PyTree, forms: PyTree, number: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            problem_key, run_key = jax.random.split(key)
            problem = sampler(problem_key, forms)
            meta = learner.init(run_key, problem.x)
            return play(run_key, params, meta, problem).accuracy

        return jax.lax.map(one, jax.random.split(key, number), batch_size=8)

    return run


def train(
    config: Config, folder: RunFolder, trainer: policies.PolicyTrainer, judge: Callable, forms: tuple, meta: PyTree,
) -> tuple[PyTree, int, list[dict]]:  # fmt: skip
    """Trains in pieces until the time is spent; the parameters that validation chose, their piece, and the records."""
    init_key, run_key, validation_key = jax.random.split(jax.random.key(config.seed), 3)
    state = jax.jit(trainer.init)(init_key, meta, forms[0])
    run = jax.jit(functools.partial(trainer.run, steps=config.piece_steps))
    path = lambda piece, what="params": folder.path / "checkpoints" / f"{what}_{piece:02d}"  # noqa: E731
    shape = state
    records: list[dict] = []

    def validated(params: PyTree) -> float:
        return round_to(judge(validation_key, params, forms[1], config.validation_problems).mean())

    def keep(piece: int) -> None:
        checkpoint.save(path(piece), state.params)
        checkpoint.save(path(piece, "state"), state)
        # The state may be large, with what a trainer remembers; the one before is for a run that is killed here.
        shutil.rmtree(path(piece - 2, "state"), ignore_errors=True)

    def begin() -> list[dict]:
        keep(0)
        return [{"series": "train", "at": 0, "seconds": 0.0, "validation": validated(state.params)}]

    records += folder.step("piece-00", begin)
    loaded = 0
    for piece in tqdm(range(1, config.pieces + 1), desc=f"{config.way}"):

        def compute(piece: int = piece, before: float = records[-1]["seconds"]) -> list[dict]:
            nonlocal state, loaded
            if loaded != piece - 1:
                state = jax.device_put(checkpoint.restore(path(piece - 1, "state"), shape))
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(run(run_key, state, forms[0]))
            seconds = before + time.perf_counter() - start
            loaded = piece
            keep(piece)
            return [{"series": "train", "at": piece * config.piece_steps, "seconds": round(seconds, 1),
                     "validation": validated(state.params),
                     **{name: round_to(values.mean()) for name, values in metrics.items()}}]  # fmt: skip

        if not folder.done(f"piece-{piece:02d}") and records[-1]["seconds"] >= 60 * config.minutes:
            break
        records += folder.step(f"piece-{piece:02d}", compute)
        for name in sorted(set(records[-1]) - {"series", "at"}):
            folder.board(f"train/{name}", records[-1][name], records[-1]["at"])
    best = int(np.argmax([record["validation"] for record in records]))
    return jax.device_put(checkpoint.restore(path(best), shape.params)), best, records


def job(config: Config) -> None:
    """The whole run."""
    check(config)
    setting = meta_active.Setting(main_config(main_job(config)))
    with arguments():
        network = make_network(config)
        sampler = make_sampler(config)
        trainer = make_trainer(config, sampler, network)
        learner, refit = linear_learners(config, config.ways)
        judged = policies.learned(network, k=config.batch_size)
    folder = RunFolder(config.out or f"runs/policies/{config.source}-{config.way}", config, resume=config.resume,
                       free=FREE)  # fmt: skip
    forms = embedded_forms(config, setting, folder)
    with arguments():
        for bank in forms:
            meta = learner.init(jax.random.key(config.seed), sampler(jax.random.key(0), bank).x)
    params, best, records = train(config, folder, trainer, areas(config, judged, learner, sampler), forms, meta)

    def compute() -> list[dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), 7)
        need = Need(k=config.batch_size, rounds=config.budget // config.batch_size, classes=config.ways,
                    learner=learner, refit=refit, loss_learner=learner)  # fmt: skip
        compared = {"policy": (judged, params), "start": (judged, judged.init(key))}
        compared |= {name: (make_policy(name, need), ()) for name in rules_of(config)}
        found = []
        for name, (policy, own) in tqdm(compared.items(), desc="report"):
            accuracy = areas(config, policy, learner, sampler)(key, own, forms[2], config.report_problems)
            found += [{"series": name, "problem": i, "accuracy": [round_to(v) for v in row]}
                      for i, row in enumerate(np.asarray(accuracy))]  # fmt: skip
        return found

    judged_records = folder.step(f"report-{best:02d}", compute)
    curves = {name: np.asarray([r["accuracy"] for r in judged_records if r["series"] == name])
              for name in dict.fromkeys(r["series"] for r in judged_records)}  # fmt: skip
    rows, paired = result_rows(config, curves, records)
    about = {"command": command(), "source": config.source, "way": config.way, "batch": config.batch_size,
             "budget": config.budget, "seconds_of_training": records[-1]["seconds"],
             "held_out": next(row for row in paired if row["b"]["strategy"] == BASELINE)}  # fmt: skip
    for place in (folder.path / "policy.json", *([Path(config.save_policy)] if config.save_policy else [])):
        policies.save(place, network, params, about)
    for place in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(place, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=dataclasses.asdict(config), rows=rows, paired=paired)  # fmt: skip
    picture(config, records, curves, folder.path / "results.png")
    print(f"\n{config.way} on {config.source}, {config.report_problems} held-out problems: area in %, mean and 95 %")
    for name, accuracy in curves.items():
        low = interval(100 * accuracy.mean(1))
        both = interval(100 * (accuracy - curves[BASELINE]).mean(1))
        print(f"  {name:12} {low.mean:.2f} ± {low.high - low.mean:.2f}   less {BASELINE}: "
              f"{both.mean:+.2f} [{both.low:+.2f}, {both.high:+.2f}]")  # fmt: skip
    print(f"{records[-1]['seconds'] / 60:.1f} minutes of training; policy: {folder.path / 'policy.json'}")


def result_rows(config: Config, curves: dict, records: list[dict]) -> tuple[list[dict], list[dict]]:
    """Areas on held-out problems, the validation along the training, and paired differences, as results."""
    rows: list[dict] = []
    paired: list[dict] = []
    common = {"source": config.source, "target": config.source, "batch": config.batch_size, "labels": config.budget}
    number = lambda low, middle: {middle: round(low.mean, 5), "low": round(low.low, 5), "high": round(low.high, 5),  # noqa: E731
                                  "problems": low.seeds}  # fmt: skip
    for name, accuracy in curves.items():
        rows.append({"strategy": name, **common, "metric": "area", **number(interval(accuracy.mean(1)), "mean")})
        if name not in ("policy", "start"):
            both = interval((curves["policy"] - accuracy).mean(1))
            paired.append({"a": {"strategy": "policy"}, "b": {"strategy": name}, **common, "metric": "area",
                           **number(both, "difference")})  # fmt: skip
    rows += [{"strategy": "policy", **common, "metric": "validation_area", "step": r["at"], "seconds": r["seconds"],
              "mean": round(r["validation"], 5)} for r in records]  # fmt: skip
    seconds = records[-1]["seconds"]
    if config.way in ("evolution", "reinforce") and seconds > 0:
        episodes = records[-1]["at"] * config.problems * config.episodes
        rows.append({"strategy": "policy", **common, "metric": "episodes_per_second",
                     "mean": round(episodes / seconds, 2)})  # fmt: skip
    return rows, paired


def picture(config: Config, records: list[dict], curves: dict, path: Path) -> None:
    """Validation along the training, and the curves on held-out problems less those of the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    left.plot([r["seconds"] / 60 for r in records], [100 * r["validation"] for r in records], marker=".")
    left.set_xlabel("minutes of training")
    left.set_ylabel("validation area, %")
    labels = config.batch_size * (1 + np.arange(curves["policy"].shape[1]))
    for name in (name for name in curves if name not in ("random", "margin")):
        found = [interval(column) for column in 100 * (curves[name] - curves[BASELINE]).T]
        right.plot(labels, [f.mean for f in found], label=name)
        right.fill_between(labels, [f.low for f in found], [f.high for f in found], alpha=0.15, linewidth=0)
    right.set_xlabel("labels bought")
    right.set_ylabel(f"accuracy less {BASELINE}'s, points")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{config.way} on {config.source}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(lambda: job(tyro.cli(Config)))
