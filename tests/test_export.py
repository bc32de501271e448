"""One exported artefact for every platform, which holds a step with every method."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
from jax import export

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
OPTIMIZERS = {
    name: optax.chain(trees.build(name), optax.adam(1e-2)) for name in trees.public_factories()
}


def loss(params: Any, inputs: jax.Array) -> jax.Array:
    dense = params["dense"]
    hidden = jnp.tanh(inputs @ dense["kernel"] + dense["bias"][None])
    others = (jnp.sum(jnp.square(params[name])) for name in ("conv", "attention"))
    return jnp.mean(jnp.square(hidden)) * params["scale"] + sum(others)


def step(params: Any, states: dict[str, Any], inputs: jax.Array) -> Any:
    """What each method makes of the same gradients."""
    updates = jax.grad(loss)(params, inputs)
    stepped = {
        name: OPTIMIZERS[name].update(updates, state, params) for name, state in states.items()
    }
    new_params = {name: optax.apply_updates(params, made) for name, (made, _) in stepped.items()}
    return new_params, {name: state for name, (_, state) in stepped.items()}


def register_states(tree: Any) -> None:
    """Gives every named tuple in a tree a name by which it is written and read."""
    kinds: set[type] = set()

    def visit(node: Any) -> bool:
        if hasattr(node, "_fields"):
            kinds.add(type(node))
        return False

    jax.tree.leaves(tree, is_leaf=visit)
    for kind in kinds:
        export.register_namedtuple_serialization(
            kind, serialized_name=f"{kind.__module__}.{kind.__qualname__}"
        )


def test_one_artefact_for_all_platforms_steps_with_every_method() -> None:
    params, _ = trees.params_and_updates()
    batches = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        states = {name: optimizer.init(params) for name, optimizer in OPTIMIZERS.items()}
        register_states(states)
        direct = jax.jit(step)
        exported = export.export(direct, platforms=PLATFORMS)(params, states, batches[0])
        restored = export.deserialize(exported.serialize())
        assert restored.platforms == PLATFORMS
        expected_states = states
        for batch in batches:
            expected, expected_states = direct(params, expected_states, batch)
            stepped, states = restored.call(params, states, batch)
            trees.assert_bitwise(stepped, expected)
            trees.assert_bitwise(states, expected_states)
    assert sorted(stepped) == sorted(trees.public_factories())
