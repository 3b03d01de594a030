"""k-means, and the rules that cluster the pool, against their definitions in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from metaal_jax import acquisition
from metaal_jax.acquisition.clustering import nearest
from views import make_view, run

SIZES = (14, 11, 8, 6)  # rows of four groups that k-means cannot mistake


def grouped(seed=0, *, labelled=(), queried=(), spread=0.05, sizes=SIZES, capacity=6):
    """A pool of groups around orthogonal directions, in random order, and the group of each row."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    z = 3 * np.eye(5)[group] + spread * rng.normal(size=(len(group), 5))
    view = make_view(seed, len(group), labelled=labelled, queried=queried, capacity=capacity)
    prediction = view.prediction._replace(embedding=jnp.asarray(z[None], jnp.float32))
    return view._replace(prediction=prediction, budget=jnp.float32(1000)), group


def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


@jax.jit
def cluster(key, x, weight, count, fixed, fixed_used):
    row = jnp.arange(x.shape[0])
    options = {"count": count, "fixed": fixed, "fixed_used": fixed_used}
    return acquisition.lloyd(key, x, weight, row, clusters=4, iterations=25, **options)


def test_kmeans_is_a_fixed_point_of_lloyd(key):
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(60, 3)), rng.integers(0, 3, 60).astype(float)
    fixed, fixed_used = rng.normal(size=(2, 3)), np.asarray([True, False])
    for one, count in zip(jax.random.split(key, 4), (4, 3, 4, 2), strict=True):
        centres, assignment = cluster(one, x, weight, count, fixed, fixed_used)
        centres, assignment = np.asarray(centres, np.float64), np.asarray(assignment)
        used = [*range(count), 4]
        every = np.concatenate([centres, fixed])
        np.testing.assert_array_equal(assignment, np.asarray(used)[distances(x, every[used]).argmin(1)])
        for number in range(count):
            mine = (assignment == number) & (weight > 0)
            np.testing.assert_allclose(centres[number], np.average(x[mine], axis=0, weights=weight[mine]), atol=1e-4)


def test_kmeans_of_fewer_rows_than_clusters(key):
    x = jnp.asarray(np.repeat(np.eye(3), 4, axis=0), jnp.float32)
    none = (jnp.zeros((2, 3)), jnp.zeros(2, bool))
    centres, assignment = cluster(key, x, jnp.ones(12), 4, *none)
    assert np.isfinite(centres).all()
    np.testing.assert_allclose(centres[assignment], x, atol=1e-6)
    centres, _ = cluster(key, x, jnp.zeros(12), 4, *none)
    assert np.isfinite(centres).all()


def test_kmeans_is_as_good_as_scikit_learn(key):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3000, 6)) + 4 * rng.normal(size=(12, 6))[rng.integers(0, 12, 3000)]

    @jax.jit
    def inertia(key, x):
        centres, assignment = acquisition.lloyd(key, x, jnp.ones(3000), jnp.arange(3000), clusters=12, iterations=30)
        return ((x - centres[assignment]) ** 2).sum()

    ours = np.median([inertia(one, jnp.asarray(x, jnp.float32)) for one in jax.random.split(key, 9)])
    theirs = [
        KMeans(12, init="k-means++", n_init=1, max_iter=30, random_state=seed).fit(x).inertia_ for seed in range(9)
    ]
    assert ours < 1.15 * np.median(theirs)  # theirs tries several rows for each start


def test_nearest_in_chunks(key):
    x, centres = jax.random.normal(key, (5000, 4)), jax.random.normal(jax.random.key(1), (7, 4))
    used = jnp.arange(7) != 3
    got = np.asarray(jax.jit(nearest)(x, centres, used))
    between = distances(np.asarray(x, np.float64), np.asarray(centres, np.float64))
    between[:, 3] = np.inf
    np.testing.assert_allclose(between[np.arange(5000), got], between.min(1), rtol=1e-5)
    assert not (got == 3).any()


MEANS = run(acquisition.k_means(k=2))


def test_k_means_takes_the_middle_of_what_is_not_labelled(key):
    _, group = grouped()
    first = [int(np.flatnonzero(group == g)[0]) for g in range(4)]
    view, _ = grouped(labelled=(first[0], first[2]))
    z = np.asarray(view.prediction.embedding[0], np.float64)
    for one in jax.random.split(key, 5):
        decision = MEANS(one, view)
        assert group[np.asarray(decision.index)].tolist() == [1, 3]  # the larger first
        for pick, number in zip(decision.index.tolist(), (1, 3), strict=True):
            centre = z[group == number].mean(0)
            middle = np.where(group == number, np.linalg.norm(z - centre, axis=1), np.inf)
            assert pick == middle.argmin()


def test_k_means_weighed_by_a_scorer(key):
    """Rows without weight attract no centre."""
    view, group = grouped()
    weight = jnp.asarray((group == 3) | (group == 1), jnp.float32)
    rule = run(acquisition.k_means(k=2, scorer=lambda key, view: weight))
    for one in jax.random.split(key, 3):
        assert sorted(group[np.asarray(rule(one, view).index)].tolist()) == [1, 3]


def plain_typical(z, members, neighbours):
    """Members of a cluster, the most typical first."""
    between = distances(z[members], z[members])
    mean = np.sort(between, axis=1)[:, 1 : neighbours + 1].mean(1)
    return [members[i] for i in np.argsort(mean)]


TYPICAL = {
    "many clusters": run(acquisition.typiclust(k=3, neighbours=4)),
    "four clusters": run(acquisition.typiclust(k=3, neighbours=4, clusters=4)),
}


def test_typiclust_takes_the_most_typical_of_the_largest_new_clusters(key):
    rule = TYPICAL["many clusters"]
    _, group = grouped()
    view, _ = grouped(labelled=(int(np.flatnonzero(group == 1)[0]),))
    z = np.asarray(view.prediction.embedding[0], np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    wanted = [plain_typical(z, np.flatnonzero(group == g), 4)[0] for g in (0, 2, 3)]
    picks = [rule(one, view) for one in jax.random.split(key, 8)]
    # One label and three picks make four clusters: k-means mostly finds the four groups.
    assert sum(pick.index.tolist() == wanted for pick in picks) >= 4
    assert all(len(set(group[np.asarray(pick.index)])) >= 2 for pick in picks)


def test_typiclust_leaves_out_small_clusters(key):
    """Two rows far from all others make a cluster, which is asked only when told so."""
    rng = np.random.default_rng(3)
    group = np.repeat([0, 1, 2], (12, 10, 2))
    embedding = jnp.asarray(np.eye(3)[group] + 0.02 * rng.normal(size=(24, 3)), jnp.float32)[None]
    view = make_view(0, n=24, capacity=3)
    view = view._replace(prediction=view.prediction._replace(embedding=embedding))
    asked = {
        smallest: [set(group[np.asarray(rule(one, view).index)].tolist()) for one in jax.random.split(key, 6)]
        for smallest, rule in ((n, run(acquisition.typiclust(k=3, neighbours=3, smallest=n))) for n in (6, 1))
    }
    assert all(2 not in groups for groups in asked[6])
    assert sum(groups == {0, 1, 2} for groups in asked[1]) >= 3


def test_typiclust_returns_to_clusters_with_the_fewest_labels(key):
    """Four groups, five labels: the next picks go to the groups with one label, from the largest."""
    rule = TYPICAL["four clusters"]
    _, group = grouped()
    where = [np.flatnonzero(group == g) for g in range(4)]
    labelled = tuple(int(i) for i in (where[0][0], where[0][1], where[1][0], where[2][0], where[3][0]))
    view, _ = grouped(labelled=labelled)
    z = np.asarray(view.prediction.embedding[0], np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    wanted = [next(i for i in plain_typical(z, where[g], 4) if i not in labelled) for g in (1, 2, 3)]
    picks = [rule(one, view).index.tolist() for one in jax.random.split(key, 8)]
    assert sum(pick == wanted for pick in picks) >= 4


def test_typiclust_of_clusters_larger_than_it_considers(key):
    view, group = grouped(sizes=(40, 20), labelled=(), capacity=2)
    rule = run(acquisition.typiclust(k=6, clusters=2, neighbours=3, considered=2))
    decision = rule(key, view)
    assert decision.valid.all()
    assert len(set(decision.index.tolist())) == 6
    assert np.bincount(group[np.asarray(decision.index)], minlength=2).tolist() == [3, 3]
    few = view._replace(queried=~jnp.isin(view.row, jnp.asarray([5, 30, 31])))
    left = rule(key, few)
    assert sorted(left.index[left.valid].tolist()) == [5, 30, 31]


def test_cluster_balanced_goes_round_the_clusters(key):
    rule = acquisition.cluster_balanced(acquisition.entropy, k=7, clusters=3)
    view, _ = grouped(3, spread=1.5, labelled=(0, 5), queried=(9,))

    @jax.jit
    def both(key, view):
        assignment = rule.begin(key, (), view)
        return assignment, rule.act(key, (), assignment, view)[0]

    clusters = np.asarray(both(key, view)[0])
    places = np.cumsum(clusters[:, None] == np.arange(3), axis=0)[np.arange(39), clusters]
    for left in (np.ones(39, bool), places <= np.asarray([4, 2, 3])[clusters]):
        here = view._replace(queried=view.queried | ~left)
        assignment, decision = both(key, here)
        available, scores = np.asarray(here.available), np.asarray(decision.scores)
        queues = []
        for number in range(3):
            members = np.flatnonzero((np.asarray(assignment) == number) & available)
            queues.append(sorted(members.tolist(), key=lambda i: -scores[i]))
        queues.sort(key=len)
        wanted = [queue[lap] for lap in range(39) for queue in queues if lap < len(queue)][:7]
        picks = decision.index[decision.valid].tolist()
        assert len({len(queue) for queue in queues}) == 3  # otherwise the key decides the order
        assert picks == wanted


def test_arguments_are_checked():
    for name, wrong in {
        "k_means: iterations": lambda: acquisition.k_means(k=1, iterations=0),
        "typiclust: neighbours": lambda: acquisition.typiclust(k=1, neighbours=0),
        "typiclust: clusters": lambda: acquisition.typiclust(k=1, clusters=0),
        "cluster_balanced: clusters": lambda: acquisition.cluster_balanced(acquisition.margin, k=1, clusters=0),
    }.items():
        with pytest.raises(ValueError, match=name):
            wrong()


def test_kmeans_far_from_the_origin_beside_a_row_of_nan(key):
    x = np.asarray([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0], [5.0, 6.0], [np.nan, np.nan]]) + 3000.0
    centres, assignment = acquisition.lloyd(
        key, jnp.asarray(x, jnp.float32), jnp.asarray([1.0, 1, 1, 1, 0]), jnp.arange(5), clusters=2, iterations=5
    )
    assert assignment[0] == assignment[1] != assignment[2] == assignment[3]
    np.testing.assert_allclose(centres[assignment[jnp.asarray([0, 2])]], [[3000, 3000.5], [3005, 3005.5]], atol=1e-3)
