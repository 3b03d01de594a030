"""Scoring a pool of 50,000 images with a Conv4: whole or in chunks, in and outside a scan, beside PyTorch.

Claim: chunks that fit the cache score several times as fast as the whole pool at once, in a small part of its memory.
For one model PyTorch's best (chunks of 250) is faster than ours, 1.4 times; a committee is scored somewhat faster here.
XLA's convolution and patches are about equally fast in chunks, except under `vmap` over a committee's weights, where
XLA's becomes a grouped convolution and patches are twice as fast.

    python benchmarks/pool_scoring.py            # 3 minutes on two cores
    python benchmarks/pool_scoring.py --quick    # a smoke test

Rows are random 28x28x1 uint8 images, the network the strided Conv4 with 32 filters and group norm. `entropy` is that of
one model, `bald` that of a committee of four, vmapped over the weights. `in scan` scores twice in a `lax.scan`, as a
run's rounds do (scoring in chunks is such a loop already); `members in turn` maps over the members instead of vmapping
them. `patches` and `lax` are the implementations of `Conv4`. What would not fit the memory is timed on fewer rows, and
ratios are taken by the row. PyTorch (channels last) gets the same weights, and one thread or all cores, whichever is
faster; its logits, and the scores of all candidates, must agree before anything is timed.

Expected, on two cores, rows a second of one model in chunks of 250, of 1000, and whole: patches 54,000, 34,000, 7,000;
XLA's convolution 60,000, 38,000, 9,000; PyTorch 78,000, 28,000. Of the committee in chunks of 1000: patches 8,800,
either with members in turn 8,900, PyTorch 7,000. All figures: benchmarks/results/cpu-2/pool_scoring.json.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import harness
import metaal_jax as ml
from harness import Candidate
from metaal_jax.base import Learner, Prediction, PyTree
from metaal_jax.studies.options import FILE

MEMBERS, CLASSES, KEY = 4, 10, 0


@dataclass(frozen=True)
class Config:
    """What is timed, and how often."""

    rows: int = 50_000
    """Rows of the pool, for one model."""
    committee_rows: int = 10_000
    """Rows for the committee."""
    few: int = 2_000
    """Rows for what would not fit the memory otherwise: the committee whole, and the whole pool in a scan."""
    chunks: tuple[int, ...] = (1000, 250, 5000)
    """Chunk sizes for one model; the first is also that of the committee."""
    repeats: int = 3
    """Times that every candidate is run, in turn, after a first run that is checked."""
    quick: bool = False
    """A smoke test: few rows and repeats; nothing is written unless `out` says where."""
    out: Annotated[str | None, FILE] = None
    """Where to write the result; by default benchmarks/results/<device>/pool_scoring.json."""


def make_learner(implementation: Any) -> Learner:
    model = ml.models.Conv4(CLASSES, implementation=implementation)
    return ml.learners.fine_tune(model, optimizer=optax.sgd(0.1), steps=0)


def members_in_turn(learner: Learner) -> Callable[[PyTree, Array], Prediction]:
    """A committee's `predict` by `lax.map` over the members instead of `vmap`."""

    def predict(params: PyTree, x: Array, /) -> Prediction:
        each = jax.lax.map(lambda weights: learner.predict(weights, x), params)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), each)

    return predict


def make_score(rule: str, implementation: str, chunk: int | None, in_turn: bool) -> Callable[[PyTree, Array], Array]:
    """`(weights, rows) -> scores`; for bald the weights have a leading axis of members."""
    learner = make_learner(implementation)
    if rule == "bald" and in_turn:
        learner = learner._replace(predict=members_in_turn(learner))
    elif rule == "bald":
        learner = ml.learners.committee(learner, members=MEMBERS, source="initialisation")
    scorer = getattr(ml.acquisition, rule)

    def score(weights: PyTree, x: Array) -> Array:
        row = jnp.arange(x.shape[0])
        return ml.acquisition.score_pool(jax.random.key(KEY), learner, weights, scorer, x, row, chunk=chunk)

    return score


def in_scan(score: Callable[[PyTree, Array], Array]) -> Callable[[PyTree, Array], Array]:
    """Scores twice, with other weights the second time (nothing may be hoisted); gives the first scores."""

    def scanned(weights: PyTree, x: Array) -> Array:
        def body(weights: PyTree, _: None) -> tuple[PyTree, Array]:
            scores = score(weights, x)
            return jax.tree.map(lambda leaf: leaf * (1 + 1e-3 * jnp.tanh(scores[0])), weights), scores

        return jax.lax.scan(body, weights, length=2)[1][0]

    return scanned


def jax_candidates(config: Config, committee: PyTree, x: Array) -> dict[str, Candidate]:
    single = jax.tree.map(lambda leaf: leaf[0], committee)
    found: dict[str, Candidate] = {}

    def add(
        rule: str, implementation: str, chunk: int | None, rows: int, *, scanned: bool = False, in_turn: bool = False
    ) -> None:
        score = make_score(rule, implementation, chunk, in_turn)
        weights = committee if rule == "bald" else single
        name = f"{rule}, {implementation}, {chunk or ('whole' if rows == config.rows else f'whole {rows}')}"
        name += ", members in turn" * in_turn + ", in scan" * scanned
        function, work = (in_scan(score), 2 * rows) if scanned else (score, rows)
        found[name] = harness.compiled(function, weights, x[:rows], work=work)

    first = config.chunks[0]
    add("entropy", "patches", None, config.rows)
    add("entropy", "patches", first, config.rows)
    add("entropy", "lax", first, config.rows)
    add("bald", "patches", first, config.committee_rows)
    if config.quick:
        return found
    for chunk in config.chunks[1:]:
        add("entropy", "patches", chunk, config.rows)
        add("entropy", "lax", chunk, config.rows)
    add("entropy", "lax", None, config.rows)
    for implementation in ("patches", "lax"):
        add("entropy", implementation, None, config.few)
        add("entropy", implementation, None, config.few, scanned=True)
        add("bald", implementation, None, config.few)
        add("bald", implementation, None, config.few, scanned=True)
        add("bald", implementation, first, config.committee_rows, in_turn=True)
    if jax.local_device_count() > 1:
        scorer = ml.parallel.pool_scorer(make_learner("patches"), ml.acquisition.entropy, chunk=config.chunks[0])
        row, key = jnp.arange(config.rows), jax.random.key(KEY)
        name = f"entropy, patches, {config.chunks[0]}, all devices"
        found[name] = harness.called(scorer, key, single, x, row, work=config.rows)
    return found


def torch_network(weights: PyTree) -> Any:
    """The same network in PyTorch, with one model's weights."""
    import torch
    from torch import nn

    class Conv4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
            size, self.pads = 28, []
            for block in range(4):
                conv, norm = weights["params"][f"Conv_{block}"], weights["params"][f"GroupNorm_{block}"]
                channels, features = conv["kernel"].shape[2:]
                after = -(-size // 2)
                total = (after - 1) * 2 + 3 - size
                # SAME padding puts the odd pixel at the end; a symmetric one costs nothing in the convolution.
                self.pads.append((0, 1, 0, 1) if total == 1 else None)
                layer = nn.Conv2d(channels, features, 3, stride=2, padding=0 if total == 1 else 1)
                layer.weight.data = torch.tensor(np.asarray(conv["kernel"]).transpose(3, 2, 0, 1))
                layer.bias.data = torch.tensor(np.asarray(conv["bias"]))
                group = nn.GroupNorm(8, features, eps=1e-6)
                group.weight.data = torch.tensor(np.asarray(norm["scale"]))
                group.bias.data = torch.tensor(np.asarray(norm["bias"]))
                self.convs.append(layer)
                self.norms.append(group)
                size = after
            head = weights["params"]["head"]
            self.head = nn.Linear(head["kernel"].shape[0], CLASSES)
            self.head.weight.data = torch.tensor(np.asarray(head["kernel"]).T.copy())
            self.head.bias.data = torch.tensor(np.asarray(head["bias"]))

        def forward(self, x: Any) -> Any:
            x = x.permute(0, 3, 1, 2).float() / 255
            for pad, conv, norm in zip(self.pads, self.convs, self.norms, strict=True):
                x = x if pad is None else nn.functional.pad(x, pad)
                x = nn.functional.relu_(norm(conv(x)))
            return self.head(x.permute(0, 2, 3, 1).flatten(1))

    return Conv4().eval().requires_grad_(False).to(harness.torch_device(), memory_format=torch.channels_last)


def torch_candidates(config: Config, committee: PyTree, x: np.ndarray) -> dict[str, Candidate]:
    import torch

    device = harness.torch_device()
    networks = [torch_network(jax.tree.map(lambda leaf, i=i: leaf[i], committee)) for i in range(MEMBERS)]
    pool = torch.tensor(x, device=device)

    def entropy_of(log_probs: Any) -> Any:
        return -(log_probs.exp() * log_probs).sum(-1)

    def entropy(chunk: int) -> np.ndarray:
        with torch.inference_mode():
            scores = [entropy_of(networks[0](rows).log_softmax(-1)) for rows in pool.split(chunk)]
            return torch.cat(scores).cpu().numpy()

    def bald(chunk: int) -> np.ndarray:
        scores = []
        with torch.inference_mode():
            for rows in pool[: config.committee_rows].split(chunk):
                log_probs = torch.stack([network(rows).log_softmax(-1) for network in networks])
                mean = log_probs.logsumexp(0) - np.log(MEMBERS)
                scores.append(entropy_of(mean) - entropy_of(log_probs).mean(0))
            return torch.cat(scores).cpu().numpy()

    with torch.inference_mode():
        theirs = networks[0](pool[:100]).cpu().numpy()
    single = jax.tree.map(lambda leaf: leaf[0], committee)
    ours = np.asarray(jax.jit(make_learner("patches").predict)(single, jnp.asarray(x[:100])).logits[0])
    np.testing.assert_allclose(theirs, ours, atol=1e-4, err_msg="PyTorch's logits differ")
    few = pool[: config.few]
    harness.fastest_threads(lambda: entropy_of(networks[0](few).log_softmax(-1)))
    found = {f"entropy, torch, {chunk}": harness.called(entropy, chunk, work=config.rows) for chunk in config.chunks}
    rows = min(config.committee_rows, config.rows)
    found[f"bald, torch, {config.chunks[0]}"] = harness.called(bald, config.chunks[0], work=rows)
    return found


def main() -> None:
    config = harness.options(Config, __doc__)
    if config.quick:
        config = Config(400, 200, 100, (100,), 2, quick=True, out=config.out)
    harness.start()
    begin = time.perf_counter()
    images = np.random.default_rng(0).integers(0, 256, (config.rows, 28, 28, 1), dtype=np.uint8)
    x = jnp.asarray(images)
    init = jax.vmap(make_learner("patches").init, in_axes=(0, None))
    committee = jax.jit(init)(jax.random.split(jax.random.key(1), MEMBERS), x[:1])
    candidates = jax_candidates(config, committee, x)
    try:
        candidates |= torch_candidates(config, committee, images)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print(harness.NO_TORCH)
    few: dict[str, np.ndarray] = {}
    peaks: dict[str, int | None] = {}
    for name, candidate in candidates.items():
        rule = name.partition(",")[0]
        result, peaks[name] = harness.peak_bytes(candidate.call)
        scores = np.asarray(result)
        few.setdefault(rule, scores)
        rows = min(len(scores), len(few[rule]))
        np.testing.assert_allclose(scores[:rows], few[rule][:rows], atol=1e-4, err_msg=f"{name} differs")
    print(f"scores of all {len(candidates)} candidates agree to 1e-4 with the first of their rule")
    times = harness.compare(candidates, repeats=config.repeats, warm=True)
    first = config.chunks[0]
    kinds, few = ("patches", "lax"), f"whole {config.few}"
    pairs = []
    for kind in kinds:
        pairs += [(f"entropy, {kind}, whole", f"entropy, {kind}, {chunk}") for chunk in config.chunks]
        pairs += [(f"{rule}, {kind}, {few}", f"{rule}, {kind}, {few}, in scan") for rule in ("entropy", "bald")]
        pairs += [(f"bald, {kind}, {first}", f"bald, {kind}, {first}, members in turn")]
        pairs += [(f"entropy, torch, {chunk}", f"entropy, {kind}, {chunk}") for chunk in config.chunks]
        pairs += [(f"bald, torch, {first}", f"bald, {kind}, {first}{how}") for how in ("", ", members in turn")]
    for rule in ("entropy", "bald"):
        for size in ("whole", few, f"{few}, in scan", *config.chunks, f"{first}, members in turn"):
            pairs += [(f"{rule}, lax, {size}", f"{rule}, patches, {size}")]
    for other in ("patches", "torch"):
        pairs += [(f"entropy, {other}, {first}", f"entropy, patches, {first}, all devices")]
    harness.finish("pool_scoring", config, begin, harness.rows("rows", times, pairs, peaks))


if __name__ == "__main__":
    main()
