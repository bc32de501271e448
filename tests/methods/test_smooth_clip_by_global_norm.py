"""Smooth clipping by the global norm, against NumPy and worked cases."""

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

GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0, 0.0]])}
FORMULAS = {
    clipax.coefficients.square_root: lambda n, c: 1 / np.sqrt(1 + (n / c) ** 2),
    clipax.coefficients.rational: lambda n, c: 1 / (1 + n / c),
    clipax.coefficients.tanh: lambda n, c: np.where(
        n == 0, 1, np.tanh(n / c) / np.where(n == 0, 1, n / c)
    ),
}
every = pytest.mark.parametrize("coefficient", FORMULAS)


def clipped_by(max_norm: Any, updates: Any, *args: Any) -> tuple[Any, Any]:
    method = clipax.smooth_clip_by_global_norm(max_norm, *args)
    return method.update(updates, method.init(updates))


def ramp(count: Any) -> Any:
    return 0.25 + 0.0625 * jnp.asarray(count, jnp.float32)


@pytest.mark.slow_but(6)
@every
@pytest.mark.parametrize("max_norm", [0.3, 1.0, 4, ramp])
def test_equals_numpy_over_a_long_run(coefficient: Any, max_norm: Any) -> None:
    sequence = sequences.long_run()
    norms, _ = sequences.long_norms(sequence)
    bounds = 0.25 + 0.0625 * np.arange(norms.size) if callable(max_norm) else max_norm
    method = clipax.smooth_clip_by_global_norm(max_norm, coefficient)
    clipped, states = sequences.scanned(method, sequence)
    factors = FORMULAS[coefficient](norms, bounds)
    np.testing.assert_allclose(states.norm, norms, rtol=1e-6)
    np.testing.assert_allclose(states.max_norm, np.broadcast_to(bounds, norms.shape), rtol=1e-6)
    np.testing.assert_allclose(states.coefficient, factors, rtol=2e-6)
    for name, leaf in sequence.items():
        np.testing.assert_allclose(clipped[name], leaf * factors[:, None], rtol=2e-6)


def test_worked_by_hand() -> None:
    # Norm 13 over bounds that make 5-12-13 and 3-4-5 of it, or a half.
    for max_norm, coefficient, factor in [
        (13.0, clipax.coefficients.rational, 0.5),
        (52 / 3, clipax.coefficients.square_root, 0.8),
        (13.0, clipax.coefficients.tanh, 0.761594156),
        (0.13, clipax.coefficients.tanh, 0.01),
    ]:
        clipped, state = clipped_by(max_norm, GRADS, coefficient)
        expected = jax.tree.map(lambda leaf, factor=factor: np.asarray(leaf) * factor, GRADS)
        trees.assert_close(clipped, expected, rtol=1e-6)
        trees.assert_close(state[:3], (13.0, max_norm, factor), rtol=1e-6)
    trees.assert_bitwise(
        clipped_by(2.0, GRADS)[0], clipped_by(2.0, GRADS, clipax.coefficients.square_root)[0]
    )


def test_a_coefficient_of_your_own() -> None:
    clipped, _ = clipped_by(1.0, GRADS, lambda norm, max_norm: max_norm / (norm + 3 * max_norm))
    trees.assert_close(clipped, jax.tree.map(lambda leaf: leaf / 16, GRADS))


@every
def test_a_longer_update_stays_longer(coefficient: Any) -> None:
    """A hard clip makes all long updates one length; the smooth ones keep their order."""
    lengths = jnp.array([0.5, 1.0, 1.5, 2.0, 3.0])

    def after(method: Any) -> Any:
        one = jnp.ones(1)
        return [method.update(x * one, method.init(one))[0][0] for x in lengths]

    assert (np.diff(after(clipax.smooth_clip_by_global_norm(1.0, coefficient))) > 0.005).all()
    assert (np.diff(after(clipax.clip_by_global_norm(1.0)))[1:] == 0).all()


@pytest.mark.slow
@every
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3])
def test_the_derivative_at_zero_is_the_identity(coefficient: Any, size: float) -> None:
    point = jnp.full(3, size)
    jacobian = jax.jacobian(lambda updates: clipped_by(1.0, updates, coefficient)[0])(point)
    np.testing.assert_allclose(jacobian, np.eye(3), atol=4e-3 if size > 1e-30 else 0)


def test_a_known_norm_is_taken() -> None:
    method = clipax.smooth_clip_by_global_norm(2.0, clipax.coefficients.rational)
    clipped, state = method.update(GRADS, method.init(GRADS), norm=jnp.array(2.0))
    trees.assert_bitwise(clipped, jax.tree.map(lambda leaf: leaf * 0.5, GRADS))
    assert state.norm == 2


# Every row of the table of edge cases.


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_edge_norm_below_the_precision_of_the_bound(coefficient: Any, dtype: str) -> None:
    updates = jnp.asarray([1e-4, -0.0, 3.0, -7.5], dtype)
    trees.assert_bitwise(clipped_by(1e9, updates, coefficient)[0], updates)
    trees.assert_bitwise(clipped_by(1e30, updates, coefficient)[0], updates)


@every
def test_edge_bounds_of_zero(coefficient: Any) -> None:
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    trees.assert_bitwise(clipped_by(0, zeros, coefficient)[0], zeros)
    for size in (1e-30, 1.0, 1e20):
        updates = jax.tree.map(lambda leaf, size=size: size * leaf, GRADS)
        clipped, state = clipped_by(0.0, updates, coefficient)
        trees.assert_bitwise(clipped, zeros)
        assert state.coefficient == 0


@every
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e37])
def test_edge_a_bound_of_inf(coefficient: Any, size: float) -> None:
    updates = jnp.array([size, -size, 0.0, -0.0])
    trees.assert_bitwise(clipped_by(math.inf, updates, coefficient)[0], updates)


@every
@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_edge_an_inf_entry(coefficient: Any, max_norm: float, value: float) -> None:
    clipped, state = clipped_by(max_norm, {**GRADS, "w": jnp.array([value, 4.0])}, coefficient)
    trees.assert_bitwise(clipped["b"], jnp.zeros((1, 2)))
    assert np.isnan(clipped["w"][0])
    assert clipped["w"][1] == 0
    assert (state.norm, state.coefficient) == (np.inf, 0)


@every
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_a_nan_entry(coefficient: Any, max_norm: float) -> None:
    updates = {**GRADS, "w": jnp.array([np.nan, np.inf])}
    clipped, state = clipped_by(max_norm, updates, coefficient)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves((clipped, state.norm)))


@every
def test_edge_finite_entries_whose_norm_overflows(coefficient: Any) -> None:
    updates = {"w": jnp.full(2, 3e38), "b": jnp.ones(3)}
    clipped, state = clipped_by(1.0, updates, coefficient)
    trees.assert_bitwise(clipped, jax.tree.map(jnp.zeros_like, updates))
    assert np.isposinf(state.norm)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_leaves_that_are_not_measured(max_norm: float) -> None:
    _, state = sequences.beside_unmeasured(
        clipax.smooth_clip_by_global_norm(max_norm), jnp.array([3.0, 4.0])
    )
    assert state.norm == 5


@sequences.far_out
def test_squares_out_of_range_are_measured_right(dtype: str, size: float) -> None:
    updates = jnp.full(4, size, dtype)
    clipped, _ = clipped_by(2 * size, updates, clipax.coefficients.rational)
    np.testing.assert_allclose(clipped.astype("float32"), size / 2, rtol=1e-3)


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_norm must be a number >= 0, got ", bad):
        clipax.smooth_clip_by_global_norm(bad)


@pytest.mark.parametrize("bad", [{"w": 1.0, "b": 2.0}, [1.0], ()])
def test_a_tree_of_bounds_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^max_norm must be one number.* got the tree [\[{(]"):
        clipax.smooth_clip_by_global_norm(bad)


@pytest.mark.parametrize("bad", [None, "tanh", 1.0, jnp.array(1.0)])
def test_a_coefficient_that_is_no_function_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^coefficient must be a function, got "):
        clipax.smooth_clip_by_global_norm(1.0, bad)
