"""Clipping each leaf by its L2 norm over its size, against NumPy and worked cases."""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import clipax

GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([[0.5, 0.0, 0.0, 0.0]])}


def clipped_by(max_norm: Any, updates: Any) -> tuple[Any, Any]:
    method = clipax.clip_by_average_norm(max_norm)
    return method.update(updates, method.init(updates))


def average_norm(leaf: np.ndarray) -> np.ndarray:
    modulus = np.abs(leaf.astype(np.result_type(leaf.dtype, np.float64)))
    total = np.sum(modulus**2, axis=tuple(range(1, leaf.ndim)), keepdims=True)
    return np.sqrt(total) / leaf[0].size


def assert_equals_numpy(method: Any, bound: Any) -> None:
    sequence = sequences.spiky()
    norms = jax.tree.map(average_norm, sequence)
    bounds = sequences.by_leaf(lambda path, n: sequences.over_steps(bound(path), n), norms)
    sequences.assert_clips(method, sequence, norms, bounds)


@pytest.mark.parametrize("max_norm", [0.125, 2.0])
def test_equals_numpy_over_a_spiky_sequence(max_norm: float) -> None:
    assert_equals_numpy(clipax.clip_by_average_norm(max_norm), lambda path: max_norm)


def test_equals_numpy_under_a_prefix_of_numbers_arrays_and_schedules() -> None:
    max_norm = {
        "conv": jnp.array(0.25),
        "dense": lambda count: 0.03125 * jnp.asarray(count, jnp.float32),
        "phase": math.inf,
        "scale": 0,
    }
    bounds = {**max_norm, "conv": 0.25, "dense": 0.03125 * np.arange(sequences.COUNT)}
    method = clipax.clip_by_average_norm(max_norm)
    assert_equals_numpy(method, lambda path: bounds[path.split("/")[0]])


def test_worked_by_hand() -> None:
    clipped, state = clipped_by(0.5, GRADS)
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=2e-7)
    trees.assert_bitwise(clipped["b"], GRADS["b"])
    trees.assert_close(state.norm, {"w": 2.5, "b": 0.125}, rtol=0)


size = st.floats(2.0**-10, 1e4, width=32)
leaves = hnp.arrays(np.float32, (5,), elements=size | size.map(lambda x: -x) | st.just(0.0))


@jax.jit
def clip_traced(updates: Any, max_norm: Any) -> Any:
    return clipped_by(max_norm, updates)[0]


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(leaves, leaves, st.floats(0.015625, 1e4, width=32))
def test_bounds_the_average_norm_of_every_leaf(
    one: np.ndarray, other: np.ndarray, max_norm: float
) -> None:
    bound = np.float32(max_norm)
    clipped = clip_traced([one, other], bound)
    for got, given in zip(clipped, (one, other), strict=True):
        norm = average_norm(given[None])[0]
        np.testing.assert_allclose(got * norm, given * np.minimum(norm, bound), rtol=1e-6)
        assert average_norm(np.asarray(got)[None]) <= np.minimum(norm, bound) * (1 + 1e-6)
    trees.assert_close(clip_traced(clipped, bound), clipped, rtol=5e-7)
    trees.assert_bitwise(clip_traced([one, 8 * other], bound)[0], clipped[0])
    trees.assert_bitwise(clip_traced([4 * one, 4 * other], 4 * bound)[1], 4 * clipped[1])


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_is_the_rms_over_the_root_of_the_size(count: int) -> None:
    """TensorFlow 1's rule: of equal entries, a longer leaf holds more before it is clipped."""
    updates = jnp.full(count, 3.0)
    clipped, state = clipped_by(0.5, updates)
    np.testing.assert_allclose(state.norm, 3 / math.sqrt(count), rtol=2e-7)
    np.testing.assert_allclose(clipped, min(3.0, 0.5 * math.sqrt(count)), rtol=3e-7)
    by_rms = clipax.clip_by_block_rms(0.5 * math.sqrt(count))
    np.testing.assert_allclose(by_rms.update(updates, by_rms.init(updates))[0], clipped, rtol=3e-7)


# Every row of the table of edge cases.


@pytest.mark.parametrize("max_norm", [2.5, 3.0, math.inf])
def test_edge_norm_within_the_bound(max_norm: float) -> None:
    trees.assert_bitwise(clipped_by(max_norm, GRADS)[0], GRADS)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_edge_zero_or_without_entries(max_norm: float) -> None:
    updates = {
        "zero": jnp.array([0.0, -0.0]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.array(0.0),
    }
    clipped, state = clipped_by(max_norm, updates)
    trees.assert_bitwise(clipped, updates)
    trees.assert_close(state.norm, {"zero": 0.0, "empty": 0.0, "scalar": 0.0}, rtol=0)


def test_a_bound_of_zero_gives_zeros() -> None:
    trees.assert_bitwise(clipped_by(0, GRADS)[0], jax.tree.map(jnp.zeros_like, GRADS))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_edge_an_inf_entry(max_norm: float, value: float) -> None:
    clipped, _ = clipped_by(max_norm, {**GRADS, "w": jnp.array([3.0, value])})
    np.testing.assert_array_equal(clipped["w"], [0.0, np.nan])
    trees.assert_bitwise(clipped["b"], GRADS["b"] * max_norm)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_a_nan_entry(max_norm: float) -> None:
    clipped, state = clipped_by(max_norm, {**GRADS, "w": jnp.array([3.0, np.nan, np.inf])})
    assert np.isnan(clipped["w"]).all()
    assert np.isnan(state.norm["w"])
    trees.assert_bitwise(clipped["b"], GRADS["b"] * min(max_norm, 1.0))


@pytest.mark.parametrize("max_norm", [0.0, 1.25, math.inf])
def test_edge_leaves_that_are_not_measured(max_norm: float) -> None:
    method, updates = clipax.clip_by_average_norm(max_norm), jnp.array([3.0, 4.0])
    clipped, state = sequences.beside_unmeasured(method, updates)
    assert list(jax.tree.leaves(state.norm)) == [2.5]
    trees.assert_bitwise(clipped, updates * min(max_norm / 2.5, 1.0))


@sequences.far_out
def test_squares_out_of_range_are_measured_right(dtype: str, size: float) -> None:
    updates = {"w": jnp.full(4, size, dtype)}
    clipped, state = clipped_by(size / 4, updates)
    np.testing.assert_allclose(state.norm["w"], updates["w"].astype("float32")[0] / 2, rtol=1e-6)
    np.testing.assert_allclose(clipped["w"].astype("float32"), size / 2, rtol=1e-3)


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_norm must be a number >= 0, got ", bad):
        clipax.clip_by_average_norm(bad)
    with pytest.raises(ValueError, match=r"^max_norm\['w'\]\[1\] must be a number >= 0, got "):
        clipax.clip_by_average_norm({"w": [1.0, bad], "b": 1.0})


@pytest.mark.parametrize("bad", [{"w": 1.0}, {"w": 1.0, "c": 1.0}, [1.0, 1.0]])
def test_a_prefix_that_does_not_fit_is_refused(bad: Any) -> None:
    method, good = clipax.clip_by_average_norm(bad), clipax.clip_by_average_norm(1.0)
    refusals.assert_prefix_must_fit("max_norm", bad, method, good, GRADS)
