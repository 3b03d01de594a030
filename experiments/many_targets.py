"""Trained policies on targets of many kinds: letters, photographs, digits and tables.

Claim: over ten targets that it has never seen, of 2 to 47 classes, a policy trained on problems made from CIFAR-10
alone is far above random, as good as max_herding, and behind `uncertain_herding`, the rule that it started from: its
training does not carry over.

    python experiments/many_targets.py --meta-run runs/cifar10-mnist
    python experiments/many_targets.py --targets iris,wine --strategies random,margin,max_herding

A target is a set, or with `SET:LABEL=NUMBER` the classes of one group of it: one alphabet of Omniglot, one superclass
of CIFAR-100. Images go through the main job's meta-learned network, whatever it was meta-trained on; tables are taken
as their columns, standardised over all rows. Every seed draws a pool and test rows anew; logistic regression learns
from a cold start, as in `strategies.py`, and all strategies get the same problems. "all" leaves out the oracle, for
which small sets have no rows, and three rules whose cost grows with the square of the number of classes (hours at 47
classes; they are in the last third of `strategies.py`'s ranking).

Expected, with the policies' starts among the rules (`starts-targets.json` names the command): mean areas of 61.0 %
for uncertain_herding, 60.4 for `cifar10` and max_herding, 55.0 for random. 20 minutes on two cores. All figures:
experiments/results/policies/ and the README; those of other files were made with a linear layer trained by AdamW.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from metaal_jax.names import STRATEGIES, Strategy, trained
from metaal_jax.studies.cells import Layer, run_cells
from metaal_jax.studies.embedding import meta_embedding
from metaal_jax.studies.groups import Run, Transfer, open_folder
from metaal_jax.studies.judged_policies import FREE, draw_shares, forget_changed, target_shares
from metaal_jax.studies.options import RESULT_FILE, at_least, check_options, flat, parse
from metaal_jax.studies.ranking import TWINS, table_of
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import load_setting
from metaal_jax.studies.target_report import compared, target_picture, target_rows, target_tables
from metaal_jax.studies.targets import check_targets, find_targets, load_target, sizes_of, target_problems, target_work
from metaal_jax.studies.usage import UsageError, command, main, strategies, trained_policies

LEFT_OUT = ("oracle", "error_reduction", "error_reduction_01", "epig", *TWINS)


@dataclass(frozen=True)
class Config:
    """Compares trained policies with rules on many targets."""

    policies: str = "cifar10"
    """Comma-separated: names of policies that come with the package, or paths of saved ones."""
    strategies: str = "all"
    """Comma-separated rules beside them, or all: those that cost little for many classes."""
    targets: str = (
        "digits,wine,iris,breast_cancer,omniglot:alphabet=1,omniglot:alphabet=29,omniglot:alphabet=33,"
        "cifar100:coarse_label=4,cifar100:coarse_label=11,cifar100:coarse_label=18"
    )
    """Comma-separated sets, or groups of classes of a set."""
    seeds: Annotated[int, at_least(2)] = 32
    """Seeds; seed i draws the same problem of a target for all."""
    transfer: Transfer = Transfer("cifar10", "mnist", "runs/cifar10-mnist")
    meta_seed: int = 0
    """Seed of the run in --meta-run. Its --target decides the shape of images, and is not looked at."""
    run: Run = Run(seed=200, out="runs/many_targets")
    save_results: Annotated[str | None, RESULT_FILE] = None
    """Also write the results to this JSON file, and the picture beside it."""


def rules_of(text: str) -> dict[str, Strategy]:
    """The rules by name, looked up and checked."""
    rules = {name: one for name, one in STRATEGIES.items() if name not in LEFT_OUT}
    if text != "all":
        rules = strategies(text)
    if "oracle" in rules:
        raise UsageError(
            "--strategies: the oracle needs rows of its own, which these problems do not have; leave it out"
        )
    if "random" not in rules or len(rules) < 2:
        raise UsageError(f"--strategies {text!r} must hold random and a rule to compare with")
    return rules


def job(config: Config) -> None:
    """The whole run."""
    check_options(config)
    run, transfer, layer = config.run, config.transfer, Layer()
    saved = trained_policies(config.policies)
    rules = rules_of(config.strategies)
    chosen = {**{name: trained(policy) for name, policy in saved.items()}, **rules}
    asked = find_targets(config.targets, run.data_dir)
    # Where all targets are tables, neither the network's data nor the network are needed.
    setting = None if all(target.table for target in asked) else load_setting(transfer, run=run)
    targets = {target.name: load_target(target, setting and setting.shape, run.data_dir) for target in asked}
    order = sorted(chosen, key=lambda name: not chosen[name].costly)
    sizes = {name: sizes_of(len(arrays.y)) for name, arrays in targets.items()}
    check_targets(targets, chosen, layer)
    folder = open_folder(config, run, "runs/many_targets", free=FREE)
    embed = setting and meta_embedding(setting, folder, seed=config.meta_seed, meta_run=transfer.meta_run)
    problems = target_problems(targets, embed, seed=run.seed, seeds=config.seeds)
    work = target_work(order, targets, problems)
    forget_changed(folder, saved, [cell for one in work for cell in one.cells])
    table = table_of(run_cells(work, problems, folder, layer=layer, seed=run.seed))
    of = compared(table, list(targets), list(saved), list(rules), transfer.source)
    rows, paired = target_rows(of)
    rows += [{"target": name, "metric": "problem", "classes": targets[name].classes, **size._asdict()}
             for name, size in sizes.items()]  # fmt: skip
    rows += target_shares(table, saved, transfer.source)
    text = target_tables(of)
    (folder.path / "table.txt").write_text(text + "\n")
    for place in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(place, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=flat(config), rows=rows, paired=paired)  # fmt: skip
        target_picture(of, place.with_suffix(".png"))
        draw_shares(table, saved, place, by="condition")
    print(text)
    print(f"\nrun folder: {folder.path}")


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
