"""The rows of a file to label next: their numbers from 0, or names by --id, best first, one a line."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from metaal_jax.cli.options import STRATEGY, Parser, add_members, add_model, add_pool, add_seed, whole


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="metaal suggest", description=__doc__)
    add_pool(parser)
    asked = parser.add_argument_group("what to ask for")
    asked.add_argument("-k", type=whole(1), default=20, help="rows that are wanted")
    asked.add_argument("--strategy", default=STRATEGY, help="metaal strategies lists them; or a trained policy's file")
    asked.add_argument("--rounds", type=whole(1), metavar="N", help="calls in all, for strategies that need it")
    asked.add_argument("--state", metavar="FILE", help="what the strategy remembers: read if it is there, then written")
    add_seed(asked)
    add_members(add_model(parser))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON, with scores and class probabilities")
    output.add_argument("--out", metavar="FILE", help="write that JSON to a file as well")
    return parser.options(words)


def run(options: argparse.Namespace) -> None:
    """Prints the rows."""
    from metaal_jax import doors
    from metaal_jax.cli import memory
    from metaal_jax.cli.files import known_labels, read_rows
    from metaal_jax.studies.files import write
    from metaal_jax.studies.options import FILE, check_place
    from metaal_jax.studies.statistics import finite
    from metaal_jax.studies.usage import arguments, warn

    for option, place in (("--out", options.out), ("--state", options.state)):
        if place is not None:
            check_place(option, place, FILE)
    pool = read_rows(options)
    labels = known_labels(options, pool)
    run_of = {"strategy": options.strategy, "learner": options.learner, "rows": len(pool.x)}
    with arguments():
        state = None if options.state is None else memory.read(options.state, run_of)
        found = doors.suggest(
            pool.x, labels, k=options.k, strategy=options.strategy, learner=options.learner, scale=options.scale,
            members=options.members, rounds=options.rounds, seed=options.seed, state=state, details=True,
        )  # fmt: skip
        if options.state is not None:
            memory.write(options.state, found.state, run_of)
    rows = [
        {"row": int(row), **({} if pool.ids is None else {"id": pool.ids[row]}),
         "score": finite(found.scores[row]),
         "probabilities": {str(name): round(float(p), 6)
                           for name, p in zip(found.classes, found.probabilities[row], strict=True)}}
        for row in found.rows
    ]  # fmt: skip
    text = json.dumps({**run_of, "labels": len(labels), "classes": list(found.classes), "suggested": rows}, indent=1)
    if options.out is not None:
        write(Path(options.out), text + "\n")
    if not rows:
        warn("every row is labelled; there is nothing to suggest")
    print(text if options.json else "\n".join(pool.name(int(row)) for row in found.rows))
