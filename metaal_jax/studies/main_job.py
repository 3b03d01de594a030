"""The main job as library code: learners meta-trained on a source, compared by their learning curves on a target."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metaal_jax.names import find
from metaal_jax.studies.arms import LEARNERS, Arm, make_arms
from metaal_jax.studies.curves import learning_curves
from metaal_jax.studies.folder import RunFolder
from metaal_jax.studies.groups import Learning, MetaTraining, Run, Sizes, Transfer
from metaal_jax.studies.meta_learners import meta_learner_of
from metaal_jax.studies.meta_training import MetaJob, make_meta_job, meta_networks
from metaal_jax.studies.options import flat
from metaal_jax.studies.results import Record
from metaal_jax.studies.setting import HELD_OUT, Setting, load_setting
from metaal_jax.studies.study import Study, pair
from metaal_jax.studies.usage import arguments, command, names


class MainJob(NamedTuple):
    """A main job, checked and ready to run.

    Attributes:
      setting: the data.
      meta_jobs: what is meta-trained, by learner.
      arms: learners by name, each with its arms.
    """

    setting: Setting
    meta_jobs: dict[str, MetaJob]
    arms: tuple[tuple[str, Arm], ...]


def learner_names(text: str) -> tuple[str, ...]:
    """Comma-separated names of learners, checked.

    >>> learner_names("scratch, maml+propagation")
    ('scratch', 'maml+propagation')

    Raises:
      UsageError: for an unknown or repeated name, or none.
    """
    return names(text, [name for name in LEARNERS if "+" not in name], "learner", LEARNERS)


def make_main_job(
    learners: Sequence[str],
    strategies: Sequence[str],
    *,
    transfer: Transfer,
    run: Run,
    sizes: Sizes,
    training: MetaTraining = MetaTraining(),
    learning: Learning = Learning(),
) -> MainJob:
    """Loads the data and makes everything that runs.

    Args:
      learners, strategies: names, all known.
      transfer: source and target.
      run: says where prepared sets are.
      sizes: of problems and of the comparison, see `curves.check_sizes`.
      training: of meta-learners.
      learning: of all learners.

    Raises:
      DataError, UsageError: for what cannot be run, before anything is computed.
    """
    held_out = HELD_OUT if any(find(name).held_out for name in strategies) else 0
    setting = load_setting(transfer, run=run, sizes=sizes, tasks_of=training.tasks, held_out=held_out)
    classes, shape = setting.classes, setting.shape
    with arguments():
        owners = dict.fromkeys(owner for name in learners if (owner := meta_learner_of(name)) is not None)
        jobs = {name: make_meta_job(setting, name, training=training, learning=learning) for name in owners}
        arms = [(learner, arm) for learner in learners
                for arm in make_arms(learner, tuple(strategies), classes=classes, shape=shape, sizes=sizes,
                                     learning=learning)]  # fmt: skip
    return MainJob(setting, jobs, tuple(arms))


def run_main_job(job: MainJob, folder: RunFolder, *, sizes: Sizes, seed: int, meta_run: str | None = None) -> Study:
    """Meta-trains, or takes the networks of the run in the folder `meta_run`, and draws all learning curves."""
    metas = meta_networks(job.meta_jobs, job.setting, folder, seed=seed, meta_run=meta_run)
    study = learning_curves(job.arms, metas, job.setting, folder, sizes=sizes, seed=seed)
    folder.close()
    return study


def main_job_folder(transfer: Transfer) -> str:
    """The run folder by default."""
    return f"runs/{Path(transfer.source).stem}-{Path(transfer.target).stem}"


def comparisons(study: Study, against: Sequence[str] = ("scratch", "frozen", "logistic")) -> list[Record]:
    """Paired differences of the meta-learned network to the same strategy with the learners `against`."""
    rows = []
    for learner, strategy in study.curves:
        for other in against:
            if learner in ("maml", "frozen") and other != learner and (other, strategy) in study.curves:
                a, b = (learner, strategy), (other, strategy)
                for n in study.columns():
                    rows.append(pair(a, b, "accuracy", n, study.at(a, "accuracy", n) - study.at(b, "accuracy", n)))
                rows.append(pair(a, b, "area", int(study.labels[-1]), study.area(a) - study.area(b)))
    return rows


def write_study(study: Study, folder: RunFolder, config: Any, save_results: str | None = None) -> str:
    """Writes table, picture and results to the run folder, the last two to another place as well; gives the table.

    Args:
      study: with `source` and `target` in what it is about.
      folder: the run.
      config: that made it.
      save_results: a JSON file; its picture is written beside it.
    """
    text = study.table()
    (folder.path / "table.txt").write_text(text + "\n")
    study.about.update(config=flat(config), seconds=folder.seconds())
    seeds = len(next(iter(study.curves.values()))["accuracy"])
    title = f"{study.about['source']} to {study.about['target']}, {seeds} seeds"
    for path in (folder.path / "results.json", *([Path(save_results)] if save_results else [])):
        study.plot(path.with_suffix(".png"), title=title)
        study.save(path, command=command(), paired=comparisons(study))
    return text
