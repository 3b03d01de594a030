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

Figures and times: experiments/results/few_shot/ and the README.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tyro

from few_shot_presets import (
    ANY_WAYS,
    LEARNERS,
    PUBLISHED,
    UNREAD,
    Preset,
    make_learner,
    make_model,
    make_optimizer,
    preset_of,
)
from metaal_jax import checkpoint, data, learners, parallel, tasks
from metaal_jax.base import Learner
from metaal_jax.losses import accuracy
from metaal_jax.metrics import interval
from metaal_jax.outer import outer_loop
from metaal_jax.studies.folder import RunFolder, round_to
from metaal_jax.studies.meta_training import piece_path, train_in_pieces
from metaal_jax.studies.options import FILE, above, at_least, check_options, numbers_of, parse
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.usage import UsageError, arguments, command, main, names

# Bertinetto et al.'s split of CIFAR-100, by the classes' numbers (beaver, beetle, ...; baby, bed, ...).
CIFAR_FS = {
    "validation": [4, 7, 14, 15, 19, 26, 27, 32, 40, 47, 48, 55, 71, 73, 87, 89],
    "test": [2, 5, 8, 21, 34, 42, 46, 58, 60, 62, 69, 70, 77, 83, 84, 86, 94, 95, 98, 99],
}
SHAPES = {"omniglot": (28, 28, 1), "cifar_fs": (32, 32, 3)}
FREE = frozenset({"out", "resume", "data_dir", "save_results"})
PIECES = 20


@dataclass(frozen=True)
class Config:
    """Meta-trains a learner on few-shot tasks and tests it on tasks of new classes."""

    learner: Annotated[str, tyro.conf.arg(help="One of: " + ", ".join(LEARNERS))] = "maml"
    train: str = "omniglot"
    """Comma-separated sources: omniglot, cifar_fs (their training classes) or TFDS image sets (all their classes)."""
    weights: str | None = None
    """Comma-separated weights with which tasks are drawn from the sources; by default even ones."""
    test: str | None = None
    """What to test on: omniglot, cifar_fs (their test classes) or a TFDS image set; by default the first source."""
    ways: int = 5
    """Classes of a test task."""
    shots: int = 1
    """Labelled rows of each class."""
    queries: int = 15
    """Test rows of each class."""
    test_tasks: int = 600
    """Test tasks."""
    validation_tasks: int = 200
    """Validation tasks after each twentieth of the training."""
    preset: Literal["budget", "paper"] = "budget"
    """budget: a small network that two cores train in at most 20 minutes. paper: the paper's own, for a GPU."""
    filters: int | None = None
    """Instead of the preset's: channels of the network's blocks."""
    norm: Literal["batch", "group", "none"] | None = None
    """Instead of the preset's: norm layers."""
    statistics: Literal["batch", "support"] | None = None
    """Instead of the preset's: what batch norm normalises query rows by in meta-training."""
    train_ways: int | None = None
    """Instead of the preset's: classes of a meta-training task."""
    train_shots: int | None = None
    """Instead of the preset's: labelled rows of each class in meta-training."""
    steps: int | None = None
    """Instead of the preset's: outer steps."""
    tasks: int | None = None
    """Instead of the preset's: tasks of an outer step."""
    rate: float | None = None
    """Instead of the preset's: outer learning rate."""
    inner_rate: float | None = None
    """Instead of the preset's: inner learning rate."""
    inner_steps: Annotated[int | None, at_least(0)] = None
    """Instead of the preset's: inner steps in meta-training."""
    proximal: float | None = None
    """Instead of the preset's: pull to the initialisation of implicit_maml."""
    damping: float | None = None
    """Instead of the preset's: what implicit_maml adds to the Hessian when it solves for the gradient."""
    eval_steps: Annotated[int | None, at_least(0)] = None
    """Instead of the preset's: inner steps on test tasks."""
    seed: int = 0
    """Decides everything that is drawn."""
    devices: int | None = None
    """Devices that share the tasks of an outer step; by default as many as divide them. A CPU's cores are devices."""
    init: str | None = None
    """Start from the meta_parameters of another run's folder, of any learner with the same body."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str | None = None
    """Run folder; by default runs/few_shot/TRAIN-TEST-LEARNER-WAYS-SHOTS."""
    resume: bool = False
    """Go on with the run in the folder."""
    save_results: Annotated[str | None, FILE] = None
    """Also write the results to this JSON file."""


class Parts(NamedTuple):
    """The classes of a set for training, validation and test, and whether rotations count as classes in training."""

    train: tasks.ClassData
    validation: tasks.ClassData
    test: tasks.ClassData
    rotations: bool


@functools.cache
def load_parts(name: str, shape: tuple[int, int, int] | None, data_dir: str | None) -> Parts:
    """The parts of a set by name; a plain set has all classes in each, 4/5 and 1/5 of its training rows in two."""
    read = functools.partial(data.load, image_shape=shape, data_dir=data_dir)
    if name not in SHAPES:
        train, test = read(name, "train"), read(name, "test")
        order = np.random.default_rng(0).permutation(len(train.y))
        kept, held = np.split(order, [len(order) * 4 // 5])
        return Parts(
            *(tasks.class_data(train.x[rows], train.y[rows]) for rows in (np.sort(kept), np.sort(held))),
            tasks.class_data(test.x, test.y),
            rotations=False,
        )
    both = [read({"cifar_fs": "cifar100"}.get(name, name), split) for split in ("train", "test")]
    x, y = np.concatenate([part.x for part in both]), np.concatenate([part.y for part in both])
    if name == "omniglot":
        groups = tasks.split_classes(1623, (1100, 100, 423))
    else:
        held = [np.array(CIFAR_FS[part]) for part in ("validation", "test")]
        groups = [np.setdiff1d(np.arange(100), np.concatenate(held)), *held]
    return Parts(*(tasks.class_data(x, y, classes=group) for group in groups), rotations=name == "omniglot")


def settings(config: Config) -> Preset:
    """The preset with what the command line says instead."""
    if names(config.learner, LEARNERS, "learner") != (config.learner,):
        raise UsageError(f"--learner {config.learner!r}: give one name; choose from {', '.join(LEARNERS)}")
    preset = preset_of(config.preset, config.learner, config.train.split(",")[0])
    own = {field.name for field in dataclasses.fields(Preset)} & {field.name for field in dataclasses.fields(Config)}
    given = {name: getattr(config, name) for name in own if getattr(config, name) is not None}
    unread = UNREAD.get(config.learner, ()) + (("filters", "norm") if preset.network == "resnet12" else ())
    for name in sorted(given):
        if name in unread:
            raise UsageError(f"--{name.replace('_', '-')} says nothing to {config.learner} with this network; leave it "
                             "out")  # fmt: skip
    preset = dataclasses.replace(preset, **given)
    # All pieces have as many steps, and the schedules end with the last of them.
    pieces = min(PIECES, max(preset.steps, 1))
    return dataclasses.replace(preset, steps=-(-preset.steps // pieces) * pieces)


def check(config: Config, preset: Preset) -> tuple[tuple[str, ...], list[float]]:
    """Checks what can be checked without data; the sources and their weights."""
    if config.learner not in ANY_WAYS and preset.train_ways not in (None, config.ways):
        raise UsageError(f"--train-ways {preset.train_ways}: the head of {config.learner} is meta-learned for as many "
                         f"classes as test tasks have; leave it out or give --ways {preset.train_ways}")  # fmt: skip
    sources = tuple(part.strip() for part in config.train.split(",") if part.strip())
    if not sources or len(set(sources)) < len(sources):
        raise UsageError(f"--train {config.train!r} is empty or repeats a set")
    weights = [1.0] * len(sources)
    if config.weights is not None:
        weights = numbers_of("--weights", config.weights, of=float, allowed=above(0), like="3,1")
    if len(weights) != len(sources):
        raise UsageError(f"--weights {config.weights!r}: {len(sources)} sources need as many weights above 0")
    same = [{"cifar_fs": "cifar100"}.get(name, name) for name in {*sources, config.test or sources[0]}]
    if len(set(same)) < len(same):
        raise UsageError("cifar_fs is cifar100: one would be trained on what the other is tested on; give one")
    if config.learner == "supervised" and len(sources) > 1:
        raise UsageError("--learner supervised trains on the classes of a single source; give one in --train")
    return sources, weights


def spread(config: Config, preset: Preset) -> int:
    """How many devices share the tasks of a step; on a CPU every core becomes one, if JAX has not started yet."""
    wanted = config.devices
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted or cores)
    have = jax.local_device_count()
    if wanted is None:
        return math.gcd(have, preset.tasks)
    if not 1 <= wanted <= have or preset.tasks % wanted:
        raise UsageError(f"--devices {wanted}: there are {have}, and {preset.tasks} tasks must divide among them")
    return wanted


def make_judge(config: Config, learner: Learner, model: Any, fresh: Any) -> Callable:
    """`(key, meta, data, *, tasks) -> {metric: accuracy [tasks]}` on tasks of the test's ways and shots."""
    sampler = tasks.few_shot(ways=config.ways, shots=config.shots, queries=config.queries)

    def one(key: jax.Array, meta: Any, part: tasks.ClassData) -> dict[str, jax.Array]:
        task_key, adapt_key = jax.random.split(key)
        task = sampler(task_key, part)
        params = learner.adapt(adapt_key, learners.transfer(meta, fresh), task.support)

        def judged(params: Any) -> jax.Array:
            logits, _ = model.apply(params, task.query.x, task.query.weight)
            return accuracy(logits, task.query.y, task.query.weight)

        if not normalises_by_batch(model):
            return {"non_transductive": judged(params)}
        free = {name: leaf for name, leaf in params.items() if name != "batch_stats"}
        fixed = learners.support_statistics(model, params, task.support)
        return {"transductive": judged(free), "non_transductive": judged(fixed)}

    def judge(key: jax.Array, meta: Any, part: tasks.ClassData, *, tasks: int) -> dict[str, jax.Array]:
        # One at a time suits a CPU's cache.
        size = 1 if jax.default_backend() == "cpu" else 50
        batch_size = None if size == 1 else size
        return jax.lax.map(lambda key: one(key, meta, part), jax.random.split(key, tasks), batch_size=batch_size)

    return judge


def normalises_by_batch(model: nn.Module) -> bool:
    """Whether predictions can depend on the rows beside them."""
    return getattr(model, "normalises_by_batch", False)


def job(config: Config) -> None:
    """The whole run."""
    check_options(config)
    preset = settings(config)
    sources, weights = check(config, preset)
    devices = spread(config, preset)
    config = dataclasses.replace(config, devices=devices)  # the order of summation is part of a run
    target = config.test or sources[0]
    shape = next((SHAPES[name] for name in (target, *sources) if name in SHAPES), None)
    parts = [load_parts(name, shape, config.data_dir) for name in sources]
    loaded = load_parts(target, shape, config.data_dir)
    test = loaded.test
    shapes = {name: part.test.x.shape[1:] for name, part in zip((*sources, target), (*parts, loaded), strict=True)}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"rows of one shape wanted, got {shapes}; give sets of one kind, or omniglot or cifar_fs "
                         "among them, whose shape all others then take")  # fmt: skip
    ways = config.ways if preset.train_ways is None else preset.train_ways
    shots = config.shots if preset.train_shots is None else preset.train_shots
    supervised = config.learner == "supervised"
    turns = [4 if part.rotations else 1 for part in parts]
    classes = parts[0].train.count.shape[0] * turns[0] if supervised else ways
    least = min(part.train.count.shape[0] * turn for part, turn in zip(parts, turns, strict=True))
    held = min(part.validation.count.shape[0] for part in parts)
    if not supervised and ways > least:
        raise UsageError(f"meta-training tasks of {ways} ways wanted, a source has {least} classes; give --train-ways "
                         f"{least} or less")  # fmt: skip
    if config.ways > min(held, test.count.shape[0]):
        raise UsageError(f"--ways {config.ways} wanted, {target!r} has {test.count.shape[0]} test classes and a source "
                         f"{held} for validation; give --ways {min(held, test.count.shape[0])} or less")  # fmt: skip
    held_rows = [part.validation.rows.shape[1] for part in parts] + [test.rows.shape[1]]
    train_rows = [part.train.rows.shape[1] for part in parts]
    for needed, have, options in (
        (config.shots + config.queries, min(held_rows), "--shots or --queries"),
        (0 if supervised else shots + preset.train_queries, min(train_rows), "--train-shots"),
    ):
        if needed > have:
            raise UsageError(f"tasks of {needed} rows a class wanted, the largest class of a set has {have}; give "
                             f"fewer {options}")  # fmt: skip
    pieces = min(PIECES, preset.steps)
    each = preset.steps // pieces
    init_key, run_key, validation_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    like = parts[0].train.x[:1]
    with arguments():
        learner = make_learner(config.learner, make_model(preset, classes), preset, testing=False)
        model = make_model(preset, config.ways)
        tester = make_learner(config.learner, model, preset, testing=True)
        draw = [
            tasks.minibatches(rows=preset.train_queries, rotations=part.rotations)
            if supervised
            else tasks.few_shot(ways=ways, shots=shots, queries=preset.train_queries, rotations=part.rotations)
            for part in parts
        ]
        outer = outer_loop(
            learner, tasks.mixture(draw, weights), optimizer=make_optimizer(preset), tasks=preset.tasks,
            chunk=1 if jax.default_backend() == "cpu" else None, axis_name=parallel.AXIS if devices > 1 else None,
        )  # fmt: skip
        state = jax.jit(outer.init)(init_key, like)
        if config.init is not None:
            state = started(config.init, state)
        fresh = jax.jit(tester.init)(init_key, like)
    out = config.out or f"runs/few_shot/{'+'.join(sources)}-{target}-{config.learner}-{config.ways}-{config.shots}"
    folder = RunFolder(out, config, resume=config.resume, free=FREE)
    judge = make_judge(config, tester, model, fresh)
    if devices > 1:
        run = parallel.outer_run(outer, steps=each, devices=jax.local_devices()[:devices])
    else:
        run = jax.jit(functools.partial(outer.run, steps=each))
    validate = jax.jit(functools.partial(judge, tasks=config.validation_tasks))

    def judge_all(meta: Any, held_out: tuple) -> dict[str, np.ndarray]:
        found = [validate(validation_key, meta, part) for part in held_out]
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

    state, records = train_in_pieces(
        folder, state, pieces=pieces, each=each,
        load=lambda: (jax.device_put(tuple(p.train for p in parts)), jax.device_put([p.validation for p in parts])),
        run=lambda state, train: run(run_key, state, train),
        judge=judge_all,
    )  # fmt: skip
    chosen_by = "transductive" if normalises_by_batch(model) and preset.statistics == "batch" else "non_transductive"
    best = int(np.argmax([record[f"validation_{chosen_by}"] for record in records]))
    meta = jax.device_put(checkpoint.restore(piece_path(folder, best), state)).meta
    checkpoint.save(folder.path / "meta_parameters", meta, config=dataclasses.asdict(config))

    def compute() -> list[dict]:
        held = jax.device_get(jax.jit(functools.partial(judge, tasks=config.test_tasks))(test_key, meta, test))
        return [{"series": "test", "at": (best + 1) * each, "task": i,
                 **{name: round_to(values[i]) for name, values in held.items()}}
                for i in range(config.test_tasks)]  # fmt: skip

    judged = folder.step("test", compute)
    metrics = sorted(set(judged[0]) - {"series", "at", "task"}, reverse=True)
    found = {name: interval(np.array([record[name] for record in judged])) for name in metrics}
    published = {
        name: PUBLISHED.get((target, config.learner, name), {}).get((config.ways, config.shots))
        for name in metrics
        if sources == (target,)
    }
    rows = [
        {"learner": config.learner, "source": "+".join(sources), "target": target, "metric": f"accuracy_{name}",
         "ways": config.ways, "shots": config.shots, "mean": round(value.mean, 5), "low": round(value.low, 5),
         "high": round(value.high, 5), "tasks": config.test_tasks, "step": (best + 1) * each,
         **({"published": published[name]} if published.get(name) is not None else {})}
        for name, value in found.items()
    ]  # fmt: skip
    title = f"{config.learner}, {target}, {config.ways}-way {config.shots}-shot"
    paths = [folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])]
    for path in paths:
        write_results(
            path, command=command(), environment=environment(), seconds=folder.seconds(),
            config={**dataclasses.asdict(config), "settings": dataclasses.asdict(preset)}, rows=rows, paired=[],
        )  # fmt: skip
    picture(records, found, metrics, folder.path / "results.png", title)
    print(f"\n{title}: accuracy in %, mean and 95 % interval over {config.test_tasks} tasks")
    for name, value in found.items():
        beside = f" (published: {published[name]})" if published.get(name) is not None else ""
        print(f"  {name.replace('_', '-'):18} {100 * value.mean:.2f} ± {50 * (value.high - value.low):.2f}{beside}")
    print(f"checkpoint of step {(best + 1) * each}, {folder.seconds() / 60:.1f} minutes; run folder: {folder.path}")


def started(path: str, state: Any) -> Any:
    """The outer loop's fresh state with another run's body."""
    folder = Path(path)
    folder = folder / "meta_parameters" if checkpoint.exists(folder / "meta_parameters") else folder
    try:
        return state._replace(meta=learners.transfer(jax.device_put(checkpoint.load(folder)), state.meta))
    except ValueError as error:
        raise UsageError(f"--init {path}: {error}") from error


def picture(records: list[dict], found: dict, metrics: list[str], path: Path, title: str) -> None:
    """Validation accuracy along the training, and where the test ended."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.8))
    for number, name in enumerate(metrics):
        at = [record["at"] for record in records]
        axis.plot(at, [100 * record[f"validation_{name}"] for record in records], color=f"C{number}",
                  label=f"validation, {name.replace('_', '-')}")  # fmt: skip
        value = found[name]
        axis.axhline(100 * value.mean, color=f"C{number}", linestyle="--", linewidth=1,
                     label=f"test, {100 * value.mean:.1f} %")  # fmt: skip
    axis.set_xlabel("outer steps")
    axis.set_ylabel("accuracy, %")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
