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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import tyro

from metaal_jax.base import PyTree
from metaal_jax.names import STRATEGIES, Strategy, listing
from metaal_jax.studies.arms import make_arms
from metaal_jax.studies.cells import Layer, Place, Program, check_work, make_plan, place_work, run_cells
from metaal_jax.studies.conditions import CONDITIONS, Rows, check_pool, check_rows, condition_problems
from metaal_jax.studies.curves import learning_curves
from metaal_jax.studies.embedding import body_of, make_embedding, meta_network, untrained_body
from metaal_jax.studies.folder import RunFolder
from metaal_jax.studies.groups import Run, Sizes, Transfer, open_folder
from metaal_jax.studies.options import RESULT_FOLDER, at_least, check_options, flat, numbers_of, parse
from metaal_jax.studies.ranking import table_of
from metaal_jax.studies.results import environment
from metaal_jax.studies.setting import Setting, load_setting
from metaal_jax.studies.strategy_report import About, best_of, rank, tables, write_report
from metaal_jax.studies.study import Study
from metaal_jax.studies.usage import UsageError, by_usual_names, command, main, names, strategies

EMBEDDINGS = {"meta": "of the main job's meta-learned network", "untrained": "of the same network, untrained"}

ADAPTED = Sizes(seeds_at_once=1, initial="random")  # full adaptation of the whole network


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
    seeds: int = 8
    """Seeds of every cell; seed i draws the same problem for all strategies."""
    best: Annotated[int, at_least(0)] = 5
    """How many of the best strategies adapt the whole network afterwards; 0 for none."""
    best_seeds: int = 4
    """Seeds of that."""
    rows: Rows = Rows()
    layer: Layer = Layer()
    transfer: Transfer = Transfer("cifar10", "mnist")
    run: Run = Run(out="runs/strategies")
    save_results: Annotated[str | None, RESULT_FOLDER] = None
    """Also write the results to this folder, one JSON file for each condition and embedding, and a summary."""


class Plan(NamedTuple):
    """What is to be run: the strategies by name, their programs, and embeddings with conditions."""

    chosen: dict[str, Strategy]
    programs: list[Program]
    places: list[Place]


def plan_of(config: Config) -> Plan:
    """The words of the config looked up and checked, without data."""
    check_options(config)
    chosen = dict(STRATEGIES) if config.strategies == "all" else by_usual_names(strategies(config.strategies))
    single = {} if config.one_by_one in ("", "none") else by_usual_names(strategies(config.one_by_one))
    conditions = names(config.conditions, CONDITIONS, "condition")
    embeddings = names(config.embeddings, EMBEDDINGS, "embedding")
    batches = [] if config.batches == "none" else numbers_of("--batches", config.batches, of=int, like="10,50")
    programs = make_plan(
        chosen, batches=batches, single=single, budget=config.budget,
        costly_budget=config.costly_budget,
    )  # fmt: skip
    check_pool(config.rows, budget=config.budget, conditions=conditions)
    if config.best and config.rows.pool < ADAPTED.budget:
        raise UsageError(f"--best adapts to {ADAPTED.budget} labels, and the pool has {config.rows.pool} rows; give "
                         "--best 0 or a larger --pool")  # fmt: skip
    return Plan(chosen, programs, [(e, c) for e in embeddings for c in conditions])


def adapt_whole_network(config: Config, setting: Setting, folder: RunFolder, network: PyTree, best: list[str]) -> Study:
    """The best strategies, beside random, with the main job's full adaptation.

    All begin with the same ten random rows: strategies differ by what they ask of the adapted network.
    """
    rows = config.rows
    sizes = dataclasses.replace(ADAPTED, pool=rows.pool, test=min(rows.test, 2000), seeds=config.best_seeds)
    arms = make_arms("maml", ("random", *best), classes=setting.classes, shape=setting.shape, sizes=sizes)
    setting = setting._replace(pool=rows.pool, test=sizes.test)
    return learning_curves([("maml", arm) for arm in arms], {"maml": network}, setting, folder, sizes=sizes,
                           seed=config.run.seed)  # fmt: skip


def job(config: Config) -> None:
    """The whole run."""
    chosen, programs, places = plan_of(config)
    seed, transfer = config.run.seed, config.transfer
    setting = load_setting(transfer, run=config.run)
    check_rows(config.rows, setting.problem_data, transfer.target)
    work = place_work(programs, places, setting.classes)
    check_work(work, chosen, config.layer)
    folder = open_folder(config, config.run, "runs/strategies")
    wanted = config.best or "meta" in dict(places)
    network = meta_network(setting, folder, seed=seed, meta_run=transfer.meta_run) if wanted else ()
    networks = {
        "meta": lambda: body_of(setting, network),
        "untrained": lambda: untrained_body(setting, jax.random.key(seed + 1)),
    }
    problems = condition_problems(setting.problem_data, make_embedding(setting), networks, places, rows=config.rows,
                                  seed=seed, seeds=config.seeds)  # fmt: skip
    table = table_of(run_cells(work, problems, folder, layer=config.layer, seed=seed))
    few = min(config.costly_budget, config.budget)
    about = About(transfer.source, transfer.target, few, config.budget, config.seeds)
    ranking, final = rank(table, about), None
    if config.best:
        # By their ranks at the labels that full adaptation buys.
        final = adapt_whole_network(config, setting, folder, network, best_of(ranking, chosen, few, config.best))
    text = tables(table, ranking, final, about)
    (folder.path / "table.txt").write_text(text + "\n")
    head = {"command": command(), "environment": environment(), "seconds": folder.seconds(), "config": flat(config)}
    for out in (folder.path / "results", *([Path(config.save_results)] if config.save_results else [])):
        write_report(out, table, ranking, final, about, head)
    print(text)
    print(f"\nrun folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
