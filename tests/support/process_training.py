"""One of the processes that train a small model together; run as a program.

A training program as a user writes it: parameters and batches are sharded over the devices of
all processes, and every process writes down what it saw.
"""

import argparse
import faulthandler
import functools
import json
import os
import pathlib
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import clipax

STEPS, BATCH, FEATURES, HIDDEN, CLASSES = 12, 32, 16, 24, 8
SPIKES = {6: 100.0, 9: 30.0}
"""Factors on the loss, and so on the gradient, of single steps."""
SECONDS = 180.0
"""After which a process ends itself."""
METHODS = {
    "clip_by_global_norm": lambda: clipax.clip_by_global_norm(1.0),
    "zclip": lambda: clipax.zclip(warmup_steps=4, max_norm=None),
    "adagc": lambda: clipax.adagc(warmup_steps=4, warmup_max_norm=100.0),
}
# With the devices in four rows of two, the rows are cut between two processes: one leaf spans
# them, one is on both, and one is on every device.
SPECS = {
    "hidden": PartitionSpec("data", "model"),
    "output": PartitionSpec("model"),
    "bias": PartitionSpec(),
}


def initial_params() -> Any:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)

    return {
        "hidden": normal(FEATURES, HIDDEN),
        "output": normal(HIDDEN, CLASSES),
        "bias": np.full(CLASSES, 0.5, np.float32),
    }


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and as labels their largest features."""
    inputs = np.random.default_rng(100 + step).normal(size=(BATCH, FEATURES)).astype(np.float32)
    return inputs, inputs[:, :CLASSES].argmax(axis=1)


def loss_fn(params: Any, inputs: Any, labels: Any, size: Any) -> Any:
    logits = jnp.tanh(inputs @ params["hidden"]) @ params["output"] + params["bias"]
    return size * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def placed(mesh: Mesh, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
    """A global array of an array that every process has; each holds its part of it."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placed_params(mesh: Mesh) -> Any:
    return jax.tree.map(functools.partial(placed, mesh), initial_params(), SPECS)


def train(mesh: Mesh, name: str, die_at: int | None) -> dict[str, Any]:
    optimizer = optax.chain(METHODS[name](), optax.adam(1e-2))
    params = placed_params(mesh)
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params: Any, opt_state: Any, inputs: Any, labels: Any, size: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, labels, size)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = clipax.metrics(opt_state, per_leaf=True)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **metrics}

    log = []
    for step in range(STEPS):
        if step == die_at:
            raise RuntimeError(f"told to die at step {step}")
        inputs, labels = (placed(mesh, part, PartitionSpec("data")) for part in batch(step))
        size = np.float32(SPIKES.get(step, 1.0))
        params, opt_state, metrics = train_step(params, opt_state, inputs, labels, size)
        log.append({key: float(value) for key, value in metrics.items()})
    whole = multihost_utils.process_allgather(params, tiled=True)
    return {"steps": log, "params": jax.tree.map(lambda leaf: leaf.tolist(), whole)}


def norm_in_shard_map(mesh: Mesh) -> float:
    """Each device measures its own parts; their types say over which axes to sum."""
    measure = jax.shard_map(
        clipax.global_norm, mesh=mesh, in_specs=(SPECS,), out_specs=PartitionSpec()
    )
    return float(jax.jit(measure)(placed_params(mesh)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--process-id", type=int, required=True)
    parser.add_argument("--coordinator", required=True, help="address:port")
    parser.add_argument("--devices", type=int, required=True, help="of this process")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--die-at", type=int, help="the step at which this process fails")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    # Also where nobody is left to end it; and it says where it hung.
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "model"))
    result = {
        "devices": len(jax.devices()),
        "processes": jax.process_count(),
        "norm_in_shard_map": norm_in_shard_map(mesh),
        "runs": {name: train(mesh, name, args.die_at) for name in args.methods},
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        # An ordinary exit would wait for the others, and they for this one.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
