"""Histories: what a bound comes to that learns from raw norms, or from clipped ones.

The norms are log-normal with median 1 and do not change over time: whatever a bound does, it
does by itself. A history of clipped norms pulls its own bound down, the more the norms
scatter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipax
from benchmarks.reproduce_shared import aligned, is_clipped

SIGMAS = (0.02, 0.1, 0.5)
# ZClip's own cap is off: it would bound norms of median 1 at 1.
CLIPS: dict[str, optax.GradientTransformation] = {
    "adagc()": clipax.adagc(),
    "adagc(raw_history=True)": clipax.adagc(raw_history=True),
    "zclip(max_norm=None)": clipax.zclip(max_norm=None),
    "zclip(max_norm=None, raw_history=True)": clipax.zclip(max_norm=None, raw_history=True),
    "autoclip()": clipax.autoclip(),
    "autoclip(0.9)": clipax.autoclip(0.9),
    "clip_by_mean_std()": clipax.clip_by_mean_std(),
    "clip_by_quantile()": clipax.clip_by_quantile(),
    "clip_by_quantile(0.9)": clipax.clip_by_quantile(0.9),
}


def run(is_quick: bool) -> dict[str, Any]:
    sizes = {"seeds": 2, "steps": 300, "left_out": 150} if is_quick else {}
    settings: dict[str, Any] = {"seeds": 5, "steps": 5000, "left_out": 1000} | sizes
    rows: dict[str, Any] = {name: {} for name in CLIPS}
    for sigma in SIGMAS:
        norms = np.stack([_norms(s, settings["steps"], sigma) for s in range(settings["seeds"])])
        for name, clip in CLIPS.items():
            bounds, clipped = (
                np.asarray(x)[:, settings["left_out"] :] for x in _bounds(clip, norms)
            )
            rows[name][f"{sigma:g}"] = {
                "share_of_steps_clipped": clipped.mean(axis=1),
                "median_bound": np.median(bounds, axis=1),
            }
    return settings | {"sigmas": SIGMAS, "rows": rows}


def _norms(seed: int, steps: int, sigma: float) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0.0, sigma, steps).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _bounds(clip: optax.GradientTransformation, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bound of every step and whether it clipped, for each seed."""

    def follow(norms: jax.Array) -> Any:
        def step(state: Any, norm: jax.Array) -> Any:
            _, state = clip.update(norm, state)
            return state, (clipax.metrics(state)["max_norm"], is_clipped(state))

        return jax.lax.scan(step, clip.init(jnp.zeros(())), norms)[1]

    return jax.vmap(follow)(norms)


def table(result: dict[str, Any]) -> str:
    title = (
        f"Histories on log-normal norms of median 1, {result['steps']} steps, the first"
        f" {result['left_out']} left out\n"
        f"share of steps clipped, and the median bound; mean of {result['seeds']} seeds ± their"
        " standard deviation\n"
    )
    header = ("method", *(f"sigma {sigma:g}" for sigma in SIGMAS))
    rows = [
        (name, *(_cell(row[f"{sigma:g}"]) for sigma in SIGMAS))
        for name, row in result["rows"].items()
    ]
    return title + aligned(header, rows)


def _cell(row: dict[str, np.ndarray]) -> str:
    share, bound = 100 * row["share_of_steps_clipped"], row["median_bound"]
    return f"{share.mean():.1f} ± {share.std():.1f} %, {bound.mean():.2f} ± {bound.std():.2f}"
