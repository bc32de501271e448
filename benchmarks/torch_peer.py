"""Torch's `clip_grad_norm_` on the tensors that the others clip, where torch is installed."""

from types import ModuleType
from typing import Any

import jax

from benchmarks import machine
from benchmarks.timing import Work

NAME = "torch clip_grad_norm_(foreach)"


def why_not() -> str:
    """Why there is no torch to measure; empty where there is one."""
    torch = _torch()
    if torch is None:
        return "torch is not installed"
    if machine.is_gpu() and not torch.cuda.is_available():
        return "the torch that is installed has no GPU"
    return ""


def work(pristine: dict[str, jax.Array], max_norm: float) -> tuple[Work, Any]:
    """The clip of copies, in place as always in torch; and the tensors it acts on.

    They are restored before each run, as the arrays of the others.
    """
    torch: Any = _torch()
    torch.set_num_threads(machine.cores())
    sources = [torch.from_dlpack(leaf) for leaf in jax.tree.leaves(pristine)]
    parameters = [torch.empty_like(source, requires_grad=True) for source in sources]
    for parameter, source in zip(parameters, sources, strict=True):
        parameter.grad = source.clone()
    updates = [parameter.grad for parameter in parameters]

    def restore() -> None:
        for update, source in zip(updates, sources, strict=True):
            update.copy_(source)
        _wait(torch)

    def clip(_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
        _wait(torch)

    return Work(clip, restore), updates


def arrays(tensors: Any) -> list[jax.Array]:
    return [jax.dlpack.from_dlpack(tensor) for tensor in tensors]


def _wait(torch: Any) -> None:
    if machine.is_gpu():
        torch.cuda.synchronize()


def _torch() -> ModuleType | None:
    try:
        import torch
    except ImportError:
        return None
    return torch
