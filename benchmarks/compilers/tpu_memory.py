# ruff: noqa: T201
"""What a bound costs in memory on a TPU, and what a bound that comes a step late risks.

    python -m benchmarks.compilers.tpu_memory [--quick] [--chips v5e v5p v6e] [--output FILE.json]
    python -m benchmarks.compilers.tpu_memory --spikes [--quick] [--output FILE.json]

The first needs the extra `tpu` and no TPU: its figures are those of the compiler, and no
measurements. The second trains on scikit-learn's digits (the extra `demo`), on a CPU.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A plug-in that finds no chip of its own would else stop the run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import clipax
from benchmarks import reproduce_spikes
from benchmarks.compilers.accelerators import chips, placed, why_not
from benchmarks.reproduce_shared import json_ready

MAX_NORM = 1.0
LEARNING_RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"])
    parser.add_argument("--spikes", action="store_true", help="the risk, in place of the memory")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()

    if arguments.spikes:
        result = spikes(arguments.quick)
    elif reason := why_not("tpu"):
        parser.error(reason)
    else:
        sizes = {"width": 256, "depth": 2, "batch": 64} if arguments.quick else {}
        result = memory(arguments.chips, **sizes)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(json_ready(result), indent=2) + "\n")


# -- A bound from the previous step --------------------------------------------------------------


def delayed_global_norm(
    max_norm: float, guard: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """Scales updates by the factor that the previous ones called for; the first by one.

    A guard with a fixed bound clips the current updates as well, after they were measured.
    """

    def init_fn(_: Any) -> clipax.states.ClipState:
        zero, one = jnp.zeros(()), jnp.ones(())
        return clipax.states.ClipState(zero, zero + max_norm, one, zero)

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        norm, previous = clipax.global_norm(updates), state.threshold
        factor = clipax.coefficients.hard(previous, state.max_norm)
        # A norm that is not finite would stop the step after it too.
        kept = jnp.where(jnp.isfinite(norm), norm, previous)
        if guard is not None:
            updates, _ = guard.update(updates, guard.init(updates), params)
        updates = jax.tree.map(lambda leaf: leaf * factor, updates)
        return updates, clipax.states.ClipState(norm, state.max_norm, factor, kept)

    return optax.GradientTransformation(init_fn, update_fn)


# -- Memory --------------------------------------------------------------------------------------

Params = list[jax.Array]
# From parameters, inputs and targets: the loss, the gradients, and their norm where it is known.
Gradients = Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Params, jax.Array | None]]


def _loss(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    for kernel in params:
        inputs = jax.nn.relu(inputs @ kernel)
    return jnp.mean(jnp.square(inputs - targets))


def _once(params: Params, inputs: jax.Array, targets: jax.Array) -> Any:
    return *jax.value_and_grad(_loss)(params, inputs, targets), None


def _twice(params: Params, inputs: jax.Array, targets: jax.Array) -> Any:
    """The whole gradient for its norm, and then once more for the update."""
    norm = clipax.global_norm(jax.grad(_loss)(params, inputs, targets))
    # Without a barrier the compiler would see that it is the same gradient.
    again = jax.lax.optimization_barrier((params, inputs, targets, norm))
    return *jax.value_and_grad(_loss)(*again[:3]), norm


def _from_activations(params: Params, inputs: jax.Array, targets: jax.Array) -> Any:
    """The norm without the gradients: `|x^T d|^2 = sum((x x^T) * (d d^T))` for each layer."""

    def loss(params: Params, offsets: list[jax.Array]) -> Any:
        seen, x = [], inputs
        for kernel, offset in zip(params, offsets, strict=True):
            seen.append(x)
            x = jax.nn.relu(x @ kernel + offset)
        return jnp.mean(jnp.square(x - targets)), seen

    offsets = [jnp.zeros((len(inputs), kernel.shape[1])) for kernel in params]
    (value, seen), (updates, deltas) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        params, offsets
    )
    pairs = zip(seen, deltas, strict=True)
    norm = jnp.sqrt(sum(jnp.sum((x @ x.T) * (delta @ delta.T)) for x, delta in pairs))
    return value, updates, norm


def _forms() -> dict[str, tuple[optax.GradientTransformation, Gradients]]:
    clip = clipax.clip_by_global_norm(MAX_NORM)
    value, leaf = clipax.clip_by_value(MAX_NORM), clipax.clip_by_leaf_norm(MAX_NORM)
    return {
        "no clipping": (optax.identity(), _once),
        "clip_by_value": (value, _once),
        "clip_by_leaf_norm": (leaf, _once),
        "clip_by_block_rms": (clipax.clip_by_block_rms(MAX_NORM), _once),
        "adaptive_grad_clip": (clipax.adaptive_grad_clip(0.01), _once),
        "clip_by_global_norm": (clip, _once),
        "optax.clip_by_global_norm": (optax.clip_by_global_norm(MAX_NORM), _once),
        "global norm, delayed": (delayed_global_norm(MAX_NORM), _once),
        "... and clip_by_value": (delayed_global_norm(MAX_NORM, value), _once),
        "... and clip_by_leaf_norm": (delayed_global_norm(MAX_NORM, leaf), _once),
        "global norm, gradient made twice": (clip, _twice),
        "global norm, from activations": (clip, _from_activations),
    }


def memory(
    names: list[str], width: int = 4096, depth: int = 8, batch: int = 1024
) -> dict[str, Any]:
    print(
        f"Temporary memory in MiB of a step of Adam on {depth} float32 layers of {width} x {width}"
        f" ({depth * width**2 / 2**18:g} MiB of parameters), batch {batch}, one chip"
    )
    print("\n" + _row("form", *names) + "\n" + _row("---", *("---:" for _ in names)))
    rows: dict[str, dict[str, int]] = {}
    for form, parts in _forms().items():
        rows[form] = {name: _temporary_bytes(*parts, name, width, depth, batch) for name in names}
        print(_row(form, *(f"{size / 2**20:.0f}" for size in rows[form].values())), flush=True)
    return {"width": width, "depth": depth, "batch": batch, "temporary_bytes": rows}


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _temporary_bytes(
    clip: optax.GradientTransformation,
    gradients: Gradients,
    chip: str,
    width: int,
    depth: int,
    batch: int,
) -> int:
    optimizer = optax.with_extra_args_support(optax.chain(clip, optax.adam(LEARNING_RATE)))

    def step(params: Params, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        value, updates, norm = gradients(params, inputs, targets)
        known = {} if norm is None else {"norm": norm}
        updates, state = optimizer.update(updates, state, params, **known)
        return optax.apply_updates(params, updates), state, value

    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * depth
    examples = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    mesh = Mesh(np.array(chips(chip)[:1]), ("x",))
    arguments = placed((params, state, examples, examples), mesh)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes


# -- The risk ------------------------------------------------------------------------------------


def spikes(is_quick: bool) -> dict[str, Any]:
    """The spikes of `reproduce_spikes`, met by a bound that comes a step late."""
    sizes = {"seeds": 2, "spikes": 2, "every": 20, "margin": 10}
    sizes = sizes if is_quick else {"seeds": 5, "spikes": 5, "every": 200, "margin": 100}
    settings = sizes | {"steps": 2 * sizes["margin"] + sizes["spikes"] * sizes["every"]}
    train_set, test_set = reproduce_spikes._digits()
    params, positions, inputs = reproduce_spikes._start(settings, len(train_set[0]))
    tables: dict[str, Any] = {}
    for kind, rate in reproduce_spikes.LEARNING_RATES.items():
        rows = tables[kind] = {}
        for name, clip in _spike_clips().items():
            sgd = optax.sgd(rate, momentum=reproduce_spikes.MOMENTUM)
            optimizer = optax.chain(clip, sgd if kind == "sgd" else optax.adam(rate))
            trained, history = reproduce_spikes._train(optimizer, params, train_set, inputs)
            rows[name] = reproduce_spikes._summary(
                trained, history, positions, train_set, test_set
            )
    result = settings | {"tables": tables}
    print(reproduce_spikes.table(result))
    return result


def _spike_clips() -> dict[str, optax.GradientTransformation]:
    value, leaf = clipax.clip_by_value(MAX_NORM), clipax.clip_by_leaf_norm(MAX_NORM)
    return {
        "none": clipax.measure(window_size=1),
        "clip_by_global_norm(1.0)": clipax.clip_by_global_norm(MAX_NORM),
        "clip_by_value(1.0)": value,
        "clip_by_leaf_norm(1.0)": leaf,
        "delayed": delayed_global_norm(MAX_NORM),
        "delayed, clip_by_value(1.0)": delayed_global_norm(MAX_NORM, value),
        "delayed, clip_by_leaf_norm(1.0)": delayed_global_norm(MAX_NORM, leaf),
    }


if __name__ == "__main__":
    main()
