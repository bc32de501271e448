"""Programs in which devices hold different leaves: expert and pipeline parallelism."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax

DEVICES, WIDTH, TOKENS = 4, 6, 8
Loss = Callable[[Any, Any], Any]
# One norm over all devices, one for each layer or expert, and histories of both kinds.
CLIPS = {
    "global": clipax.clip_by_global_norm(0.1),
    "by layer": clipax.clip_by_leaf_norm(0.05, stack_axis={"stacked": 0, "whole": None}),
    "by unit": clipax.adaptive_grad_clip(0.01, unit_axis={"stacked": (0, -1), "whole": -1}),
    "history": clipax.zclip(max_norm=0.1, warmup_steps=1),
    "history by leaf": clipax.adagc(warmup_max_norm=0.1, warmup_steps=1),
    "skipped": clipax.skip_step(optax.identity(), 0.12),
}
clips = pytest.mark.parametrize("clip", CLIPS)


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"stacked": normal(0, DEVICES, WIDTH, WIDTH) / 2, "whole": normal(1, WIDTH, DEVICES)}
SPECS = {"stacked": PartitionSpec("device"), "whole": PartitionSpec()}
INPUTS = normal(2, TOKENS, WIDTH)


def specs_of(tree: Any) -> Any:
    """How the leaves of a tree on devices are sharded; what is on one of them is whole."""
    return jax.tree.map(lambda leaf: getattr(leaf.sharding, "spec", PartitionSpec()), tree)


def train(loss: Loss, clip: str, mesh: Any = None) -> tuple[Any, Any]:
    """Some steps; on a mesh, each device sees its own part of the parameters and the state."""
    optimizer = optax.chain(CLIPS[clip], optax.sgd(1.0, momentum=0.9))

    def step(params: Any, state: Any, inputs: Any) -> Any:
        grads = jax.grad(loss)(params, inputs)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = PARAMS
    if mesh is not None:
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
        params = jax.device_put(PARAMS, shardings)
    state = optimizer.init(params)
    if mesh is not None:
        specs = specs_of(params), specs_of(state)
        inputs = PartitionSpec()
        step = jax.shard_map(step, mesh=mesh, in_specs=(*specs, inputs), out_specs=specs)
    step, norms = jax.jit(step), []
    for size in (1.0, 1.0, 3.0, 1.0):
        params, state = step(params, state, size * INPUTS)
        norms.append(clipax.metrics(state, per_leaf=True))
    return params, norms


def device_mesh() -> Any:
    devices = jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("device",), axis_types=(AxisType.Auto,), devices=devices)


def assert_trained_alike(one: Loss, other: Loss, clip: str) -> None:
    expected, norms = train(one, clip)
    params, norms_on_devices = train(other, clip, device_mesh())
    trees.assert_close(params, expected, rtol=1e-4, atol=1e-6)
    trees.assert_close(norms_on_devices, norms, rtol=1e-4, atol=1e-6)
    acted = [metrics["skipped" if clip == "skipped" else "clip_fraction"] for metrics in norms]
    assert max(map(float, acted)) > 0


def gates(params: Any, inputs: Any) -> Any:
    return jax.nn.softmax(inputs @ params["whole"])


def mixture(params: Any, inputs: Any) -> Any:
    """A router weighs what each expert makes of a token."""
    outputs = jnp.tanh(jnp.einsum("tw,ewv->etv", inputs, params["stacked"]))
    return jnp.mean(jnp.einsum("te,etv->tv", gates(params, inputs), outputs) ** 2)


def mixture_on_devices(params: Any, inputs: Any) -> Any:
    """The same with one expert a device and the router on all."""
    device = jax.lax.axis_index("device")
    gate = jax.lax.dynamic_slice_in_dim(gates(params, inputs), device, 1, axis=1)
    output = jnp.tanh(inputs @ params["stacked"][0])
    return jnp.mean(jax.lax.psum(gate * output, "device") ** 2)


@pytest.mark.slow
@clips
def test_expert_parallel(clip: str) -> None:
    assert_trained_alike(mixture, mixture_on_devices, clip)


def layers(params: Any, inputs: Any) -> Any:
    for stage in range(DEVICES):
        inputs = jnp.tanh(inputs @ params["stacked"][stage])
    return 0.1 * jnp.mean((inputs @ params["whole"]) ** 2)


def pipeline(params: Any, inputs: Any) -> Any:
    """Layer by layer on another device, while the next part of the batch follows behind."""
    device, parts = jax.lax.axis_index("device"), jnp.split(inputs, 2)
    is_first, is_last = device == 0, device == DEVICES - 1
    to_next = [(stage, stage + 1) for stage in range(DEVICES - 1)]
    arrived, losses = 0 * parts[0], []
    for tick in range(DEVICES + len(parts) - 1):
        entering = parts[min(tick, len(parts) - 1)]
        made = jnp.tanh(jnp.where(is_first, entering, arrived) @ params["stacked"][0])
        if tick >= DEVICES - 1:
            losses.append(0.1 * jnp.mean((made @ params["whole"]) ** 2))
        arrived = jax.lax.ppermute(made, "device", to_next)
    loss = jnp.mean(jnp.stack(losses))
    return jax.lax.psum(jnp.where(is_last, loss, 0.0), "device")


@pytest.mark.slow
@clips
def test_pipeline(clip: str) -> None:
    assert_trained_alike(layers, pipeline, clip)
