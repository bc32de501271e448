"""Spikes: one batch in 200 comes with its gradients times 100.

That is what ZClip, AdaGC, SPAM and the skipping of steps are made against. A network with two
hidden layers reads scikit-learn's digits. The spikes stand at the same steps for every
method, and none in the first and the last 100.
"""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import clipax
from benchmarks.reproduce_shared import (
    aligned,
    clipped_optimizers,
    is_clipped,
    mean_and_std,
    percent,
)

SPIKE_FACTOR, BATCH_SIZE, TEST_SIZE, WIDTHS = 100.0, 32, 360, (64, 32, 32, 10)
LEARNING_RATES, MOMENTUM = {"sgd": 0.01, "adam": 1e-3}, 0.9
# How many losses on each side of a spike are averaged.
NEIGHBOURS = 5
# To compile a method takes longer than a quick run of it.
IN_QUICK = ("none", "clip_by_global_norm", "autoclip", "skip_step", "acclip", "scale_by")

Params = list[dict[str, Any]]


def run(is_quick: bool) -> dict[str, Any]:
    sizes = {"seeds": 2, "spikes": 2, "every": 20, "margin": 10} if is_quick else {}
    settings = {"seeds": 5, "spikes": 5, "every": 200, "margin": 100} | sizes
    settings["steps"] = 2 * settings["margin"] + settings["spikes"] * settings["every"]
    train_set, test_set = _digits()
    params, positions, inputs = _start(settings, len(train_set[0]))

    tables: dict[str, dict[str, Any]] = {}
    for kind, optimizers in _optimizers().items():
        names = [name for name in optimizers if not is_quick or name.startswith(IN_QUICK)]
        tables[kind] = {}
        for name in names:
            trained, history = _train(optimizers[name], params, train_set, inputs)
            tables[kind][name] = _summary(trained, history, positions, train_set, test_set)
    constants = {"factor": SPIKE_FACTOR, "batch_size": BATCH_SIZE, "widths": WIDTHS}
    return settings | constants | {"tables": tables}


def _optimizers() -> dict[str, dict[str, optax.GradientTransformation]]:
    sgd, adam = LEARNING_RATES["sgd"], LEARNING_RATES["adam"]
    # ACClip's momentum is a mean, where that of SGD is a sum.
    acclip = optax.chain(clipax.acclip(MOMENTUM), optax.sgd(sgd / (1 - MOMENTUM)))
    stable = optax.chain(clipax.scale_by_stable_adam(), optax.scale_by_learning_rate(adam))
    return {
        "sgd": clipped_optimizers(optax.sgd(sgd, momentum=MOMENTUM))
        | {"acclip(), for the momentum": acclip},
        "adam": clipped_optimizers(optax.adam(adam))
        | {"scale_by_stable_adam(), for Adam": stable},
    }


# -- The data and the network ----------------------------------------------------------------


def _digits() -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    test, train = slice(None, TEST_SIZE), slice(TEST_SIZE, None)
    return (images[train], labels[train]), (images[test], labels[test])


def _start(settings: dict[str, int], samples: int) -> tuple[Params, np.ndarray, Any]:
    """For each seed: parameters, where its spikes are, and for each step a batch and factor."""
    seeds, steps = range(settings["seeds"]), settings["steps"]
    params = jax.tree.map(lambda *each: np.stack(each), *map(_initial_params, seeds))
    positions = np.stack([_spike_positions(seed, settings) for seed in seeds])
    factors = np.ones((len(seeds), steps), np.float32)
    np.put_along_axis(factors, positions, SPIKE_FACTOR, axis=1)
    rngs = [np.random.default_rng([seed, 3]) for seed in seeds]
    batches = np.stack([rng.integers(samples, size=(steps, BATCH_SIZE)) for rng in rngs])
    return params, positions, (batches, factors)


def _initial_params(seed: int) -> Params:
    rng = np.random.default_rng([seed, 1])
    return [
        {
            "kernel": rng.normal(0, np.sqrt(2 / rows), (rows, columns)).astype(np.float32),
            "bias": np.zeros(columns, np.float32),
        }
        for rows, columns in itertools.pairwise(WIDTHS)
    ]


def _spike_positions(seed: int, settings: dict[str, int]) -> np.ndarray:
    """One step in each stretch of `every`, between the margins."""
    rng = np.random.default_rng([seed, 2])
    offsets = rng.integers(settings["every"], size=settings["spikes"])
    return settings["margin"] + settings["every"] * np.arange(settings["spikes"]) + offsets


def _logits(params: Params, images: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images @ last["kernel"] + last["bias"]


def _loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = _logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# -- Training --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _train(
    optimizer: optax.GradientTransformation, params: Params, train_set: Any, inputs: Any
) -> tuple[Params, dict[str, jax.Array]]:
    """The parameters and what was seen, in arrays of (seeds, steps)."""
    images, labels = train_set

    def train(params: Params, inputs: Any) -> Any:
        def step(carry: Any, batch_and_factor: Any) -> Any:
            (params, state), (batch, factor) = carry, batch_and_factor
            loss, grads = jax.value_and_grad(_loss)(params, images[batch], labels[batch])
            grads = jax.tree.map(lambda leaf: factor * leaf, grads)
            updates, state = optimizer.update(grads, state, params)
            seen = {"loss": loss, "clipped": is_clipped(state)}
            return (optax.apply_updates(params, updates), state), seen

        (params, _), history = jax.lax.scan(step, (params, optimizer.init(params)), inputs)
        return params, history

    return jax.vmap(train)(params, inputs)


@jax.jit
def _evaluated(params: Params, dataset: Any) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy, of each seed."""
    images, labels = dataset

    def evaluate(params: Params) -> tuple[jax.Array, jax.Array]:
        hits = _logits(params, images).argmax(axis=1) == labels
        return _loss(params, images, labels), hits.mean()

    return jax.vmap(evaluate)(params)


def _summary(
    params: Params, history: Any, positions: np.ndarray, train_set: Any, test_set: Any
) -> dict[str, np.ndarray]:
    """Everything with one value a seed."""
    loss, clipped = np.asarray(history["loss"]), np.asarray(history["clipped"])
    # The loss of a step is that before its update: the spike's own is the last before it.
    before, after = (
        np.stack([_at(loss, positions + offset) for offset in offsets])
        for offsets in (range(1 - NEIGHBOURS, 1), range(1, NEIGHBOURS + 1))
    )
    return {
        "final_loss": np.asarray(_evaluated(params, train_set)[0]),
        "test_accuracy": np.asarray(_evaluated(params, test_set)[1]),
        "loss_before_spikes": before.mean(axis=(0, 2)),
        "loss_after_spikes": after.mean(axis=(0, 2)),
        "share_of_steps_clipped": clipped.mean(axis=1),
        "share_of_spikes_clipped": _at(clipped, positions).mean(axis=1),
    }


def _at(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, positions, axis=1)


# -- The tables ------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    return "\n\n".join(_table(kind, result) for kind in result["tables"])


def _table(kind: str, result: dict[str, Any]) -> str:
    momentum = f" and momentum {MOMENTUM}" if kind == "sgd" else ""
    title = (
        f"Spikes, {kind} with learning rate {LEARNING_RATES[kind]}{momentum}:"
        f" {result['spikes']} in {result['steps']} steps, gradients times {SPIKE_FACTOR:g}\n"
        f"mean ± standard deviation over {result['seeds']} seeds; before, after: batch losses"
        f" of {NEIGHBOURS} steps\n"
    )
    header = (
        "method",
        "final loss",
        "test accuracy",
        "before",
        "after",
        "steps clipped",
        "spikes clipped",
    )
    rows = [(name, *_cells(row)) for name, row in result["tables"][kind].items()]
    return title + aligned(header, rows)


def _cells(row: dict[str, np.ndarray]) -> tuple[str, ...]:
    spreads = ("final_loss", "test_accuracy", "loss_before_spikes", "loss_after_spikes")
    shares = ("share_of_steps_clipped", "share_of_spikes_clipped")
    return (*(mean_and_std(row[key]) for key in spreads), *(percent(row[key]) for key in shares))
