"""One meta-step of MAML through its inner steps: tasks a second and memory, beside PyTorch.

Claim: compiled, a second-order meta-step handles more tasks a second than the same step in PyTorch, be it written as a
loop over tasks, one process a core, `torch.func.vmap`, or with higher, TorchOpt or learn2learn; and with rematerialised
inner steps its memory hardly grows with their number.

    python benchmarks/meta_step.py            # about six minutes on two cores
    python benchmarks/meta_step.py --quick    # a smoke test, one minute

All start from the same parameters and the same tasks (5-way 1-shot, 15 query rows a class, strided Conv4 with batch
norm on the batch's own statistics), and their losses and meta-gradients are compared before anything is timed.
Libraries that are not installed are left out.

Expected on two CPU cores: 1.85 times the best PyTorch form (a loop in two processes) with 32 filters, 1.3 to 1.5 times
with 64. All figures: benchmarks/results/.
"""

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import harness
import metaal_jax as ml
from harness import Candidate, Quartiles, Times
from metaal_jax.base import PyTree, Task
from metaal_jax.outer import MetaState, OuterLoop
from metaal_jax.studies.options import FILE
from metaal_jax.tasks import ClassData

WAYS, SHOTS, QUERIES, SIZE, KEY = 5, 1, 15, 28, 0
RATE, OUTER_RATE, DECAY = 0.1, 1e-3, 0.9
TOLERANCE = 1e-2
SAMPLER = ml.tasks.few_shot(ways=WAYS, shots=SHOTS, queries=QUERIES)
IN_TURN, ALL = "jax, in turn", "jax, in turn, all devices"


@dataclass(frozen=True)
class Config:
    """What is timed, and how often."""

    filters: tuple[int, ...] = (32, 64)
    """Filters of the networks."""
    tasks: int = 32
    """Tasks of a meta-step."""
    steps: int = 5
    """Inner steps."""
    long_steps: int = 15
    """Inner steps whose memory is compared with that of `steps`."""
    repeats: int = 7
    """Times that every candidate is run, in turn."""
    quick: bool = False
    """A smoke test: a small network, few tasks, steps and repeats; nothing is written unless `out` says where."""
    out: Annotated[str | None, FILE] = None
    """Where to write the result; by default benchmarks/results/<device>/meta_step.json."""


class Found(NamedTuple):
    """What a meta-step found: the mean query loss, and the meta-gradient in the order and layout of PyTorch."""

    loss: float
    grads: list[np.ndarray]


class Start(NamedTuple):
    """What every candidate starts from."""

    key: Array
    state: MetaState
    data: ClassData


def make_data() -> ClassData:
    """Twenty classes of noisy images around a random one."""
    mean_key, noise_key = jax.random.split(jax.random.key(KEY))
    classes, rows = 20, SHOTS + QUERIES
    mean = jax.random.uniform(mean_key, (classes, 1, SIZE, SIZE, 1))
    x = 0.5 * mean + 0.5 * jax.random.uniform(noise_key, (classes, rows, SIZE, SIZE, 1))
    x = np.asarray(x).reshape(-1, SIZE, SIZE, 1)
    return jax.device_put(ml.tasks.class_data(x, np.repeat(np.arange(classes), rows)))


def make_outer(
    filters: int,
    config: Config,
    *,
    steps: int | None = None,
    implementation: Any = "patches",
    chunk: int | None = 1,
    axis_name: Any = None,
    **inner: Any,
) -> OuterLoop:
    """The outer loop on a network with batch norm; `inner` are options of `learners.maml`."""
    model = ml.models.Conv4(WAYS, filters=filters, norm="batch", implementation=implementation)
    learner = ml.learners.maml(model, optimizer=optax.sgd(RATE), steps=steps or config.steps, **inner)
    optimizer = optax.adam(OUTER_RATE, b1=DECAY)
    return ml.outer_loop(learner, SAMPLER, optimizer=optimizer, tasks=config.tasks, chunk=chunk, axis_name=axis_name)


def make_start(filters: int, config: Config, data: ClassData) -> Start:
    init = jax.jit(make_outer(filters, config).init)
    return Start(jax.random.key(KEY + 1), init(jax.random.key(KEY + 2), data.x[:1]), data)


def drawn_tasks(start: Start, tasks: int) -> Task:
    """The tasks that `outer_loop` draws in its first step, leaves `[tasks, n, ...]`."""
    key = jax.random.fold_in(start.key, 0)

    def draw(number: Array) -> Task:
        return SAMPLER(jax.random.split(jax.random.fold_in(key, number))[0], start.data)

    return jax.jit(jax.vmap(draw))(jnp.arange(tasks))


def compiled(outer: OuterLoop, start: Start, work: int) -> tuple[Candidate, int]:
    """A meta-step as a compiled program, and the bytes of its temporary buffers."""
    begin = time.perf_counter()
    program = jax.jit(partial(outer.run, steps=1)).lower(*start).compile()
    seconds = time.perf_counter() - begin
    candidate = Candidate(lambda: jax.block_until_ready(program(*start)), work, seconds)
    return candidate, program.memory_analysis().temp_size_in_bytes


def jax_candidates(filters: int, config: Config, start: Start) -> tuple[dict[str, Candidate], dict[str, int]]:
    """Our meta-steps, and the temporary memory of those on one device."""
    kinds: dict[str, dict[str, Any]] = {
        IN_TURN: {},
        f"{IN_TURN}, remat": {"remat": True},
        f"{IN_TURN}, unrolled": {"unroll": True},
        "jax, vmap": {"chunk": None},
    }
    if jax.default_backend() == "gpu":
        kinds["jax, vmap, unrolled"] = {"chunk": None, "unroll": True}
        kinds["jax, vmap, lax"] = {"chunk": None, "implementation": "lax"}
    found, temporary = {}, {}
    for name, options in kinds.items():
        found[name], temporary[name] = compiled(make_outer(filters, config, **options), start, config.tasks)
    devices = jax.local_devices()[: math.gcd(config.tasks, jax.local_device_count())]
    if len(devices) > 1:
        outer = make_outer(filters, config, axis_name=ml.parallel.AXIS)
        run = ml.parallel.outer_run(outer, steps=1, devices=devices)
        jax.block_until_ready(run(*start))  # compiles, which is not to count as memory
        found[ALL] = harness.called(run, *start, work=config.tasks)
    return found, temporary


def layout_of_torch(params: PyTree) -> list[np.ndarray]:
    """A `Conv4`'s parameters, or their gradient, in the order and layout of the PyTorch network."""
    found = []
    for block in range(4):
        conv, norm = params[f"Conv_{block}"], params[f"BatchNorm_{block}"]
        found += [conv["kernel"].transpose(3, 2, 0, 1), conv["bias"], norm["scale"], norm["bias"]]
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    side = math.isqrt(len(kernel) // len(found[-1]))
    kernel = kernel.reshape(side, side, -1, WAYS).transpose(3, 2, 0, 1).reshape(WAYS, -1)
    return [np.ascontiguousarray(leaf) for leaf in (*found, kernel, bias)]


def torch_candidates(filters: int, config: Config, start: Start) -> tuple[Found, dict[str, Candidate]]:
    """The meta-step in double precision, and PyTorch's meta-steps, each with a network of its own."""
    import torch

    from references import torch_maml

    device = harness.torch_device()
    weights = layout_of_torch(jax.tree.map(np.asarray, start.state.meta["params"]))
    drawn = drawn_tasks(start, config.tasks)
    # Products of full precision, as ours.
    torch.backends.cudnn.allow_tf32 = False
    arrays = [array for part in drawn for array in (np.moveaxis(np.asarray(part.x), -1, 2), np.asarray(part.y, int))]
    given = torch_maml.Tasks(*(torch.tensor(array, device=device) for array in arrays))
    few = torch_maml.Tasks(*(part[:4] for part in given))
    inner = torch_maml.Inner(config.steps, RATE)

    def step(method: Any, channels_last: bool, tasks: Any = given, dtype: Any = torch.float32) -> Callable[[], Any]:
        network = torch_maml.network_of(weights, SIZE, channels_last=channels_last).to(device, dtype)
        tasks = torch_maml.Tasks(*(part.to(dtype) if part.is_floating_point() else part for part in tasks))
        return torch_maml.meta_step(method, network, tasks, inner, rate=OUTER_RATE)

    def fastest(what: str, steps: dict[Any, Callable[[], Any]]) -> Any:
        times = harness.compare({name: harness.called(one) for name, one in steps.items()}, repeats=3)
        taken = {name: float(np.median(one.seconds)) for name, one in times.items()}
        print(f"PyTorch, {what}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items()))
        return min(taken, key=taken.__getitem__)

    expected = as_found(step(torch_maml.loop, False, dtype=torch.float64)())
    harness.fastest_threads(step(torch_maml.loop, False, few))
    last = fastest("channels last", {last: step(torch_maml.loop, last, few) for last in (False, True)})
    sizes = {size: step(torch_maml.vmapped(size), last) for size in sorted({2, 8, config.tasks})}
    size = fastest("tasks vmapped at a time", sizes)
    steps = {"loop": step(torch_maml.loop, last), "vmap": step(torch_maml.vmapped(size), last)}
    count = math.gcd(config.tasks, harness.cores())
    if device == "cpu" and count > 1:
        steps[f"loop, {count} processes"] = step(torch_maml.Processes(count), last)
    for name, method in torch_maml.LIBRARIES.items():
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}")
        else:
            steps[name] = step(method, last)
    return expected, {f"torch, {name}": harness.called(one, work=config.tasks) for name, one in steps.items()}


def as_found(result: Any) -> Found:
    """The finding of a candidate: PyTorch's, or ours from a fresh optimiser state, where Adam's first moment is the
    gradient times one minus its decay."""
    if isinstance(result[0], MetaState):
        state, metrics = result
        grads = jax.tree.map(lambda mu: np.asarray(mu) / np.float32(1 - DECAY), state.opt_state[0].mu["params"])
        return Found(float(metrics["loss"][0]), layout_of_torch(grads))
    loss, grads = result
    return Found(loss, [grad.cpu().numpy() for grad in grads])


def check(name: str, found: Found, expected: Found) -> None:
    """The same query loss, and the same meta-gradient in each parameter: the error beside its norm.

    Biases before a norm have no gradient at all; the norm is therefore counted as at least 1 % of the whole gradient's.
    """
    loss = abs(found.loss - expected.loss) / expected.loss
    norms = [float(np.linalg.norm(grad)) for grad in expected.grads]
    least = 0.01 * math.hypot(*norms)
    errors = [float(np.linalg.norm(a - b)) for a, b in zip(found.grads, expected.grads, strict=True)]
    worst = max(error / max(norm, least) for error, norm in zip(errors, norms, strict=True))
    print(f"{name}: loss {found.loss:.6f}, off by {loss:.1e}; meta-gradient off by {worst:.1e} where it is worst")
    if not (loss < TOLERANCE / 10 and worst < TOLERANCE):
        raise SystemExit(f"error: {name} does not compute the same meta-gradient")


def row(name: str, metric: str, value: float, **more: Any) -> dict:
    return {"name": name, "metric": metric, **dict.fromkeys(("mean", "low", "high"), float(f"{value:.4g}")), **more}


def memory(filters: int, config: Config, start: Start, temporary: dict[str, int]) -> list[dict]:
    """Temporary memory of our meta-steps, also with many inner steps, and by how much these need more."""
    found, temporary = [], dict(temporary)
    for short in (IN_TURN, f"{IN_TURN}, remat"):
        long = f"{short}, {config.long_steps} steps"
        outer = make_outer(filters, config, steps=config.long_steps, remat=short != IN_TURN)
        candidate, temporary[long] = compiled(outer, start, config.tasks)
        _, peak = harness.peak_bytes(candidate.call)
        if peak is not None:
            found.append(row(long, "bytes", peak))
        more = temporary[long] / temporary[short]
        found.append(row(long, "temporary_bytes_ratio", more, compared_with=f"{filters} filters, {short}"))
    found += [row(name, "temporary_bytes", value) for name, value in temporary.items()]
    return [{**one, "name": f"{filters} filters, {one['name']}"} for one in found]


def shares_of_peak(filters: int, config: Config, start: Start, times: dict[str, Times]) -> list[dict]:
    """How much of the arithmetic that a large float32 matrix product reaches on this device our meta-steps do."""
    size = 8192
    matrix = jnp.ones((size, size))
    seconds = harness.measure(jnp.matmul, matrix, matrix, repeats=10).seconds
    peak = 2 * size**3 / float(np.median(seconds))
    # Counted before any optimisation, in the program without loops, since what a loop repeats is counted once.
    shapes = jax.eval_shape(lambda: start)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        outer = make_outer(filters, config, chunk=None, unroll=True)
        flops = jax.jit(outer.step).lower(*shapes).cost_analysis()["flops"]
    found = [row("matrix product", "flops_per_second", peak, repeats=10), row(f"{filters} filters", "flops", flops)]
    for name, one in times.items():
        if name.startswith(f"{filters} filters, jax") and "all devices" not in name:
            shares = Quartiles(*(flops / value / peak for value in harness.quartiles(one.seconds)))
            found.append(row(name, "share_of_peak", shares.median) | {"low": shares.high, "high": shares.low})
    return found


def main() -> None:
    config = harness.options(Config, __doc__)
    if config.quick:
        config = Config((8,), 2, 2, 4, 1, quick=True, out=config.out)
    harness.start()
    begin = time.perf_counter()
    data = make_data()
    times: dict[str, Times] = {}
    peaks: dict[str, int | None] = {}
    pairs: list[tuple[str, str]] = []
    found: list[dict] = []
    for filters in config.filters:
        start = make_start(filters, config, data)
        candidates, temporary = jax_candidates(filters, config, start)
        expected = as_found(candidates[IN_TURN].call())
        try:
            expected, theirs = torch_candidates(filters, config, start)
            candidates |= theirs
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            print(harness.NO_TORCH)
        candidates = {f"{filters} filters, {name}": candidate for name, candidate in candidates.items()}
        for name, candidate in candidates.items():
            result, peak = harness.peak_bytes(candidate.call)
            if "processes" not in name:
                peaks[name] = peak
            check(name, as_found(result), expected)
        timed = harness.compare(candidates, repeats=config.repeats, warm=True)
        times |= timed
        for name in candidates:
            if "torch" in name:
                pairs += [(name, f"{filters} filters, {mine}") for mine in (IN_TURN, ALL)]
            elif not name.endswith(IN_TURN):
                pairs.append((f"{filters} filters, {IN_TURN}", name))
        found += memory(filters, config, start, temporary)
        if jax.default_backend() == "gpu":
            found += shares_of_peak(filters, config, start, timed)
    harness.finish("meta_step", config, begin, harness.rows("tasks", times, pairs, peaks) + found)


if __name__ == "__main__":
    main()
