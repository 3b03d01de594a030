"""Image-classification sets of TensorFlow Datasets, read without TensorFlow; the only file that needs TFDS.

Sets must be prepared in the array_record format (`metaal_jax.data.prepare`). Nothing here asks the network.
"""

import contextlib
import difflib
import io
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metaal_jax.data.arrays import DataError, Source, check_labels
from metaal_jax.data.images import convert_image
from metaal_jax.data.local import EMBEDDED

_NAME = re.compile(r"[A-Za-z_]\w*(/[^/:\s]+)?(:[\d*]+\.[\d*]+\.[\d*]+)?")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what TFDS, and only TFDS, says through absl below the level of an error, while the block runs."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "tensorflow_datasets" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def prepare_command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """The commands that prepare a set, as the messages give them."""
    folder = "" if data_dir is None else f" --data-dir {shlex.quote(os.fspath(data_dir))}"
    return f"pip install 'metaal_jax[prepare]' then python -m metaal_jax.data.prepare {name}{folder}"


def make_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Makes the TFDS builder of a set, prepared or not, from what is on this machine.

    Args:
      name: `name`, `name/config`, `name:version` or `name/config:version`.
      data_dir: the data directory of TFDS, None for its default.

    Returns:
      The builder.

    Raises:
      DataError: TFDS cannot be imported, or the name, config or version is unknown; the nearest names are given.
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{name!r} is no name of a data set; give 'digits', a path that ends in .npz, or a TFDS set as 'name', "
            "'name/config' or 'name:1.2.3'"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{name!r} needs tensorflow-datasets, which cannot be imported ({error}); pip install "
            "tensorflow-datasets importlib_resources array_record, or use 'digits' or a .npz file"
        ) from error
    folder = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    plain = re.split("[/:]", name)[0]
    with quiet():
        try:
            return tfds.builder(name, data_dir=folder, try_gcs=False)
        except tfds.core.DatasetNotFoundError as error:
            known = [*EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
            near = difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
            advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "see tfds.list_builders()"
            raise DataError(
                f"unknown data set {name!r}; there are {', '.join(map(repr, EMBEDDED))}, paths that end in .npz, and "
                f"the {len(known) - len(EMBEDDED)} sets of TFDS; {advice}"
            ) from error
        except Exception as error:  # for a config, a version or metadata that it cannot use TFDS raises nearly anything
            reason = " ".join(str(error).rpartition('}": ')[2].split())[:300].rstrip(".")
            advice = f"give {plain!r} alone for its default config and version"
            if isinstance(error, ImportError):
                advice = "pip install 'metaal_jax[prepare]', or choose another set"
            config = name.split(":")[0].partition("/")[2]
            with contextlib.suppress(tfds.core.DatasetNotFoundError):
                configs = list(tfds.builder_cls(plain).builder_configs)
                if config and config not in configs:
                    near = difflib.get_close_matches(config, configs, n=5, cutoff=0.0)
                    more = ", ..." if len(configs) > len(near) else ""
                    reason = f"no config {config!r}, only: {', '.join(near) or 'none'}{more}"
            raise DataError(f"{name!r} cannot be opened: {reason or type(error).__name__}; {advice}") from error


def _check_prepared(builder: Any, name: str, data_dir: str | os.PathLike[str] | None) -> None:
    with quiet():
        prepared = builder.is_prepared()
    if not prepared:
        place = Path(builder.data_dir)
        root = place.parents[len(builder.info.full_name.split("/")) - 1]
        others = sorted(
            str(found.parent.relative_to(root)) for found in (root / builder.name).glob("**/dataset_info.json")
        )
        there = f" (prepared there: {', '.join(others)}; ask for 'name/config:version')" if others else ""
        raise DataError(
            f"data set {name!r} is not prepared in {str(root)!r}{there}; prepare it once: "
            f"{prepare_command(name, data_dir)}; or give the data_dir that holds it"
        )
    formats = {getattr(form, "value", str(form)) for form in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise DataError(
            f"data set {name!r} is prepared as {', '.join(sorted(formats)) or 'unknown'} in "
            f"{os.fspath(builder.data_dir)!r}, and only array_record can be read; prepare it into another folder: "
            f"{prepare_command(name, 'FOLDER')}, and give data_dir='FOLDER'"
        )


def _image_and_label(builder: Any, name: str, label: str | None) -> tuple[str, str]:
    """The keys of the image and of the label: the supervised pair, or the only image and `label`; or the one given."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    # Sorted: a set read from its files has its features in no particular order.
    found = dict(sorted(features.items())) if isinstance(features, tfds.features.FeaturesDict) else {}
    images = [key for key, feature in found.items() if type(feature) is tfds.features.Image]
    labels = [
        key for key, feature in found.items() if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes
    ]
    pair = builder.info.supervised_keys
    if pair is None and len(images) == 1:
        pair = (images[0], "label")
    if pair is None or len(pair) < 2 or pair[0] not in images or pair[1] not in labels:
        raise DataError(
            f"{name!r} is not image classification (its features: {', '.join(map(str, found)) or features}), "
            "which takes one image and one class label; choose such a set, e.g. mnist, cifar10 or omniglot, or save x "
            "and y to a .npz"
        )
    if np.dtype(found[pair[0]].np_dtype) != np.uint8:
        raise DataError(
            f"{name!r} has {np.dtype(found[pair[0]].np_dtype)} pixels, not 8 bits; convert them "
            "yourself and save x and y to a .npz"
        )
    if label is not None and label not in labels:
        raise DataError(f"{name!r} has no class label {label!r}; give one of {', '.join(map(repr, labels))}")
    return pair[0], label or pair[1]


def _pixels(encoded: bytes, shape: tuple[int, int, int], *, converted: bool, what: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if not converted and (image.height, image.width) != shape[:2]:
                raise DataError(
                    f"{what} is {image.height}x{image.width}, and its set says {shape[0]}x{shape[1]}; "
                    "give image_shape to bring all images to one size"
                )
            return convert_image(image, shape)
    # What Pillow raises for damaged pictures, and for those that are too large to be one.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{what} cannot be decoded ({error}); delete the prepared set and prepare it again") from error


def open_tfds(
    name: str,
    split: str,
    *,
    image_shape: tuple[int, int, int] | None,
    invert: bool,
    label: str | None,
    data_dir: str | os.PathLike[str] | None,
) -> Source:
    """Opens a split of a prepared TFDS set; arguments as in `metaal_jax.data.load`, with `invert` decided.

    Labels are the set's own: for Omniglot the number of the character among all 1623, so that its `train` and `test`,
    which share no character, share no label.

    Returns:
      The `Source`.

    Raises:
      DataError: see `metaal_jax.data.load`.
    """
    builder = make_builder(name, data_dir)
    usual = _image_and_label(builder, name, None)
    image_key, label_key = _image_and_label(builder, name, label)
    _check_prepared(builder, name, data_dir)
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    try:
        rows = int(splits[split].num_examples)
    except (KeyError, ValueError, AttributeError, AssertionError) as error:
        raise DataError(
            f"{name!r} has no split {split!r}; give one of {', '.join(map(repr, splits))}, or a part such as "
            f"'{next(iter(splits), 'train')}[:10%]'"
        ) from error
    if not rows:
        raise DataError(f"{name!r}, split {split!r}: the set is empty; give a split with at least one row")
    stored = builder.info.features[image_key].shape
    if image_shape is None and (None in stored or stored[-1] not in (1, 2, 3, 4)):
        raise DataError(
            f"images of {name!r} have the shape {stored}, which is not fixed; give the one that you want, for "
            "example image_shape=(64, 64, 3)"
        )
    shape: tuple[int, int, int] = image_shape or tuple(stored)
    classes = int(builder.info.features[label_key].num_classes)
    try:
        with quiet():
            records = builder.as_data_source(
                split, decoders={image_key: tfds.decode.SkipDecoding()}, file_format="array_record"
            )
    except ImportError as error:
        raise DataError(
            f"{name!r}: TFDS cannot read array_record files ({error}); pip install array_record importlib_resources"
        ) from error

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            examples = records.__getitems__(numbers.tolist())
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise DataError(
                f"{name!r}, split {split!r}: records cannot be read ({error}); delete the folder "
                f"{os.fspath(builder.data_dir)!r} and prepare the set again"
            ) from error
        x = np.empty((len(numbers), *shape), np.uint8)
        for place, example in enumerate(examples):
            x[place] = _pixels(
                example[image_key],
                shape,
                converted=image_shape is not None,
                what=f"{name!r}, split {split!r}: the image in row {numbers[place]}",
            )
        labels = [int(example[label_key]) for example in examples]
        y = check_labels(np.asarray(labels), classes=classes, name=f"{name!r}, split {split!r}", rows=numbers)
        return (255 - x if invert else x), y

    full_name = builder.info.full_name
    root = Path(builder.data_dir).parents[len(full_name.split("/")) - 1]
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Source(
        rows=rows,
        shape=shape,
        dtype=np.dtype(np.uint8),
        classes=classes,
        read=read,
        # The size in bytes tells apart sets of one name and version that were prepared from different files.
        key=f"{full_name} {split} {'x'.join(map(str, shape))} {'inverted' if invert else 'as stored'} "
        f"{int(builder.info.dataset_size)}" + ("" if label_key == usual[1] else f" {label_key}"),
        cache_folders=(root / "metaal_jax_cache", home / "metaal_jax"),
    )
