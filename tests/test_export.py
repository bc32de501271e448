"""Exported programs: one for every platform, others for every size."""

from typing import Any

import every_method
import jax
import jax.numpy as jnp
import per_example_zoo as zoo
import pytest
import trees
from jax import export

import clipax
from clipax import norms


@pytest.mark.slow
def test_one_artefact_for_all_platforms_steps_with_every_method() -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        restored = export.deserialize(every_method.exported())
        assert set(restored.platforms) == {"cpu", "cuda", "rocm", "tpu"}
        direct, call = jax.jit(every_method.step), jax.jit(restored.call)
        states = expected_states = every_method.initial_states(every_method.PARAMS)
        for batch in every_method.BATCHES:
            expected, expected_states = direct(every_method.PARAMS, expected_states, batch)
            stepped, states = call(every_method.PARAMS, states, batch)
            # The compiler may fuse another platform's way out a little differently.
            trees.assert_close(stepped, expected, rtol=1e-5, atol=1e-7)
            trees.assert_close(states, expected_states, rtol=1e-5, atol=1e-7)
    assert sorted(stepped) == sorted(trees.public_factories())


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("name", trees.mostly_slow(trees.public_factories()))
def test_leaves_may_have_a_symbolic_size(name: str) -> None:
    method = trees.build(name)

    def step(updates: Any) -> Any:
        return method.update(updates, method.init(updates), updates)

    (rows,) = export.symbolic_shape("rows")
    shapes = {"w": jax.ShapeDtypeStruct((rows, 3), jnp.float32), "b": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):
        exported = export.export(jax.jit(step))(shapes)
        for size in (2, 5):
            updates = {"w": 3 * jnp.eye(size, 3) + 1, "b": jnp.array([1.0, -2.0, 0.5])}
            found, expected = exported.call(updates), jax.jit(step)(updates)
            trees.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_sum_in_steps_may_have_a_symbolic_size() -> None:
    (rows,) = export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((rows, 512), jnp.float32)
    measure = jax.jit(lambda x: norms.leaf_norm(x * x, 1))
    squares = export.export(measure)(shape).call(jnp.full((200, 512), 2.0))
    assert float(squares) == 4 * 200 * 512


EXPORTED = [name for name in zoo.ZOO if "conv" not in name]  # JAX exports no such convolutions


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *(("mlp", memory) for memory in ("auto", "kept", "twice")),
        pytest.param("rematerialized", "auto", marks=pytest.mark.slow),
        *(pytest.param(each, "kept", marks=pytest.mark.slow) for each in EXPORTED[::3]),
    ],
)
def test_the_number_of_examples_may_be_symbolic(name: str, memory: Any) -> None:
    loss_fn, params, batch = zoo.ZOO[name].build()
    (examples,) = export.symbolic_shape("examples")
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((examples, *leaf.shape[1:]), leaf.dtype), batch
    )
    grad_fn = jax.jit(clipax.clipped_grad(loss_fn, 0.5, memory=memory))
    found, _ = export.export(grad_fn)(params, shapes).call(params, batch)
    zoo.assert_near(found, grad_fn(params, batch)[0])
