"""Ways to train a policy at equal time; and learner and policy trained together, against each alone.

Claim: at equal time evolution strategies and REINFORCE train better policies than every other way, and only theirs are
shown to pass the best rule; learner and policy trained at once are better than either trained alone. (One training
each; the settings of pathwise were chosen by trials on the source.)

    python experiments/compare_trainings.py --meta-run runs/cifar10-mnist                # every way, 5 minutes each
    python experiments/compare_trainings.py --what joint --meta-run runs/cifar10-mnist

Problems, learner and trainers are those of `learn_policy.py`, with its defaults. Ways differ in nothing but the way,
and have the same time to train, which is measured without compilation and validation. For `--what joint` the learner is
ridge regression on a linear map of the embedding, and gradients through the episode train the policy, the learner's
meta-parameters, or both; then every policy is played with every learner. All are judged on the same held-out problems.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

import learn_policy
from forms import embedded_forms, kinds_of, main_job
from metaal_jax.base import PyTree
from metaal_jax.metrics import interval
from metaal_jax.studies.folder import RunFolder, round_to
from metaal_jax.studies.options import FILE, check_options, parse
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.statistics import numbers, shown
from metaal_jax.studies.usage import UsageError, arguments, command, main, names
from policy_training import (
    BASELINE,
    TRAINED,
    WAYS,
    Areas,
    areas_of,
    first_metas,
    make_chooser,
    make_network,
    make_trainers,
    train,
)
from strategies import main_config

WHAT = {"ways": "the ways to train", "joint": "learner, policy, or both, by gradients"}
FREE = frozenset({"out", "resume", "data_dir", "save_results", "minutes", "pieces"})


@dataclass(frozen=True)
class Config:
    """Compares trainings of acquisition policies at equal time."""

    what: Annotated[str, tyro.conf.arg(help=learn_policy.choices(WHAT))] = "ways"
    trainings: str = "all"
    """Comma-separated ways, or for joint what is trained; or all."""
    minutes: float = 5.0
    """Time of each training; it is checked after each piece."""
    pieces: int = 1000
    """Most pieces of each training, each followed by a validation."""
    piece_steps: int = 5
    """Steps of the trainer, repeated until a piece has lasted long enough."""
    piece_seconds: float = 30.0
    """Least time of a piece, so that every training has as many checkpoints to choose from."""
    runs: int = 1
    """Trainings of each, with keys of their own."""
    kinds: str = "10:600:10:100"
    """The kind of problems, as `learn_policy.py` writes it."""
    parts: int = 3
    """Most forms of a class."""
    test: int = 400
    """Most test rows of a problem."""
    held_out: int = 100
    """Its validation rows, which imitation, regression and classification measure labels by."""
    validation_problems: int = 80
    """Problems that choose the checkpoint."""
    report_problems: int = 200
    """Held-out problems that are reported."""

    source: str = "cifar10"
    """Data set that problems are made from; the one that the main job's network was meta-trained on."""
    target: str = "mnist"
    """Data set that the main job was for: it decides the shape of rows, and is not looked at."""
    meta_run: str | None = None
    """Run folder of the main job for this source and target, whose network embeds. None trains it here."""
    meta_seed: int = 0
    """Seed of the main job's run."""
    seed: int = 0
    """Decides everything that is drawn."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str | None = None
    """Run folder; by default runs/compare_trainings/WHAT."""
    resume: bool = False
    """Go on with the run in the folder."""
    save_results: Annotated[str | None, FILE] = None
    """Also write the results to this JSON file."""


class Player(NamedTuple):
    """Who plays: a policy and a learner, by name.

    Attributes:
      policy, learner: names.
      play: what gives accuracies, see `areas`.
      params, meta: the policy's parameters, and the learner's.
    """

    policy: str
    learner: str
    play: Areas
    params: PyTree
    meta: PyTree


def arms_of(config: Config) -> dict[str, learn_policy.Config]:
    """The trainings by name."""
    check_options(config)
    if config.what not in WHAT:
        raise UsageError(f"--what {config.what!r} must be one of {', '.join(WHAT)}")
    known = WAYS if config.what == "ways" else TRAINED
    chosen = tuple(known) if config.trainings == "all" else names(config.trainings, known, "training")
    shared = {field.name for field in dataclasses.fields(learn_policy.Config)} & set(vars(config))
    base = learn_policy.Config(**{name: getattr(config, name) for name in shared - {"out"}})
    if len(kinds_of(config.kinds)) > 1:
        raise UsageError(f"--kinds {config.kinds!r}: give one kind of problems")
    if config.what == "ways":
        found = {arm: dataclasses.replace(base, way=arm) for arm in chosen}
    else:
        found = {arm: dataclasses.replace(base, way="pathwise", learner="ridge", train=arm) for arm in chosen}
    for arm in found.values():
        learn_policy.check(arm)
    return found


def job(config: Config) -> None:
    """The whole run."""
    arms = arms_of(config)
    first = next(iter(arms.values()))
    setting = Setting(main_config(main_job(first)))
    with arguments():
        networks = {name: make_network(arm) for name, arm in arms.items()}
        for name, arm in arms.items():
            make_trainers(arm, networks[name])
    folder = RunFolder(config.out or f"runs/compare_trainings/{config.what}", config, resume=config.resume, free=FREE)
    forms = embedded_forms(first, setting, folder)
    with arguments():
        for bank in forms:
            first_metas(first, bank)
    found, seconds = [], {}
    for run in range(config.runs):
        trained = {}
        for name, arm in arms.items():
            own = dataclasses.replace(arm, seed=config.seed + run)
            place = RunFolder(f"{folder.path}/{name}-{run}", own, resume=config.resume, free=learn_policy.FREE)
            trained[name] = train(own, place, networks[name], forms)
            seconds[name, run] = trained[name].records[-1]["seconds"]
        found.append(judge(config, folder, arms, networks, trained, forms, run))
    table = {player: np.stack([each[player] for each in found]) for player in found[0]}
    rows, paired = result_rows(config, table, seconds)
    for path in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(path, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=dataclasses.asdict(config), rows=rows, paired=paired)  # fmt: skip
    best = max(table, key=lambda player: table[player].mean())
    print(f"\n{WHAT[config.what]} on {config.source}, {config.report_problems} held-out problems: area in %, mean and "
          "95 %")  # fmt: skip
    for (policy, learner), accuracy in sorted(table.items(), key=lambda item: -item[1].mean()):
        low = interval(100 * accuracy.mean((0, 2)))
        less = shown((table[best] - accuracy).mean((0, 2)))
        of_runs = ", ".join(f"{100 * mean:.2f}" for mean in accuracy.mean((1, 2)))
        print(f"  {policy:15} {learner:8} {low.mean:.2f} ± {low.high - low.mean:.2f}   the best less this: {less}   "
              f"runs: {of_runs}")  # fmt: skip


def players(config: Config, arms: dict, networks: dict, trained: dict, forms: tuple) -> list[Player]:
    """Every way's policy with the untrained learner; or every policy with every learner."""
    arm = next(iter(arms.values()))
    kind, network = kinds_of(config.kinds)[0], next(iter(networks.values()))
    start = make_chooser(arm, kind, network).init(jax.random.key(config.seed))
    learners: dict[str, PyTree] = {"start": first_metas(arm, forms[0])[0]}
    choosers: dict[str, tuple[Areas, PyTree]] = {
        BASELINE: (areas_of(arm, kind, rule=BASELINE), ()),
        "start": (areas_of(arm, kind, network=network), start),
    }
    for name, of in trained.items():
        if arms[name].train != "learner":
            choosers[name] = (areas_of(arm, kind, network=networks[name]), of.params)
        if arms[name].train != "policy":
            learners[name] = of.metas[0]
    return [Player(policy, learner, *choosers[policy], meta) for policy in choosers
            for learner, meta in learners.items()]  # fmt: skip


def judge(
    config: Config, folder: RunFolder, arms: dict, networks: dict, trained: dict, forms: tuple, run: int
) -> dict[tuple[str, str], np.ndarray]:
    """Accuracies `[problems, rounds]` by policy and learner on the same held-out problems."""
    key = jax.random.fold_in(jax.random.key(config.seed), 7)

    def compute() -> list[dict]:
        found = []
        for player in tqdm(players(config, arms, networks, trained, forms), desc="report"):
            accuracy = player.play(key, player.meta, player.params, forms[2], config.report_problems)
            who = {"series": player.policy, "learner": player.learner, "run": run}
            found += [{**who, "problem": i, "accuracy": [round_to(v) for v in row]}
                      for i, row in enumerate(np.asarray(accuracy))]  # fmt: skip
        return found

    bests = "-".join(f"{of.best:02d}" for of in trained.values())
    records = folder.step(f"report-{run}-{'-'.join(trained)}-{bests}", compute)
    places = dict.fromkeys((r["series"], r["learner"]) for r in records)
    return {place: np.asarray([r["accuracy"] for r in records if (r["series"], r["learner"]) == place])
            for place in places}  # fmt: skip


def result_rows(
    config: Config, table: dict[tuple[str, str], np.ndarray], seconds: dict[tuple[str, int], float]
) -> tuple[list[dict], list[dict]]:
    """Areas and all paired differences; accuracies are `[runs, problems, rounds]`."""
    kind = kinds_of(config.kinds)[0]
    where = {"source": config.source, "target": config.source, "ways": kind.ways, "pool": kind.pool,
             "batch": kind.batch, "labels": kind.budget, "metric": "area"}  # fmt: skip
    rows: list[dict[str, Any]] = []
    paired = []
    for one, accuracy in table.items():
        who = dict(zip(("strategy", "learner"), one, strict=True))
        rows.append({**who, **where, **numbers(accuracy.mean((0, 2)), of="problems"),
                     "runs": [round(float(mean), 5) for mean in accuracy.mean((1, 2))]})  # fmt: skip
        for other, theirs in table.items():
            if other != one:
                paired.append({"a": who, "b": dict(zip(("strategy", "learner"), other, strict=True)), **where,
                               **numbers((accuracy - theirs).mean((0, 2)), "difference", "problems")})  # fmt: skip
    rows += [{"strategy": name, "run": run, "source": config.source, "target": config.source,
              "metric": "seconds_of_training", "mean": value} for (name, run), value in seconds.items()]  # fmt: skip
    return rows, paired


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
