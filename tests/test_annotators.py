"""Who answers: errors, silence, delay and prices come out as often as told, by row and not by round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import Decision, annotators, tasks

N = 4000
TRUTH = annotators.truth()
PROBLEM = tasks.problem(np.zeros((N, 1)), np.arange(N) % 4, classes=4)
TARGETS = tasks.problem(np.zeros((N, 1)), np.linspace(-1, 1, N))
ALL = Decision(jnp.arange(N), jnp.ones(N, bool), jnp.zeros(()), jnp.zeros(N))


def ask(annotator, key, problem=PROBLEM, decision=ALL):
    init_key, answer_key = jax.random.split(key)
    return annotator.answer(answer_key, annotator.init(init_key, problem), problem, decision)[0]


def near(share, chance):
    return abs(share - chance) < 4 * np.sqrt(max(chance * (1 - chance), 1e-9) / N)


def test_the_truth(key):
    answer = ask(TRUTH, key)
    np.testing.assert_array_equal(answer.y, PROBLEM.y)
    assert answer[1:] == (None,) * 4
    with pytest.raises(ValueError, match="drive ask and tell"):
        ask(TRUTH, key, PROBLEM._replace(y=None))


def test_noise_of_one_rate_and_by_row(key):
    answer = ask(annotators.noisy(TRUTH, rate=0.3, classes=4), key)
    wrong = np.asarray(answer.y != PROBLEM.y)
    assert near(wrong.mean(), 0.3)
    shift = np.asarray((answer.y - PROBLEM.y) % 4)[wrong]
    assert all(abs((shift == s).mean() - 1 / 3) < 0.07 for s in (1, 2, 3))
    hard = np.where(np.arange(N) < N // 2, 0.0, 0.8)
    wrong = np.asarray(ask(annotators.noisy(TRUTH, rate=hard, classes=4), key).y != PROBLEM.y)
    assert not wrong[: N // 2].any()
    assert abs(wrong[N // 2 :].mean() - 0.8) < 0.04


def test_a_confusion_matrix(key):
    matrix = np.asarray([[0.7, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [1, 0, 0, 0]])
    y = np.asarray(ask(annotators.confused(TRUTH, matrix=matrix), key).y)
    got = np.stack([np.bincount(y[np.asarray(PROBLEM.y) == c], minlength=4) / (N / 4) for c in range(4)])
    assert np.abs(got - matrix).max() < 0.06
    assert (got[matrix == 0] == 0).all()


def test_targets_get_normal_noise(key):
    error = np.asarray(ask(annotators.jittered(TRUTH, deviation=0.5), key, TARGETS).y - TARGETS.y)
    assert abs(error.mean()) < 0.04
    assert abs(error.std() - 0.5) < 0.03


def test_silence_delay_and_price(key):
    quiet = ask(annotators.silent(TRUTH, rate=0.25), key)
    assert near(np.mean(np.asarray(quiet.weight) == 0), 0.25)
    late = ask(annotators.busy(TRUTH, rate=0.25), key)
    assert near(np.mean(np.asarray(late.later)), 0.25)
    dear = ask(annotators.priced(annotators.silent(TRUTH, rate=0.25), cost=np.arange(N)), key)
    np.testing.assert_array_equal(dear.cost, np.where(dear.weight > 0, np.arange(N), 0))


def test_errors_belong_to_rows(key):
    """The same row gets the same answer in another round, order and batch; another run draws anew."""
    annotator = annotators.silent(annotators.noisy(TRUTH, rate=0.5, classes=4), rate=0.5)
    init_key, first, second = jax.random.split(key, 3)
    state = annotator.init(init_key, PROBLEM)
    one, state = annotator.answer(first, state, PROBLEM, ALL)
    rows = jnp.asarray([700, 3, 41])
    part = Decision(rows, jnp.ones(3, bool), jnp.zeros(()), jnp.zeros(N))
    two, _ = annotator.answer(second, state, PROBLEM, part)
    np.testing.assert_array_equal(two.y, one.y[rows])
    np.testing.assert_array_equal(two.weight, one.weight[rows])
    assert (ask(annotator, second).y != one.y).mean() > 0.3
    # A delay is drawn anew whenever one asks.
    busy = annotators.busy(TRUTH, rate=0.5)
    assert (ask(busy, first).later != ask(busy, second).later).any()


REFUSED = {
    "noisy: rate must lie between 0 and 1": lambda: annotators.noisy(TRUTH, rate=1.5, classes=3),
    "noisy: rate must lie between": lambda: annotators.noisy(TRUTH, rate=np.asarray([0.1, np.nan]), classes=3),
    "classes must be at least 2": lambda: annotators.noisy(TRUTH, rate=0.1, classes=1),
    "silent: rate": lambda: annotators.silent(TRUTH, rate=-0.1),
    "busy: rate": lambda: annotators.busy(TRUTH, rate=2),
    "cost must not be negative": lambda: annotators.priced(TRUTH, cost=-1.0),
    "deviation must not be negative": lambda: annotators.jittered(TRUTH, deviation=-1.0),
    "the matrix must be square": lambda: annotators.confused(TRUTH, matrix=np.ones((2, 3)) / 3),
    "add up to 1": lambda: annotators.confused(TRUTH, matrix=np.ones((2, 2))),
    r"problem\.y\[2\] is 2.*2 outputs": lambda: ask(annotators.noisy(TRUTH, rate=0.1, classes=2), jax.random.key(0)),
    r"changes classes \(integers\), the answers are float32": lambda: ask(
        annotators.noisy(TRUTH, rate=0.1, classes=2), jax.random.key(0), TARGETS
    ),
    r"changes targets \(floats\)": lambda: ask(annotators.jittered(TRUTH, deviation=1.0), jax.random.key(0)),
    "one for each of the 4000 pool rows": lambda: ask(annotators.silent(TRUTH, rate=np.zeros(3)), jax.random.key(0)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
