"""Trains an acquisition policy on a source's problems: what to have labelled is learned, and used on other sets.

Claim: a policy trained on problems made from CIFAR-10 alone chooses better than the best rules on held-out problems
and, in batches of ten, better than every rule on a new task (`evaluate_policy.py`); single rows as well as the best.

    python experiments/learn_policy.py --meta-run runs/cifar10-mnist               # by evolution strategies
    python experiments/learn_policy.py --meta-run runs/cifar10-mnist --way reinforce --minutes 15
    python experiments/learn_policy.py --meta-run runs/cifar10-mnist --policy selector # what chooses among rules

The main job's meta-learned network embeds everything once. A problem's classes are each composed of one to three forms,
in uneven shares: shapes drawn from the source's images at several strengths of distortion, without any label, or, with
`--made-of classes`, the source's own classes. Problems of several kinds (classes, rows, labels, batches) take turns.
Logistic regression is fitted to the embedding after every batch, as in `strategies.py`, and the policy is rewarded with
the area under the learning curve. Problems of forms that training does not see choose the checkpoint; problems of still
other forms are what is reported, paired with rules on the same problems. (Of a source's own classes with too few of
them, the held-out forms are other images of the same classes.) The new task is not looked at. How many pieces there are
is a matter of time: the seed decides what each of them gives.

Expected: see experiments/results/policies/ and the README.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from forms import MADE_OF, embedded_forms, kinds_of, main_job, strengths_of
from metaal_jax import policies
from metaal_jax.metrics import interval
from metaal_jax.studies.folder import RunFolder, round_to
from metaal_jax.studies.options import FILE, Range, above, at_least, check_options, parse
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.statistics import numbers, shown
from metaal_jax.studies.usage import UsageError, arguments, command, main, names
from policy_training import (
    BASELINE,
    LEARNERS,
    POLICIES,
    TRAINED,
    WAYS,
    Trained,
    areas_of,
    first_metas,
    make_chooser,
    make_network,
    make_trainers,
    moving_of,
    rules_of,
    train,
)
from strategies import main_config

# A run may go on for longer: what is there stays as it is.
FREE = frozenset({"out", "resume", "data_dir", "save_results", "save_policy", "minutes", "pieces", "plan"})


def choices(lines: dict[str, str]) -> str:
    """Names and what they mean, for `--help`."""
    return "One of: " + "; ".join(f"{name}: {line}" for name, line in lines.items())


@dataclass(frozen=True)
class Config:
    """Trains an acquisition policy on a source's problems."""

    way: Annotated[str, tyro.conf.arg(help=choices({name: way.line for name, way in WAYS.items()}))] = "evolution"
    source: str = "cifar10"
    """Data set that problems are made from; the one that the main job's network was meta-trained on."""
    target: str = "mnist"
    """Data set that the main job was for: it decides the shape of rows, and is not looked at."""
    meta_run: str | None = None
    """Run folder of the main job for this source and target, whose network embeds. None trains it here."""
    policy: Annotated[str, tyro.conf.arg(help=choices(POLICIES))] = "linear"
    arms: str = "random,margin,badge,typical,max_herding"
    """Comma-separated rules that a selector chooses among; max_herding, which it begins with, among them."""
    start: Annotated[float, Range()] = 1.0
    """Factor of the feature uncertain_cover with which scores begin, four times that for reinforce, ppo and pathwise,
    whose draws are then near the best rows; of a selector, the head start of max_herding, the same for all ways."""
    situation: str = "labels,margin"
    """Comma-separated features of the situation that a linear policy's factors move with."""
    plan: int = 10
    """Rows that the policy chooses at a time where it is asked for fewer, one a class at most. It is for the report and
    for later use; in training and validation single rows are chosen one by one, which costs less."""
    minutes: float = 20.0
    """Time to train; it is checked after each piece."""
    pieces: int = 40
    """Most pieces of the training, each followed by a validation and a checkpoint."""
    piece_steps: int = 5
    """Steps of the trainer in a piece, each one of every kind of problems."""
    piece_seconds: float = 0.0
    """Least time of a piece, whose steps are repeated until then. Its end is then a matter of time as well."""

    kinds: str = "10:600:10:100,30:360:10:100,3:150:5:50,10:600:1:100"
    """Comma-separated kinds of problems: classes:rows of the pool:rows asked for in a round:labels of an episode."""
    parts: int = 3
    """Most forms of a class."""
    test: int = 400
    """Most test rows of a problem."""
    held_out: int = 100
    """Its validation rows, which imitation and regression measure labels by."""
    imbalance: Annotated[float, at_least(1)] = 10.0
    """How many times rarer its rarest class may be than its most frequent one."""
    made_of: Annotated[str, tyro.conf.arg(help=choices(MADE_OF))] = "auto"
    forms: int = 560
    """Shape classes for training, at each strength."""
    validation_forms: int = 140
    """Shape classes for validation, and as many others for the report, at each strength."""
    examples: int = 120
    """Examples of each."""
    strengths: str = "0.6,0.9,1.2,1.5,1.8"
    """Strengths of their distortion; a problem's forms share one."""
    validation_problems: int = 80
    """Problems of each kind that choose the checkpoint."""
    report_problems: int = 200
    """Problems of each kind in the report."""
    rules: str = "random,margin,typiclust,max_herding,uncertain_herding"
    """Comma-separated rules in the report; max_herding, the one that counts, among them."""

    problems: int = 8
    """Problems of a step."""
    episodes: int = 16
    """Episodes of each problem in a step (evolution and reinforce); ppo runs a quarter as many in all, each of a
    problem of its own, the supervised ways and pathwise one of each problem."""
    deviation: Annotated[float, above(0)] = 0.15
    """Of evolution's noise on the parameters."""
    policy_rate: float = 0.05
    """Learning rate of the policy (Adam); row and set take a tenth of it, ppo and pathwise a fifth."""
    anchors: int = 1000
    """Rows that stand for the pool in training, at most all of it; by default as many as in use. With fewer the same
    parameters choose worse, and training is for another policy than the one that is used."""
    candidates: int = 200
    """Rows a round that reinforce, ppo and pathwise choose from."""
    tried: int = 48
    """Rows a round that imitation, regression and classification try."""
    learner: Annotated[str, tyro.conf.arg(help=choices(LEARNERS))] = "linear"
    train: Annotated[str, tyro.conf.arg(help="What the way pathwise trains. " + choices(TRAINED))] = "policy"
    learner_rate: float = 3e-3
    """Learning rate of the learner's meta-parameters (Adam)."""
    ridge: Annotated[float, above(0)] = 20.0
    """Ridge that meta-training begins with."""
    scale: Annotated[float, above(0)] = 5.0
    """Factor on the ridge regression's outputs that meta-training begins with."""
    linear_ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of the linear layer, a logistic regression."""
    solver_steps: int = 64
    """Steps of its solver."""
    refit_steps: int = 16
    """Steps where labels are tried."""

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
    save_results: Annotated[str | None, FILE] = None
    """Also write the results to this JSON file."""
    save_policy: Annotated[str | None, FILE] = None
    """Also write the policy to this JSON file."""


def check(config: Config) -> None:
    """Checks what can be checked without data."""
    for text, known, what in ((config.way, WAYS, "way"), (config.policy, POLICIES, "policy"),
                              (config.learner, LEARNERS, "learner"), (config.train, TRAINED, "train"),
                              (config.made_of, MADE_OF, "made-of")):  # fmt: skip
        if names(text, known, what) != (text,):
            raise UsageError(f"--{what} {text!r}: give one; choose from {', '.join(known)}")
    check_options(config)
    if config.way in ("evolution", "reinforce") and (config.episodes < 2 or config.episodes % 2):
        raise UsageError(f"--episodes {config.episodes} must be an even number from 2 on")
    strengths_of(config)
    moving_of(config)
    largest = max(kind.batch for kind in kinds_of(config.kinds))
    for option in ("candidates", "tried"):
        if getattr(config, option) < largest:
            raise UsageError(f"--{option} {getattr(config, option)} are fewer than a batch of {largest}")
    for option in ("rules", "arms"):
        rules_of(config, option)
    if config.policy == "selector" and config.way not in ("evolution", "reinforce", "ppo"):
        raise UsageError(f"--way {config.way} needs scores of single rows, which a selector does not give; choose "
                         "evolution, reinforce or ppo")  # fmt: skip
    if config.train != "policy" and (config.way != "pathwise" or len(kinds_of(config.kinds)) > 1):
        raise UsageError(f"--train {config.train} needs gradients that reach the learner, and problems of one kind: "
                         "give --way pathwise and one of --kinds")  # fmt: skip
    if config.train != "policy" and config.learner != "ridge":
        raise UsageError(f"--train {config.train}: a new task's classes come in any order, so a linear layer has no "
                         "start worth learning; give --learner ridge")  # fmt: skip


def job(config: Config) -> None:
    """The whole run."""
    check(config)
    kinds = kinds_of(config.kinds)
    setting = Setting(main_config(main_job(config)))
    with arguments():
        network = make_network(config)
        make_trainers(config, network)
    folder = RunFolder(config.out or f"runs/policies/{config.source}-{config.policy}-{config.way}", config,
                       resume=config.resume, free=FREE)  # fmt: skip
    forms = embedded_forms(config, setting, folder)
    with arguments():
        for bank in forms:
            first_metas(config, bank)
    trained = train(config, folder, network, forms)
    params, records = trained.params, trained.records
    curves = [report(config, folder, network, trained, forms, place) for place in range(len(kinds))]

    rows, paired = result_rows(config, curves, records)
    about = {"command": command(), "source": config.source, "way": config.way, "kinds": config.kinds,
             "seconds_of_training": records[-1]["seconds"],
             "held_out": [row for row in paired if row["b"]["strategy"] == BASELINE]}  # fmt: skip
    rules = rules_of(config, "arms") if config.policy == "selector" else ()
    for place in (folder.path / "policy.json", *([Path(config.save_policy)] if config.save_policy else [])):
        policies.save(place, network, params, about, rules=rules, plan=1 if rules else config.plan)
    for place in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(place, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=dataclasses.asdict(config), rows=rows, paired=paired)  # fmt: skip
    picture(config, records, curves, folder.path / "results.png")
    print(f"\n{config.way} on {config.source}, {config.report_problems} held-out problems of each kind: area in %, "
          "mean and 95 %")  # fmt: skip
    for kind, found in zip(kinds, curves, strict=True):
        print(f"{kind}")
        for name, accuracy in found.items():
            low = interval(100 * accuracy.mean(1))
            print(f"  {name:12} {low.mean:.2f} ± {low.high - low.mean:.2f}   less {BASELINE}: "
                  f"{shown((accuracy - found[BASELINE]).mean(1))}")  # fmt: skip
    print(f"{records[-1]['seconds'] / 60:.1f} minutes of training; policy: {folder.path / 'policy.json'}")


def report(
    config: Config, folder: RunFolder, network: Any, trained: Trained, forms: tuple, place: int
) -> dict[str, np.ndarray]:
    """Accuracies `[problems, rounds]` by name on held-out problems of a kind: the policy, its start, and rules.

    The start has the learner's as well; rules have the learner as it is after training. Where the policy plans, it is
    also there without plans, as `one_by_one`.
    """
    kind = kinds_of(config.kinds)[place]
    planned = config.policy != "selector" and min(config.plan, kind.ways) > kind.batch

    def compute() -> list[dict]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 7), place)
        plain, meta = areas_of(config, kind, network=network), trained.metas[place]
        policy = areas_of(config, kind, network=network, plan=config.plan) if planned else plain
        start = make_chooser(config, kind, network).init(key)
        compared = {"policy": (policy, meta, trained.params),
                    "start": (policy, first_metas(config, forms[0])[place], start)}  # fmt: skip
        compared |= {"one_by_one": (plain, meta, trained.params)} if planned else {}
        compared |= {name: (areas_of(config, kind, rule=name), meta, ()) for name in rules_of(config, "rules")}
        found = []
        for name, (play, *own) in tqdm(compared.items(), desc=f"report, {kind}"):
            accuracy = play(key, *own, forms[2], config.report_problems)
            found += [{"series": name, "kind": list(kind), "problem": i, "accuracy": [round_to(v) for v in row]}
                      for i, row in enumerate(np.asarray(accuracy))]  # fmt: skip
        return found

    used = f"-plan-{config.plan}" if planned else ""
    records = folder.step(f"report-{trained.best:02d}-{place}{used}", compute)
    return {name: np.asarray([r["accuracy"] for r in records if r["series"] == name])
            for name in dict.fromkeys(r["series"] for r in records)}  # fmt: skip


def result_rows(config: Config, curves: list[dict], records: list[dict]) -> tuple[list[dict], list[dict]]:
    """Areas on held-out problems, the validation along the training, and paired differences, as results."""
    rows: list[dict] = []
    paired: list[dict] = []
    common = {"source": config.source, "target": config.source}
    for kind, found in zip(kinds_of(config.kinds), curves, strict=True):
        where = {**common, "ways": kind.ways, "pool": kind.pool, "batch": kind.batch, "labels": kind.budget}
        for name, accuracy in found.items():
            rows.append({"strategy": name, **where, "metric": "area", **numbers(accuracy.mean(1), of="problems")})
            if name not in ("policy", "start"):
                paired.append({"a": {"strategy": "policy"}, "b": {"strategy": name}, **where, "metric": "area",
                               **numbers((found["policy"] - accuracy).mean(1), "difference", "problems")})  # fmt: skip
    rows += [{"strategy": "policy", **common, "metric": "validation_area", "step": r["at"], "seconds": r["seconds"],
              "mean": round(r["validation"], 5)} for r in records]  # fmt: skip
    seconds = records[-1]["seconds"]
    if config.way in ("evolution", "reinforce") and seconds > 0:
        episodes = records[-1]["at"] * config.problems * config.episodes * len(curves)
        rows.append({"strategy": "policy", **common, "metric": "episodes_per_second",
                     "mean": round(episodes / seconds, 2)})  # fmt: skip
    return rows, paired


def picture(config: Config, records: list[dict], curves: list[dict], path: Path) -> None:
    """Validation along the training, and the differences to the best rules on held-out problems of each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    minutes = [r["seconds"] / 60 for r in records]
    kinds = kinds_of(config.kinds)
    for number, kind in enumerate(kinds):
        gained = [100 * (r[f"validation_{number}"] - records[0][f"validation_{number}"]) for r in records]
        left.plot(minutes, gained, marker=".", label=str(kind))
    left.set_xlabel("minutes of training")
    left.set_ylabel("validation area gained, points")
    left.legend(frameon=False, fontsize=8)
    names = [name for name in curves[0] if name not in ("policy", "random", "margin")]
    for shift, name in enumerate(names):
        found = [interval(100 * (of_kind["policy"] - of_kind[name]).mean(1)) for of_kind in curves]
        place = np.arange(len(kinds)) + 0.2 * (shift - (len(names) - 1) / 2)
        error = np.asarray([[f.mean - f.low, f.high - f.mean] for f in found]).T
        right.errorbar([f.mean for f in found], place, xerr=error, fmt="o", label=f"less {name}", capsize=3)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(kinds)), [str(kind) for kind in kinds], fontsize=8)
    right.set_xlabel("area of the policy less that of a rule, points")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{config.way} on {config.source}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
