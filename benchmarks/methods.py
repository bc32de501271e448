"""What is compared: every method of clipax, and what optax has in its place."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import clipax
from benchmarks import workloads
from clipax._demo._methods import METHODS

Optimizer = optax.GradientTransformation
Clips = dict[str, Optimizer]
ALONE = "alone"
SCALED = "limit: behind a number"
GLOBAL, OPTAX_GLOBAL = "clip_by_global_norm", "optax.clip_by_global_norm"
READ = "clip_by_leaf_norm + metrics(per_leaf=True)"
OBSERVED = "observe(clip_by_global_norm)"
SKIPPED = "skip_step(clip_by_global_norm)"
STABLE_ADAM = "scale_by_stable_adam"
SPECTRAL = "spectral"
NOTHING_ABOVE = "clip_by_spectral_norm, nothing above its bound"

# Those that are measured without an optimizer too.
CLIPS: dict[str, Clips] = {
    "global": {
        GLOBAL: clipax.clip_by_global_norm(1.0),
        OPTAX_GLOBAL: optax.clip_by_global_norm(1.0),
    },
    "leaf": {
        "clip_by_leaf_norm": clipax.clip_by_leaf_norm(1.0),
        "clip_by_block_rms": clipax.clip_by_block_rms(0.1),
        "optax.clip_by_block_rms": optax.clip_by_block_rms(0.1),
    },
    "unit": {
        "clip_by_unit_norm": clipax.clip_by_unit_norm(1.0),
        "adaptive_grad_clip": clipax.adaptive_grad_clip(0.01),
        "optax.adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    },
}
# What optax's gives has to be what the method of the same name gives.
PAIRS = {"optax.clip": "clip_by_value"} | {
    name: name.removeprefix("optax.")
    for clips in CLIPS.values()
    for name in clips
    if name.startswith("optax.")
}

_GLOBAL = CLIPS["global"][GLOBAL]
_LEAF = CLIPS["leaf"]["clip_by_leaf_norm"]


class Group(NamedTuple):
    """Methods that are measured in turns with each other and with the optimizer alone."""

    rows: dict[str, Callable[[Optimizer], Optimizer]]
    baseline: str = ALONE
    """What the ratios are to."""
    optimizers: tuple[str, ...] = ("adam", "sgd")
    """What it makes sense with."""


def _alone(inner: Optimizer) -> Optimizer:
    return inner


def _before(clip: Optimizer) -> Callable[[Optimizer], Optimizer]:
    return lambda inner: optax.chain(clip, inner)


def _group(clips: Clips, baseline: str = ALONE) -> Group:
    return Group({ALONE: _alone} | {name: _before(clips[name]) for name in clips}, baseline)


def _scaled_by_a_number() -> Optimizer:
    """A clip that measures nothing."""

    def scale(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda leaf: workloads.scaled(leaf, state), updates), state

    return optax.GradientTransformation(lambda _: jnp.full((), 0.3), scale)


GROUPS: dict[str, Group] = {name: _group(clips) for name, clips in CLIPS.items()} | {
    "global": _group({SCALED: _scaled_by_a_number()} | CLIPS["global"]),
    "value": _group(
        {
            "clip_by_value": clipax.clip_by_value(1.0),
            "optax.clip": optax.clip(1.0),
            "smooth_clip_by_value": clipax.smooth_clip_by_value(1.0),
        }
    ),
    "other bounds": _group(
        {
            "smooth_clip_by_global_norm": clipax.smooth_clip_by_global_norm(1.0),
            "delta_gclip": clipax.delta_gclip(1.0),
            "clip_by_average_norm": clipax.clip_by_average_norm(1e-6),
        }
    ),
    # One norm and its history, against a fixed bound on the same norm.
    "scalar history": _group(
        {
            GLOBAL: _GLOBAL,
            "autoclip": clipax.autoclip(),
            "clip_by_quantile": clipax.clip_by_quantile(),
            "zclip": clipax.zclip(),
            "clip_by_mean_std": clipax.clip_by_mean_std(),
            "clip_by(global_norm, ema)": clipax.clip_by(clipax.global_norm, optax.ema(0.9)),
        },
        baseline=GLOBAL,
    ),
    "other histories": _group(
        {
            "adagc": clipax.adagc(),
            "spam_clip": clipax.spam_clip(),
            "stable_spam": clipax.stable_spam(),
        }
    ),
    "wrappers": Group(
        {
            ALONE: _alone,
            GLOBAL: _before(_GLOBAL),
            "measure": _before(clipax.measure()),
            OBSERVED: _before(clipax.observe(_GLOBAL)),
            "track(clip_by_global_norm)": _before(clipax.track(_GLOBAL)),
            "skip_step": lambda inner: clipax.skip_step(inner, z_max=6.0),
            SKIPPED: lambda inner: clipax.skip_step(optax.chain(_GLOBAL, inner), z_max=6.0),
        }
    ),
    "feedback": _group(
        {
            "u_clip(clip_by_global_norm)": clipax.u_clip(_GLOBAL),
            "clip21(clip_by_global_norm)": clipax.clip21(_GLOBAL),
        }
    ),
    # The second returns every figure of every leaf from the step.
    "metrics": _group({"clip_by_leaf_norm": _LEAF, READ: _LEAF}, baseline="clip_by_leaf_norm"),
    # Momentum of its own, and second moments of its own, are compared with just that.
    "momentum": Group(
        {
            ALONE: lambda _: optax.sgd(1e-3, momentum=0.9),
            "acclip": _before(clipax.acclip()),
        },
        optimizers=("sgd",),
    ),
    "moments": Group(
        {
            ALONE: _alone,
            STABLE_ADAM: lambda _: optax.chain(
                clipax.scale_by_stable_adam(), optax.scale_by_learning_rate(1e-3)
            ),
        },
        optimizers=("adam",),
    ),
    # Each matrix is decomposed, or multiplied with itself: nothing that is read once.
    SPECTRAL: _group(
        {
            NOTHING_ABOVE: clipax.clip_by_spectral_norm(1e6),
            "clip_by_spectral_norm": clipax.clip_by_spectral_norm(1.0),
            "clip_by_spectral_norm(iterations=10)": clipax.clip_by_spectral_norm(
                1.0, iterations=10
            ),
        }
    ),
}
_NAMED = {re.match(r"[\w.]+", name)[0] for group in GROUPS.values() for name in group.rows}
_FOUND: Clips = {
    name: build()
    for name, build in METHODS.items()
    if name not in {*_NAMED, "none", "clip_cotangent"}
}
if _FOUND:
    GROUPS["found by their annotation"] = _group(_FOUND)
OPTIMIZERS: dict[str, Optimizer] = {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-3)}
