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
    hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"][None])
    return params["scale"] * jnp.sum(jnp.square(hidden))


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
    params = {"kernel": jnp.full((4, 3), 0.5), "bias": jnp.zeros(3), "scale": jnp.ones(())}
    batches = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
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
            # The compiler may fuse another platform's way out a little differently.
            trees.assert_close(stepped, expected, rtol=1e-5, atol=1e-7)
            trees.assert_close(states, expected_states, rtol=1e-5, atol=1e-7)
    assert sorted(stepped) == sorted(trees.public_factories())
