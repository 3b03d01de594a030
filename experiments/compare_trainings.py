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

Expected over 200 problems: an area of 83.9 % for evolution, 83.8 for reinforce, 83.3 for pathwise, 83.1 for ppo and
max_herding, 82.9 for the start and what is supervised. Jointly 83.4 % for both, 82.9 for the trained policy with the
trained learner, 82.8 with the untrained one. Five minutes on two cores for each training; all figures: the README.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from typing_extensions import Doc

from metaal_jax.studies import groups
from metaal_jax.studies.embedding import meta_embedding
from metaal_jax.studies.forms import Problems, embedded_forms
from metaal_jax.studies.groups import Run, Transfer, open_folder
from metaal_jax.studies.options import FILE, check_options, choices, flat, parse
from metaal_jax.studies.policy_choosers import LearnerOptions
from metaal_jax.studies.policy_training import FREE, Schedule, Training, parse_training, train
from metaal_jax.studies.policy_ways import TRAINED, WAYS, Trainer
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import load_setting
from metaal_jax.studies.training_comparison import TrainingRun, comparison_rows, comparison_text, judge
from metaal_jax.studies.usage import UsageError, arguments, command, main, names

WHAT = {"ways": "the ways to train", "joint": "learner, policy, or both, by gradients"}


@dataclass(frozen=True)
class Config:
    """Compares trainings of acquisition policies at equal time."""

    what: Annotated[str, Doc(choices(WHAT))] = "ways"
    trainings: str = "all"
    """Comma-separated ways, or for joint what is trained; or all."""
    runs: int = 1
    """Trainings of each, with keys of their own."""
    schedule: Schedule = Schedule(minutes=5.0, pieces=1000, piece_seconds=30.0)
    problems: Problems = Problems(kinds="10:600:10:100")
    transfer: Transfer = Transfer("cifar10", "mnist")
    meta_seed: int = 0
    """Seed of the main job's run. Its --target decides the shape of rows, and is not looked at."""
    run: Run = Run()
    save_results: Annotated[str | None, FILE] = None
    """Also write the results to this JSON file."""


def trainings_of(config: Config) -> dict[str, Training]:
    """The trainings by name."""
    check_options(config)
    if config.what not in WHAT:
        raise UsageError(f"--what {config.what!r} must be one of {', '.join(WHAT)}")
    known = WAYS if config.what == "ways" else TRAINED
    chosen = tuple(known) if config.trainings == "all" else names(config.trainings, known, "training")
    base = Training(problem_options=config.problems, schedule=config.schedule)
    if config.what == "ways":
        return {name: dataclasses.replace(base, trainer=Trainer(way=name)) for name in chosen}
    base = dataclasses.replace(base, learner_options=LearnerOptions(learner="ridge"))
    return {name: dataclasses.replace(base, trainer=Trainer(way="pathwise", train=name)) for name in chosen}


def job(config: Config) -> None:
    """The whole run."""
    trainings = trainings_of(config)
    courses = {name: parse_training(training) for name, training in trainings.items()}
    first, run, transfer = next(iter(courses.values())), config.run, config.transfer
    if len(first.games) > 1:
        raise UsageError(f"--kinds {config.problems.kinds!r}: give one kind of problems")
    composed = first.games[0].problems
    setting = load_setting(transfer, run=run)
    with arguments():
        for course in courses.values():
            course.check()
    folder = open_folder(config, run, f"runs/compare_trainings/{config.what}", free=groups.FREE | {"minutes", "pieces"})
    embed = meta_embedding(setting, folder, seed=config.meta_seed, meta_run=transfer.meta_run)
    forms = embedded_forms(setting, embed, Training().material, [composed], seed=run.seed)
    with arguments():
        for bank in forms:
            first.first_metas(bank, seed=run.seed)
    found, seconds = [], {}
    for number in range(config.runs):
        trained = {}
        for name, course in courses.items():
            own = dataclasses.replace(run, seed=run.seed + number, out=f"{folder.path}/{name}-{number}")
            place = open_folder(TrainingRun(trainings[name], transfer, config.meta_seed, own), own, "", free=FREE)
            trained[name] = train(course, place, forms, seed=own.seed)
            seconds[name, number] = trained[name].records[-1]["seconds"]
        found.append(judge(folder, courses, trained, forms, seed=run.seed, run=number))
    curves = {player: np.stack([each[player] for each in found]) for player in found[0]}
    rows, paired = comparison_rows(curves, seconds, source=transfer.source, kind=composed.kind)
    for path in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(path, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=flat(config), rows=rows, paired=paired)  # fmt: skip
    print("\n" + comparison_text(
        f"{WHAT[config.what]} on {transfer.source}, {first.schedule.report_problems} held-out problems: area in %, "
        "mean and 95 %", curves,
    ))  # fmt: skip


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
