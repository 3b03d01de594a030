"""The main job: meta-train on a source, then learn actively on a new target, against training from scratch.

Claim: after meta-training on tasks made of CIFAR-10 images, the same network needs a fraction of the labels on MNIST
that it needs from scratch, whichever query strategy is used.

    python experiments/meta_active.py                                   # digits to digits, other classes
    python experiments/meta_active.py --source cifar10 --target mnist
    python experiments/meta_active.py --source omniglot --target mnist

Expected from CIFAR-10 to MNIST, over 16 seeds: with typical rows 87.1 % after 20 labels and 92.4 after 100, from
scratch 56.4 and 78.9; with random rows 67.4 and 90.5, from scratch 46.0 and 73.7. It takes 33 minutes on two CPU cores.
All figures: experiments/results/meta_active/ and the README.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from metaal_jax.names import listing
from metaal_jax.studies.curves import check_sizes
from metaal_jax.studies.groups import Learning, MetaTraining, Run, Sizes, Transfer, open_folder
from metaal_jax.studies.main_job import learner_names, main_job_folder, make_main_job, run_main_job, write_study
from metaal_jax.studies.options import RESULT_FILE, check_options, parse
from metaal_jax.studies.usage import main, strategy_names


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


def job(config: Config) -> None:
    """The whole run."""
    check_options(config)
    check_sizes(config.sizes)
    learners, strategies = learner_names(config.learners), strategy_names(config.strategies)
    transfer, sizes, run = config.transfer, config.sizes, config.run
    planned = make_main_job(
        learners, strategies, transfer=transfer, run=run, sizes=sizes, training=config.training,
        learning=config.learning,
    )  # fmt: skip
    folder = open_folder(config, run, main_job_folder(transfer))
    study = run_main_job(planned, folder, sizes=sizes, seed=run.seed, meta_run=transfer.meta_run)
    table = write_study(study, folder, config, config.save_results)
    print(f"\n{transfer.source} to {transfer.target}: test accuracy in %, mean and 95 % interval over "
          f"{sizes.seeds} seeds\n")  # fmt: skip
    print(f"{table}\n\nrun folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
