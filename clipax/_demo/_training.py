"""A recurrent network on handwritten digits, trained from several seeds at once."""

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipax
from clipax._demo._methods import BATCH_SIZE, METHODS, OPTIMIZERS, chained

HIDDEN_SIZE, TEST_SIZE = 64, 360
RECURRENT_GAIN, INPUT_SCALE = 1.4, 0.2
FINAL_STEPS, CHUNK_STEPS = 20, 10

Params = dict[str, Any]
Batch = tuple[Any, Any]
Record = dict[str, Any]


def digits(datasets: Any) -> tuple[Batch, Batch]:
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    train, test = slice(TEST_SIZE, None), slice(TEST_SIZE)
    return (images[train], labels[train]), (images[test], labels[test])


def initial_params(seed: int) -> Params:
    rng = np.random.default_rng(seed)
    orthogonal, _ = np.linalg.qr(rng.normal(size=(HIDDEN_SIZE, HIDDEN_SIZE)))
    params = {
        "input": INPUT_SCALE * rng.normal(size=(1, HIDDEN_SIZE)),
        "recurrent": RECURRENT_GAIN * orthogonal,
        "bias": np.zeros(HIDDEN_SIZE),
        "output": rng.normal(size=(HIDDEN_SIZE, 10)) / math.sqrt(HIDDEN_SIZE),
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def minibatches(train_set: Batch, seeds: int) -> Iterator[Batch]:
    images, labels = train_set
    rngs = [np.random.default_rng([seed, 1]) for seed in range(seeds)]
    while True:
        chosen = np.stack([rng.integers(len(labels), size=BATCH_SIZE) for rng in rngs])
        yield images[chosen], labels[chosen]


def predict(
    params: Params, images: jax.Array, inner: optax.GradientTransformation | None = None
) -> jax.Array:
    """The logits of a batch; `inner` clips what flows back through the network."""

    def read(hidden: jax.Array, pixels: jax.Array) -> tuple[jax.Array, None]:
        if inner is not None:
            hidden = jax.vmap(lambda sequence: clipax.clip_cotangent(sequence, inner))(hidden)
        inputs = pixels[:, None] @ params["input"] + params["bias"][None]
        return jnp.tanh(inputs + hidden @ params["recurrent"]), None

    hidden, _ = jax.lax.scan(read, jnp.zeros((len(images), HIDDEN_SIZE)), images.T)
    return hidden @ params["output"]


# Apart from `_update`, so that all methods share one compiled program.
@functools.partial(jax.jit, static_argnums=2)
def _losses_and_grads(
    params: Params, batch: Batch, inner: optax.GradientTransformation | None
) -> tuple[jax.Array, Params]:
    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = predict(params, images, inner)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.vmap(jax.value_and_grad(loss))(params, *batch)


@functools.partial(jax.jit, static_argnums=0)
def _update(
    optimizer: optax.GradientTransformation, grads: Params, state: Any, params: Params
) -> tuple[Params, Any, Record]:
    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any, Record]:
        updates, state = optimizer.update(grads, state, params)
        metrics = clipax.metrics(state)
        seen = {key: metrics[key] for key in ("norm", "max_norm", "clip_fraction")}
        seen["clip_fraction"] = metrics.get("is_skipped", seen["clip_fraction"])
        seen["global_norm"] = clipax.global_norm(grads)
        return optax.apply_updates(params, updates), state, seen

    return jax.vmap(update)(grads, state, params)


@jax.jit
def accuracies(params: Params, test_set: Batch) -> jax.Array:
    images, labels = test_set
    predictions = jax.vmap(lambda params: predict(params, images).argmax(axis=1))(params)
    return (predictions == labels[None]).mean(axis=1)


def train(
    name: str, args: argparse.Namespace, train_set: Batch, report: Callable[[int], Any]
) -> tuple[Params, Record, float]:
    """Returns the parameters, records of shape (steps, seeds), and the seconds per step."""
    inner = METHODS[name]() if name == "clip_cotangent" else None
    optimizer = chained(name, OPTIMIZERS[args.optimizer]())

    def step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any, Record]:
        losses, grads = _losses_and_grads(params, batch, inner)
        params, state, seen = _update(optimizer, grads, state, params)
        return params, state, seen | {"loss": losses}

    params = jax.tree.map(lambda *each: np.stack(each), *map(initial_params, range(args.seeds)))
    state = jax.jit(jax.vmap(optimizer.init))(params)
    batches = minibatches(train_set, args.seeds)
    # Compiles before any step is timed.
    step(params, state, next(minibatches(train_set, args.seeds)))[0]["output"].block_until_ready()
    history, seconds = [], []
    for done in range(0, args.steps, CHUNK_STEPS):
        chunk, start = min(CHUNK_STEPS, args.steps - done), time.perf_counter()
        for batch in itertools.islice(batches, chunk):
            params, state, seen = step(params, state, batch)
            history.append(seen)
        params["output"].block_until_ready()
        seconds.append((time.perf_counter() - start) / chunk)
        report(chunk)
    arrays = {key: np.stack([seen[key] for seen in history]) for key in history[0]}
    return params, arrays, statistics.median(seconds)


def summary(name: str, history: Record) -> Record:
    loss, norm, max_norm = history["loss"], history["global_norm"], history["max_norm"]
    clipped = history["clip_fraction"] > 0
    # A bound belongs beside the global norms only if it bounds them.
    is_global = np.allclose(norm, history["norm"], rtol=1e-3, equal_nan=True)
    return {
        "final_loss": loss[-FINAL_STEPS:].mean(axis=0),
        "largest_norm": np.where(np.isnan(norm), np.inf, norm).max(axis=0),
        "share_of_steps_clipped": None if name == "clip_cotangent" else clipped.mean(axis=0),
        "loss": loss,
        "norm": norm,
        "max_norm": max_norm if is_global and np.isfinite(max_norm).any() else None,
    }
