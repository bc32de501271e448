"""The methods that take part, each with its usual bound."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax

import clipax

BATCH_SIZE = 32
ADAM_LEARNING_RATE = 1e-3

Build = Callable[..., optax.GradientTransformation]

# Values for arguments of factories without a default.
_USUAL: dict[str, Any] = {
    "max_norm": 1.0,
    "max_rms": 1.0,
    "max_value": 1.0,
    "ratio": 0.01,
    "inner": clipax.clip_by_global_norm(1.0),
}
# `clip_by` builds others, `clip` is `clip_by_value`, and the rest change nothing.
_NO_METHODS = {"clip", "clip_by", "measure", "observe", "track"}


def _factories() -> dict[str, Build]:
    """Every public method, by its annotation."""
    kind = optax.GradientTransformationExtraArgs
    return {
        name: value
        for name, value in sorted(vars(clipax).items())
        if inspect.isfunction(value) and inspect.signature(value).return_annotation is kind
    }


def _usual(factory: Build) -> Build:
    parameters = inspect.signature(factory).parameters.values()
    given = {each.name: _USUAL[each.name] for each in parameters if each.default is each.empty}
    return functools.partial(factory, **given)


METHODS: dict[str, Build] = {
    "none": clipax.measure,
    **{
        name: _usual(factory)
        for name, factory in _factories().items()
        if name not in {*_NO_METHODS, "skip_step"}
    },
    "skip_step": functools.partial(clipax.skip_step, z_max=6.0),
    # It clips what flows back from step to step of a sequence. The loss is a mean over the batch,
    # so this bound is 1.0 for the loss of one sequence.
    "clip_cotangent": functools.partial(clipax.clip_by_global_norm, 1.0 / BATCH_SIZE),
}
# One of each family, chosen before anything was run: by what it measures, and by how its bound
# is found.
DEFAULT = [
    "none",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "adaptive_grad_clip",
    "clip_by_value",
    "smooth_clip_by_global_norm",
    "zclip",
    "spam_clip",
    "skip_step",
    "clip_cotangent",
]

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": functools.partial(optax.sgd, 0.01, momentum=0.9),
    "adam": functools.partial(optax.adam, ADAM_LEARNING_RATE),
    "adamw": functools.partial(optax.adamw, ADAM_LEARNING_RATE),
    "rmsprop": functools.partial(optax.rmsprop, 1e-3),
    "lion": functools.partial(optax.lion, 1e-4),
}


def chained(name: str, optimizer: optax.GradientTransformation) -> Any:
    if name == "skip_step":
        return METHODS[name](optax.chain(clipax.measure(), optimizer))
    if name == "scale_by_stable_adam":
        # It is an Adam of its own, so it replaces the optimizer.
        optimizer = optax.scale_by_learning_rate(ADAM_LEARNING_RATE)
    return optax.chain(METHODS["none" if name == "clip_cotangent" else name](), optimizer)
