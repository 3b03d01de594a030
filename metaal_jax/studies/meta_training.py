"""Meta-training of the main job: tasks of the source, the outer loop, checkpoints."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from metaal_jax import checkpoint, tasks
from metaal_jax.base import PyTree
from metaal_jax.outer import MetaState, OuterLoop, outer_loop
from metaal_jax.studies.arms import make_model
from metaal_jax.studies.folder import RunFolder, read_object, round_to
from metaal_jax.studies.meta_learners import OWN_HEAD, make_meta_learner
from metaal_jax.studies.usage import UsageError


def draw_shapes(key: jax.Array, images: np.ndarray, classes: int, label: str) -> tasks.ClassData:
    """`classes` shape classes of 20 examples, each drawn from a random image; those that show nothing are left out."""
    at_once = min(500, classes)
    draw = jax.jit(jax.vmap(tasks.shape_exemplars(examples=20, size=images.shape[1])))
    drawn = []
    for part in tqdm(range(0, classes, at_once), desc=label):
        pick_key, draw_key = jax.random.split(jax.random.fold_in(key, part))
        row = jax.random.randint(pick_key, (at_once,), 0, len(images))
        x, ink = draw(jax.random.split(draw_key, at_once), images[np.asarray(row)])
        drawn.append(np.asarray(x)[np.asarray((ink > 0.05) & (ink < 0.5))])
    x = np.concatenate(drawn)
    y = np.repeat(np.arange(len(x)), x.shape[1])
    return jax.device_put(tasks.class_data(x.reshape(-1, *x.shape[2:]), y))


class MetaJob(NamedTuple):
    """Meta-training, checked and ready to run: the outer loop, the pieces it runs in and the steps of each."""

    outer: OuterLoop
    pieces: int
    each: int


def make_meta_job(config: Any, setting: Any, name: str = "maml") -> MetaJob:
    """The outer loop of this config and meta-learner; raises `UsageError` for options that do not go together."""
    images = len(setting.shape) == 3
    rotations = images and "classes" in setting.kinds
    parts = (setting.train_source.y, setting.validation_source.y)
    own = min(len(np.unique(y)) for y in parts) * (4 if rotations else 1)
    available = min(own if kind == "classes" else config.shape_classes // 2 for kind in setting.kinds)
    own_head = name in OWN_HEAD
    ways = setting.classes if own_head else config.ways or min(20, available)
    if ways > available:
        raise UsageError(f"--ways {ways} wanted, {config.source!r} has {available} classes"
                         f"{' with rotations' if rotations else ''}; "
                         + (f"leave {name} out" if own_head else f"give --ways {available} or less"))  # fmt: skip
    steps = config.meta_steps or (2000 if images and min(setting.shape[:2]) < 16 else 15000)
    pieces = max(1, min(20, steps // 50))
    each = -(-steps // pieces)
    learner = make_meta_learner(name, make_model(ways, setting.shape, config), config, testing=False)
    labels, queries = max(config.meta_labels, ways), config.meta_queries
    samplers = [
        tasks.growing(
            ways=ways,
            labels=labels,
            smallest=0 if own_head else ways,
            queries=queries,
            unseen=own_head,
            rotations=rotations and kind == "classes",
        )
        for kind in setting.kinds
    ]
    sampler = tasks.mixture(samplers, [1.0] * len(samplers))
    # Reptile's difference is a step by itself: a rate of 1 goes all the way to the adapted parameters.
    rate = optax.cosine_decay_schedule(1.0 if name == "reptile" else config.meta_rate, each * pieces)
    optimizer = optax.sgd(rate) if name == "reptile" else optax.adam(rate)
    return MetaJob(outer_loop(learner, sampler, optimizer=optimizer, tasks=config.meta_tasks, chunk=1), pieces, each)


def meta_data(config: Any, setting: Any, key: jax.Array) -> tuple[tuple, tuple]:
    """What each kind of task is drawn from, for training and for validation."""
    keys = jax.random.split(key)
    found = []
    for part, part_key, classes in (
        (setting.train_source, keys[0], config.shape_classes),
        (setting.validation_source, keys[1], 500),
    ):
        by_kind = {
            "classes": lambda part=part: jax.device_put(tasks.class_data(part.x, part.y)),
            "shapes": lambda part=part, key=part_key, n=classes: draw_shapes(key, part.x, n, "drawing shapes"),
        }
        found.append(tuple(by_kind[kind]() for kind in setting.kinds))
    return found[0], found[1]


def piece_path(folder: RunFolder, piece: int, name: str = "") -> Path:
    """Where the outer loop's state after a piece of the training (of the run's only learner, or by name) is kept."""
    return folder.path / "checkpoints" / f"{name}{'_' if name else ''}piece_{piece:02d}"


def train_in_pieces(
    folder: RunFolder, state: MetaState, *, pieces: int, each: int, load: Callable[[], tuple], run: Callable,
    judge: Callable, name: str = "",
) -> tuple[MetaState, list[dict]]:  # fmt: skip
    """Meta-trains in pieces, each one step of the run folder with a checkpoint; goes on after the last one kept.

    Args:
      folder: the run.
      state: the outer loop's fresh state.
      pieces, each: number of pieces and outer steps of each.
      load: gives the data of training and validation; called only if something is left to train.
      run: `(state, training data) -> (state, metrics [each])`.
      judge: `(meta, validation data) -> metrics [tasks]`.
      name: of the learner, where a run trains several.

    Returns:
      The last state and the records of all pieces.
    """
    step = f"meta-{name}" if name else "meta"
    kept = [folder.done(f"{step}-{i:02d}") and checkpoint.exists(piece_path(folder, i, name)) for i in range(pieces)]
    last = (kept.index(False) if False in kept else pieces) - 1
    if last >= 0:
        state = jax.device_put(checkpoint.restore(piece_path(folder, last, name), state))
    if last < pieces - 1:
        train, held_out = load()
    records = []
    for piece in tqdm(range(pieces), desc=f"meta-training {name}".rstrip()):

        def compute(piece: int = piece) -> list[dict]:
            nonlocal state
            state, trained = run(state, train)
            judged = judge(state.meta, held_out)
            checkpoint.save(piece_path(folder, piece, name), state)
            values = {f"train_{_called(k)}": round_to(v.mean()) for k, v in trained.items()}
            values |= {f"validation_{_called(k)}": round_to(v.mean()) for k, v in judged.items()}
            return [{"series": f"meta/{name}" if name else "meta", "at": (piece + 1) * each, **values}]

        for record in folder.step(f"{step}-{piece:02d}", compute, again=piece > last):
            for metric in sorted(set(record) - {"series", "at"}):
                folder.board(f"{record['series']}/{metric}", record[metric], record["at"])
            records.append(record)
    return state, records


def _called(metric: str) -> str:
    """A metric as folders and boards call it: the learners here are scored by their accuracy."""
    return "accuracy" if metric == "score" else metric


def meta_train(
    config: Any, setting: Any, meta_job: MetaJob, folder: RunFolder, key: jax.Array, *, name: str = "maml",
    load: Callable[[jax.Array], tuple] | None = None,
):  # fmt: skip
    """Meta-parameters, trained in pieces that are checkpointed one by one.

    `load(key)` gives the data, by default `meta_data`; every learner is given the same key.
    """
    outer, pieces, each = meta_job
    data_key, init_key, run_key, validation_key = jax.random.split(key, 4)
    like = jnp.zeros((1, *setting.shape), setting.train_source.x.dtype)
    state = jax.jit(outer.init)(init_key, like)
    run = jax.jit(functools.partial(outer.run, steps=each))
    judge = jax.jit(functools.partial(outer.evaluate, tasks=50))
    state, _ = train_in_pieces(
        folder, state, pieces=pieces, each=each,
        load=lambda: load(data_key) if load else meta_data(config, setting, data_key),
        run=lambda state, train: run(run_key, state, train),
        judge=lambda meta, held_out: judge(validation_key, meta, held_out),
        name="" if name == "maml" else name,
    )  # fmt: skip
    config = {"learner": name, **dataclasses.asdict(config)}
    checkpoint.save(folder.path / kept_name(name), state.meta, config=config)
    return state.meta


def kept_name(name: str) -> str:
    """The part of a run folder that holds a learner's meta-parameters."""
    return "meta_parameters" if name == "maml" else f"meta_parameters_{name}"


def meta_restore(config: Any, setting: Any, meta_job: MetaJob, *, name: str = "maml") -> PyTree:
    """The meta-parameters that the finished run in the folder `config.meta_run` keeps.

    Raises:
      UsageError: where the folder has none for this learner, or is a run of another source, target or seed.
    """
    path = Path(config.meta_run)
    if not checkpoint.exists(path / kept_name(name)):
        raise UsageError(f"{path} holds no finished meta-training of {name}; run python experiments/meta_active.py "
                         f"--source {config.source} --target {config.target} --learners {name} first, or leave "
                         "--meta-run out")  # fmt: skip
    held = read_object(path / "config.json", "and the folder with it, or give another --meta-run")
    for field in ("source", "target", "seed"):
        if held.get(field) != getattr(config, field):
            raise UsageError(
                f"{path} is a run with {field}={held.get(field)!r}, asked for is {getattr(config, field)!r}"
            )
    like = jnp.zeros((1, *setting.shape), setting.train_source.x.dtype)
    meta = jax.eval_shape(meta_job.outer.init, jax.random.key(config.seed), like).meta
    return checkpoint.restore(path / kept_name(name), meta)
