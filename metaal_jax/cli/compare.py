"""Simulates active learning on labelled rows: the learning curve of each strategy, as a table for each set of rows.

A set is a name that metaal_jax.data.load knows (digits, iris, wine, breast_cancer, or a prepared TFDS set), a .npz with
arrays x and y, or a .csv or .npz with --label-column. Needs the extra `experiments`.
"""

import argparse
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metaal_jax.cli.options import STRATEGY, Parser, add_columns, add_members, add_model, add_seed, several, whole


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="metaal compare", description=__doc__)
    rows = parser.add_argument_group("rows and labels")
    rows.add_argument("sets", metavar="SET", nargs="+", help="name of a set, .npz or .csv")
    rows.add_argument("--label-column", metavar="COLUMN", help="column of a .csv, or array of a .npz, with the labels")
    add_columns(rows)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--strategies", type=several(), default=f"random,{STRATEGY}", metavar="NAME,...",
                      help="metaal strategies lists them")  # fmt: skip
    what.add_argument("--budget", type=whole(1), default=100, help="labels bought in all")
    what.add_argument("--batch-size", type=whole(1), default=10, help="labels bought in a round")
    what.add_argument("--seeds", type=whole(1), default=16, help="runs of every strategy")
    what.add_argument("--pool", type=whole(1), help="rows of the pool; else what the test leaves, at most 2000")
    what.add_argument("--test", type=whole(1), help="test rows; else two fifths, at most 1000")
    add_seed(what)
    add_members(add_model(parser))
    output = parser.add_argument_group("output")
    output.add_argument("--save-results", metavar="FILE", help="JSON with all curves; of several sets a folder")
    output.add_argument("--picture", metavar="FILE", help="picture (.png) of the curves; of several sets a folder")
    return parser.options(words)


def run(options: argparse.Namespace) -> None:
    """Prints the tables."""
    from metaal_jax.doors import compare
    from metaal_jax.studies import usage
    from metaal_jax.studies.usage import UsageError, arguments, need

    if len(set(options.sets)) < len(options.sets):
        raise UsageError("the same set is given twice")
    several_sets = len(options.sets) > 1
    places = {
        name: {"results": _place(options.save_results, name, ".json", several_sets),
               "picture": _place(options.picture, name, ".png", several_sets)}
        for name in options.sets
    }  # fmt: skip
    _check_places(options, several_sets)
    tabulate = need("tabulate", extra="experiments").tabulate
    if options.picture is not None:
        need("matplotlib", extra="experiments")
    areas: dict[str, list[float]] = {name: [] for name in options.strategies}
    data = {name: _load(name, options) for name in options.sets}
    for name in options.sets:
        with arguments():
            study = compare(
                data.pop(name), options.strategies, learner=options.learner, budget=options.budget,
                batch_size=options.batch_size, seeds=options.seeds, pool=options.pool, test=options.test,
                scale=options.scale, members=options.members, seed=options.seed,
                progress=functools.partial(_announced, target=name),
            )  # fmt: skip
        study.about["target"] = name
        for arm in study.curves:
            areas[arm[1]].append(100 * float(study.area(arm).mean()))
        print(f"{name}: test accuracy in % by labels bought, with 95 % intervals over {options.seeds} seeds")
        print(study.table())
        _print_differences(study)
        print(flush=True)
        if place := places[name]["results"]:
            study.save(place, command=usage.command())
        if place := places[name]["picture"]:
            study.plot(place, title=name)
    if several_sets:
        print("mean accuracy in % along the curve")
        rows = [[strategy, *means, sum(means) / len(means)] for strategy, means in areas.items()]
        print(tabulate(rows, ["strategy", *options.sets, "mean"], floatfmt=".1f"))


def _load(name: str, options: argparse.Namespace) -> Any:
    """Rows and labels of a set."""
    import numpy as np

    from metaal_jax import data
    from metaal_jax.cli.files import labelled, read_rows
    from metaal_jax.studies.usage import UsageError

    own = Path(name).suffix.lower() in (".csv", ".npy") or options.label_column is not None
    if own and options.label_column is None:
        raise UsageError(f"{name}: give --label-column, the column with the labels")
    if own:
        x, y, _ = labelled(read_rows(options, name), options.label_column, name)
        return x, y
    if options.drop or options.header:
        raise UsageError(f"{name}: {'--drop' if options.drop else '--header'} is for .csv files")
    parts = [data.load(name, split) for split in ("train", "test")]
    return np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])


def _place(given: str | None, name: str, ending: str, several_sets: bool) -> Path | None:
    """Where something about a set is written."""
    if given is None:
        return None
    return Path(given) / f"{Path(name).stem.replace('/', '-')}{ending}" if several_sets else Path(given)


def _check_places(options: argparse.Namespace, several_sets: bool) -> None:
    from metaal_jax.studies.options import Place, check_place
    from metaal_jax.studies.usage import UsageError

    for option, given in (("--save-results", options.save_results), ("--picture", options.picture)):
        if given is not None:
            check_place(option, given, Place(folder=several_sets))
    if options.picture is not None and not several_sets and Path(options.picture).suffix != ".png":
        raise UsageError(f"--picture {options.picture} must end in .png")
    if several_sets and (options.save_results or options.picture):
        stems = [Path(name).stem for name in options.sets]
        if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
            raise UsageError(f"two sets are called {twice!r} and would be written to one file; rename one")


def _print_differences(study: Any) -> None:
    """The mean differences along the curves to the reference."""
    if len(study.curves) < 2:
        return
    for row in study.paired():
        if row["metric"] == "area":
            difference, low, high = (100 * row[name] for name in ("difference", "low", "high"))
            print(f"{row['a']['strategy']} against {row['b']['strategy']}: {difference:+.2f} [{low:+.2f}, {high:+.2f}] "
                  "along the curve")  # fmt: skip


def _announced(names: Iterable[str], target: str) -> Iterator[str]:
    """The names, each said on stderr as its turn comes, where a person watches."""
    for name in names:
        if sys.stderr.isatty():
            print(f"{target}: {name} ...", file=sys.stderr)
        yield name
