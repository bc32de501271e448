"""Ghost clipping by Opacus next to plain torch, where both are installed."""

import importlib.util
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.per_example_models import Model
from benchmarks.timing import Work

PLAIN, GHOST = "torch, plain", "Opacus, ghost clipping"


def why_not() -> str:
    """Why there is nothing to measure; empty where there is."""
    missing = [name for name in ("torch", "opacus") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "measured on CPUs only" if machine.is_gpu() else ""


def works(model: Model, max_norm: float) -> dict[str, Work]:
    """A forward and a backward pass of the MLP, each in a network of its own.

    A run gives the gradients: their mean, and the sum of the clipped ones.
    """
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    torch.set_num_threads(machine.cores())
    inputs = torch.from_numpy(np.array(model.batch[0]))
    labels = torch.from_numpy(np.array(model.batch[1], np.int64))

    plain = _network(model.params)
    criterion = torch.nn.CrossEntropyLoss()

    def run_plain(_: Any) -> Any:
        plain.zero_grad()
        criterion(plain(inputs), labels).backward()
        return _gradients(plain)

    clipped = GradSampleModuleFastGradientClipping(
        _network(model.params), max_grad_norm=max_norm, use_ghost_clipping=True
    )
    # The optimizer makes no step: neither noise nor a rate is of interest.
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(clipped.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=max_norm,
        expected_batch_size=model.examples,
    )
    ghost_criterion = DPLossFastGradientClipping(clipped, optimizer, torch.nn.CrossEntropyLoss())

    def run_ghost(_: Any) -> Any:
        optimizer.zero_grad()
        ghost_criterion(clipped(inputs), labels).backward()
        return _gradients(clipped)

    return {PLAIN: Work(run_plain), GHOST: Work(run_ghost)}


def gradients(work: Work, model: Model) -> Any:
    """What a run gives, in the structure of the model's parameters."""
    tensors = iter(work.run(work.prepare()))
    return [
        {"kernel": next(tensors).numpy().T, "bias": next(tensors).numpy()} for _ in model.params
    ]


def _network(params: Any) -> Any:
    import torch

    layers: list[Any] = []
    for layer in params:
        linear = torch.nn.Linear(*layer["kernel"].shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(np.array(layer["kernel"]).T))
            linear.bias.copy_(torch.from_numpy(np.array(layer["bias"])))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def _gradients(network: Any) -> list[Any]:
    return [parameter.grad for parameter in network.parameters()]
