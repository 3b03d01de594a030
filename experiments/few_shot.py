"""The field's own benchmark: meta-train one learner on a set's training classes, test it on tasks of other classes.

Claim: every learner of the family, each a few lines on shared parts, learns to tell new characters apart from one
drawing each, within 20 minutes on two cores.

    python experiments/few_shot.py --learner maml                       # Omniglot, 5-way 1-shot
    python experiments/few_shot.py --learner protonet --ways 20
    python experiments/few_shot.py --learner metaoptnet --train cifar_fs --preset paper --shots 5      # for a GPU
    python experiments/few_shot.py --learner r2d2 --train omniglot,mnist --weights 3,1 --test kmnist   # several sources

`omniglot` is 1,100 classes and their rotations for training, 100 for validation and 423 for the test; `cifar_fs` is
CIFAR-100 in 64, 16 and 20 classes. Any other TFDS image set can stand beside them as a source, or be what is tested on:
all of its classes are then in training, a fifth of its training rows is for validation, and its test rows for the test.
Validation tasks choose the checkpoint; nothing looks at the test rows before. Where a network normalises by the
batch, accuracy is given twice: with the statistics of the query rows (transductive: rows of a task are judged together)
and with those of the labelled rows alone.

Expected on Omniglot, 5-way 1-shot: 98.1 % for maml (transductive; else 97.1) in 16 minutes on two CPU cores, 98.8 for
protonet in 11, 98.3 for r2d2 in 12. All figures: experiments/results/few_shot/ and the README.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from metaal_jax.studies.few_shot import make_trial, picture, published_of, result_rows, run_trial, spread
from metaal_jax.studies.few_shot_data import Benchmark, load_tasks, sources_of
from metaal_jax.studies.few_shot_presets import LEARNERS, Instead, settings_of
from metaal_jax.studies.groups import Run, open_folder
from metaal_jax.studies.options import FILE, check_options, flat, parse
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.usage import arguments, command, main


@dataclass(frozen=True)
class Config:
    """Meta-trains a learner on few-shot tasks and tests it on tasks of new classes."""

    learner: Annotated[str, tyro.conf.arg(help="One of: " + ", ".join(LEARNERS))] = "maml"
    benchmark: Benchmark = Benchmark()
    preset: Literal["budget", "paper"] = "budget"
    """budget: a small network that two cores train in at most 20 minutes. paper: the paper's own, for a GPU."""
    instead: Instead = Instead()
    devices: int | None = None
    """Devices that share the tasks of an outer step; by default as many as divide them. A CPU's cores are devices."""
    init: str | None = None
    """Start from the meta_parameters of another run's folder, of any learner with the same body."""
    run: Run = Run()
    save_results: Annotated[str | None, FILE] = None
    """Also write the results to this JSON file."""


def job(config: Config) -> None:
    """The whole run."""
    check_options(config)
    learner, benchmark, run = config.learner, config.benchmark, config.run
    sources = sources_of(benchmark, learner)
    preset = settings_of(config.preset, learner, sources.names[0], config.instead)
    devices = spread(config.devices, preset.tasks)
    config = dataclasses.replace(config, devices=devices)  # the order of summation is part of a run
    data = load_tasks(benchmark, sources, learner, preset, data_dir=run.data_dir)
    with arguments():
        trial = make_trial(learner, preset, benchmark, sources, data, seed=run.seed, devices=devices, init=config.init)
    name = "-".join(["+".join(sources.names), sources.target, learner, str(benchmark.ways), str(benchmark.shots)])
    folder = open_folder(config, run, f"runs/few_shot/{name}")
    found = run_trial(trial, benchmark, data, folder, about=flat(config))
    for path in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(
            path, command=command(), environment=environment(), seconds=folder.seconds(),
            config={**flat(config), "settings": dataclasses.asdict(preset)},
            rows=result_rows(learner, benchmark, sources, found), paired=[],
        )  # fmt: skip
    title = f"{learner}, {sources.target}, {benchmark.ways}-way {benchmark.shots}-shot"
    picture(found, folder.path / "results.png", title=title)
    print(f"\n{title}: accuracy in %, mean and 95 % interval over {benchmark.test_tasks} tasks")
    published = published_of(learner, benchmark, sources)
    for metric, value in found.accuracy.items():
        beside = f" (published: {published[metric]})" if metric in published else ""
        print(f"  {metric.replace('_', '-'):18} {100 * value.mean:.2f} ± {50 * (value.high - value.low):.2f}{beside}")
    print(f"checkpoint of step {found.step}, {folder.seconds() / 60:.1f} minutes; run folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
