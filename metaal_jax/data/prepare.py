"""Prepares a data set of TensorFlow Datasets once, in the format that `metaal_jax.data` reads.

    python -m metaal_jax.data.prepare NAME [NAME ...] [--data-dir DIR]

This downloads the set and needs TensorFlow (`pip install 'metaal_jax[prepare]'`); reading it afterwards needs neither
the network nor TensorFlow.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from metaal_jax.data.arrays import DataError
from metaal_jax.data.tfds import make_builder, quiet


def prepare(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> str:
    """Downloads and prepares a TFDS set in the array_record format; does nothing if it is there already.

    Args:
      name: `name`, `name/config`, `name:version` or `name/config:version`.
      data_dir: the data directory of TFDS; None for its default.

    Returns:
      The folder of the prepared set.

    Raises:
      DataError: an unknown name, TensorFlow missing, a set that is there in another format, or a failed download.
    """
    builder = make_builder(name, data_dir)
    folder = os.fspath(builder.data_dir)
    with quiet():
        prepared = builder.is_prepared()
    if prepared:
        formats = {getattr(form, "value", str(form)) for form in builder.info.available_file_formats()}
        if "array_record" not in formats:
            raise DataError(
                f"{name!r} is already prepared as {', '.join(sorted(formats))} in {folder!r}, and only "
                "array_record can be read; give another --data-dir or delete that folder"
            )
        return folder
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"preparing {name!r} needs TensorFlow, which is not installed; pip install 'metaal_jax[prepare]' and "
            "run this again (reading the prepared set will not need it)"
        )
    import tensorflow_datasets as tfds

    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:  # TFDS lets through whatever its download, its parsers and TensorFlow raise
        raise DataError(
            f"{name!r} could not be prepared in {folder!r} ({type(error).__name__}: {str(error)[:300]}); check the "
            "network and the free space and run this again"
        ) from error
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if a set could not be prepared."""
    parser = argparse.ArgumentParser(
        prog="python -m metaal_jax.data.prepare", description="Prepares data sets of TFDS (needs TensorFlow)."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="name, name/config, name:version")
    parser.add_argument("--data-dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    options = parser.parse_args(arguments)
    for name in options.names:
        try:
            folder = prepare(name, data_dir=options.data_dir)
        except DataError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
