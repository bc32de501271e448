"""Heavy tails: SGD on a convex quadratic, with gradient noise that has no variance.

Zhang et al. 2020 (https://arxiv.org/abs/1912.03194) hold heavy-tailed noise to be one cause
of SGD's poor performance, and clipping to be a remedy. The noise here is Student's t with
1.5 degrees of freedom, entry by entry: it has a mean, zero, but no finite variance.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipax
from benchmarks.reproduce_shared import (
    aligned,
    clipped_optimizers,
    is_clipped,
    median_and_range,
    percent,
)

DIMENSION, TAIL, LEARNING_RATE = 50, 1.5, 0.1
# On a vector these are another name for the clip of the global norm.
SAME_ON_A_VECTOR = (
    "clip_by_leaf_norm(1.0)",
    "clip_by_unit_norm(1.0)",
    "clip_by_spectral_norm(1.0)",
)
# The curvature of each axis, and where each coordinate starts.
CURVATURE, START = np.geomspace(0.1, 1.0, DIMENSION).astype(np.float32), 1.0


def run(is_quick: bool) -> dict[str, Any]:
    settings: dict[str, Any] = (
        {"seeds": 3, "steps": 50} if is_quick else {"seeds": 20, "steps": 5000}
    )
    settings |= {"dimension": DIMENSION, "degrees_of_freedom": TAIL}
    noise = np.stack([_noise(seed, settings["steps"]) for seed in range(settings["seeds"])])
    rows = {
        name: jax.tree.map(np.asarray, _descend(optimizer, noise))
        for name, optimizer in _optimizers(settings["steps"]).items()
    }
    start = float(np.linalg.norm(np.full(DIMENSION, START)))
    return settings | {"distance_at_start": start, "rows": rows}


def _optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    sgd = optax.sgd(optax.linear_schedule(LEARNING_RATE, 0.0, steps))
    optimizers = clipped_optimizers(sgd) | {"acclip()": optax.chain(clipax.acclip(), sgd)}
    return {name: o for name, o in optimizers.items() if name not in SAME_ON_A_VECTOR}


def _noise(seed: int, steps: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_t(TAIL, (steps, DIMENSION)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _descend(optimizer: optax.GradientTransformation, noise: jax.Array) -> dict[str, jax.Array]:
    """What became of each seed."""

    def follow(noise: jax.Array) -> dict[str, jax.Array]:
        def step(carry: Any, noise: jax.Array) -> Any:
            x, state = carry
            updates, state = optimizer.update(CURVATURE * x + noise, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), (clipax.global_norm(x), is_clipped(state))

        x = jnp.full(DIMENSION, START)
        _, (distance, clipped) = jax.lax.scan(step, (x, optimizer.init(x)), noise)
        return {
            "final_distance": distance[-1],
            "largest_distance": distance.max(),
            "share_of_steps_clipped": clipped.mean(),
        }

    return jax.vmap(follow)(noise)


def table(result: dict[str, Any]) -> str:
    title = (
        f"Heavy-tailed noise: distance to the optimum after {result['steps']} steps of SGD in"
        f" {DIMENSION} dimensions, {result['distance_at_start']:.3g} at the start\n"
        f"learning rate {LEARNING_RATE} falling linearly to zero; median and range of"
        f" {result['seeds']} seeds\n"
    )
    rows = [
        (
            name,
            median_and_range(row["final_distance"]),
            median_and_range(row["largest_distance"]),
            percent(row["share_of_steps_clipped"]),
        )
        for name, row in result["rows"].items()
    ]
    return title + aligned(("method", "at the end", "farthest", "steps clipped"), rows)
