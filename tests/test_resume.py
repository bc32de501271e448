"""A run that is cut, saved with Orbax and taken up again equals the one that went on."""

import inspect
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
import trees

import clipax

METHODS = sorted(trees.public_factories())
# Histories that are short enough to come into force before the cut.
SHORT = {"warmup_steps": 3, "window_size": 4}
CUT = 7


def build(name: str) -> Any:
    factory = trees.public_factories()[name]
    given = trees.required(factory, trees.ACTIVE)
    taken = inspect.signature(factory).parameters
    return factory(**given, **{key: SHORT[key] for key in SHORT if key in taken})


def updates_at(step: int) -> Any:
    _, updates = trees.params_and_updates(seed=step % 5)
    # No NaN: the accumulator of MultiSteps would keep it for ever.
    size = {4: 0.0, 9: 300.0}.get(step, 1.0 + 0.1 * step)
    return jax.tree.map(lambda leaf: leaf * size, updates)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_goes_on_bit_for_bit(name: str, tmp_path: pathlib.Path) -> None:
    """In a scan, and in the middle of an accumulation."""
    params, _ = trees.params_and_updates()
    sequence = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(updates_at, range(2 * CUT)))
    early, late = (
        jax.tree.map(lambda leaf, part=part: leaf[part], sequence)
        for part in (slice(CUT), slice(CUT, None))
    )

    def start() -> Any:
        accumulated = optax.MultiSteps(build(name), 2).gradient_transformation()

        def step(state: Any, updates: Any) -> Any:
            clipped, state = accumulated.update(updates, state, params)
            return state, clipped

        return accumulated.init, jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))

    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        init, run = start()
        middle, _ = run(init(params), early)
        end, outputs = run(middle, late)
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", middle)
            checkpointer.wait_until_finished()
            again, run_again = start()
            shapes = jax.eval_shape(again, params)
            restored = checkpointer.restore(tmp_path / "state", shapes)
        trees.assert_same_type(restored, middle)
        end_again, outputs_again = run_again(restored, late)
    trees.assert_bitwise(end_again, end)
    trees.assert_bitwise(outputs_again, outputs)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(outputs))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(outputs))
    assert clipax.metrics(end)
