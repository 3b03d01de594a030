"""Downloads sets of TensorFlow Datasets once, in the format that metaal_jax reads; needs the extra `prepare`."""

import argparse
from collections.abc import Sequence

from metaal_jax.cli.options import Parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="metaal prepare", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="+", help="name, name/config, name:version")
    parser.add_argument("--data-dir", metavar="FOLDER", help="else $TFDS_DATA_DIR or ~/tensorflow_datasets")
    return parser.options(words)


def run(options: argparse.Namespace) -> None:
    """Prints the folder of each set."""
    from metaal_jax.data.prepare import prepare

    for name in options.names:
        print(f"{name}: {prepare(name, data_dir=options.data_dir)}", flush=True)
