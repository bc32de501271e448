"""Corruption: linear regression from a stream in which some samples lie.

Merad and Gaïffas 2023 (https://arxiv.org/abs/2309.17316) bound gradient norms by a quantile of
the last ones, to tolerate heavy tails and a share of outliers in the stream. Covariates and
label noise here are Student's t, and a corrupted sample has the label that belongs to
the parameters times -10: it pulls the wrong way, and hard.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipax
from benchmarks.reproduce_shared import aligned, is_clipped, median_and_range, percent

DIMENSION, LEARNING_RATE, WINDOW_SIZE = 20, 0.01, 100
COVARIATE_TAIL, NOISE_TAIL, WRONG_FACTOR = 5.0, 2.1, -10.0
SHARES, BOUNDS, QUANTILES = (0.0, 0.05, 0.1), (0.1, 1.0, 10.0, 100.0), (0.1, 0.2, 0.5, 0.9)


def run(is_quick: bool) -> dict[str, Any]:
    settings: dict[str, Any] = (
        {"seeds": 2, "steps": 50} if is_quick else {"seeds": 10, "steps": 10_000}
    )
    settings |= {"dimension": DIMENSION, "shares": SHARES, "window_size": WINDOW_SIZE}
    rows: dict[str, Any] = {name: {} for name in _clips()}
    for share in SHARES:
        streams = [_stream(seed, settings["steps"], share) for seed in range(settings["seeds"])]
        stacked = jax.tree.map(lambda *each: np.stack(each), *streams)
        for name, clip in _clips().items():
            seen = _regress(clip, *stacked)
            rows[name][f"{share:g}"] = jax.tree.map(np.asarray, seen)
    return settings | {"rows": rows}


@functools.cache
def _clips() -> dict[str, optax.GradientTransformation]:
    constant = {f"clip_by_global_norm({c})": clipax.clip_by_global_norm(c) for c in BOUNDS}
    window = {f"autoclip({q})": clipax.autoclip(q, WINDOW_SIZE) for q in QUANTILES}
    tracker = {f"clip_by_quantile({q})": clipax.clip_by_quantile(q) for q in QUANTILES}
    return {"none": clipax.measure(window_size=1)} | constant | window | tracker


def _stream(seed: int, steps: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The true parameters, and a sample for each step."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=DIMENSION)
    covariates = rng.standard_t(COVARIATE_TAIL, (steps, DIMENSION))
    noise, is_wrong = rng.standard_t(NOISE_TAIL, steps), rng.random(steps) < share
    labels = covariates @ truth * np.where(is_wrong, WRONG_FACTOR, 1.0) + noise
    truth, covariates, labels = (x.astype(np.float32) for x in (truth, covariates, labels))
    return truth, covariates, labels


@functools.partial(jax.jit, static_argnums=0)
def _regress(
    clip: optax.GradientTransformation, truths: Any, covariates: Any, labels: Any
) -> dict[str, jax.Array]:
    """The relative error of the parameters and the share of steps clipped, for each seed."""
    steps = labels.shape[1]
    sgd = optax.sgd(optax.linear_schedule(LEARNING_RATE, 0.0, steps))
    optimizer = optax.chain(clip, sgd)

    def regress(truth: jax.Array, covariates: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, sample: Any) -> Any:
            (params, state), (x, y) = carry, sample
            updates, state = optimizer.update((x @ params - y) * x, state, params)
            return (optax.apply_updates(params, updates), state), is_clipped(state)

        params = jnp.zeros(DIMENSION)
        (params, _), clipped = jax.lax.scan(
            step, (params, optimizer.init(params)), (covariates, labels)
        )
        error = clipax.global_norm(params - truth) / clipax.global_norm(truth)
        return {"relative_error": error, "share_of_steps_clipped": clipped.mean()}

    return jax.vmap(regress)(truths, covariates, labels)


def table(result: dict[str, Any]) -> str:
    title = (
        f"Corrupted labels: relative error of {DIMENSION} regression parameters after"
        f" {result['steps']} samples, one a step\n"
        f"learning rate {LEARNING_RATE} falling linearly to zero; median and range of"
        f" {result['seeds']} seeds; windows of {WINDOW_SIZE}\n"
    )
    shares = [f"{share:g}" for share in SHARES]
    columns = [f"{100 * share:g} % corrupted" for share in SHARES]
    header = ("method", *columns, "steps clipped then")
    rows = [
        (
            name,
            *(median_and_range(row[share]["relative_error"]) for share in shares),
            percent(row[shares[-1]]["share_of_steps_clipped"]),
        )
        for name, row in result["rows"].items()
    ]
    return title + aligned(header, rows)
