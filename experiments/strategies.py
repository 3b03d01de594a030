"""All query strategies on one target: plain, repeated, wrongly answered and unbalanced, on two frozen embeddings.

Claim: on the embedding that the main job meta-learned, strategies that look at where rows lie win while labels are few,
uncertain ones win later, and a greedy oracle shows how much room is left above all of them.

    python experiments/strategies.py                                    # meta-trains the network first
    python experiments/strategies.py --meta-run runs/cifar10-mnist      # takes that of a run of meta_active.py
    python experiments/strategies.py --strategies random,margin,typiclust --embeddings meta --conditions plain

A cell is one strategy with one batch size in one condition on one embedding; all its seeds run in one compiled
program. After every batch logistic regression is fitted to the embedding; strategies that ask a committee see draws
from its Laplace posterior, and all are judged by the single regression. The cold start is part of the comparison: each
strategy chooses its first batch itself, by a model that knows no label. Then the five best adapt the whole network.

Expected: area up to 100 labels of 89.4 % for max_herding, 88.9 for typiclust, 82.5 for margin, 81.1 for random, 90.4
for the oracle (plain, meta-learned embedding, batches of ten). 34 minutes on two cores without meta-training. All
figures: experiments/results/strategies/ and the README.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import meta_active
from metaal_jax import annotators, learners, tasks
from metaal_jax.active import ActiveState
from metaal_jax.base import Learner, Problem, PyTree
from metaal_jax.loop import active_learner
from metaal_jax.metrics import Score
from metaal_jax.names import ALIASES, CANDIDATES, STRATEGIES, Given, build, find, listing
from metaal_jax.policies.selector import SelectorState
from metaal_jax.studies.arms import linear_loss_learner, make_arms, make_embed, make_model, standardised, without_head
from metaal_jax.studies.folder import RunFolder, round_to
from metaal_jax.studies.meta_training import make_meta_job, meta_restore, meta_train
from metaal_jax.studies.options import RESULT_FOLDER, above, at_least, check_options, numbers_of, parse
from metaal_jax.studies.processes import side_by_side
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.usage import UsageError, arguments, main, names, strategy_names
from strategy_report import Cell, report

CONDITIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "repeated": {"duplicates": 5, "noise": 10.0},
    "wrong": {"wrong": 0.2},
    "unbalanced": {"imbalance": 10.0},
}
SEEDS_AT_ONCE = 8  # of a program; more would only take memory
EMBEDDINGS = {"meta": "of the main job's meta-learned network", "untrained": "of the same network, untrained"}


@dataclass(frozen=True)
class Config:
    """Compares query strategies with a linear layer on a frozen embedding."""

    strategies: Annotated[str, tyro.conf.arg(help=f"Comma-separated, or all. Of:\n{listing()}\n")] = "all"
    conditions: str = "plain,repeated,wrong,unbalanced"
    """Comma-separated, of: plain; repeated (every image five times, with noise); wrong (20 % wrong answers); unbalanced
    (classes 1:10)."""
    embeddings: str = "meta,untrained"
    """Comma-separated, of: meta, untrained."""
    batches: str = "10,50"
    """Batch sizes for all strategies, or none."""
    one_by_one: str = "random,entropy,margin,typical,badge"
    """Those of the strategies that are also run with batches of one, or none."""
    budget: int = 300
    """Labels bought in all."""
    costly_budget: int = 100
    """Labels bought by strategies that look at a sample of the pool."""
    pool: int = 3000
    """Pool rows."""
    test: int = 3000
    """Test rows."""
    held_out: int = 300
    """Rows beside the pool that the oracle chooses by."""
    seeds: int = 8
    """Seeds of every cell; seed i draws the same problem for all strategies."""

    source: str = "cifar10"
    """Data set that the network was meta-trained on."""
    target: str = "mnist"
    """Data set for active learning."""
    meta_run: str | None = None
    """Run folder of the main job for this source and target, whose network is used. None trains it here."""
    ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of the linear layer, a logistic regression."""
    solver_steps: int = 64
    """Steps of its solver."""
    refit_steps: int = 16
    """Steps where a strategy refits it by the thousand."""
    members: Annotated[int, at_least(2)] = 20
    """Draws from the posterior that committee strategies see."""
    joint_members: Annotated[int, at_least(2)] = 100
    """Draws for strategies that look at a sample of the pool."""
    prior_precision: Annotated[float, above(0)] = 20.0
    """Of the Laplace posterior: the reciprocal variance of each weight before any label. That of the regression itself
    is the ridge; a larger one draws members that agree more."""
    best: Annotated[int, at_least(0)] = 5
    """How many of the best strategies adapt the whole network afterwards; 0 for none."""
    best_seeds: int = 4
    """Seeds of that."""

    seed: int = 0
    """Decides everything that is drawn."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str = "runs/strategies"
    """Run folder."""
    resume: bool = False
    """Go on with the run in the folder."""
    save_results: Annotated[str | None, RESULT_FOLDER] = None
    """Also write the results to this folder, one JSON file for each condition and embedding, and a summary."""


FREE = frozenset({"out", "resume", "data_dir", "save_results"})


class Work(NamedTuple):
    """A program, `(strategy, k, budget)` for a number of classes, and the cells that it runs, of one shape."""

    classes: int
    program: tuple[str, int, int]
    cells: tuple[Cell, ...]


class Plan(NamedTuple):
    """What is to be run: names, batch sizes and the number of labels of each program."""

    programs: tuple[tuple[str, int, int], ...]
    places: tuple[tuple[str, str], ...]

    def work(self, classes: int) -> list[Work]:
        """The programs, each with its cells in the order in which they are run."""
        return [Work(classes, program, tuple(Cell(*place, program[1], program[0]) for place in self.places))
                for program in self.programs]  # fmt: skip


def make_plan(config: Config) -> Plan:
    """Checks the names and numbers; costly strategies first, so that no core waits at the end."""
    check_options(config)
    named = lambda text: tuple(ALIASES.get(n, n) for n in strategy_names(text))  # noqa: E731
    chosen = tuple(STRATEGIES) if config.strategies == "all" else named(config.strategies)
    single = () if config.one_by_one in ("", "none") else named(config.one_by_one)
    conditions = names(config.conditions, CONDITIONS, "condition")
    embeddings = names(config.embeddings, EMBEDDINGS, "embedding")
    batches = [] if config.batches == "none" else numbers_of("--batches", config.batches, of=int, like="10,50")
    if not batches and not single:
        raise UsageError("neither --batches nor --one-by-one holds anything; give one of them")
    if min(batches, default=2) < 2 or len(set(batches)) < len(batches):
        raise UsageError(f"--batches {config.batches!r} must be different numbers from 2 on; --one-by-one is for 1")
    if max(batches, default=1) > min(config.costly_budget, config.budget):
        raise UsageError(f"batches of {max(batches)} are more than --costly-budget or --budget; raise them")
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--strategies {config.strategies!r} names one strategy twice, by different spellings")
    programs = []
    for strategy in chosen:
        costly = find(strategy).costly
        budget = min(config.costly_budget, config.budget) if costly else config.budget
        programs += [(strategy, k, budget) for k in batches]
        if strategy in single:
            programs.append((strategy, 1, budget))
    for strategy, k, budget in programs:
        if not 1 <= k <= budget or budget % k:
            raise UsageError(f"batches of {k} do not divide the {budget} labels of {strategy}; give other --batches, "
                             "--budget or --costly-budget")  # fmt: skip
        if find(strategy).costly and k > CANDIDATES:
            raise UsageError(f"{strategy} looks at {CANDIDATES} rows a round, too few for batches of {k}")
    if config.budget > config.pool:
        raise UsageError(f"a budget of {config.budget} labels is larger than the pool of {config.pool} rows")
    if "repeated" in conditions and config.pool % 5:
        raise UsageError(f"--pool {config.pool} must be a multiple of 5 for the condition repeated")
    programs.sort(key=lambda program: not find(program[0]).costly)
    return Plan(tuple(programs), tuple((e, c) for e in embeddings for c in conditions))


def main_config(config: Any) -> meta_active.Config:
    """The main job's config for the same source and target."""
    return meta_active.Config(source=config.source, target=config.target, seed=config.seed, data_dir=config.data_dir,
                              meta_run=config.meta_run)  # fmt: skip


def main_network(config: Any, setting: Setting, folder: RunFolder) -> PyTree:
    """The main job's meta-learned network: restored from its run folder, or trained here with the same keys."""
    job_config = main_config(config)
    meta_job = make_meta_job(job_config, setting)
    if config.meta_run is not None:
        return meta_restore(job_config, setting, meta_job)
    return meta_train(job_config, setting, meta_job, folder, jax.random.split(jax.random.key(config.seed))[0])


def make_problems(config: Config, setting: Setting, meta: PyTree, places: tuple) -> dict:
    """Every seed's problem in every condition, embedded once: leaves `[seeds, ...]`."""
    job_config = main_config(config)
    model = make_model(setting.classes, setting.shape, job_config)
    embed = make_embed(model, 100)
    body = learners.maml(model, optimizer=optax.identity(), steps=0)
    image = jnp.zeros((1, *setting.shape), setting.train_source.x.dtype)
    networks = {
        "meta": lambda: without_head(model, meta, image),
        "untrained": lambda: body.init(jax.random.key(config.seed + 1), image),
    }
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), config.seeds)

    found = {}
    for embedding, condition in tqdm(places, desc="embedding"):
        options = {name: value for name, value in CONDITIONS[condition].items() if name != "wrong"}
        sampler = tasks.problems(pool=config.pool, test=config.test, validation=config.held_out, **options)

        @jax.jit
        def draw(network: PyTree, key: jax.Array, data: Any, sampler: Any = sampler) -> Problem:
            return standardised(lambda x: embed(network, x), sampler(key, data))[0]

        network = networks[embedding]()
        each = [draw(network, key, setting.problem_data) for key in keys]
        found[embedding, condition] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return found


def linear_learners(classes: int, *, ridge: float, steps: int, refit_steps: int) -> tuple[Learner, Learner]:
    """Logistic regression on an embedding, and its quicker form for what refits it by the thousand."""
    return learners.linear(classes, ridge=ridge, steps=steps), learners.linear(classes, ridge=ridge, steps=refit_steps)


def make_run(config: Config, classes: int, strategy: str, k: int, budget: int):
    """`(key, problem, wrong) -> (Score [rounds], labels bought, shares [rounds, rules])`: one run, a pure function.

    The last says which rules proposed the batch of each round, if the strategy is a selector; else it is `()`.
    """
    learner, refit = linear_learners(
        classes, ridge=config.ridge, steps=config.solver_steps, refit_steps=config.refit_steps
    )
    posterior = None
    if find(strategy).committee:
        members = config.joint_members if find(strategy).costly else config.members
        posterior = learners.laplace(learner, members=members, prior_precision=config.prior_precision)
    need = Given(
        k=k,
        rounds=budget // k,
        classes=classes,
        learner=learner,
        refit=refit,
        loss_learner=linear_loss_learner(classes),
    )
    policy = build(strategy, need, posterior)

    def run(key: jax.Array, problem: Problem, wrong: jax.Array) -> tuple[Score, jax.Array, PyTree]:
        init_key, begin_key, loop_key = jax.random.split(key, 3)

        def shares(state: ActiveState) -> PyTree:
            own = state.policy_state
            return own.last if isinstance(own, SelectorState) else ()

        who = annotators.noisy(annotators.truth(), rate=wrong, classes=classes)
        active = active_learner(learner, policy, capacity=budget, annotator=who, record=shares)
        meta = learner.init(init_key, problem.x)
        params = find(strategy).params(problem)
        state = active.init(begin_key, meta, params, problem)
        state, trace = active.run(loop_key, meta, params, problem, rounds=budget // k, state=state)
        return trace.test, problem.y[jnp.maximum(state.labelled_index, 0)], trace.record

    return run


def run_program(problems: dict, task: tuple[Any, Work], send: Any) -> None:
    """Compiles one program, runs it in all wanted places and sends the records of each."""
    config, (classes, (strategy, k, budget), wanted) = task
    one = make_run(config, classes, strategy, k, budget)

    @jax.jit
    def run(keys: jax.Array, problems: Problem, wrong: jax.Array) -> tuple[Score, jax.Array, PyTree]:
        if config.seeds <= SEEDS_AT_ONCE:
            return jax.vmap(one, in_axes=(0, 0, None))(keys, problems, wrong)
        return jax.lax.map(lambda each: one(*each, wrong), (keys, problems), batch_size=SEEDS_AT_ONCE)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2), config.seeds)
    compiled = None
    for cell in wanted:
        inputs = (keys, problems[cell[:2]], jnp.float32(CONDITIONS.get(cell.condition, {}).get("wrong", 0.0)))
        compiled = run.lower(*inputs).compile() if compiled is None else compiled
        begin = time.perf_counter()
        found = jax.device_get(compiled(*inputs))
        send(cell, (_records(cell, *found, k, classes), time.perf_counter() - begin))


def _records(cell: Cell, test: Score, y: np.ndarray, shares: Any, k: int, classes: int) -> list[dict]:
    records = []
    for seed in range(y.shape[0]):
        share = np.bincount(y[seed], minlength=classes) / y.shape[1]
        balance = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(classes)
        curves = {name: [round_to(v) for v in getattr(test, name)[seed]] for name in ("accuracy", "brier", "ece")}
        labels = [k * (i + 1) for i in range(test.accuracy.shape[1])]
        if len(shares):
            curves["shares"] = [[round_to(v) for v in row] for row in shares[seed]]
        records.append({**cell._asdict(), "seed": seed, "labels": labels, **curves, "balance": round_to(balance)})
    return records


def run_cells(config: Config, work: list[Work], problems: dict, folder: RunFolder) -> dict[Cell, list[dict]]:
    """All cells, a step of the run folder each; as many programs at a time as there are cores to run them.

    Args:
      config: settings of the linear layer, of posteriors and seeds.
      work: what is to be run.
      problems: by the cells' `(embedding, condition)`, leaves `[seeds, ...]`.
      folder: the run.
    """
    left = [(config, one._replace(cells=tuple(c for c in one.cells if not folder.done(c.step())))) for one in work]
    found = {}
    with side_by_side(run_program, problems, [task for task in left if task[1].cells]) as wait:
        bar = tqdm([cell for one in work for cell in one.cells], desc="cells")
        for cell in bar:
            bar.set_postfix_str(" ".join(str(part) for part in cell))

            def compute(cell: Cell = cell) -> list[dict]:
                records, seconds = wait(cell)
                with open(folder.path / "cell_times.jsonl", "a") as file:
                    file.write(json.dumps({**cell._asdict(), "seconds": round(seconds, 3)}) + "\n")
                return records

            found[cell] = folder.step(cell.step(), compute)
    return found


def adapt_whole_network(config: Config, setting: Setting, folder: RunFolder, meta: PyTree, best: list[str]):
    """The best strategies, beside random, with the main job's full adaptation; its `Study`.

    All begin with the same ten random rows: strategies differ by what they ask of the adapted network.
    """
    chosen = ("random", *best)
    job_config = dataclasses.replace(
        main_config(config), strategies=",".join(chosen), learners="maml", seeds=config.best_seeds,
        seeds_at_once=1, pool=config.pool, test=min(config.test, 2000), initial="random",
    )  # fmt: skip
    arms = [("maml", arm) for arm in make_arms("maml", chosen, classes=setting.classes, shape=setting.shape,
                                               config=job_config)]  # fmt: skip
    _, active_key = jax.random.split(jax.random.key(config.seed))
    setting.pool, setting.test = config.pool, job_config.test
    return meta_active.active(job_config, setting, folder, active_key, meta, arms)


def job(config: Config) -> None:
    """The whole run."""
    plan = make_plan(config)
    setting = Setting(main_config(config))
    rows = setting.problem_data.pool.y.shape[0], setting.problem_data.test.y.shape[0]
    for name, wanted, have in (("pool", config.pool + config.held_out, rows[0]), ("test", config.test, rows[1])):
        if wanted > have:
            raise UsageError(f"{wanted} rows wanted for --{name}, {config.target!r} has {have}")
    with arguments():
        for strategy, k, budget in plan.programs:
            make_run(config, setting.classes, strategy, k, budget)
    folder = RunFolder(config.out, config, resume=config.resume, free=FREE)
    meta = main_network(config, setting, folder) if config.best or "meta" in config.embeddings else ()
    problems = make_problems(config, setting, meta, plan.places)
    records = run_cells(config, plan.work(setting.classes), problems, folder)
    again = lambda best: adapt_whole_network(config, setting, folder, meta, best)  # noqa: E731
    print(report(config, folder, records, again if config.best else None))
    print(f"\nrun folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
