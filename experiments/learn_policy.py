"""Trains an acquisition policy on a source's problems: what to have labelled is learned, and used on other sets.

Claim: a policy trained on problems made from CIFAR-10 alone chooses better than max_herding on held-out problems of
that source. What it has learned does not carry over to other sets: see `evaluate_policy.py` and `many_targets.py`.

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

Expected with `--minutes 30`: on 200 held-out problems of ten classes in batches of ten an area of 81.9 %, 0.8 points
more than max_herding, 1.6 than typiclust and 10.8 than random; of three classes in batches of five 93.7, and 93.3 for
max_herding. 81 minutes on two cores, the reports included. All figures: experiments/results/policies/ and the README.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from metaal_jax import policies
from metaal_jax.studies.embedding import meta_embedding
from metaal_jax.studies.forms import embedded_forms
from metaal_jax.studies.groups import Run, Transfer, open_folder
from metaal_jax.studies.options import FILE, check_options, flat, parse
from metaal_jax.studies.policy_choosers import BASELINE
from metaal_jax.studies.policy_training import FREE, Training, parse_training, train
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import load_setting
from metaal_jax.studies.training_report import play_all, training_picture, training_rows, training_text
from metaal_jax.studies.usage import arguments, command, main


@dataclass(frozen=True)
class Config:
    """Trains an acquisition policy on a source's problems."""

    training: Training = Training()
    transfer: Transfer = Transfer("cifar10", "mnist")
    meta_seed: int = 0
    """Seed of the main job's run. Its --target decides the shape of rows, and is not looked at."""
    run: Run = Run()
    save_results: Annotated[str | None, FILE] = None
    """Also write the results to this JSON file."""
    save_policy: Annotated[str | None, FILE] = None
    """Also write the policy to this JSON file."""


def job(config: Config) -> None:
    """The whole run."""
    check_options(config)
    training, transfer, run = config.training, config.transfer, config.run
    course = parse_training(training)
    setting = load_setting(transfer, run=run)
    with arguments():
        course.check()
    way, policy = training.trainer.way, training.policy_options.policy
    folder = open_folder(config, run, f"runs/policies/{transfer.source}-{policy}-{way}", free=FREE)
    embed = meta_embedding(setting, folder, seed=config.meta_seed, meta_run=transfer.meta_run)
    composed = [game.problems for game in course.games]
    forms = embedded_forms(setting, embed, training.material, composed, seed=run.seed)
    with arguments():
        for bank in forms:
            course.first_metas(bank, seed=run.seed)
    trained = train(course, folder, forms, seed=run.seed)
    curves = play_all(course, folder, trained, forms, seed=run.seed)

    rows, paired = training_rows(course, transfer.source, curves, trained.records)
    seconds = trained.records[-1]["seconds"]
    about = {"command": command(), "source": transfer.source, "way": way, "kinds": training.problem_options.kinds,
             "seconds_of_training": seconds,
             "held_out": [row for row in paired if row["b"]["strategy"] == BASELINE]}  # fmt: skip
    rules = tuple(course.arms)
    for place in (folder.path / "policy.json", *([Path(config.save_policy)] if config.save_policy else [])):
        policies.save(place, course.chooser.network, trained.params, about, rules=rules,
                      plan=1 if rules else course.plan)  # fmt: skip
    for place in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(place, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=flat(config), rows=rows, paired=paired)  # fmt: skip
    title = f"{way} on {transfer.source}"
    training_picture(title, trained.records, curves, folder.path / "results.png")
    problems = training.schedule.report_problems
    print("\n" + training_text(f"{title}, {problems} held-out problems of each kind: area in %, mean and 95 %", curves))
    print(f"{seconds / 60:.1f} minutes of training; policy: {folder.path / 'policy.json'}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
