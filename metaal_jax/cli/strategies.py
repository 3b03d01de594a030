"""The query strategies and trained policies by name: what each does, what it needs, and where it can be used."""

import argparse
from collections.abc import Sequence

from metaal_jax.cli.options import Parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="metaal strategies", description=__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="one of them, or a trained policy's file, in full")
    return parser.options(words)


def run(options: argparse.Namespace) -> None:
    """Prints the list, or one of them."""
    from metaal_jax import names, policies
    from metaal_jax.door_inputs import doors_of
    from metaal_jax.studies.usage import arguments

    if options.name is not None:
        with arguments():
            found = names.find(options.name)
        doors = doors_of(options.name)
        print(f"{options.name}: {found.line}")
        print(f"for: {'classes and targets' if found.labels == 'both' else found.labels}")
        print(f"needs: {'; '.join(names.NEEDS[need] for need in found.needs) or 'nothing'}")
        print(f"used by: {', '.join(doors) or 'names.strategy and active_learner alone'}")
        if found.memory:
            print("remembers earlier rounds: give --state to metaal suggest, state= to suggest and pick")
        if found.costly:
            print(f"is costly, and looks at {names.CANDIDATES} random rows a round")
        return
    for name in dict.fromkeys([*names.STRATEGIES, *names.ADAPTIVE, *names.REGRESSION, *policies.shipped()]):
        found = names.find(name)
        usable = ", ".join(doors_of(name)) or "active_learner"
        print(f"{name}: {found.line} (needs {', '.join(found.needs) or 'nothing'}; {usable})")
