"""Networks that score a pool's rows: what `metaal_jax.policies` learns."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.losses import clear_padding


def _value(situation: Array, width: int) -> Array:
    return nn.Dense(1, name="value_2")(nn.tanh(nn.Dense(width, name="value_1")(situation)))[..., 0]


def _scores(hidden: Array, rows: Array, prior: Sequence[float]) -> Array:
    """Scores that begin as `rows @ prior`."""
    start = jnp.zeros(rows.shape[-1]).at[: len(prior)].set(jnp.asarray(prior, jnp.float32))
    skip = nn.Dense(1, use_bias=False, kernel_init=lambda *_: start[:, None], name="skip")(rows)
    own = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros, name="scores")(hidden)
    return (skip + own)[..., 0]


class RowNetwork(nn.Module):
    """Scores every row by itself, given the situation.

    Attributes:
      width: of the hidden layers.
      prior: factors of the rows' inputs with which the scores begin, 0 for those not given.
    """

    width: int = 32
    prior: tuple[float, ...] = ()

    @nn.compact
    def __call__(self, rows: Array, situation: Array, mask: Array) -> tuple[Array, Array]:
        """Inputs of the rows `[m, f]`, of the situation `[g]`, who counts `[m]` -> scores `[m]`, value `[]`."""
        rows = clear_padding(rows, mask)
        hidden = nn.tanh(
            nn.Dense(self.width, name="rows")(rows) + nn.Dense(self.width, name="situation")(situation)[None]
        )
        hidden = nn.tanh(nn.Dense(self.width, name="hidden")(hidden))
        return _scores(hidden, rows, self.prior), _value(situation, self.width)


class LinearNetwork(nn.Module):
    """Scores that are linear in the rows' inputs, with factors that may move with the situation.

    Few parameters: what `policies.evolution` trains best.

    Attributes:
      ignored: places of the rows' inputs that count as 0: those that training never saw move, whose factors would be
        noise.
      situation: places of the situation's inputs that move the factors; `()` for fixed ones.
      prior: factors of the rows' inputs with which the scores begin, 0 for those not given.
    """

    ignored: tuple[int, ...] = ()
    situation: tuple[int, ...] = ()
    prior: tuple[float, ...] = ()

    @nn.compact
    def __call__(self, rows: Array, situation: Array, mask: Array) -> tuple[Array, Array]:
        """Inputs of the rows `[m, f]`, of the situation `[g]`, who counts `[m]` -> scores `[m]`, value `[]`."""
        rows = clear_padding(rows, mask)
        start = jnp.zeros(rows.shape[-1]).at[: len(self.prior)].set(jnp.asarray(self.prior, jnp.float32))
        factors = self.param("factors", lambda _: start)
        if self.situation:
            moves = self.param("moves", nn.initializers.zeros, (len(self.situation), rows.shape[-1]), jnp.float32)
            factors = factors + situation[jnp.asarray(self.situation)] @ moves
        if self.ignored:
            factors = factors.at[jnp.asarray(self.ignored)].set(0.0)
        return rows @ factors, nn.Dense(1, name="value")(situation)[..., 0]


class SetNetwork(nn.Module):
    """Scores every row in view of all others: attention through a few inducing points, linear in the number of rows.

    A permutation of the rows permutes the scores; rows that `mask` leaves out change none.

    Attributes:
      width: of the hidden layers.
      points: inducing points.
      prior: factors of the rows' inputs with which the scores begin, 0 for those not given.

    Reference: Lee et al.: Set Transformer, 2019.
    """

    width: int = 32
    points: int = 8
    prior: tuple[float, ...] = ()

    @nn.compact
    def __call__(self, rows: Array, situation: Array, mask: Array) -> tuple[Array, Array]:
        """Inputs of the rows `[m, f]`, of the situation `[g]`, who counts `[m]` -> scores `[m]`, value `[]`."""
        rows = clear_padding(rows, mask)
        dense = lambda name, x: nn.Dense(self.width, name=name)(x)  # noqa: E731
        hidden = nn.tanh(dense("rows", rows) + dense("situation", situation)[None])
        point = self.param("points", nn.initializers.normal(1.0), (self.points, self.width), jnp.float32)
        asked = (point + dense("asked", situation)[None]) @ dense("keys", hidden).T / jnp.sqrt(self.width)
        # Without any row that counts nothing is left out, and the summary is 0.
        share = jax.nn.softmax(jnp.where((mask | ~mask.any())[None], asked, -jnp.inf), axis=-1) * mask.any()
        summary = nn.tanh(dense("summary", share @ hidden))
        back = jax.nn.softmax(dense("asking", hidden) @ dense("answers", summary).T / jnp.sqrt(self.width), axis=-1)
        hidden = nn.tanh(dense("hidden", hidden) + back @ dense("told", summary))
        value_input = jnp.concatenate([situation, summary.mean(0)])
        return _scores(hidden, rows, self.prior), _value(value_input, self.width)
