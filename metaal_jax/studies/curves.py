"""Learning curves of arms: every learner with every strategy on every seed, in the steps of a run folder."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaal_jax import tasks
from metaal_jax.base import PyTree
from metaal_jax.studies.arms import Arm, Curves, make_run
from metaal_jax.studies.folder import Records, RunFolder, round_to
from metaal_jax.studies.groups import Sizes
from metaal_jax.studies.meta_learners import meta_learner_of
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.study import Study
from metaal_jax.studies.usage import UsageError, need


def check_sizes(sizes: Sizes) -> None:
    """Checks that batches fill the budget, and calls of a program the seeds; raises `UsageError`."""
    if sizes.budget % sizes.batch_size:
        raise UsageError(f"--budget {sizes.budget} must be a multiple of --batch-size {sizes.batch_size}")
    if sizes.seeds % sizes.seeds_at_once:
        raise UsageError(f"--seeds {sizes.seeds} must be a multiple of --seeds-at-once {sizes.seeds_at_once}")


def learning_curves(
    arms: Sequence[tuple[str, Arm]],
    metas: Mapping[str, PyTree],
    setting: Setting,
    folder: RunFolder,
    *,
    sizes: Sizes,
    seed: int,
) -> Study:
    """Runs every arm on every seed; each call of a compiled program is one step of the run folder.

    A program serves all strategies that share a learner. The next programs are compiled while one runs.

    Args:
      arms: learners by name, each with its arms.
      metas: meta-parameters by meta-learner, for all that the arms need.
      setting: the data, and the rows of a problem.
      folder: the run.
      sizes: budget, batch and seeds, checked.
      seed: of the run.
    """
    sampler = tasks.problems(pool=setting.pool, test=setting.test, validation=setting.held_out)
    keys = jax.random.split(jax.random.split(jax.random.key(seed))[1], sizes.seeds)
    labels = list(range(sizes.batch_size, sizes.budget + 1, sizes.batch_size))
    parts = range(0, sizes.seeds, sizes.seeds_at_once)

    def step(learner: str, strategy: str, first: int) -> str:
        return f"active-{learner}-{strategy}-{first:04d}"

    programs: list[tuple[str, Arm, PyTree, Future[Any] | None]] = []
    with ThreadPoolExecutor(2) as compilers:
        for learner, arm in arms:
            one = make_run(arm, sampler, k=sizes.batch_size, chunk=sizes.chunk)
            run = jax.jit(jax.vmap(one, in_axes=(0, None, None, None, None)))
            wanted = any(not folder.done(step(learner, s, first)) for s in arm.strategies for first in parts)
            owner = meta_learner_of(learner)
            meta = () if owner is None else metas[owner]
            example = (keys[: sizes.seeds_at_once], jnp.int32(0), meta, setting.problem_data, setting.full_test)
            compiled = compilers.submit(_compiled, run, example) if wanted else None
            programs.append((learner, arm, meta, compiled))
        records: dict[tuple[str, str], Records] = {}
        bar = need("tqdm", extra="experiments").tqdm(
            total=sum(len(arm.strategies) for _, arm in arms) * len(parts), desc="active learning"
        )
        for learner, arm, meta, compiled in programs:
            for number, strategy in enumerate(arm.strategies):
                bar.set_postfix_str(f"{learner} {strategy}")
                own = records[learner, strategy] = []
                for first in parts:

                    def compute(
                        keys: Array = keys[first : first + sizes.seeds_at_once], number: int = number,
                        meta: PyTree = meta, compiled: Any = compiled, name: str = f"{learner}/{strategy}",
                        first: int = first,
                    ) -> Records:  # fmt: skip
                        result = compiled.result()(
                            keys, jnp.int32(number), meta, setting.problem_data, setting.full_test
                        )
                        return _records(jax.device_get(result), name, first, labels, setting.classes)

                    own += folder.step(step(learner, strategy, first), compute)
                    bar.update()
        bar.close()
    study = _study(records, labels, {"source": Path(setting.source).stem, "target": Path(setting.target).stem})
    for names, curves in study.curves.items():
        for n, value in zip(labels, curves["accuracy"].mean(0), strict=True):
            folder.board(f"active/{'/'.join(names)}/accuracy", value, n)
    return study


def _compiled(run: Any, example: tuple[Any, ...]) -> Any:
    return run.lower(*example).compile()


def _records(result: Curves, name: str, first: int, labels: list[int], classes: int) -> Records:
    records: Records = []
    for i in range(result.bought.shape[0]):
        common = {"series": f"active/{name}", "seed": first + i}
        for round, n in enumerate(labels):
            scores = {metric: round_to(values[i, round]) for metric, values in result.test._asdict().items()}
            counts = np.bincount(np.asarray(result.y[i, :n]), minlength=classes)
            # 1 for equal numbers of every class, 0 for a single class.
            share = counts[counts > 0] / counts.sum()
            balance = round_to(-(share * np.log(share)).sum() / np.log(classes))
            records.append({**common, "at": n, **scores, "balance": balance})
        for kind, at, score in (("cold", 0, result.cold), ("final", labels[-1], result.final)):
            scores = {metric: round_to(values[i]) for metric, values in score._asdict().items()}
            records.append({**common, "at": at, kind: True, **scores})
    return records


def _study(records: Mapping[tuple[str, str], Records], labels: list[int], about: dict[str, Any]) -> Study:
    """The curves that the records of all seeds hold."""
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    final: dict[tuple[str, str], dict[str, Any]] = {}
    for arm, found in records.items():
        at = {n: [r for r in found if r["at"] == n and not r.get("final")] for n in labels}
        metrics = sorted(set(found[0]) - {"series", "seed", "at", "final"})
        curves[arm] = {m: np.array([[r[m] for r in at[n]] for n in labels]).T for m in metrics}
        final[arm] = {}
        for kind in ("cold", "final"):
            own = [r for r in found if r.get(kind)]
            final[arm] |= {f"{kind}_{m}": np.array([r[m] for r in own]) for m in metrics if m in own[0]}
    return Study(np.asarray(labels), curves, final, about)
