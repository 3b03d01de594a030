"""What a feature is worth to a trained policy: the same network with that feature in a random order."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.base import PyTree
from metaal_jax.policies import features


class Scrambled:
    """A network that sees one of the rows' features in an order that has nothing to do with the rows."""

    def __init__(self, network: Any, feature: str):
        """`feature` is a name of `features.ROWS`."""
        self.network, self.place = network, features.ROWS.index(feature)

    def init(self, *args: Any) -> PyTree:
        """As the network's."""
        return self.network.init(*args)

    def apply(self, params: PyTree, rows: Array, situation: Array, mask: Array) -> Any:
        """As the network's, with the feature's two columns from other rows."""
        columns = jnp.asarray([self.place, self.place + len(features.ROWS)])
        # Rows that count swap with rows that count.
        order = jnp.argsort(jax.random.uniform(jax.random.key(0), mask.shape) + 2.0 * ~mask)
        place = jnp.argsort(~mask, stable=True)
        other = jnp.zeros_like(order).at[place].set(order)
        return self.network.apply(params, rows.at[:, columns].set(rows[other][:, columns]), situation, mask)
