"""The main job: meta-train on a source, then learn actively on a new target, against training from scratch.

Claim: after meta-training on tasks made of CIFAR-10 images, the same network needs a fraction of the labels on MNIST
that it needs from scratch, whichever query strategy is used.

    python experiments/meta_active.py                                   # digits to digits, other classes
    python experiments/meta_active.py --source cifar10 --target mnist
    python experiments/meta_active.py --source omniglot --target mnist

Figures and times: experiments/results/meta_active/ and the table in the README.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from metaal_jax.names import listing
from metaal_jax.studies.arms import LEARNERS, make_arms
from metaal_jax.studies.curves import check_sizes, learning_curves
from metaal_jax.studies.groups import Learning, MetaTraining, Run, Sizes, Transfer, open_folder
from metaal_jax.studies.meta_learners import meta_learner_of
from metaal_jax.studies.meta_training import make_meta_job, meta_networks
from metaal_jax.studies.options import RESULT_FILE, check_options, flat, parse
from metaal_jax.studies.setting import held_out_for, load_setting
from metaal_jax.studies.study import Study, pair
from metaal_jax.studies.usage import arguments, command, main, names, strategy_names


@dataclass(frozen=True)
class Config:
    """Meta-trains a learner on tasks of a source, then compares learners and query strategies on a target."""

    learners: str = "scratch,maml,frozen,logistic"
    """Comma-separated, of: scratch, logistic, frozen (maml's body), maml, fomaml, anil, meta_sgd, reptile,
    implicit_maml, protonet, r2d2, metaoptnet. With +pseudo or +propagation, as in maml+propagation, a learner also
    learns from the pool's unlabelled rows."""
    strategies: Annotated[str, tyro.conf.arg(help=f"Comma-separated, of:\n{listing()}\n")] = (
        "random,entropy,margin,committee,typical"
    )
    transfer: Transfer = Transfer()
    sizes: Sizes = Sizes()
    training: MetaTraining = MetaTraining()
    learning: Learning = Learning()
    run: Run = Run()
    save_results: Annotated[str | None, RESULT_FILE] = None
    """Also write the results to this JSON file."""


def check(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Checks what can be checked without data; returns the names of learners and strategies."""
    check_options(config)
    check_sizes(config.sizes)
    plain = [name for name in LEARNERS if "+" not in name]
    return names(config.learners, plain, "learner", LEARNERS), strategy_names(config.strategies)


def comparisons(study: Study, against: tuple[str, ...]) -> list[dict]:
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


def job(config: Config) -> None:
    """The whole run."""
    learners, strategies = check(config)
    transfer, sizes, learning, run = config.transfer, config.sizes, config.learning, config.run
    setting = load_setting(
        transfer, run=run, sizes=sizes, tasks_of=config.training.tasks, held_out=held_out_for(strategies)
    )
    with arguments():
        owners = dict.fromkeys(filter(None, map(meta_learner_of, learners)))
        meta_jobs = {name: make_meta_job(setting, name, training=config.training, learning=learning) for name in owners}
        arms = [
            (learner, arm)
            for learner in learners
            for arm in make_arms(
                learner, strategies, classes=setting.classes, shape=setting.shape, sizes=sizes, learning=learning
            )
        ]
    folder = open_folder(config, run, f"runs/{Path(transfer.source).stem}-{Path(transfer.target).stem}")
    metas = meta_networks(meta_jobs, setting, folder, seed=run.seed, meta_run=transfer.meta_run)
    study = learning_curves(arms, metas, setting, folder, sizes=sizes, seed=run.seed)
    folder.close()
    text = study.table()
    (folder.path / "table.txt").write_text(text + "\n")
    study.about.update(config=flat(config), seconds=folder.seconds())
    title = f"{study.about['source']} to {study.about['target']}, {sizes.seeds} seeds"
    paired = comparisons(study, against=("scratch", "frozen", "logistic"))
    for path in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        study.plot(path.with_suffix(".png"), title=title)
        study.save(path, command=command(), paired=paired)
    print(f"\n{transfer.source} to {transfer.target}: test accuracy in %, mean and 95 % interval over "
          f"{sizes.seeds} seeds\n")  # fmt: skip
    print(text)
    print(f"\nrun folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
