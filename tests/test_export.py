"""One exported artefact for every platform, which holds a step with every method."""

import every_method
import jax
import pytest
import trees
from jax import export


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
