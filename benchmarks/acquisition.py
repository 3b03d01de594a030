"""Every query strategy on a pool of 50,000 rows, beside plain NumPy and the libraries that have the same rule.

Claim: k-centre and BADGE are more than 3 times as fast as in scikit-activeml, BatchBALD more than 3 times as fast as in
batchbald_redux; BADGE picks 100 of 20,000 rows of 100 classes and 768 features in less than 1 GB. Rules that only sort
by a score take about as long as NumPy: both are bound by the same exponentials.

    pip install -e '.[peers]'                   # without them there is NumPy alone
    python benchmarks/acquisition.py            # 6 minutes on two cores
    python benchmarks/acquisition.py --quick    # a smoke test
    python benchmarks/acquisition.py --large    # covering and density rules alone, 500 of 100,000 x 512 rows: 2 minutes

The strategies are those of metaal_jax.names: `begin` and `act` of one round of 100 picks as one program. The
pool has 64 features from ten clusters, ten classes, 50 labelled rows and a buffer for 150; its logits are those of ten
draws around a linear head, which is also what rules with a learner refit. batch_bald, epig, error_reduction,
error_reduction_01 and oracle look at 200 random rows, as everywhere; k_medoids, max_herding, uncertain_herding,
prob_cover and typical at all rows but judge them by 1000 random ones, here and in NumPy.

NumPy's forms (references/scores.py, references/rules.py) are float32 and vectorised over the pool. Rules that refit or
draw at random have none (it would take minutes, or there is nothing to compare), nor have mixtures of other rules. The
libraries get what NumPy makes of the same logits: scikit-activeml's utilities, CoreSet, Badge, TypiClust and
DiscriminativeAL (one fit), baal's BALD; at 5,000 rows ProbCover and MaxHerding, which hold a square matrix of the pool
and cover all of it; batchbald_redux in float32, with one thread or all cores, whichever is faster, and its own chunks.
Badge there starts without the labelled rows, and would need 12 GB for the wide pool.

Answers are checked before anything is timed: scores and picks must agree, for BADGE the probability of the draws, for
BatchBALD the picks whose configurations are all summed; where k-means or random rows have a part, the picks must be
worth as much (references/checks.py). What takes more than 8 seconds is timed by its first run alone.

Expected, on two cores: k_center 0.035 s, ten times as fast as scikit-activeml and as fast as NumPy; badge 0.12 s, 27
times as fast; the wide badge 0.21 s and 0.14 GB; batch_bald 0.2 s where batchbald_redux takes 105 s: the draws agree on
most of that pool, whose rows need not be looked at again after each pick; pools without such structure gain less.
typical and typiclust take up to twice as long as their NumPy forms. With --large no rule takes over twice the time of
max_herding (0.8 s): 1.9 for typiclust, 1.8 for typical, 1.6 for k_means, 1.5 or less for the others. Other work on the
machine slows those with many small steps more than max_herding. All figures: benchmarks/results/cpu-2/acquisition.json
and acquisition_large.json.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import harness
import metaal_jax as ml
from harness import Candidate, Times
from metaal_jax.base import Batch, Decision, Policy, PoolView, Prediction, PyTree, pad_batch
from metaal_jax.studies.options import FILE
from references import rules, scores
from references.checks import VALUES, Check, Found, as_good, drawn_rightly, same_picks, same_scores
from references.scores import Pool

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
from metaal_jax.names import STRATEGIES, Given, find

MEMBERS, CLASSES, FEATURES, LABELLED, KEY = 10, 10, 64, 50, 0
NO_PEERS = "{} is not installed, so there are no peers; install them with: pip install -e '.[peers]'"
NUMPY = "numpy"
COVERING = ("max_herding", "uncertain_herding", "typical", "k_center", "typiclust", "k_means", "prob_cover",
            "k_medoids", "cluster_margin", "density_entropy", "discriminative", "badge")  # fmt: skip
FEW = ("margin", "bald", "k_center", "badge", "glister", "max_herding", "discriminative")


@dataclass(frozen=True)
class Config:
    """What is timed, and how often."""

    rules: str = "all"
    """Names of strategies separated by commas."""
    rows: int = 50_000
    """Rows of the pool."""
    k: int = 100
    """Rows to pick."""
    steps: int = 50
    """Steps of the linear head, for rules that refit."""
    square_rows: int = 5_000
    """Rows of the pool for peers that hold a square matrix of it."""
    wide: tuple[int, int, int] = (20_000, 100, 768)
    """Rows, classes and features of the wide pool for BADGE."""
    draws: tuple[int, int, int, int] = (10_000, 100, 10, 10_000)
    """Rows, members, picks and configurations for BatchBALD."""
    epig_rows: int = 1_000
    """Rows of the pool for EPIG, all of them targets."""
    large: bool = False
    """Only the rules that cover the pool or look at its density, beside max_herding, on `size`; they refit nothing."""
    size: tuple[int, int, int] = (100_000, 512, 500)
    """Rows, features and picks for `large`."""
    repeats: int = 3
    """Times that every candidate is run, in turn, after a first run that is checked."""
    patience: float = 8.0
    """Seconds beyond which the first run of a candidate is the only one."""
    quick: bool = False
    """A smoke test: a few strategies, few rows and repeats; nothing is written unless `out` says where."""
    out: Annotated[str | None, FILE] = None
    """Where to write the result; by default benchmarks/results/<device>/acquisition.json."""


def make_learner(classes: int, steps: int) -> ml.Learner:
    model = ml.models.MLP(classes, hidden=(), zero_head=True)
    return ml.learners.fine_tune(model, optimizer=optax.adamw(1e-2, weight_decay=0.1), steps=steps)


def make_view(n: int, *, k: int, members: int, classes: int, features: int, steps: int) -> tuple[PoolView, np.ndarray]:
    """A pool from ten clusters with 50 labelled rows, seen by draws around a linear head; and its classes."""
    rng = np.random.default_rng(KEY)
    cluster = rng.integers(0, 10, n)
    centres = rng.normal(size=(10, features))
    x = jnp.asarray(centres[cluster] + rng.normal(size=(n, features)), jnp.float32)
    y = (cluster + 10 * rng.integers(0, classes // 10, n)).astype(np.int32)
    index = rng.permutation(n)[:LABELLED].astype(np.int32)
    labelled = pad_batch(Batch(x[index], jnp.asarray(y[index]), jnp.ones(LABELLED)), LABELLED + k)
    learner = make_learner(classes, steps)
    meta = learner.init(jax.random.key(KEY), x[:1])
    params = jax.jit(learner.adapt)(jax.random.key(KEY), meta, labelled)
    head = params["params"]["head"]
    spread = 0.1 * rng.normal(size=(members, features, classes))
    logits = jnp.einsum("nd,mdc->mnc", x, head["kernel"] + jnp.asarray(spread, jnp.float32)) + head["bias"]
    view = PoolView(
        x=x, row=jnp.arange(n, dtype=jnp.int32), weight=jnp.ones(n),
        queried=jnp.zeros(n, bool).at[index].set(True), cost=jnp.ones(n),
        prediction=Prediction(logits=logits, embedding=x[None]), labelled=labelled,
        labelled_index=jnp.pad(jnp.asarray(index), (0, k), constant_values=-1), meta=meta, params=params,
        budget=jnp.float32(n), spent=jnp.float32(LABELLED),
    )  # fmt: skip
    return jax.block_until_ready(view), y


def as_numpy(view: PoolView, k: int) -> Pool:
    logits, embedding = (np.asarray(leaf) for leaf in view.prediction)
    labelled = np.asarray(view.labelled_index)[:LABELLED]
    return Pool(logits, embedding[0], np.asarray(view.available), labelled, np.asarray(view.labelled.y)[:LABELLED], k)


def decide(policy: Policy) -> Callable[[PyTree, Array, PoolView], Decision]:
    def run(params: PyTree, key: Array, view: PoolView) -> Decision:
        begin_key, act_key = jax.random.split(key)
        return policy.act(act_key, params, policy.begin(begin_key, params, view), view)[0]

    return run


def ours(policy: Policy, view: PoolView, params: PyTree = ()) -> Candidate:
    return harness.compiled(decide(policy), params, jax.random.key(KEY), view, work=view.row.shape[0])


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


class Bench:
    """Checks and times one group of candidates after the other."""

    def __init__(self, config: Config):
        self.config = config
        self.times: dict[str, Times] = {}
        self.peaks: dict[str, int | None] = {}
        self.pairs: list[tuple[str, str]] = []
        try:
            from references import peers

            self.peers: Any = peers
        except ModuleNotFoundError as error:
            self.peers = None
            print(NO_PEERS.format(error.name))

    def run(self, name: str, candidate: Candidate, others: dict[str, Callable[[], Found]], check: Check | None) -> None:
        """`candidate` under `name`, and others; each is checked by its first run, whose time counts if it is long."""
        candidates = {name: candidate}
        for label, call in others.items():
            candidates[f"{name}, {label}"] = Candidate(call, candidate.work)
        found: dict[str, Found] = {}
        for each, one in candidates.items():
            (result, seconds), self.peaks[each] = harness.peak_bytes(lambda one=one: timed(one.call))
            if isinstance(result, Decision):
                self.decision = result
                assert bool(result.valid.all()), f"{name} left places empty"
                result = Found(np.asarray(result.scores), np.asarray(result.index))
            found[each] = Found(*result)
            picks = found[each].picks
            assert len(set(picks.tolist())) == len(picks), f"{each} picked a row twice"
            if each == name:
                print(f"{name}, {seconds:.2f} s", flush=True)
            if seconds > self.config.patience:
                self.times[each] = Times(np.asarray([seconds]), one.work, one.compile_seconds)
            if each != name and check is not None:
                try:
                    print(f"{each}, {seconds:.2f} s: {check(found[name], found[each])}", flush=True)
                except AssertionError as error:
                    raise SystemExit(f"error: {name} beside {each}: {error}") from None
        again = {each: one for each, one in candidates.items() if each not in self.times}
        self.times |= harness.compare(again, repeats=self.config.repeats, warm=True)
        self.pairs += [(each, name) for each in candidates if each != name]

    def peers_of(self, name: str, pool: Pool, *, square: bool = False) -> dict[str, Callable[[], Found]]:
        """The libraries that have this rule."""
        if self.peers is None:
            return {}
        wanted = [key for key in self.peers.PEERS if key[0] == name and (name in self.peers.SQUARE) == square]
        return {key[1]: lambda key=key: Found(*self.peers.PEERS[key](pool)) for key in wanted}


def plain_of(name: str, pool: Pool) -> dict[str, Callable[[], Found]]:
    def scored() -> Found:
        found = scores.SCORES[name](pool)
        return Found(found, scores.top(pool, found))

    if name in scores.SCORES:
        return {NUMPY: scored}
    return {NUMPY: lambda: Found(None, rules.RULES[name](pool))} if name in rules.RULES else {}


def check_of(name: str, pool: Pool, bench: Bench) -> Check | None:
    if name == "badge":
        return drawn_rightly(pool, lambda: float(bench.decision.log_prob))
    if name in scores.SCORES:
        return same_scores(pool)
    if name in VALUES:
        return as_good(lambda picks: VALUES[name](pool, picks))
    return same_picks()


def every_strategy(bench: Bench, config: Config) -> None:
    """All strategies on one pool."""
    learner = make_learner(CLASSES, config.steps)
    model = ml.models.MLP(CLASSES, hidden=(), zero_head=True)
    loss_learner = ml.learners.loss_predictor(model, optimizer=optax.adamw(1e-2, weight_decay=0.1), steps=config.steps)
    need = Given(k=config.k, rounds=1, classes=CLASSES, learner=learner, refit=learner, loss_learner=loss_learner)
    shape = {"members": MEMBERS, "classes": CLASSES, "features": FEATURES, "steps": config.steps}
    view, y = make_view(config.rows, k=config.k, **shape)
    pool = as_numpy(view, config.k)
    names = list(STRATEGIES) if config.rules == "all" else config.rules.split(",")
    for name in names:
        selection = jax.tree.map(lambda leaf: leaf[:200], Batch(view.x, jnp.asarray(y), view.weight))
        params = (jnp.asarray(y), selection) if STRATEGIES[name].held_out else ()
        others = plain_of(name, pool) | bench.peers_of(name, pool)
        bench.run(name, ours(find(name).build(need), view, params), others, check_of(name, pool, bench))
    if "discriminative" in names:
        policy = ml.acquisition.discriminative(k=config.k, sub_batches=1)
        name = "discriminative, one fit"
        others = {NUMPY: lambda: Found(None, rules.discriminative(pool, parts=1))} | bench.peers_of(name, pool)
        bench.run(name, ours(policy, view), others, same_picks(0.9))
    small, _ = make_view(config.square_rows, k=config.k, **shape)
    pool = as_numpy(small, config.k)
    for name in names:
        if others := bench.peers_of(name, pool, square=True):
            check = as_good(lambda picks, name=name: VALUES[name](pool, picks), 0.9)
            bench.run(f"{name}, {config.square_rows} rows", ours(find(name).build(need), small), others, check)


def wide_badge(bench: Bench, config: Config) -> None:
    """BADGE where the gradients would take n * c * d floats."""
    n, classes, features = config.wide
    view, _ = make_view(n, k=config.k, members=1, classes=classes, features=features, steps=config.steps)
    pool = as_numpy(view, config.k)
    candidate = ours(ml.acquisition.badge(k=config.k), view)
    name = f"badge, {n} x {classes} x {features}"
    bench.run(name, candidate, plain_of("badge", pool), check_of("badge", pool, bench))


def covering(bench: Bench, config: Config) -> None:
    """The rules that cover the pool or look at its density where one pass over the embedding takes long."""
    n, features, k = config.size
    view, _ = make_view(n, k=k, members=1, classes=CLASSES, features=features, steps=config.steps)
    need = Given(k=k, rounds=1, classes=CLASSES, learner=None, refit=None, loss_learner=None)  # type: ignore[arg-type]
    for name in COVERING:
        bench.run(f"{name}, {n} x {features}", ours(find(name).build(need), view), {}, None)
    base = f"{COVERING[0]}, {n} x {features}"
    bench.pairs += [(base, each) for each in bench.times if each != base]
    middle = {name: float(np.median(times.seconds)) for name, times in bench.times.items()}
    for name, seconds in middle.items():
        print(f"{name}: {seconds:.2f} s, {seconds / middle[base]:.2f} times {COVERING[0]}")


def batch_bald(bench: Bench, config: Config) -> None:
    """BatchBALD with the draws of a posterior, beside batchbald_redux."""
    n, members, k, configurations = config.draws
    view, _ = make_view(n, k=k, members=members, classes=CLASSES, features=FEATURES, steps=config.steps)
    pool, others = as_numpy(view, k), {}
    if bench.peers is not None:
        bench.peers.set_threads(pool, configurations)
        others = {"batchbald_redux": lambda: Found(*bench.peers.batch_bald(pool, configurations))}
    exact = sum(CLASSES**chosen <= configurations for chosen in range(k))

    def check(found: Found, reference: Found) -> str:
        same = (found.picks[:exact] == reference.picks[:exact]).all()
        assert same, f"picks {found.picks[:exact]} and {reference.picks[:exact]}"
        return f"the first {exact} picks, whose configurations are all summed, agree"

    policy = ml.acquisition.batch_bald(k=k, configurations=configurations)
    bench.run(f"batch_bald, {n} rows, {members} draws, {k} picks", ours(policy, view), others, check)


def epig(bench: Bench, config: Config) -> None:
    """EPIG on a small pool that is its own target."""
    n = config.epig_rows
    shape = {"members": MEMBERS, "classes": CLASSES, "features": FEATURES, "steps": config.steps}
    view, _ = make_view(n, k=config.k, **shape)
    pool = as_numpy(view, config.k)

    def call() -> Found:
        found = scores.epig(pool)
        return Found(found, scores.top(pool, found))

    policy = ml.acquisition.epig(k=config.k, targets=n)
    bench.run(f"epig, {n} rows and targets", ours(policy, view), {NUMPY: call}, same_scores(pool))


def main() -> None:
    config = harness.options(Config, __doc__)
    if config.quick:
        config = Config(",".join(FEW) if config.rules == "all" else config.rules, 2000, 10, 5, 500, (500, 20, 64),
                        (300, 10, 6, 1000), 200, repeats=1, quick=True, out=config.out)  # fmt: skip
    # One device with all cores: the other side's products take all of them, too.
    harness.start(cores_as_devices=False)
    begin = time.perf_counter()
    bench = Bench(config)
    if config.large:
        covering(bench, config)
    else:
        every_strategy(bench, config)
        wide_badge(bench, config)
        epig(bench, config)
        batch_bald(bench, config)
    harness.finish(
        "acquisition_large" if config.large else "acquisition",
        config,
        begin,
        harness.rows("rows", bench.times, bench.pairs, bench.peaks),
    )


if __name__ == "__main__":
    main()
