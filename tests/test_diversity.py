"""Rules that spread out over the embedding, against plain float64 NumPy written from their papers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from metaal_jax import acquisition, models, policies
from metaal_jax.acquisition import diversity, gradient_embedding
from metaal_jax.acquisition.clustering import draw
from views import make_view, probabilities, run

K = 5


def pool(seed, **options):
    return make_view(seed, 30, **options)._replace(budget=jnp.float32(100))


VIEWS = {
    "labelled": lambda: pool(0, labelled=(2, 11, 7), queried=(4, 9), padding=3),
    "cold": lambda: pool(1, queried=(4,), padding=2),
}


def plain(view, *, unit):
    """Embedding, real rows and labelled rows in float64."""
    z = np.asarray(view.prediction.embedding[0], np.float64)
    if unit:
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z, np.asarray(view.weight) > 0, [int(i) for i in view.labelled_index if i >= 0]


def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


def check_greedy(view, decision, gain, tolerance=1e-5):
    """Every pick has the largest gain of all rows that were left, given the labelled rows and the picks before it."""
    left = np.asarray(view.available).copy()
    chosen = [int(i) for i in view.labelled_index if i >= 0]
    largest = np.abs(gain(chosen)[left]).max()
    np.testing.assert_allclose(decision.scores[left], gain(chosen)[left], atol=3 * tolerance * largest)
    assert decision.valid.all()
    for pick in decision.index.tolist():
        assert left[pick]
        assert gain(chosen)[pick] >= gain(chosen)[left].max() - 2 * tolerance * largest
        left[pick] = False
        chosen.append(pick)


CENTER = run(acquisition.k_center(k=K))


def test_k_center_takes_the_farthest_row(key):
    view = VIEWS["labelled"]()
    z, _, _ = plain(view, unit=False)
    check_greedy(view, CENTER(key, view), lambda chosen: distances(z, z[chosen]).min(1) ** 2)
    cold = VIEWS["cold"]()
    z, _, _ = plain(cold, unit=False)
    first = set()
    for one in jax.random.split(key, 6):
        picks = CENTER(one, cold).index.tolist()
        first.add(picks[0])
        for t in range(1, K):
            near = distances(z, z[picks[:t]]).min(1)
            assert near[picks[t]] >= near[np.asarray(cold.available)].max() - 1e-4
    assert len(first) > 2  # a cold start begins anywhere


def test_k_center_far_from_the_origin(key):
    view = VIEWS["labelled"]()
    moved = view._replace(prediction=view.prediction._replace(embedding=view.prediction.embedding + 3000.0))
    z, _, _ = plain(moved, unit=False)
    check_greedy(moved, CENTER(key, moved), lambda chosen: distances(z, z[chosen]).min(1) ** 2)


BUILD = run(acquisition.k_medoids(k=K, iterations=0))
MEDOIDS = run(acquisition.k_medoids(k=K))


def test_k_medoids_builds_greedily_and_then_exchanges(key):
    better = 0
    for name, seed in itertools.product(VIEWS, range(4)):
        view = VIEWS[name]()._replace(prediction=make_view(seed, 30).prediction)
        z, real, labelled = plain(view, unit=False)
        between = distances(z[real], z)
        far = distances(z[real], z[real]).max()

        def spread(chosen, between=between, far=far):
            return between[:, chosen].min(1, initial=far).sum()

        def gain(chosen, spread=spread):
            return np.asarray([spread(chosen) - spread([*chosen, i]) for i in range(30)])

        greedy, exchanged = BUILD(key, view), MEDOIDS(key, view)
        check_greedy(view, greedy, gain)
        assert exchanged.valid.all()
        sums = [spread([*labelled, *decision.index.tolist()]) for decision in (greedy, exchanged)]
        assert sums[1] <= sums[0] + 1e-4
        better += sums[1] < sums[0] - 1e-3
    assert better >= 1


def uncertain(probs):
    second, first = np.sort(probs, axis=-1).T[-2:]
    return 1 - (first - second)


def entropy(probs):
    return -(probs * np.log(probs)).sum(-1)


HERDING = {  # rule, its bandwidth (None for the default), what anchors weigh: probabilities [r, c] -> [r]; temperature
    "max": (run(acquisition.max_herding(k=K)), None, None, 1),
    "max, bandwidth": (run(acquisition.max_herding(k=K, bandwidth=0.5)), 0.5, None, 1),
    "uncertain": (run(acquisition.uncertain_herding(k=K)), None, uncertain, 1),
    "uncertain, entropy": (
        run(acquisition.uncertain_herding(k=K, bandwidth=0.5, uncertainty="entropy", temperature=3.0)), 0.5, entropy, 3
    ),
    "uncertain, shrink": (run(acquisition.uncertain_herding(k=K, shrink=True)), "shrink", uncertain, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("rule", HERDING)
def test_herding_raises_the_largest_kernel_value(key, name, rule):
    view, (herding, width, weigh, temperature) = VIEWS[name](), HERDING[rule]
    z, real, labelled = plain(view, unit=True)
    square, weight = distances(z[real], z) ** 2, np.ones(real.sum())
    if width == "shrink" and labelled:
        width = min(np.linalg.norm(z[i] - z[j]) for i, j in itertools.combinations(labelled, 2))
    elif width in (None, "shrink"):
        inner = [np.quantile(np.delete(row, i), 0.1, method="lower") for i, row in enumerate(square[:, real])]
        width = np.sqrt(np.quantile(inner, 0.5, method="lower"))
    if weigh is not None and labelled:
        logits = np.asarray(view.prediction.logits, np.float64)
        weight = weigh(probabilities(logits / temperature).mean(0)[real])
    kernel = np.exp(-square / width**2)

    def gain(chosen):
        covered = kernel[:, chosen].max(1, initial=0.0)
        return weight @ np.maximum(kernel - covered[:, None], 0)

    check_greedy(view, herding(key, view), gain)


def test_uncertain_herding_is_max_herding_where_all_is_uncertain_alike(key):
    labelled = VIEWS["labelled"]()
    alike = labelled._replace(prediction=labelled.prediction._replace(logits=jnp.zeros((3, 30, 4))))
    for view in (VIEWS["cold"](), alike):
        one, other = (HERDING[rule][0](key, view) for rule in ("uncertain", "max"))
        np.testing.assert_array_equal(one.index, other.index)
        np.testing.assert_array_equal(one.scores, other.scores)


def test_uncertain_herding_is_where_learned_policies_start(key):
    start = policies.learned(models.LinearNetwork(prior=policies.prior(uncertain_cover=1.0)), k=K)
    untrained = run(policies.fixed(start, start.init(key)))
    for seed in range(4):
        view = VIEWS["labelled"]()._replace(prediction=make_view(seed, 30).prediction)
        herding, plain_herding = (HERDING[rule][0](key, view).index.tolist() for rule in ("uncertain", "max"))
        assert untrained(key, view).index.tolist() == herding != plain_herding


@pytest.mark.parametrize("labelled", [(3,), (3, 5)])
def test_one_labelled_row_and_its_copy_have_no_distance_to_shrink_to(key, labelled):
    view = pool(2, labelled=labelled)
    embedding = view.prediction.embedding
    view = view._replace(prediction=view.prediction._replace(embedding=embedding.at[:, 5].set(embedding[:, 3])))
    wide, narrow = (HERDING[rule][0](key, view) for rule in ("uncertain", "uncertain, shrink"))
    np.testing.assert_array_equal(narrow.scores, wide.scores)


COVER = run(acquisition.prob_cover(k=K, radius=0.6))


@pytest.mark.parametrize("name", VIEWS)
def test_prob_cover_covers_the_most_new_rows(key, name):
    view = VIEWS[name]()
    z, real, _ = plain(view, unit=True)
    inside = distances(z[real], z) < 0.6

    def gain(chosen):
        return (inside & ~inside[:, chosen].any(1)[:, None]).sum(0).astype(float)

    check_greedy(view, COVER(key, view), gain)


def test_prob_cover_finds_the_largest_pure_radius(key):
    """Two far groups on the unit sphere, whose clusters are certain."""
    rng = np.random.default_rng(0)
    z = np.eye(5)[np.arange(40) % 2] + 0.15 * rng.normal(size=(40, 5))
    view = make_view(0, 40)._replace(budget=jnp.float32(100))
    view = view._replace(prediction=view.prediction._replace(embedding=jnp.asarray(z[None], jnp.float32)))
    z, _, _ = plain(view, unit=True)
    nearest = np.where(np.arange(40)[:, None] % 2 != np.arange(40) % 2, distances(z, z), np.inf).min(1)
    begin = jax.jit(
        lambda key, view, purity: acquisition.prob_cover(k=1, classes=2, purity=purity).begin(key, (), view)
    )
    for purity in (0.5, 0.9, 0.96, 0.999):
        radius = float(begin(key, view, purity)[-1])
        assert (nearest >= radius).mean() >= purity
        assert (nearest >= radius * 1.001).mean() < purity


def test_prob_cover_says_when_its_balls_are_too_small(key):
    rule = acquisition.prob_cover(k=2, radius=1e-4)
    with pytest.raises(ValueError, match="no ball of radius"):
        rule.begin(key, (), pool(0))


@jax.jit
def densities(key, view):
    weighted = acquisition.density_weighted(acquisition.entropy, beta=2.0)
    return acquisition.density(key, view), weighted(key, view), acquisition.entropy(key, view)


def test_density_is_the_mean_cosine(key):
    view = pool(3, padding=4)
    z, real, _ = plain(view, unit=True)
    mean = np.asarray([np.mean([a @ b for b in z[real]]) for a in z])
    density, weighted, entropy = densities(key, view)
    np.testing.assert_allclose(density[real], mean[real], atol=1e-6)
    np.testing.assert_allclose(weighted[real], (entropy * np.maximum(mean, 0) ** 2)[real], atol=1e-5)


DISCRIMINATE = run(acquisition.discriminative(k=4, sub_batches=2))


def plain_odds(z, real, labelled, ridge=0.01):
    """Log-odds of being unlabelled, by a general optimiser."""
    features = z - z[real].mean(0)
    features = np.c_[features / np.sqrt((features[real] ** 2).mean()), np.ones(len(z))]
    mine = np.isin(np.arange(len(z)), labelled)
    weight = real * np.where(mine, 0.5 / (mine & real).sum(), 0.5 / (~mine & real).sum())
    sign = np.where(mine, -1.0, 1.0)

    def loss(w):
        return (weight * np.logaddexp(0, -sign * (features @ w))).sum() + ridge / 2 * (w**2).sum()

    return features @ optimize.minimize(loss, np.zeros(features.shape[1]), tol=1e-10).x


def test_discriminative_fits_anew_after_each_part(key):
    view = VIEWS["labelled"]()
    z, real, labelled = plain(view, unit=False)
    decision = DISCRIMINATE(key, view)
    left = np.asarray(view.available).copy()
    np.testing.assert_allclose(decision.scores[real], plain_odds(z, real, labelled)[real], atol=2e-3)
    for part in np.asarray(decision.index).reshape(2, 2):
        odds = np.where(left, plain_odds(z, real, labelled), -np.inf)
        np.testing.assert_allclose(np.sort(odds[part]), np.sort(odds)[-2:], atol=1e-3)
        left[part] = False
        labelled = [*labelled, *part]
    cold = [DISCRIMINATE(one, VIEWS["cold"]()) for one in jax.random.split(key, 4)]
    assert len({tuple(decision.index[:2].tolist()) for decision in cold}) > 1
    assert not cold[0].scores.any()


def test_draws_follow_the_weights(key):
    weight = np.zeros(700)
    places = [0, 1, 255, 256, 300, 699]
    weight[places] = [1, 2, 3, 4, 5, 6]
    drawn = jax.jit(jax.vmap(draw, in_axes=(0, None)))(jax.random.split(key, 4000), jnp.asarray(weight, jnp.float32))
    counts = np.bincount(drawn, minlength=700)
    assert counts[places].sum() == 4000
    wanted = 4000 * weight[places] / weight.sum()
    assert ((counts[places] - wanted) ** 2 / wanted).sum() < 20.5  # 5 degrees of freedom, p = 0.001
    assert len(set(np.asarray(jax.vmap(draw, in_axes=(0, None))(jax.random.split(key, 50), jnp.zeros(9))))) == 9


BADGE = {covered: run(acquisition.badge(k=4, covered=covered)) for covered in (True, False)}


def plain_gradients(view):
    p = probabilities(np.asarray(view.prediction.logits, np.float64)).mean(0)
    z = np.asarray(view.prediction.embedding, np.float64).mean(0)
    return ((p - np.eye(p.shape[1])[p.argmax(1)])[:, :, None] * z[:, None]).reshape(len(p), -1)


@pytest.mark.parametrize("covered", BADGE)
@pytest.mark.parametrize("name", VIEWS)
def test_badge_draws_by_squared_distance_of_gradients(key, covered, name):
    view = VIEWS[name]()
    gradients = plain_gradients(view)
    centres = [int(i) for i in view.labelled_index if i >= 0] if covered else []
    decision = BADGE[covered](key, view)
    left, log_prob = np.asarray(view.available).copy(), 0.0
    for turn, pick in enumerate(decision.index.tolist()):
        if centres:
            weight = distances(gradients, gradients[centres]).min(1) ** 2
            log_prob += np.log(weight[pick] / weight[left].sum())
        else:
            weight = (gradients**2).sum(1)
            assert pick == np.where(left, weight, -1).argmax()
        if turn == 0:
            real = np.asarray(view.weight) > 0
            np.testing.assert_allclose(decision.scores[real], weight[real], rtol=1e-3, atol=1e-4)
        left[pick] = False
        centres.append(pick)
    np.testing.assert_allclose(decision.log_prob, log_prob, rtol=1e-3)


def test_badge_frequencies(key):
    view = VIEWS["labelled"]()
    gradients = plain_gradients(view)
    weight = distances(gradients, gradients[[2, 11, 7]]).min(1) ** 2 * np.asarray(view.available)
    one = acquisition.badge(k=1)
    first = jax.jit(jax.vmap(lambda key: one.act(key, (), (), view)[0].index[0]))(jax.random.split(key, 5000))
    counts, wanted = np.bincount(first, minlength=30), 5000 * weight / weight.sum()
    some = wanted > 5
    assert counts[weight == 0].sum() == 0
    assert ((counts - wanted)[some] ** 2 / wanted[some]).sum() < 52  # 24 degrees of freedom, p = 0.001


def test_badge_among_equal_gradients(key):
    view = pool(0, labelled=(3,))
    view = view._replace(prediction=jax.tree.map(lambda leaf: leaf[:, :1] + jnp.zeros_like(leaf), view.prediction))
    picks = [BADGE[True](one, view) for one in jax.random.split(key, 30)]
    assert all(len(set(pick.index.tolist())) == 4 for pick in picks)
    assert len({i for pick in picks for i in pick.index.tolist()}) > 25
    np.testing.assert_allclose(picks[0].log_prob, -sum(np.log(29 - t) for t in range(4)), rtol=1e-5)


def test_arguments_are_checked():
    for name, wrong in {
        "k_center: k must be at least 1, got 0": lambda: acquisition.k_center(k=0),
        "k_medoids: anchors": lambda: acquisition.k_medoids(k=1, anchors=0),
        "k_medoids: iterations": lambda: acquisition.k_medoids(k=1, iterations=-1),
        "prob_cover: radius": lambda: acquisition.prob_cover(k=1, radius=0.0),
        "prob_cover: give a radius or at least 2 classes": lambda: acquisition.prob_cover(k=1),
        "prob_cover: purity": lambda: acquisition.prob_cover(k=1, classes=3, purity=1.0),
        "max_herding: bandwidth": lambda: acquisition.max_herding(k=1, bandwidth=-1.0),
        "uncertain_herding: anchors must be at least 1": lambda: acquisition.uncertain_herding(k=1, anchors=0),
        "uncertain_herding: bandwidth": lambda: acquisition.uncertain_herding(k=1, bandwidth=0.0),
        "uncertain_herding: temperature must be positive": lambda: acquisition.uncertain_herding(k=1, temperature=0.0),
        "uncertain_herding: uncertainty must be one of .*, got 'bald'": lambda: acquisition.uncertain_herding(
            k=1, uncertainty="bald"
        ),
        "badge: k": lambda: acquisition.badge(k=0),
        "density_weighted: beta": lambda: acquisition.density_weighted(acquisition.entropy, beta=-1.0),
        "discriminative: ridge": lambda: acquisition.discriminative(k=1, ridge=0.0),
        "discriminative: sub_batches": lambda: acquisition.discriminative(k=1, sub_batches=0),
    }.items():
        with pytest.raises(ValueError, match=name):
            wrong()


@pytest.mark.parametrize("features", [1, 3])
def test_k_center_beside_a_row_far_out(key, features):
    x = np.tile([0.0, 1, 2, 3, 5, 8], 10)
    x[-1] = 1e6
    view = make_view(0, n=60, labelled=(0, 59))._replace(budget=jnp.float32(100))
    z = jnp.asarray(np.repeat(x[None, :, None], features, axis=2), jnp.float32)
    view = view._replace(prediction=view.prediction._replace(embedding=z))
    picks = acquisition.k_center(k=5).act(key, (), (), view)[0].index
    assert np.abs(x[:, None] - x[[0, 59, *picks.tolist()]]).min(1).max() == 0


def test_shortlists_and_blocks_pick_as_the_plain_loops(key, monkeypatch):
    """What large pools go through, on a small one: the same rows, or where they are drawn the same chances."""
    rng = np.random.default_rng(3)
    view = make_view(1, n=120, labelled=(3, 70), queried=(5,), padding=9, capacity=50)
    z = jnp.asarray(
        (rng.normal(size=(4, 6))[rng.integers(0, 4, 120)] + 0.3 * rng.normal(size=(120, 6)))[None], jnp.float32
    )
    view = view._replace(prediction=view.prediction._replace(embedding=z), budget=jnp.float32(1000))
    cold = view._replace(labelled_index=jnp.full(50, -1, jnp.int32), queried=jnp.zeros(120, bool))
    rules = (acquisition.k_center(k=30), acquisition.typical(k=30))

    def picks(view):
        return [rule.act(key, (), rule.begin(key, (), view), view)[0].index for rule in rules]

    plain = jax.jit(picks)(view)
    for module in (diversity, gradient_embedding):
        monkeypatch.setattr(module, "PLAIN", 1)
        monkeypatch.setattr(module, "PENDING", 5)
    monkeypatch.setattr(diversity, "SHORTLIST", 16)
    for one, other in zip(plain, jax.jit(lambda view: picks(view))(view), strict=True):
        np.testing.assert_array_equal(one, other)
    run = jax.jit(lambda key, view: BLOCKS.act(key, (), (), view)[0])
    for name, pool in (("labelled", view), ("cold", cold)):
        decision, total = run(key, pool), 0.0
        gradients, left = plain_gradients(pool), np.asarray(pool.available).copy()
        centres = [i for i in pool.labelled_index.tolist() if i >= 0]
        for pick in decision.index.tolist():
            assert left[pick]
            if centres:
                chance = np.where(left, distances(gradients, gradients[centres]).min(1) ** 2, 0)
                total += np.log(chance[pick] / chance.sum())
            left[pick] = False
            centres.append(pick)
        np.testing.assert_allclose(decision.log_prob, total, rtol=1e-3, err_msg=name)
    # The last of two picks follows the distances to the first.
    few = make_view(4, n=7, members=1, capacity=7)
    second = jax.jit(jax.vmap(lambda key: BADGE_PAIR.act(key, (), (), few)[0].index))(jax.random.split(key, 3000))
    first, gradients = int(second[0, 0]), plain_gradients(few)
    assert (second[:, 0] == first).all()
    counts = np.bincount(second[:, 2], minlength=7)
    wanted = np.zeros(7)
    chance = distances(gradients, gradients[[first]])[:, 0] ** 2
    for i in set(range(7)) - {first}:
        later = np.minimum(chance, distances(gradients, gradients[[i]])[:, 0] ** 2)
        later[[first, i]] = 0
        wanted += 3000 * chance[i] / chance.sum() * later / later.sum()
    common = wanted > 5
    assert (((counts - wanted) ** 2)[common] / wanted[common]).sum() < 25  # at most 5 degrees of freedom


BLOCKS, BADGE_PAIR = acquisition.badge(k=14), acquisition.badge(k=3)
