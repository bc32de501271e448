"""One step with every method, to be exported."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
from jax import export

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
OPTIMIZERS = {
    name: optax.chain(trees.build(name), optax.sgd(0.1, momentum=0.9))
    for name in trees.public_factories()
}
PARAMS = {
    "kernel": np.full((4, 3), 0.5, np.float32),
    "bias": np.zeros(3, np.float32),
    "scale": np.ones((), np.float32),
}
BATCHES = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)


def initial_states(params: Any) -> dict[str, Any]:
    return {name: optimizer.init(params) for name, optimizer in OPTIMIZERS.items()}


def step(params: Any, states: dict[str, Any], inputs: jax.Array) -> Any:
    """What each method makes of the same gradients: its parameters and its state."""
    updates = jax.grad(_loss)(params, inputs)
    stepped = {
        name: OPTIMIZERS[name].update(updates, state, params) for name, state in states.items()
    }
    new_params = {name: optax.apply_updates(params, made) for name, (made, _) in stepped.items()}
    return new_params, {name: state for name, (_, state) in stepped.items()}


def _loss(params: Any, inputs: jax.Array) -> jax.Array:
    hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"][None])
    return params["scale"] * jnp.sum(jnp.square(hidden))


@functools.cache
def exported() -> bytearray:
    """The step for all platforms, as it would be written to a file."""
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        states = jax.eval_shape(initial_states, PARAMS)
        _name_states(states)
        lowered = export.export(jax.jit(step), platforms=PLATFORMS)(PARAMS, states, BATCHES[0])
    return lowered.serialize()


_named: set[type] = set()


def _name_states(tree: Any) -> None:
    """Gives every named tuple in a tree the name by which it is written and read."""

    def visit(node: Any) -> bool:
        kind = type(node)
        if hasattr(kind, "_fields") and kind not in _named:
            _named.add(kind)
            name = f"{kind.__module__}.{kind.__qualname__}"
            export.register_namedtuple_serialization(kind, serialized_name=name)
        return False

    jax.tree.leaves(tree, is_leaf=visit)
