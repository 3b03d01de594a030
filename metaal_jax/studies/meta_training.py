"""Meta-training on a source: its tasks, the outer loop in pieces with checkpoints, and what earlier runs keep."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from metaal_jax import checkpoint, tasks
from metaal_jax.base import Metrics, PyTree
from metaal_jax.outer import MetaState, OuterLoop, outer_loop
from metaal_jax.studies.arms import make_model
from metaal_jax.studies.folder import Records, RunFolder, read_object, round_to
from metaal_jax.studies.groups import Learning, MetaTraining
from metaal_jax.studies.meta_learners import OWN_HEAD, make_meta_learner
from metaal_jax.studies.options import flat
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.usage import UsageError, need

MetaData = tuple[tuple[tasks.ClassData, ...], tuple[tasks.ClassData, ...]]


def draw_shapes(key: Array, images: np.ndarray[Any, Any], classes: int, label: str) -> tasks.ClassData:
    """`classes` shape classes of 20 examples, each drawn from a random image; those that show nothing are left out."""
    at_once = min(500, classes)
    draw = jax.jit(jax.vmap(tasks.shape_exemplars(examples=20, size=images.shape[1])))
    drawn = []
    for part in need("tqdm", extra="experiments").tqdm(range(0, classes, at_once), desc=label):
        pick_key, draw_key = jax.random.split(jax.random.fold_in(key, part))
        row = jax.random.randint(pick_key, (at_once,), 0, len(images))
        x, ink = draw(jax.random.split(draw_key, at_once), images[np.asarray(row)])
        drawn.append(np.asarray(x)[np.asarray((ink > 0.05) & (ink < 0.5))])
    x = np.concatenate(drawn)
    y = np.repeat(np.arange(len(x)), x.shape[1])
    found: tasks.ClassData = jax.device_put(tasks.class_data(x.reshape(-1, *x.shape[2:]), y))
    return found


class MetaJob(NamedTuple):
    """The meta-training of one learner, checked and ready to run.

    Attributes:
      name: of the meta-learner.
      outer: the outer loop.
      pieces, each: pieces that it runs in, and the steps of each.
      training: its options.
      about: what decides the parameters, kept beside them.
    """

    name: str
    outer: OuterLoop
    pieces: int
    each: int
    training: MetaTraining
    about: dict[str, Any]


def make_meta_job(
    setting: Setting, name: str = "maml", *, training: MetaTraining = MetaTraining(), learning: Learning = Learning()
) -> MetaJob:
    """The meta-training of a learner by name; raises `UsageError` for options that do not go together."""
    images = len(setting.shape) == 3
    rotations = images and "classes" in setting.kinds
    parts = (setting.train_source.y, setting.validation_source.y)
    own = min(len(np.unique(y)) for y in parts) * (4 if rotations else 1)
    available = min(own if kind == "classes" else training.shape_classes // 2 for kind in setting.kinds)
    own_head = name in OWN_HEAD
    ways = setting.classes if own_head else training.ways or min(20, available)
    if ways > available:
        raise UsageError(f"--ways {ways} wanted, {setting.source!r} has {available} classes"
                         f"{' with rotations' if rotations else ''}; "
                         + (f"leave {name} out" if own_head else f"give --ways {available} or less"))  # fmt: skip
    steps = training.meta_steps or (2000 if images and min(setting.shape[:2]) < 16 else 15000)
    pieces = max(1, min(20, steps // 50))
    each = -(-steps // pieces)
    model = make_model(ways, setting.shape, learning.network)
    learner = make_meta_learner(name, model, learning.adaptation, training=training)
    samplers = [
        tasks.growing(
            ways=ways,
            labels=max(training.meta_labels, ways),
            smallest=0 if own_head else ways,
            queries=training.meta_queries,
            unseen=own_head,
            rotations=rotations and kind == "classes",
        )
        for kind in setting.kinds
    ]
    sampler = tasks.mixture(samplers, [1.0] * len(samplers))
    # Reptile's difference is a step by itself: a rate of 1 goes all the way to the adapted parameters.
    rate = optax.cosine_decay_schedule(1.0 if name == "reptile" else training.meta_rate, each * pieces)
    optimizer = optax.sgd(rate) if name == "reptile" else optax.adam(rate)
    outer = outer_loop(learner, sampler, optimizer=optimizer, tasks=training.meta_tasks, chunk=1)
    about = {"learner": name, "source": setting.source, "target": setting.target, **flat(training), **flat(learning)}
    return MetaJob(name, outer, pieces, each, training, about)


def meta_data(setting: Setting, training: MetaTraining, key: Array) -> MetaData:
    """What each kind of task is drawn from, for training and for validation."""
    keys = jax.random.split(key)

    def drawn(kind: str, part: Any, part_key: Array, shapes: int) -> tasks.ClassData:
        if kind == "shapes":
            return draw_shapes(part_key, part.x, shapes, "drawing shapes")
        found: tasks.ClassData = jax.device_put(tasks.class_data(part.x, part.y))
        return found

    sizes = ((setting.train_source, keys[0], training.shape_classes), (setting.validation_source, keys[1], 500))
    train, held_out = (tuple(drawn(kind, *part) for kind in setting.kinds) for part in sizes)
    return train, held_out


def piece_path(folder: RunFolder, piece: int, name: str = "") -> Path:
    """Where the outer loop's state after a piece of the training (of the run's only learner, or by name) is kept."""
    return folder.path / "checkpoints" / f"{name}{'_' if name else ''}piece_{piece:02d}"


def train_in_pieces(
    folder: RunFolder, state: MetaState, *, pieces: int, each: int, load: Callable[[], tuple[Any, Any]],
    run: Callable[[MetaState, Any], tuple[MetaState, Metrics]], judge: Callable[[PyTree, Any], Metrics], name: str = "",
) -> tuple[MetaState, Records]:  # fmt: skip
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
    progress = need("tqdm", extra="experiments").tqdm
    kept = [folder.done(f"{step}-{i:02d}") and checkpoint.exists(piece_path(folder, i, name)) for i in range(pieces)]
    last = (kept.index(False) if False in kept else pieces) - 1
    if last >= 0:
        state = jax.device_put(checkpoint.restore(piece_path(folder, last, name), state))
    train: Any = None
    held_out: Any = None
    if last < pieces - 1:
        train, held_out = load()
    records: Records = []
    for piece in progress(range(pieces), desc=f"meta-training {name}".rstrip()):

        def compute(piece: int = piece) -> Records:
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
    job: MetaJob, setting: Setting, folder: RunFolder, *, seed: int, load: Callable[[Array], MetaData] | None = None
) -> PyTree:
    """Meta-parameters, trained in pieces that are checkpointed one by one, and kept in the run folder.

    Args:
      job: what is trained.
      setting: the data.
      folder: the run.
      seed: of the run; every learner draws by the same keys.
      load: `key -> data`, by default `meta_data`.
    """
    data_key, init_key, run_key, validation_key = jax.random.split(jax.random.split(jax.random.key(seed))[0], 4)
    state = jax.jit(job.outer.init)(init_key, setting.row())
    run = jax.jit(functools.partial(job.outer.run, steps=job.each))
    judge = jax.jit(functools.partial(job.outer.evaluate, tasks=50))
    state, _ = train_in_pieces(
        folder, state, pieces=job.pieces, each=job.each,
        load=lambda: load(data_key) if load else meta_data(setting, job.training, data_key),
        run=lambda state, train: run(run_key, state, train),
        judge=lambda meta, held_out: judge(validation_key, meta, held_out),
        name="" if job.name == "maml" else job.name,
    )  # fmt: skip
    checkpoint.save(folder.path / kept_name(job.name), state.meta, config={**job.about, "seed": seed})
    return state.meta


def kept_name(name: str) -> str:
    """The part of a run folder that holds a learner's meta-parameters."""
    return "meta_parameters" if name == "maml" else f"meta_parameters_{name}"


def meta_restore(job: MetaJob, setting: Setting, meta_run: str, *, seed: int) -> PyTree:
    """The meta-parameters that the finished run in the folder `meta_run` keeps.

    Raises:
      UsageError: where the folder has none for this learner, or is a run of another source, target or seed.
    """
    path = Path(meta_run)
    if not checkpoint.exists(path / kept_name(job.name)):
        raise UsageError(f"{path} holds no finished meta-training of {job.name}; run python experiments/meta_active.py "
                         f"--source {setting.source} --target {setting.target} --learners {job.name} first, or leave "
                         "--meta-run out")  # fmt: skip
    held = read_object(path / "config.json", "and the folder with it, or give another --meta-run")
    for field, wanted in (("source", setting.source), ("target", setting.target), ("seed", seed)):
        if held.get(field) != wanted:
            raise UsageError(f"{path} is a run with {field}={held.get(field)!r}, asked for is {wanted!r}")
    like = jax.eval_shape(job.outer.init, jax.random.key(seed), setting.row()).meta
    return checkpoint.restore(path / kept_name(job.name), like)


def meta_networks(
    jobs: Mapping[str, MetaJob], setting: Setting, folder: RunFolder, *, seed: int, meta_run: str | None
) -> dict[str, PyTree]:
    """Meta-parameters by learner, those that an earlier run keeps or, without one, trained here on the same data."""
    if meta_run is not None:
        return {name: meta_restore(job, setting, meta_run, seed=seed) for name, job in jobs.items()}
    drawn: list[MetaData] = []
    found = {}
    for name, job in jobs.items():

        def once(key: Array, job: MetaJob = job) -> MetaData:
            if not drawn:
                drawn.append(meta_data(setting, job.training, key))
            return drawn[0]

        found[name] = meta_train(job, setting, folder, seed=seed, load=once)
    return found
