"""The main job: meta-train on a source, then learn actively on a new target, against training from scratch.

Claim: after meta-training on tasks made of CIFAR-10 images, the same network needs a fraction of the labels on MNIST
that it needs from scratch, whichever query strategy is used.

    python experiments/meta_active.py                                   # digits to digits, other classes
    python experiments/meta_active.py --source cifar10 --target mnist
    python experiments/meta_active.py --source omniglot --target mnist

Figures and times: experiments/results/meta_active/ and the table in the README.
"""

import dataclasses
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from metaal_jax import tasks
from metaal_jax.names import listing
from metaal_jax.studies.arms import LEARNERS, Arm, Curves, make_arms, make_run
from metaal_jax.studies.folder import RunFolder, round_to
from metaal_jax.studies.meta_learners import meta_learner_of
from metaal_jax.studies.meta_training import make_meta_job, meta_data, meta_restore, meta_train
from metaal_jax.studies.options import RESULT_FILE, above, at_least, check_options, parse
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.study import Study, pair
from metaal_jax.studies.usage import UsageError, arguments, command, main, names, strategy_names


@dataclass(frozen=True)
class Config:
    """Meta-trains a learner on tasks of a source, then compares learners and query strategies on a target."""

    source: str = "digits"
    """Data set for meta-training: digits, a TFDS image-classification set by name, or a .npz file with x and y."""
    target: str = "digits"
    """Data set for active learning. If it is the source, its classes are split: first half source, rest target."""
    learners: str = "scratch,maml,frozen,logistic"
    """Comma-separated, of: scratch, logistic, frozen (maml's body), maml, fomaml, anil, meta_sgd, reptile,
    implicit_maml, protonet, r2d2, metaoptnet. With +pseudo or +propagation, as in maml+propagation, a learner also
    learns from the pool's unlabelled rows."""
    strategies: Annotated[str, tyro.conf.arg(help=f"Comma-separated, of:\n{listing()}\n")] = (
        "random,entropy,margin,committee,typical"
    )
    budget: int = 100
    """Labels bought in all, the first batch included."""
    batch_size: int = 10
    """Labels bought in one round."""
    initial: Literal["strategy", "random", "typical"] = "strategy"
    """First batch. strategy: random rows for random, typical rows (by the learner's own embedding) for all rules that
    need a model; random or typical: the same kind for every strategy."""
    seeds: int = 16
    """Runs of every arm; run i draws the same problem in all arms."""
    seeds_at_once: int = 4
    """How many of them are vmapped in one call of the compiled program."""
    pool: int | None = None
    """Pool rows; by default 5000, or 60 percent of a smaller training split."""
    test: int = 2000
    """Test rows judged after every round; at the end all rows of the test split are. Fewer where the set has fewer."""
    members: Annotated[int, at_least(2)] = 4
    """Committee members."""

    meta_run: str | None = None
    """Run folder of an earlier run for this source and target, whose meta-learned networks are used. None trains them
    here."""
    tasks: Literal["auto", "classes", "shapes", "both"] = "auto"
    """Tasks of the source. classes: its classes, and their rotations as further classes. shapes: level sets of
    distorted crops of single images, without labels. both: half of the tasks each. auto: shapes for natural images (32
    pixels, colour), both for omniglot, else classes."""
    shape_classes: int = 16000
    """Classes drawn for shapes."""
    ways: int | None = None
    """Classes of a meta-training task; by default 20, or fewer where the source has fewer."""
    meta_steps: int | None = None
    """Outer steps; by default 2000 below 16 pixels, else 15000."""
    meta_tasks: int = 1
    """Tasks of one outer step."""
    meta_labels: int = 80
    """Largest support set of a meta-training task; the smallest is a label a class."""
    meta_queries: int = 6
    """Query rows of each class."""
    meta_rate: float = 3e-3
    """Outer learning rate (Adam), falling to zero along a cosine."""
    inner_steps: Annotated[int, at_least(0)] = 1
    """Inner steps of MAML in meta-training."""
    inner_rate: float = 0.01
    """Inner learning rate (SGD) in meta-training."""
    first_order: bool = False
    """First-order MAML."""

    filters: int = 32
    """Channels of the network's blocks."""
    blocks: int | None = None
    """Blocks of the network; by default 4, or 2 below 16 pixels."""
    norm: Literal["none", "group", "batch"] = "none"
    """Norm layers of the network."""
    adapt_steps: Annotated[int, at_least(0)] = 20
    """Inner steps of the meta-learned network on the target (Adam, from the prototype head)."""
    adapt_rate: float = 1e-2
    """Their learning rate for the last layer."""
    adapt_body_rate: float = 3e-4
    """Their learning rate for the other layers."""
    temperature: Annotated[float, above(0)] = 1.0
    """Factor on the prototype head's logits."""
    own_steps: Annotated[int, at_least(0)] = 5
    """Inner steps of meta_sgd, in meta-training and on the target."""
    own_rate: float = 0.1
    """Inner learning rate (SGD) that meta_sgd starts from, and that of implicit_maml."""
    implicit_steps: Annotated[int, at_least(0)] = 10
    """Inner steps of implicit_maml."""
    proximal: float = 1.0
    """Strength of its pull to the initialisation."""
    reptile_steps: Annotated[int, at_least(0)] = 8
    """Inner steps of Reptile in meta-training (SGD, 10 rows each)."""
    reptile_adapt_steps: Annotated[int, at_least(0)] = 40
    """Its inner steps on the target (all labels)."""
    reptile_rate: float = 0.1
    """Its inner learning rate."""
    pool_rows: int | None = 500
    """Pool rows that +pseudo and +propagation learn from; None for all of them."""
    scratch_steps: Annotated[int, at_least(0)] = 60
    """Steps from scratch (AdamW, all labels in every step)."""
    scratch_rate: float = 1e-3
    """Their learning rate."""
    scratch_decay: float = 3.0
    """Their weight decay."""
    frozen_ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of logistic regression on the frozen, standardised embedding."""
    logistic_ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of logistic regression on pixels from 0 to 1."""
    solver_steps: int = 64
    """Steps of the solver of both."""
    chunk: int = 100
    """Rows predicted at a time. Few stay in a CPU's cache (twice as fast as 1000); a GPU wants many."""

    seed: int = 0
    """Decides everything that is drawn."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str | None = None
    """Run folder; by default runs/SOURCE-TARGET."""
    resume: bool = False
    """Go on with the run in the folder."""
    save_results: Annotated[str | None, RESULT_FILE] = None
    """Also write the results to this JSON file."""


FREE = frozenset({"out", "resume", "data_dir", "save_results"})


def check(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Checks what can be checked without data; returns the names of learners and strategies."""
    check_options(config)
    if config.budget % config.batch_size:
        raise UsageError(f"--budget {config.budget} must be a multiple of --batch-size {config.batch_size}")
    if config.seeds % config.seeds_at_once:
        raise UsageError(f"--seeds {config.seeds} must be a multiple of --seeds-at-once {config.seeds_at_once}")
    plain = [name for name in LEARNERS if "+" not in name]
    return names(config.learners, plain, "learner", LEARNERS), strategy_names(config.strategies)


def active(config: Config, setting: Setting, folder: RunFolder, key: jax.Array, metas: dict, arms: list):
    """Runs every learner with every strategy on every seed; each call of a program is one step of the run folder.

    A program serves all strategies that share a learner. The next programs are compiled while one runs.
    """
    sampler = tasks.problems(pool=setting.pool, test=setting.test, validation=setting.held_out)
    keys = jax.random.split(key, config.seeds)
    labels = list(range(config.batch_size, config.budget + 1, config.batch_size))
    parts = range(0, config.seeds, config.seeds_at_once)
    name = lambda learner, strategy, first: f"active-{learner}-{strategy}-{first:04d}"  # noqa: E731
    programs: list[tuple[str, Arm, Any, Future]] = []
    with ThreadPoolExecutor(2) as compilers:
        for learner, arm in arms:
            run = jax.jit(jax.vmap(make_run(arm, sampler, config), in_axes=(0, None, None, None, None)))
            wanted = any(not folder.done(name(learner, s, first)) for s in arm.strategies for first in parts)
            meta = metas.get(meta_learner_of(learner), ())
            example = (keys[: config.seeds_at_once], jnp.int32(0), meta, setting.problem_data, setting.full_test)
            compiled = compilers.submit(lambda run=run, a=example: run.lower(*a).compile()) if wanted else None
            programs.append((learner, arm, meta, compiled))
        records: dict[tuple[str, str], list[dict]] = {}
        bar = tqdm(total=sum(len(arm.strategies) for _, arm in arms) * len(parts), desc="active learning")
        for learner, arm, meta, compiled in programs:
            for number, strategy in enumerate(arm.strategies):
                bar.set_postfix_str(f"{learner} {strategy}")
                own = records[learner, strategy] = []
                for first in parts:

                    def compute(
                        first=first, strategy=strategy, number=number, learner=learner, meta=meta, compiled=compiled
                    ):
                        some = keys[first : first + config.seeds_at_once]
                        result = compiled.result()(
                            some, jnp.int32(number), meta, setting.problem_data, setting.full_test
                        )
                        result = jax.device_get(result)
                        return _records(result, f"{learner}/{strategy}", first, labels, setting.classes)

                    own += folder.step(name(learner, strategy, first), compute)
                    bar.update()
        bar.close()
    curves, final = {}, {}
    for arm in records:
        final[arm] = {}
        at = {n: [r for r in records[arm] if r["at"] == n and not r.get("final")] for n in labels}
        metrics = sorted(set(records[arm][0]) - {"series", "seed", "at", "final"})
        curves[arm] = {m: np.array([[r[m] for r in at[n]] for n in labels]).T for m in metrics}
        for name in ("cold", "final"):
            own = [r for r in records[arm] if r.get(name)]
            final[arm] |= {f"{name}_{m}": np.array([r[m] for r in own]) for m in metrics if m in own[0]}
        for n, value in zip(labels, curves[arm]["accuracy"].mean(0), strict=True):
            folder.board(f"active/{'/'.join(arm)}/accuracy", value, n)
    return Study(labels, curves, final, {"source": Path(config.source).stem, "target": Path(config.target).stem})


def _records(result: Curves, name: str, first: int, labels: list[int], classes: int) -> list[dict]:
    records = []
    for i in range(result.count.shape[0]):
        common = {"series": f"active/{name}", "seed": first + i}
        for round, n in enumerate(labels):
            scores = {metric: round_to(values[i, round]) for metric, values in result.test._asdict().items()}
            counts = np.bincount(result.y[i, :n], minlength=classes)
            # 1 for equal numbers of every class, 0 for a single class.
            share = counts[counts > 0] / counts.sum()
            balance = round_to(-(share * np.log(share)).sum() / np.log(classes))
            records.append({**common, "at": n, **scores, "balance": balance})
        for name, at, score in (("cold", 0, result.cold), ("final", labels[-1], result.final)):
            scores = {metric: round_to(values[i]) for metric, values in score._asdict().items()}
            records.append({**common, "at": at, name: True, **scores})
    return records


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
    learner_names, chosen = check(config)
    setting = Setting(config)
    out = config.out or f"runs/{Path(config.source).stem}-{Path(config.target).stem}"
    make = functools.partial(make_arms, classes=setting.classes, shape=setting.shape, config=config)
    with arguments():
        owners = dict.fromkeys(filter(None, map(meta_learner_of, learner_names)))
        meta_jobs = {name: make_meta_job(config, setting, name) for name in owners}
        arms = [(learner, arm) for learner in learner_names for arm in make(learner, chosen)]
    folder = RunFolder(out, config, resume=config.resume, free=FREE)
    meta_key, active_key = jax.random.split(jax.random.key(config.seed))
    drawn: list[tuple] = []

    def once(key: jax.Array) -> tuple:
        if not drawn:
            drawn.append(meta_data(config, setting, key))
        return drawn[0]

    metas = {
        name: meta_train(config, setting, meta_job, folder, meta_key, name=name, load=once)
        if config.meta_run is None
        else meta_restore(config, setting, meta_job, name=name)
        for name, meta_job in meta_jobs.items()
    }
    study = active(config, setting, folder, active_key, metas, arms)
    folder.close()
    text = study.table()
    (folder.path / "table.txt").write_text(text + "\n")
    study.about.update(config=dataclasses.asdict(config), seconds=folder.seconds())
    title = f"{study.about['source']} to {study.about['target']}, {config.seeds} seeds"
    paired = comparisons(study, against=("scratch", "frozen", "logistic"))
    for path in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        study.plot(path.with_suffix(".png"), title=title)
        study.save(path, command=command(), paired=paired)
    print(
        f"\n{config.source} to {config.target}: test accuracy in %, mean and 95 % interval over {config.seeds} seeds\n"
    )
    print(text)
    print(f"\nrun folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
