"""Scoring a pool of 50,000 images with a Conv4: whole or in chunks, in and outside a scan, beside PyTorch.

Claim: chunks bound the memory of scoring without slowing it, and convolutions by patches keep their speed inside a
`lax.scan` and under `vmap` over a committee's weights, where XLA's own convolution on a CPU is many times slower; one
model scores about as many rows a second as PyTorch with channels-last images.

    python benchmarks/pool_scoring.py            # a few minutes on two cores
    python benchmarks/pool_scoring.py --quick    # a smoke test

Rows are random 28x28x1 uint8 images, the network the strided Conv4 with 32 filters and group norm. `entropy` is that of
one model, `bald` that of a committee of four, vmapped over the weights. `in scan` scores twice in a `lax.scan`, as a
run's rounds do (scoring in chunks is such a loop already). `lax` is XLA's convolution; where it is slow it is timed on
fewer rows, and ratios are taken by the row. PyTorch gets the same weights; its logits and scores, and the scores of all
candidates, must agree before anything is timed.

Expected: see benchmarks/results/<device>/pool_scoring.json.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import harness
import metaal_jax as ml
from harness import Candidate
from metaal_jax.base import Learner, PyTree

MEMBERS, CLASSES, KEY = 4, 10, 0


@dataclass(frozen=True)
class Config:
    """What is timed, and how often."""

    rows: int = 50_000
    """Rows of the pool."""
    few: int = 5_000
    """Rows for the candidates that are slow or would not fit: the committee whole, XLA's convolution in loops."""
    fewest: int = 500
    """Rows for XLA's convolution under `vmap` over the committee's weights."""
    chunks: tuple[int, ...] = (1000, 5000)
    """Chunk sizes."""
    repeats: int = 5
    """Times that every candidate is run, in turn."""
    quick: bool = False
    """A smoke test: few rows and repeats; nothing is written unless `out` says where."""
    out: str | None = None
    """Where to write the result; by default benchmarks/results/<device>/pool_scoring.json."""


def make_learner(implementation: Any) -> Learner:
    return ml.learners.fine_tune(ml.models.Conv4(CLASSES, implementation=implementation), optimizer=optax.sgd(0.1), steps=0)


def make_score(rule: str, implementation: str, chunk: int | None) -> Callable[[PyTree, Array], Array]:
    """`(weights, rows) -> scores`; for bald the weights have a leading axis of members."""
    learner = make_learner(implementation)
    if rule == "bald":
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

    def add(rule: str, implementation: str, chunk: int | None, rows: int, scanned: bool = False) -> None:
        score = make_score(rule, implementation, chunk)
        weights = committee if rule == "bald" else single
        name = f"{rule}, {implementation}, {'whole' if chunk is None else chunk}" + (", in scan" if scanned else "")
        if scanned:
            found[name] = harness.compiled(in_scan(score), weights, x[:rows], work=2 * rows)
        else:
            found[name] = harness.compiled(score, weights, x[:rows], work=rows)

    for chunk in (None, *config.chunks):
        add("entropy", "patches", chunk, config.rows)
    add("entropy", "patches", None, config.few, scanned=True)
    add("entropy", "lax", None, config.rows)
    add("entropy", "lax", config.chunks[0], config.few)
    add("entropy", "lax", None, config.few, scanned=True)
    add("bald", "patches", None, config.few)
    add("bald", "patches", config.chunks[0], config.rows)
    add("bald", "patches", None, config.few, scanned=True)
    add("bald", "lax", None, config.fewest)
    add("bald", "lax", None, config.fewest, scanned=True)
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

    return Conv4().eval().to(harness.torch_device(), memory_format=torch.channels_last)


def torch_candidates(config: Config, committee: PyTree, x: np.ndarray) -> dict[str, Candidate]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
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
            for rows in pool.split(chunk):
                log_probs = torch.stack([network(rows).log_softmax(-1) for network in networks])
                mean = log_probs.logsumexp(0) - np.log(MEMBERS)
                scores.append(entropy_of(mean) - entropy_of(log_probs).mean(0))
            return torch.cat(scores).cpu().numpy()

    with torch.inference_mode():
        theirs = networks[0](pool[:100]).cpu().numpy()
    single = jax.tree.map(lambda leaf: leaf[0], committee)
    ours = np.asarray(jax.jit(make_learner("patches").predict)(single, jnp.asarray(x[:100])).logits[0])
    np.testing.assert_allclose(theirs, ours, atol=1e-4, err_msg="PyTorch's logits differ")
    found = {f"entropy, torch, {chunk}": harness.called(entropy, chunk, work=config.rows) for chunk in config.chunks}
    found[f"bald, torch, {config.chunks[0]}"] = harness.called(bald, config.chunks[0], work=config.rows)
    return found


def main() -> None:
    config = harness.options(Config, __doc__)
    if config.quick:
        config = Config(600, 200, 100, (200,), 2, quick=True, out=config.out)
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
    few = {}
    for name, candidate in candidates.items():
        rule = name.partition(",")[0]
        scores = np.asarray(candidate.call())
        few.setdefault(rule, scores)
        rows = min(len(scores), len(few[rule]))
        np.testing.assert_allclose(scores[:rows], few[rule][:rows], atol=1e-4, err_msg=f"{name} differs")
    print(f"scores of all {len(candidates)} candidates agree to 1e-4 with the first of their rule")
    times = harness.compare(candidates, repeats=config.repeats)
    first, last = config.chunks[0], config.chunks[-1]
    pairs = [
        ("entropy, patches, whole", f"entropy, patches, {first}"),
        ("entropy, patches, whole", f"entropy, patches, {last}"),
        ("entropy, patches, whole", "entropy, patches, whole, in scan"),
        ("entropy, lax, whole", "entropy, patches, whole"),
        ("entropy, lax, whole, in scan", "entropy, patches, whole, in scan"),
        ("bald, lax, whole", "bald, patches, whole"),
        ("bald, lax, whole, in scan", "bald, patches, whole, in scan"),
        (f"entropy, patches, {first}", f"entropy, patches, {first}, all devices"),
        (f"entropy, torch, {first}", f"entropy, patches, {first}"),
        (f"entropy, torch, {first}", f"entropy, patches, {first}, all devices"),
        (f"bald, torch, {first}", f"bald, patches, {first}"),
    ]
    peaks = {name: harness.peak_bytes(candidate.call) for name, candidate in candidates.items()}
    harness.finish("pool_scoring", config, begin, harness.rows("rows", times, pairs, peaks))


if __name__ == "__main__":
    main()
