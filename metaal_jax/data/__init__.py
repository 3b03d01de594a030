"""Host-side data: named sources to NumPy arrays, streams for what does not fit, and prefetching to the device."""

from metaal_jax.data.arrays import Arrays, DataError, check_arrays
from metaal_jax.data.images import convert_images
from metaal_jax.data.local import TABLES
from metaal_jax.data.sources import load
from metaal_jax.data.stream import StreamBatch, prefetch, stream

__all__ = [
    "TABLES",
    "Arrays",
    "DataError",
    "StreamBatch",
    "check_arrays",
    "convert_images",
    "load",
    "prefetch",
    "stream",
]
