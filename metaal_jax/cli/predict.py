"""The most probable class of every row of a file and its probability, as CSV, from the labels of some rows."""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from metaal_jax.cli.options import Parser, add_model, add_pool, add_seed


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="metaal predict", description=__doc__)
    add_pool(parser)
    add_seed(add_model(parser))
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write to a file instead of the terminal")
    return parser.options(words)


def run(options: argparse.Namespace) -> None:
    """Prints the table."""
    from metaal_jax import doors
    from metaal_jax.cli.files import known_labels, read_rows
    from metaal_jax.studies.files import write
    from metaal_jax.studies.options import FILE, check_place
    from metaal_jax.studies.usage import UsageError, arguments

    if options.out is not None:
        check_place("--out", options.out, FILE)
    pool = read_rows(options)
    labels = known_labels(options, pool)
    classes = sorted(set(labels.values()))
    if len(classes) < 2:
        held = f"only the class {classes[0]!r} has labels" if classes else "there are no labels"
        raise UsageError(f"{held}; give rows of two classes or more by --labels or --label-column")
    with arguments():
        found = doors.suggest(
            pool.x, labels, k=1, strategy="random", learner=options.learner, scale=options.scale, seed=options.seed,
            details=True,
        )  # fmt: skip
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([options.id or "row", "class", "probability"])
    for row, (best, share) in enumerate(zip(found.probabilities.argmax(1), found.probabilities.max(1), strict=True)):
        table.writerow([pool.name(row), found.classes[best], f"{share:.6f}"])
    if options.out is None:
        sys.stdout.write(text.getvalue())
    else:
        write(Path(options.out), text.getvalue())
