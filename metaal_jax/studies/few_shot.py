"""The few-shot benchmark: one learner, meta-trained on a set's training classes, tested on tasks of other classes."""

import contextlib
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from metaal_jax import checkpoint, learners, parallel, tasks
from metaal_jax.base import Metrics, PyTree
from metaal_jax.losses import accuracy
from metaal_jax.metrics import Interval, interval
from metaal_jax.outer import MetaState, outer_loop
from metaal_jax.studies.few_shot_data import Benchmark, Sources, TaskData
from metaal_jax.studies.few_shot_presets import (
    PIECES,
    PUBLISHED,
    Preset,
    preset_learner,
    preset_model,
    preset_optimizer,
)
from metaal_jax.studies.folder import Records, RunFolder, round_to
from metaal_jax.studies.meta_training import piece_path, train_in_pieces
from metaal_jax.studies.usage import UsageError, need


class Trial(NamedTuple):
    """A learner's training and test, ready to run.

    Attributes:
      state: the outer loop's fresh state.
      pieces, each: pieces of the training, and the steps of each.
      run: `(state, data) -> (state, metrics [each])`.
      judge: `(key, meta, data, *, tasks) -> {metric: accuracy [tasks]}`.
      chosen_by: the metric that the checkpoint is chosen by.
      validation_key, test_key: what tasks are drawn with.
    """

    state: MetaState
    pieces: int
    each: int
    run: Callable[[MetaState, Any], tuple[MetaState, Metrics]]
    judge: Callable[..., Metrics]
    chosen_by: str
    validation_key: Array
    test_key: Array


class Found(NamedTuple):
    """What a trial found.

    Attributes:
      records: validation along the training.
      step: outer steps of the checkpoint that validation chose.
      meta: its meta-parameters.
      accuracy: on the test tasks, by metric.
    """

    records: Records
    step: int
    meta: PyTree
    accuracy: dict[str, Interval]


def spread(wanted: int | None, tasks: int) -> int:
    """How many devices share the tasks of a step; on a CPU every core becomes one, if JAX has not started yet.

    Args:
      wanted: devices; None for as many as divide the tasks.
      tasks: of a step.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted or cores)  # type: ignore[no-untyped-call]
    have = jax.local_device_count()
    if wanted is None:
        return math.gcd(have, tasks)
    if not 1 <= wanted <= have or tasks % wanted:
        raise UsageError(f"--devices {wanted}: there are {have}, and {tasks} tasks must divide among them")
    return wanted


def make_trial(
    learner: str, preset: Preset, benchmark: Benchmark, sources: Sources, data: TaskData, *, seed: int, devices: int,
    init: str | None = None,
) -> Trial:  # fmt: skip
    """A learner's training and test.

    Args:
      learner: its name.
      preset: its settings.
      benchmark: the test's ways, shots and queries.
      sources: weights of the sources.
      data: what tasks are drawn from.
      seed: decides everything that is drawn.
      devices: that share the tasks of a step.
      init: the run folder whose `meta_parameters` it starts from, those of any learner with the same body.
    """
    init_key, run_key, validation_key, test_key = jax.random.split(jax.random.key(seed), 4)
    like = data.parts[0].train.x[:1]
    trained = preset_learner(learner, preset_model(preset, data.classes), preset, testing=False)
    model = preset_model(preset, benchmark.ways)
    tester = preset_learner(learner, model, preset, testing=True)
    samplers: list[Any] = [
        tasks.minibatches(rows=preset.train_queries, rotations=part.rotations)
        if learner == "supervised"
        else tasks.few_shot(ways=data.ways, shots=data.shots, queries=preset.train_queries, rotations=part.rotations)
        for part in data.parts
    ]
    outer = outer_loop(
        trained, tasks.mixture(samplers, sources.weights), optimizer=preset_optimizer(preset), tasks=preset.tasks,
        chunk=1 if jax.default_backend() == "cpu" else None, axis_name=parallel.AXIS if devices > 1 else None,
    )  # fmt: skip
    state = jax.jit(outer.init)(init_key, like)
    if init is not None:
        state = _started(init, state)
    fresh = jax.jit(tester.init)(init_key, like)
    pieces = min(PIECES, preset.steps)
    each = preset.steps // pieces
    if devices > 1:
        run = parallel.outer_run(outer, steps=each, devices=jax.local_devices()[:devices])
    else:
        run = jax.jit(functools.partial(outer.run, steps=each))
    by_batch = _normalises_by_batch(model) and preset.statistics == "batch"
    return Trial(
        state=state,
        pieces=pieces,
        each=each,
        run=lambda state, train: run(run_key, state, train),
        judge=_make_judge(benchmark, tester, model, fresh),
        chosen_by="transductive" if by_batch else "non_transductive",
        validation_key=validation_key,
        test_key=test_key,
    )


def _make_judge(benchmark: Benchmark, learner: Any, model: Any, fresh: PyTree) -> Callable[..., Metrics]:
    """`(key, meta, data, *, tasks) -> {metric: accuracy [tasks]}` on tasks of the test's ways and shots."""
    sampler = tasks.few_shot(ways=benchmark.ways, shots=benchmark.shots, queries=benchmark.queries)

    def one(key: Array, meta: PyTree, part: tasks.ClassData) -> Metrics:
        task_key, adapt_key = jax.random.split(key)
        task = sampler(task_key, part)
        params = learner.adapt(adapt_key, learners.transfer(meta, fresh), task.support)

        def judged(params: PyTree) -> Array:
            logits, _ = model.apply(params, task.query.x, task.query.weight)
            return accuracy(logits, task.query.y, task.query.weight)

        if not _normalises_by_batch(model):
            return {"non_transductive": judged(params)}
        free = {name: leaf for name, leaf in params.items() if name != "batch_stats"}
        fixed = learners.support_statistics(model, params, task.support)
        return {"transductive": judged(free), "non_transductive": judged(fixed)}

    def judge(key: Array, meta: PyTree, part: tasks.ClassData, *, tasks: int) -> Metrics:
        # One at a time suits a CPU's cache.
        batch_size = None if jax.default_backend() == "cpu" else 50
        found: Metrics = jax.lax.map(
            lambda key: one(key, meta, part), jax.random.split(key, tasks), batch_size=batch_size
        )
        return found

    return judge


def _normalises_by_batch(model: Any) -> bool:
    """Whether predictions can depend on the rows beside them."""
    return bool(getattr(model, "normalises_by_batch", False))


def _started(path: str, state: MetaState) -> MetaState:
    """The outer loop's fresh state with another run's body."""
    folder = Path(path)
    folder = folder / "meta_parameters" if checkpoint.exists(folder / "meta_parameters") else folder
    try:
        return state._replace(meta=learners.transfer(jax.device_put(checkpoint.load(folder)), state.meta))
    except ValueError as error:
        raise UsageError(f"--init {path}: {error}") from error


def run_trial(trial: Trial, benchmark: Benchmark, data: TaskData, folder: RunFolder, *, about: dict[str, Any]) -> Found:
    """Trains, chooses the checkpoint by validation tasks, tests it, and keeps its parameters in the run folder.

    Args:
      trial: what is run.
      benchmark: numbers of tasks.
      data: what tasks are drawn from.
      folder: the run.
      about: kept beside the parameters.
    """
    validate = jax.jit(functools.partial(trial.judge, tasks=benchmark.validation_tasks))

    def judge_all(meta: PyTree, held_out: Any) -> dict[str, Any]:
        found = [validate(trial.validation_key, meta, part) for part in held_out]
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

    state, records = train_in_pieces(
        folder, trial.state, pieces=trial.pieces, each=trial.each,
        load=lambda: (jax.device_put(tuple(part.train for part in data.parts)),
                      jax.device_put([part.validation for part in data.parts])),
        run=trial.run,
        judge=judge_all,
    )  # fmt: skip
    best = int(np.argmax([record[f"validation_{trial.chosen_by}"] for record in records]))
    step = (best + 1) * trial.each
    meta = jax.device_put(checkpoint.restore(piece_path(folder, best), state)).meta
    checkpoint.save(folder.path / "meta_parameters", meta, config=about)

    def compute() -> Records:
        test = jax.jit(functools.partial(trial.judge, tasks=benchmark.test_tasks))
        held = jax.device_get(test(trial.test_key, meta, data.test))
        return [{"series": "test", "at": step, "task": i, **{name: round_to(held[name][i]) for name in held}}
                for i in range(benchmark.test_tasks)]  # fmt: skip

    judged = folder.step("test", compute)
    metrics = sorted(set(judged[0]) - {"series", "at", "task"}, reverse=True)
    accuracies = {name: interval(np.array([record[name] for record in judged])) for name in metrics}
    return Found(records, step, meta, accuracies)


def published_of(learner: str, benchmark: Benchmark, sources: Sources) -> dict[str, float]:
    """The papers' figures for this learner, set and tasks, by metric, where it is trained on that set alone."""
    if sources.names != (sources.target,):
        return {}
    task = (benchmark.ways, benchmark.shots)
    return {metric: figures[task] for (data, name, metric), figures in PUBLISHED.items()
            if (data, name) == (sources.target, learner) and task in figures}  # fmt: skip


def result_rows(learner: str, benchmark: Benchmark, sources: Sources, found: Found) -> Records:
    """Accuracies on the test tasks, and the papers' beside them, in the results' form."""
    published = published_of(learner, benchmark, sources)
    return [
        {"learner": learner, "source": "+".join(sources.names), "target": sources.target, "metric": f"accuracy_{name}",
         "ways": benchmark.ways, "shots": benchmark.shots, "mean": round(value.mean, 5), "low": round(value.low, 5),
         "high": round(value.high, 5), "tasks": benchmark.test_tasks, "step": found.step,
         **({"published": published[name]} if name in published else {})}
        for name, value in found.accuracy.items()
    ]  # fmt: skip


def picture(found: Found, path: Path, *, title: str) -> None:
    """Validation accuracy along the training, and where the test ended. Needs the extra `experiments`."""
    need("matplotlib", extra="experiments")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8))
    axis = figure.subplots()
    for number, (name, value) in enumerate(found.accuracy.items()):
        at = [record["at"] for record in found.records]
        axis.plot(at, [100 * record[f"validation_{name}"] for record in found.records], color=f"C{number}",
                  label=f"validation, {name.replace('_', '-')}")  # fmt: skip
        axis.axhline(100 * value.mean, color=f"C{number}", linestyle="--", linewidth=1,
                     label=f"test, {100 * value.mean:.1f} %")  # fmt: skip
    axis.set_xlabel("outer steps")
    axis.set_ylabel("accuracy, %")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
