"""One MAML meta-step in PyTorch: a loop over tasks, that loop on every core, `torch.func`, and meta-learning libraries.

A method takes `(network, tasks, inner)`, leaves the mean meta-gradient of the tasks in the parameters' `grad`, and
gives the mean query loss. Libraries are imported where they are used, so that each may be missing.
"""

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

Method = Callable[[nn.Module, "Tasks", "Inner"], Tensor]


class Inner(NamedTuple):
    """The inner loop: steps of plain SGD, and their rate."""

    steps: int
    rate: float


class Tasks(NamedTuple):
    """Support and query rows of all tasks: images `[t, n, channels, h, w]`, classes `[t, n]`."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


def network_of(arrays: list[np.ndarray], size: int, *, channels_last: bool) -> nn.Module:
    """The strided `Conv4` with batch norm on the batch's own statistics, for square images of `size` pixels.

    `arrays` are its parameters: kernel and bias, scale and bias of each block, kernel and bias of the head.
    """
    layers: list[nn.Module] = []
    for kernel in arrays[:-2:4]:
        features, channels = kernel.shape[:2]
        # SAME padding puts the odd pixel at the end; a symmetric one costs nothing in the convolution.
        even = size % 2 == 0
        layers += [nn.ZeroPad2d((0, 1, 0, 1))] * even
        layers += [nn.Conv2d(channels, features, 3, stride=2, padding=0 if even else 1)]
        layers += [nn.BatchNorm2d(features, track_running_stats=False), nn.ReLU()]
        size = -(-size // 2)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(arrays[-2].shape[1], arrays[-2].shape[0]))
    for parameter, array in zip(network.parameters(), arrays, strict=True):
        parameter.data = torch.tensor(array)
    return network.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def meta_step(
    method: Method, network: nn.Module, tasks: Tasks, inner: Inner, *, rate: float
) -> Callable[[], tuple[float, list[Tensor]]]:
    """A step of `method` and Adam; gives the query loss and the meta-gradient."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)

    def step() -> tuple[float, list[Tensor]]:
        optimizer.zero_grad()
        loss = method(network, tasks, inner)
        optimizer.step()
        return loss.item(), [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    return step


def loop(network: nn.Module, tasks: Tasks, inner: Inner) -> Tensor:
    """Task by task, with the graph of the inner steps kept for the second derivatives."""
    params, total = dict(network.named_parameters()), torch.zeros((), device=tasks.query_x.device)
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        fast = params
        for _ in range(inner.steps):
            loss = functional.cross_entropy(functional_call(network, fast, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: value - inner.rate * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
        loss = functional.cross_entropy(functional_call(network, fast, (query_x,)), query_y) / len(tasks.query_x)
        loss.backward()
        total += loss.detach()
    return total


def vmapped(chunk: int | None) -> Method:
    """`torch.func.vmap` over `chunk` tasks at a time, all for None."""

    def method(network: nn.Module, tasks: Tasks, inner: Inner) -> Tensor:
        params = dict(network.named_parameters())

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional.cross_entropy(functional_call(network, params, (x,)), y)

        def query_loss(params: dict[str, Tensor], *task: Tensor) -> Tensor:
            for _ in range(inner.steps):
                grads = torch.func.grad(loss)(params, *task[:2])
                params = {name: value - inner.rate * grads[name] for name, value in params.items()}
            return loss(params, *task[2:])

        each = torch.func.vmap(torch.func.grad_and_value(query_loss), (None, 0, 0, 0, 0), chunk_size=chunk)
        grads, losses = each(params, *tasks)
        for name, parameter in params.items():
            parameter.grad = grads[name].mean(0).detach()
        return losses.mean()

    return method


def with_higher(network: nn.Module, tasks: Tasks, inner: Inner) -> Tensor:
    """The loop with higher: Grefenstette et al., Generalized Inner Loop Meta-Learning, 2019."""
    import higher

    sgd, total = torch.optim.SGD(network.parameters(), lr=inner.rate), torch.zeros((), device=tasks.query_x.device)
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        with higher.innerloop_ctx(network, sgd, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(inner.steps):
                optimizer.step(functional.cross_entropy(fast(support_x), support_y))
            loss = functional.cross_entropy(fast(query_x), query_y) / len(tasks.query_x)
            loss.backward()
        total += loss.detach()
    return total


def with_torchopt(network: nn.Module, tasks: Tasks, inner: Inner) -> Tensor:
    """The loop with TorchOpt: Ren et al., TorchOpt: An Efficient Library for Differentiable Optimization, 2023."""
    import torchopt

    sgd, total = torchopt.MetaSGD(network, lr=inner.rate), torch.zeros((), device=tasks.query_x.device)
    before = torchopt.extract_state_dict(network, by="reference")
    state = torchopt.extract_state_dict(sgd, by="reference")
    parameters = list(network.parameters())
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        for _ in range(inner.steps):
            sgd.step(functional.cross_entropy(network(support_x), support_y))
        loss = functional.cross_entropy(network(query_x), query_y) / len(tasks.query_x)
        loss.backward(inputs=parameters)
        total += loss.detach()
        torchopt.recover_state_dict(network, before)
        torchopt.recover_state_dict(sgd, state)
    return total


def with_learn2learn(network: nn.Module, tasks: Tasks, inner: Inner) -> Tensor:
    """The loop with learn2learn: Arnold et al., learn2learn: A Library for Meta-Learning Research, 2020."""
    from learn2learn.algorithms import MAML

    learner, total = MAML(network, lr=inner.rate), torch.zeros((), device=tasks.query_x.device)
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        fast = learner.clone()
        for _ in range(inner.steps):
            fast.adapt(functional.cross_entropy(fast(support_x), support_y))
        loss = functional.cross_entropy(fast(query_x), query_y) / len(tasks.query_x)
        loss.backward()
        total += loss.detach()
    return total


LIBRARIES: dict[str, Method] = {
    "higher": with_higher,
    "torchopt": with_torchopt,
    "learn2learn": with_learn2learn,
}


class Processes:
    """The loop in several processes of one thread each, with shared parameters and a part of the tasks each.

    They start with the first call, whose network, tasks and inner loop they keep, and end with this process.
    """

    def __init__(self, count: int):
        self.count = count
        self.pipes: list[Any] = []

    def __call__(self, network: nn.Module, tasks: Tasks, inner: Inner) -> Tensor:
        """As any method, for a number of tasks that the processes divide evenly."""
        if not self.pipes:
            self._start(network.share_memory(), tasks, inner)
        for pipe in self.pipes:
            pipe.send(True)
        losses, grads = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        for parameter, *parts in zip(network.parameters(), *grads, strict=True):
            parameter.grad = torch.from_numpy(np.mean(parts, axis=0))
        return torch.tensor(np.mean(losses))

    def _start(self, network: nn.Module, tasks: Tasks, inner: Inner) -> None:
        context = multiprocessing.get_context("spawn")
        for part in zip(*(leaf.chunk(self.count) for leaf in tasks), strict=True):
            here, there = context.Pipe()
            context.Process(target=_work, args=(there, network, Tasks(*part), inner), daemon=True).start()
            self.pipes.append(here)


def _work(pipe: Any, network: nn.Module, tasks: Tasks, inner: Inner) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            network.zero_grad()
            loss = loop(network, tasks, inner).item()
            # NumPy arrays travel as bytes, tensors would each open a file.
            grads = [parameter.grad.numpy() for parameter in network.parameters() if parameter.grad is not None]
            pipe.send((loss, grads))
