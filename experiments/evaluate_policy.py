"""Trained policies on a new task, beside every rule, a bandit over rules and the greedy oracle.

Claim: a policy trained on problems made from CIFAR-10 alone has, in batches of ten, a larger area under the learning
curve on MNIST than max_herding, by 0.2 points, which takes some hundred problems to see; but no larger one than its
own start, and a smaller one than `uncertain_herding`, the rule that it started from: its training does not carry over.
(The oracle, which sees labels, is no rule but a bound.)

    python experiments/evaluate_policy.py --meta-run runs/cifar10-mnist --batches 1,10
    python experiments/evaluate_policy.py --policies runs/policies/cifar10-evolution/policy.json --strategies margin

Cells, problems and learner are those of `strategies.py`: logistic regression on the main job's meta-learned embedding,
all strategies on the same problems from a cold start; the oracle chooses by rows of its own. What the policy looks at
is measured by runs in which it sees one feature in a random order. A run can grow: with `--resume` other policies,
rules and batches are added to it, and a policy that changed is run again.

Expected over 256 problems, with the starts among the rules (`starts-mnist.json` names the command): areas of 90.0 %
for uncertain_herding, 89.7 for `cifar10` and for its start, 89.5 for max_herding, 78.4 for random. 24 minutes on two
cores. All figures: experiments/results/policies/ and the README; those of other files were made with a linear layer
trained by AdamW.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from metaal_jax.names import ADAPTIVE, STRATEGIES, Strategy, trained
from metaal_jax.policies import Saved, features
from metaal_jax.studies.cells import Layer, Program, check_work, make_plan, place_work, run_cells
from metaal_jax.studies.conditions import Rows, check_pool, check_rows, condition_problems
from metaal_jax.studies.embedding import body_of, make_embedding, meta_network
from metaal_jax.studies.evaluation_report import (
    BOUNDS,
    PLACE,
    Evaluation,
    draw_wins,
    evaluation_picture,
    evaluation_rows,
    evaluation_tables,
)
from metaal_jax.studies.groups import Run, Transfer, open_folder
from metaal_jax.studies.judged_policies import FREE, draw_shares, forget_changed
from metaal_jax.studies.options import RESULT_FILE, check_options, flat, numbers_of, parse
from metaal_jax.studies.ranking import table_of
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import load_setting
from metaal_jax.studies.usage import UsageError, by_usual_names, command, main, names, strategies, trained_policies


@dataclass(frozen=True)
class Config:
    """Compares trained policies with rules on a new task."""

    policies: str = "cifar10"
    """Comma-separated: names of policies that come with the package, or paths of saved ones."""
    strategies: str = "all"
    """Comma-separated rules beside them, or all."""
    without: str = ""
    """Comma-separated rules to leave out of all of them, such as those that cost much with single rows."""
    importance: bool = True
    """Also run the first policy with each feature in a random order."""
    batches: str = "10"
    """Comma-separated batch sizes."""
    budget: int = 100
    """Labels bought in all."""
    rows: Rows = Rows(pool=5000, test=5000)
    seeds: int = 32
    """Seeds; seed i draws the same problem for all."""
    transfer: Transfer = Transfer("cifar10", "mnist", "runs/cifar10-mnist")
    meta_seed: int = 0
    """Seed of the run in --meta-run."""
    run: Run = Run(seed=100, out="runs/evaluate_policy")
    save_results: Annotated[str | None, RESULT_FILE] = None
    """Also write the results to this JSON file, and the picture beside it."""


class Plan(NamedTuple):
    """What is to be run: all strategies by name, the policies among them, and those with a scrambled feature."""

    chosen: dict[str, Strategy]
    programs: list[Program]
    saved: dict[str, Saved]
    scrambled: list[str]


def plan_of(config: Config) -> Plan:
    """The words of the config looked up and checked, without data."""
    check_options(config)
    saved = trained_policies(config.policies)
    first, policy = next(iter(saved.items()))
    asked = {name: trained(one) for name, one in saved.items()}
    scrambled = {f"{first}~{name}": trained(policy, name) for name in features.ROWS if config.importance}
    rules = {**STRATEGIES, **ADAPTIVE} if config.strategies == "all" else strategies(config.strategies)
    left_out = names(config.without, rules, "rule to leave out") if config.without else ()
    rules = by_usual_names({name: one for name, one in rules.items() if name not in left_out})
    if not rules.keys() - set(BOUNDS[1:]) - saved.keys():
        raise UsageError(f"--strategies {config.strategies!r} must hold a rule to compare with, such as max_herding")
    batches = numbers_of("--batches", config.batches, of=int, like="1,10")
    several = [k for k in batches if k != 1]
    # Features are scrambled in the larger batches, which cost less.
    single = [*asked, *(scrambled if not several else ()), *rules] if 1 in batches else []
    chosen = {**asked, **scrambled, **rules}
    programs = make_plan(chosen, batches=several, single=single, budget=config.budget, costly_budget=config.budget)
    check_pool(config.rows, budget=config.budget)
    return Plan(chosen, programs, saved, list(scrambled))


def job(config: Config) -> None:
    """The whole run."""
    chosen, programs, saved, scrambled = plan_of(config)
    run, transfer, layer = config.run, config.transfer, Layer()
    setting = load_setting(transfer, run=run)
    check_rows(config.rows, setting.problem_data, transfer.target)
    work = place_work(programs, [PLACE], setting.classes)
    check_work(work, chosen, layer)
    folder = open_folder(config, run, "runs/evaluate_policy", free=FREE)
    forget_changed(folder, saved, [cell for one in work for cell in one.cells])
    network = meta_network(setting, folder, seed=config.meta_seed, meta_run=transfer.meta_run)
    problems = condition_problems(setting.problem_data, make_embedding(setting),
                                  {PLACE[0]: lambda: body_of(setting, network)}, [PLACE], rows=config.rows,
                                  seed=run.seed, seeds=config.seeds)  # fmt: skip
    table = table_of(run_cells(work, problems, folder, layer=layer, seed=run.seed))
    of = Evaluation(table, saved, scrambled, transfer.source, transfer.target, config.budget, config.seeds)
    rows, paired = evaluation_rows(of)
    text = evaluation_tables(of)
    (folder.path / "table.txt").write_text(text + "\n")
    for place in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(place, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=flat(config), rows=rows, paired=paired)  # fmt: skip
        evaluation_picture(of, place.with_suffix(".png"))
        draw_shares(table, saved, place, by="batch")
    draw_wins(of, folder.path)
    print(text)
    print(f"\nrun folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
