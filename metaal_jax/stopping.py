"""When to stop asking: rules that read a few numbers of every round, inside the compiled loop or on its trace.

`active_learner(..., stop=rule)` computes the `Signals` of each round, records them in the trace and, once the rule says
so, asks for nothing more: the remaining rounds of the scan are masked. `stops(rule, trace.signals)` says afterwards
where another rule would have stopped.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.uncertainty import entropy_of
from metaal_jax.base import Decision, PoolView, PyTree, is_classes, require, require_classes
from metaal_jax.losses import consensus


class Signals(NamedTuple):
    """What stopping rules may look at: a round's numbers before its answers, each `[]`, `[rounds]` in a trace.

    `agreement`, `changed` and `uncertainty` are about classes, and NaN where labels are targets.

    Attributes:
      count: int32, labelled rows.
      spent, budget: float32, in units of `Problem.cost`.
      agreement: Cohen's kappa of the pool's predicted classes with those of the round before; 0 in the first round.
      changed: share of the pool's rows whose predicted class changed; 1 in the first round.
      uncertainty: mean entropy in nats over the rows not asked yet; 0 where none is left.
      gain: largest score per unit of cost among the rows that the policy wants to ask for, for scores that are not
        divided by the cost already (`acquisition.per_cost`); -inf where there is none.
    """

    count: Array  # type: ignore[assignment]
    spent: Array
    budget: Array
    agreement: Array
    changed: Array
    uncertainty: Array
    gain: Array


class StoppingInitFn(Protocol):
    """`() -> state`."""

    def __call__(self) -> PyTree: ...  # noqa: D102


class StoppingUpdateFn(Protocol):
    """`(state, signals) -> (state, stop bool [])`, once a round, before its questions are asked."""

    def __call__(self, state: PyTree, signals: Signals, /) -> tuple[PyTree, Array]: ...  # noqa: D102


class StoppingRule(NamedTuple):
    """Says when to stop.

    Attributes:
      init: see `StoppingInitFn`.
      update: see `StoppingUpdateFn`.
      needs_classes: name of the rule if it looks at predicted classes and is refused for targets, else `""`.
    """

    init: StoppingInitFn
    update: StoppingUpdateFn
    needs_classes: str = ""


class StoppingState(NamedTuple):
    """What the loop carries for a stopping rule.

    Attributes:
      rule: the rule's state.
      classes: int32 `[n]`, the pool's predicted classes in the round before, -1 before the first.
      stopped: bool `[]`; once set it stays.
    """

    rule: PyTree
    classes: Array
    stopped: Array


def observe(view: PoolView, decision: Decision, before: Array) -> tuple[Signals, Array]:
    """The signals of a round and the pool's predicted classes, given those of the round before (-1 for none)."""
    if is_classes(view.labelled.y):
        agreement, changed, uncertainty, classes = _of_classes(view, before)
    else:
        agreement = changed = uncertainty = jnp.full((), jnp.nan)
        classes = before
    cost = view.cost[decision.index]
    # What costs nothing is worth any price.
    wanted = jnp.where(cost > 0, decision.scores[decision.index] / jnp.where(cost > 0, cost, 1.0), jnp.inf)
    signals = Signals(
        count=(view.labelled_index >= 0).sum(dtype=jnp.int32),
        spent=view.spent,
        budget=view.budget,
        agreement=agreement,
        changed=changed,
        uncertainty=uncertainty,
        gain=jnp.where(decision.valid, wanted, -jnp.inf).max(),
    )
    return signals, classes


def _of_classes(view: PoolView, before: Array) -> tuple[Array, Array, Array, Array]:
    """Agreement, share of changed rows, mean entropy, and the predicted classes, int32 `[n]`."""
    log_probs = consensus(view.prediction.logits)
    finite = jnp.isfinite(log_probs.max(-1))
    classes = log_probs.argmax(-1).astype(jnp.int32)
    real, first = (view.weight > 0) & finite, (before < 0).all()
    total = jnp.maximum(real.sum(), 1)
    same = (real & (classes == before)).sum() / total
    shares = [
        jnp.zeros(log_probs.shape[-1]).at[labels].add(real) / total for labels in (classes, jnp.maximum(before, 0))
    ]
    chance = shares[0] @ shares[1]
    kappa = jnp.where(chance < 1, (same - chance) / jnp.where(chance < 1, 1 - chance, 1.0), 1.0)
    left = real & ~view.queried
    uncertainty = jnp.where(left, entropy_of(log_probs), 0.0).sum() / jnp.maximum(left.sum(), 1)
    return jnp.where(first, 0.0, kappa), jnp.where(first, 1.0, 1.0 - same), uncertainty, classes


def start(rule: StoppingRule, rows: int) -> StoppingState:
    """The memory of a rule before the first round, for a pool of `rows` rows."""
    return StoppingState(rule=rule.init(), classes=jnp.full(rows, -1, jnp.int32), stopped=jnp.zeros((), bool))


def advance(
    rule: StoppingRule, memory: StoppingState, view: PoolView, decision: Decision
) -> tuple[StoppingState, Signals]:
    """One round of a rule inside the loop; raises `ValueError` for a rule about classes where labels are targets."""
    if rule.needs_classes:
        require_classes(f"stopping.{rule.needs_classes}", view)
    signals, classes = observe(view, decision, memory.classes)
    state, stop = rule.update(memory.rule, signals)
    return StoppingState(rule=state, classes=classes, stopped=memory.stopped | stop), signals


def stops(rule: StoppingRule, signals: Signals) -> Array:
    """Whether a rule has stopped, in each round of a trace: bool `[rounds]`, True from the first stop on.

    Args:
      rule: any rule.
      signals: leaves `[rounds]`, such as `trace.signals`; vmap over runs.

    >>> import jax.numpy as jnp
    >>> from metaal_jax import stopping
    >>> zeros = jnp.zeros(4)
    >>> signals = stopping.Signals(zeros, zeros, zeros, zeros, zeros, jnp.array([2.0, 0.9, 0.4, 1.1]), zeros)
    >>> stopping.stops(stopping.certain(uncertainty=0.5), signals)
    Array([False, False,  True,  True], dtype=bool)
    """

    def round(carry: tuple[PyTree, Array], now: Signals) -> tuple[tuple[PyTree, Array], Array]:
        state, stopped = carry
        state, stop = rule.update(state, now)
        return (state, stopped | stop), stopped | stop

    return lax.scan(round, (rule.init(), jnp.zeros((), bool)), jax.tree.map(jnp.asarray, signals))[1]


def never() -> StoppingRule:
    """Never stops; makes the loop record the signals."""
    return _of_now(lambda now: jnp.zeros((), bool))


def bought(*, labels: int | Array | None = None, spent: float | Array | None = None) -> StoppingRule:
    """Stops at a number of labels, or at an amount spent (in units of cost), whichever comes first.

    Raises:
      ValueError: where neither is given, or one is negative.
    """
    if labels is None and spent is None:
        raise ValueError("bought: give labels, spent or both")
    for name, value in (("labels", labels), ("spent", spent)):
        require(value is None or value >= 0, f"bought: {name} must not be negative, got {value}")

    def stop(now: Signals) -> Array:
        enough = jnp.zeros((), bool)
        if labels is not None:
            enough |= now.count >= labels
        return enough if spent is None else enough | (now.spent >= spent)

    return _of_now(stop)


def stabilised(*, agreement: float | Array = 0.99, rounds: int = 3) -> StoppingRule:
    """Stops when successive models agree: their mean kappa over the last `rounds` rounds is at least `agreement`.

    Raises:
      ValueError: for `rounds < 1` or an agreement above 1.

    Reference: Bloodgood, Vijay-Shanker: A Method for Stopping Active Learning Based on Stabilizing Predictions, 2009.
    """
    require(rounds >= 1, f"stabilised: rounds must be at least 1, got {rounds}")
    require(agreement <= 1, f"stabilised: agreement must be at most 1, got {agreement}")

    def update(last: Array, now: Signals) -> tuple[Array, Array]:
        last = jnp.roll(last, 1).at[0].set(now.agreement)
        # Rounds that were not there yet count -inf. The tolerance is for the rounding of a mean of equal numbers.
        return last, last.mean() >= agreement - 1e-6

    return StoppingRule(init=lambda: jnp.full(rounds, -jnp.inf), update=update, needs_classes="stabilised")


def unchanged(*, share: float | Array = 0.0, rounds: int = 2) -> StoppingRule:
    """Stops when at most a share of the pool's rows changed their predicted class in each of the last `rounds` rounds.

    Raises:
      ValueError: for `rounds < 1` or a share outside [0, 1].

    Reference: Zhu, Wang, Hovy: Multi-Criteria-Based Strategy to Stop Active Learning for Data Annotation, 2008.
    """
    require(rounds >= 1, f"unchanged: rounds must be at least 1, got {rounds}")
    require((share >= 0) & (share <= 1), f"unchanged: share must lie in [0, 1], got {share}")

    def update(quiet: Array, now: Signals) -> tuple[Array, Array]:
        quiet = jnp.where(now.changed <= share + 1e-6, quiet + 1, 0)
        return quiet, quiet >= rounds

    return StoppingRule(init=lambda: jnp.zeros((), jnp.int32), update=update, needs_classes="unchanged")


def certain(*, uncertainty: float | Array) -> StoppingRule:
    """Stops when the mean entropy of the rows not asked yet is at most `uncertainty` nats: overall uncertainty.

    Raises:
      ValueError: for a negative threshold.

    Reference: Zhu, Wang, Hovy: Learning a Stopping Criterion for Active Learning, 2008.
    """
    require(uncertainty >= 0, f"certain: uncertainty must not be negative, got {uncertainty}")
    return _of_now(lambda now: now.uncertainty <= uncertainty)._replace(needs_classes="certain")


def not_worth_it(*, worth: float | Array) -> StoppingRule:
    """Stops when the expected gain falls below the cost: `worth * score < cost` for every row the policy would ask for.

    Made for policies whose scores are expected gains, such as `acquisition.expected_error_reduction`; `worth` is what
    one unit of the score is worth in units of cost. Scores must not be divided by the cost already, as
    `acquisition.per_cost` does.

    Raises:
      ValueError: for a worth that is not positive.

    Reference: Kapoor, Horvitz, Basu: Selective Supervision, 2007.
    """
    require(worth > 0, f"not_worth_it: worth must be > 0, got {worth}")
    return _of_now(lambda now: worth * now.gain < 1)


def any_of(rules: Sequence[StoppingRule]) -> StoppingRule:
    """Stops when one of the rules does."""
    return _together("any_of", rules, jnp.any)


def all_of(rules: Sequence[StoppingRule]) -> StoppingRule:
    """Stops when all of the rules do in the same round."""
    return _together("all_of", rules, jnp.all)


def _of_now(stop: Callable[[Signals], Array]) -> StoppingRule:
    return StoppingRule(init=lambda: (), update=lambda state, now: (state, stop(now)))


def _together(name: str, rules: Sequence[StoppingRule], how: Callable[[Array], Array]) -> StoppingRule:
    rules = tuple(rules)
    require(rules, f"{name}: no rules given")

    def update(states: PyTree, now: Signals) -> tuple[PyTree, Array]:
        pairs = [rule.update(state, now) for rule, state in zip(rules, states, strict=True)]
        return tuple(state for state, _ in pairs), how(jnp.stack([stop for _, stop in pairs]))

    about = next((rule.needs_classes for rule in rules if rule.needs_classes), "")
    return StoppingRule(init=lambda: tuple(rule.init() for rule in rules), update=update, needs_classes=about)
