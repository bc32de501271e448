"""Smooth clipping of each entry, against NumPy and worked cases."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees

import clipax

GRADS = jnp.array([3.0, -0.5, -4.0])
FORMULAS = {
    clipax.coefficients.tanh: lambda x, c: c * np.tanh(x / c),
    clipax.coefficients.square_root: lambda x, c: x / np.sqrt(1 + (x / c) ** 2),
    clipax.coefficients.rational: lambda x, c: x / (1 + np.abs(x) / c),
}
every = pytest.mark.parametrize("coefficient", FORMULAS)


def clipped_by(max_value: Any, updates: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    method = clipax.smooth_clip_by_value(max_value, *args, **kwargs)
    return method.update(updates, method.init(updates))


def ramp(count: Any) -> Any:
    return 0.25 + 0.0625 * jnp.asarray(count, jnp.float32)


def assert_equals_numpy(method: Any, sequence: Any, coefficient: Any, bounds: Any) -> None:
    clipped, states = sequences.scanned(method, sequence)
    for name, leaf in sequence.items():
        count = len(leaf)
        wide = leaf.astype(np.result_type(leaf.dtype, np.float64)).reshape(count, -1)
        bound = np.broadcast_to(np.reshape(bounds(name), (-1, 1)), (count, 1))
        modulus = np.abs(wide)
        drawn = FORMULAS[coefficient](modulus, bound)
        factor = np.where(modulus == 0, 1, drawn / np.where(modulus == 0, 1, modulus))
        got = clipped[name].reshape(count, -1)
        np.testing.assert_allclose(got, wide * factor, rtol=2e-6)
        np.testing.assert_allclose(states.norm[name], modulus.max(1), rtol=1e-6)
        np.testing.assert_allclose(states.max_norm[name], bound[:, 0], rtol=1e-6)
        np.testing.assert_allclose(states.coefficient[name], factor.min(1), rtol=2e-6)


@pytest.mark.slow_but(6)
@every
@pytest.mark.parametrize("max_value", [0.1, 1.0, 3, ramp])
def test_equals_numpy_over_a_long_run(coefficient: Any, max_value: Any) -> None:
    steps = 0.25 + 0.0625 * np.arange(sequences.LONG_COUNT)
    method = clipax.smooth_clip_by_value(max_value, coefficient)
    bounds = steps if callable(max_value) else max_value
    assert_equals_numpy(method, sequences.long_run(), coefficient, lambda name: bounds)


@every
def test_equals_numpy_on_every_shape_with_a_prefix_of_bounds(coefficient: Any) -> None:
    shapes = {"conv": (2, 3, 2, 4), "kernel": (5, 6), "phase": (3, 2), "scale": ()}
    bounds = {"conv": 0.5, "kernel": jnp.array(0.25), "phase": 2, "scale": ramp}
    steps = 0.25 + 0.0625 * np.arange(sequences.COUNT)
    numbers = {**bounds, "scale": steps}
    method = clipax.smooth_clip_by_value(bounds, coefficient)
    assert_equals_numpy(method, sequences.spiky(shapes), coefficient, numbers.get)


def test_equals_numpy_in_double_precision() -> None:
    with trees.double_precision(True):
        updates = np.geomspace(1e-3, 1e3, 50)
        clipped, _ = clipped_by(1.0, jnp.asarray(updates))
        np.testing.assert_allclose(clipped, np.tanh(updates), rtol=1e-14)


def test_worked_by_hand() -> None:
    clipped, state = clipped_by(1.0, GRADS, clipax.coefficients.rational)
    trees.assert_close(clipped, np.array([0.75, -1 / 3, -0.8]), rtol=1e-6)
    trees.assert_close(state[:3], (4.0, 1.0, 0.2), rtol=1e-6)
    clipped, _ = clipped_by(4.0, jnp.array([3.0, -3.0, 0.0]), clipax.coefficients.square_root)
    trees.assert_close(clipped, np.array([2.4, -2.4, 0.0]), rtol=1e-6)
    clipped, _ = clipped_by(2.0, jnp.array([2.0, -1e3]))
    trees.assert_close(clipped, np.array([1.523188312, -2.0]), rtol=1e-6)
    clipped, _ = clipped_by(5.0, jnp.array([3 + 4j, -5j]), clipax.coefficients.rational)
    trees.assert_close(clipped, np.array([1.5 + 2j, -2.5j]), rtol=1e-6)


def test_hard_makes_it_clip_by_value() -> None:
    method = clipax.clip_by_value(1.0)
    clipped, state = clipped_by(1.0, GRADS, clipax.coefficients.hard)
    expected = method.update(GRADS, method.init(GRADS))
    trees.assert_close((clipped, state), expected, rtol=1e-7)


@pytest.mark.slow_but(3)
@every
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_the_derivative_at_zero_is_the_identity(coefficient: Any, size: float) -> None:
    point = jnp.full(3, size)
    jacobian = jax.jacobian(lambda updates: clipped_by(1.0, updates, coefficient)[0])(point)
    trees.assert_bitwise(jacobian, jnp.eye(3))


@every
def test_entries_keep_their_order_and_their_signs(coefficient: Any) -> None:
    updates = jnp.array([-3.0, -1.0, -0.1, 0.1, 1.0, 3.0])
    clipped, _ = clipped_by(1.0, updates, coefficient)
    assert (jnp.diff(clipped) > 0).all()
    trees.assert_bitwise(-clipped[::-1], clipped)
    assert (jnp.abs(clipped) < jnp.minimum(jnp.abs(updates), 1.0)).all()


# Every row of the table of edge cases.


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_edge_entries_below_the_precision_of_the_bound(coefficient: Any, dtype: str) -> None:
    updates = jnp.asarray([4.0, -4.0, 1e-4, 0.0, -0.0, 1 / 3], dtype)
    for max_value in (1e9, 1e30, math.inf):
        clipped, state = clipped_by(max_value, updates, coefficient)
        trees.assert_bitwise(clipped, updates)
        assert state.coefficient == 1


@every
@pytest.mark.parametrize("max_value", [0.0, 1e-30, 2.5, 1e30, math.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_edge_inf_becomes_the_bound(coefficient: Any, max_value: float, dtype: str) -> None:
    updates = jnp.asarray([np.inf, -np.inf, 0.0], dtype)
    clipped, state = clipped_by(max_value, updates, coefficient)
    expected = jnp.asarray([max_value, -max_value, 0.0], dtype)
    np.testing.assert_allclose(clipped.astype("float32"), expected.astype("float32"), rtol=2e-7)
    assert (state.norm, state.coefficient) == (np.inf, 1 if max_value == np.inf else 0)


@every
@pytest.mark.parametrize("size", [1e20, 1e37, 3.3e38])
def test_the_largest_entries_reach_the_bound(coefficient: Any, size: float) -> None:
    """Their own factor, below the smallest normal number, would be flushed to zero."""
    clipped, _ = clipped_by(0.5, jnp.array([size, -size]), coefficient)
    np.testing.assert_allclose(clipped, [0.5, -0.5], rtol=2e-7)


def test_edge_a_coefficient_of_your_own_far_beyond_the_bound() -> None:
    def root(modulus: Any, max_value: Any) -> Any:
        return 1 / jnp.sqrt(1 + modulus / max_value)

    updates = jnp.array([2.0**60, 2.0**64, 2.0**90, np.inf, -np.inf])
    clipped, _ = clipped_by(1.0, updates, root)
    expected = np.array([2.0**30, 2.0**32, 2.0**32, 2.0**32, -(2.0**32)])
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)


@every
@pytest.mark.parametrize(
    "value", [complex(np.inf, 1), complex(1, -np.inf), complex(np.inf, np.inf)]
)
def test_edge_complex_with_an_infinite_part(coefficient: Any, value: complex) -> None:
    clipped, _ = clipped_by(1e9, jnp.array([value, 0.5j]), coefficient)
    assert np.isnan(clipped[0])
    trees.assert_bitwise(clipped[1], jnp.array(0.5j))


@every
@pytest.mark.parametrize("max_value", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_edge_nan_stays_nan_and_harms_no_other(
    coefficient: Any, max_value: float, dtype: str
) -> None:
    updates = jnp.asarray([np.nan, 3.0, -0.5], dtype)
    clipped, state = clipped_by(max_value, updates, coefficient)
    expected, _ = clipped_by(max_value, updates[1:], coefficient)
    assert np.isnan(clipped[0])
    trees.assert_bitwise(clipped[1:], expected)
    assert np.isnan(state.norm)


@every
def test_edge_bounds_of_zero(coefficient: Any) -> None:
    clipped, _ = clipped_by(0, jnp.array([3.0, -0.5, 0.0, np.inf, 1e-30, 3e38]), coefficient)
    np.testing.assert_array_equal(clipped, np.zeros(6))
    clipped, _ = clipped_by(0, jnp.array([3j, 0j]), coefficient)
    np.testing.assert_array_equal(clipped, np.zeros(2))


@every
@pytest.mark.parametrize("max_value", [0.0, 1.0, math.inf])
def test_edge_leaves_that_are_not_measured(coefficient: Any, max_value: float) -> None:
    method = clipax.smooth_clip_by_value(max_value, coefficient)
    clipped, state = sequences.beside_unmeasured(method, GRADS)
    trees.assert_bitwise(clipped, clipped_by(max_value, GRADS, coefficient)[0])
    assert jax.tree.leaves(state.norm) == [4]


def test_axis_name_gives_the_norm_of_all_shards() -> None:
    method = clipax.smooth_clip_by_value(1.0, axis_name="shard")
    updates = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    state = method.init(updates[0])
    clipped, states = jax.vmap(method.update, (0, None), axis_name="shard")(updates, state)
    trees.assert_bitwise(states.norm, jnp.array([3.0, 3.0]))
    trees.assert_close(clipped, clipped_by(1.0, updates)[0])


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_value must be a number >= 0, got ", bad):
        clipax.smooth_clip_by_value(bad)
    with pytest.raises(ValueError, match=r"^max_value\['w'\] must be a number >= 0, got "):
        clipax.smooth_clip_by_value({"w": bad})


@pytest.mark.parametrize("bad", [{"v": 0.0}, [0.0, 0.0], {"w": [0.0]}])
def test_a_prefix_that_does_not_fit_is_refused(bad: Any) -> None:
    method, good = clipax.smooth_clip_by_value(bad), clipax.smooth_clip_by_value(1.0)
    refusals.assert_prefix_must_fit("max_value", bad, method, good, {"w": GRADS})


@pytest.mark.parametrize("bad", [None, "tanh", 1.0, jnp.array(1.0)])
def test_a_coefficient_that_is_no_function_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^coefficient must be a function, got "):
        clipax.smooth_clip_by_value(1.0, bad)
