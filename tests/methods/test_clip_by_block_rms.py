"""Clipping each leaf by its root mean square, against NumPy and worked cases."""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refusals
import sequences
import trees
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import clipax

GRADS = {"w": jnp.array([3.0, 4.0, 0.0, 0.0]), "b": jnp.array([[0.5, -0.5]])}


def clipped_by(max_rms: Any, updates: Any) -> tuple[Any, Any]:
    method = clipax.clip_by_block_rms(max_rms)
    return method.update(updates, method.init(updates))


def rms(leaf: np.ndarray) -> np.ndarray:
    modulus = np.abs(leaf.astype(np.result_type(leaf.dtype, np.float64)))
    return np.sqrt(np.mean(modulus**2, axis=tuple(range(1, leaf.ndim)), keepdims=True))


def assert_equals_numpy(
    method: Any, bound: Any, dtype: Any = np.float32, rtol: float = 2e-6
) -> None:
    sequence = sequences.spiky(dtype=dtype)
    norms = jax.tree.map(rms, sequence)
    bounds = sequences.by_leaf(lambda path, n: sequences.over_steps(bound(path), n), norms)
    sequences.assert_clips(method, sequence, norms, bounds, rtol=rtol)


@pytest.mark.parametrize("max_rms", [0.25, 4.0])
def test_equals_numpy_over_a_spiky_sequence(max_rms: float) -> None:
    assert_equals_numpy(clipax.clip_by_block_rms(max_rms), lambda path: max_rms)


def test_equals_numpy_in_double_precision() -> None:
    with trees.double_precision(True):
        method = clipax.clip_by_block_rms(1.0)
        assert_equals_numpy(method, lambda path: 1.0, np.float64, rtol=1e-13)


def test_equals_numpy_under_a_prefix_of_numbers_arrays_and_schedules() -> None:
    max_rms = {
        "conv": jnp.array(0.5),
        "dense": lambda count: 0.125 * jnp.asarray(count, jnp.float32),
        "phase": math.inf,
        "scale": 1,
    }
    bounds = {**max_rms, "conv": 0.5, "dense": 0.125 * np.arange(sequences.COUNT)}
    method = clipax.clip_by_block_rms(max_rms)
    assert_equals_numpy(method, lambda path: bounds[path.split("/")[0]])


def test_worked_by_hand() -> None:
    clipped, state = clipped_by(1.0, GRADS)
    np.testing.assert_allclose(clipped["w"], [1.2, 1.6, 0.0, 0.0], rtol=2e-7)
    trees.assert_bitwise(clipped["b"], GRADS["b"])
    trees.assert_close(state.norm, {"w": 2.5, "b": 0.5}, rtol=2e-7)


size = st.floats(2.0**-10, 1e4, width=32)
leaves = hnp.arrays(np.float32, (6,), elements=size | size.map(lambda x: -x) | st.just(0.0))


@jax.jit
def clip_traced(updates: Any, max_rms: Any) -> Any:
    return clipped_by(max_rms, updates)[0]


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(leaves, leaves, st.floats(0.015625, 1e4, width=32))
def test_bounds_the_rms_of_every_leaf(one: np.ndarray, other: np.ndarray, max_rms: float) -> None:
    bound = np.float32(max_rms)
    clipped = clip_traced([one, other], bound)
    for got, given in zip(clipped, (one, other), strict=True):
        size = rms(given[None])[0]
        np.testing.assert_allclose(got * size, given * np.minimum(size, bound), rtol=1e-6)
        assert rms(np.asarray(got)[None]) <= np.minimum(size, bound) * (1 + 1e-6)
    trees.assert_close(clip_traced(clipped, bound), clipped, rtol=5e-7)
    trees.assert_bitwise(clip_traced([one, 8 * other], bound)[0], clipped[0])
    trees.assert_bitwise(clip_traced([4 * one, 4 * other], 4 * bound)[1], 4 * clipped[1])
    # A mean does not depend on how often the same entries occur.
    repeated = clip_traced([np.tile(one, 2), other], bound)[0]
    np.testing.assert_allclose(repeated, np.tile(clipped[0], 2), rtol=5e-7)


def test_a_stale_second_moment_moves_no_leaf_further_than_the_bound() -> None:
    """Adafactor's claim: after small gradients, one of common size makes too large a step."""
    grads = jnp.asarray([1e-4] * 20 + [1.0] * 5)[:, None] * jnp.array([[1.0, -2.0, 0.5]])

    def sizes(*after: Any) -> np.ndarray:
        optimizer = optax.chain(optax.scale_by_adam(b1=0.0, b2=0.999), *after)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            steps = sequences.scanned(optimizer, grads)[0]
        return rms(steps).ravel()

    plain, clipped = sizes(), sizes(clipax.clip_by_block_rms(1.0))
    assert plain[20] > 4
    assert (clipped <= 1 + 1e-6).all()
    np.testing.assert_allclose(clipped, np.minimum(plain, 1.0), rtol=1e-6)


# Every row of the table of edge cases.


@pytest.mark.parametrize("max_rms", [2.5, 3.0, math.inf])
def test_edge_rms_within_the_bound(max_rms: float) -> None:
    clipped, state = clipped_by(max_rms, GRADS)
    trees.assert_bitwise(clipped, GRADS)
    trees.assert_close(state.coefficient, {"w": 1.0, "b": 1.0}, rtol=0)


def test_edge_rms_at_the_bound_as_of_adams_first_step() -> None:
    # Among them sizes n for which sqrt(n) * n**-0.5 is above one in float32.
    sizes = (1, 2, 3, 6, 24, 58, 61)
    updates = [jnp.asarray((-1.0) ** np.arange(size), jnp.float32) for size in sizes]
    clipped, _ = clipped_by(1.0, updates)
    trees.assert_bitwise(clipped, updates)


def test_edge_zero_or_without_entries() -> None:
    updates = {
        "zero": jnp.array([0.0, -0.0]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.array(0.0),
    }
    clipped, state = clipped_by(1e-30, updates)
    trees.assert_bitwise(clipped, updates)
    trees.assert_close(state.norm, {"zero": 0.0, "empty": 0.0, "scalar": 0.0}, rtol=0)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_edge_an_inf_entry(value: float) -> None:
    clipped, _ = clipped_by(1.0, {**GRADS, "w": jnp.array([3.0, value, 0.0])})
    np.testing.assert_array_equal(clipped["w"], [0.0, np.nan, 0.0])
    trees.assert_bitwise(clipped["b"], GRADS["b"])


@pytest.mark.parametrize("max_rms", [1.0, math.inf])
def test_edge_a_nan_entry(max_rms: float) -> None:
    clipped, state = clipped_by(max_rms, {**GRADS, "w": jnp.array([3.0, np.nan, np.inf])})
    assert np.isnan(clipped["w"]).all()
    assert np.isnan(state.norm["w"])
    trees.assert_bitwise(clipped["b"], GRADS["b"])


@pytest.mark.parametrize("max_rms", [0.5, math.inf])
def test_edge_leaves_that_are_not_measured(max_rms: float) -> None:
    method = clipax.clip_by_block_rms(max_rms)
    clipped, state = sequences.beside_unmeasured(method, jnp.array([2.0, -2.0]))
    trees.assert_close(jax.tree.leaves(state.norm), [2.0], rtol=2e-7)
    trees.assert_close(clipped, jnp.array([1.0, -1.0]) * min(max_rms, 2.0), rtol=2e-7)


@sequences.far_out
def test_squares_out_of_range_are_measured_right(dtype: str, size: float) -> None:
    updates = {"w": jnp.full(4, size, dtype)}
    clipped, state = clipped_by(size / 2, updates)
    np.testing.assert_allclose(state.norm["w"], updates["w"].astype("float32")[0], rtol=1e-6)
    np.testing.assert_allclose(clipped["w"].astype("float32"), size / 2, rtol=1e-3)


# Every bad argument.


@pytest.mark.parametrize("bad", [0, -0.0, -1, -1e-9, -math.inf, *refusals.NO_NUMBERS])
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_rms must be a number > 0, got ", bad):
        clipax.clip_by_block_rms(bad)
    with pytest.raises(ValueError, match=r"^max_rms\['w'\]\[1\] must be a number > 0, got "):
        clipax.clip_by_block_rms({"w": [1.0, bad], "b": 1.0})


@pytest.mark.parametrize("bad", [{"w": 1.0}, {"w": 1.0, "c": 1.0}, [1.0, 1.0]])
def test_a_prefix_that_does_not_fit_is_refused(bad: Any) -> None:
    method, good = clipax.clip_by_block_rms(bad), clipax.clip_by_block_rms(1.0)
    refusals.assert_prefix_must_fit("max_rms", bad, method, good, GRADS)


def test_a_bound_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_rms of shape \(2,\) does not fit"):
        clipax.clip_by_block_rms(jnp.ones(2)).init(GRADS)
