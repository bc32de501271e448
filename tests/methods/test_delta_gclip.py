"""delta-GClip, against NumPy and worked cases."""

import inspect
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


def clipped_by(max_norm: Any, updates: Any, **kwargs: Any) -> tuple[Any, Any]:
    method = clipax.delta_gclip(max_norm, **kwargs)
    return method.update(updates, method.init(updates))


def ramp(count: Any) -> Any:
    return 0.0625 * jnp.asarray(count, jnp.float32)


@pytest.mark.parametrize("delta", [1e-3, 0.25, 0.9])
@pytest.mark.parametrize("max_norm", [0.5, 2, ramp])
def test_equals_numpy_over_a_long_run(max_norm: Any, delta: float) -> None:
    sequence = sequences.long_run()
    norms, _ = sequences.long_norms(sequence)
    bounds = 0.0625 * np.arange(norms.size) if callable(max_norm) else max_norm
    clipped, states = sequences.scanned(clipax.delta_gclip(max_norm, delta), sequence)
    ratios = np.where(norms > 0, bounds / np.where(norms == 0, 1, norms), 1)
    factors = np.where(np.isnan(norms), np.nan, np.minimum(1, np.maximum(delta, ratios)))
    np.testing.assert_allclose(states.norm, norms, rtol=1e-6)
    np.testing.assert_allclose(states.coefficient, factors, rtol=2e-6)
    for name, leaf in sequence.items():
        np.testing.assert_allclose(clipped[name], leaf * factors[:, None], rtol=2e-6)
    assert (factors == delta).any() == (delta != 1e-3 or callable(max_norm))


@pytest.mark.parametrize(
    ("delta", "factor"), [(0.25, 0.5), (0.5, 0.5), (0.75, 0.75), (np.float32(0.625), 0.625)]
)
def test_worked_by_hand(delta: Any, factor: float) -> None:
    clipped, state = clipped_by(6.5, GRADS, delta=delta)
    trees.assert_bitwise(clipped, jax.tree.map(lambda leaf: leaf * factor, GRADS))
    trees.assert_bitwise(state[:3], tuple(map(jnp.float32, (13, 6.5, factor))))


def test_a_step_from_far_away_does_not_vanish() -> None:
    """On x^2 from 1e6, a plain clip walks one bound at a time; the floor keeps a rate."""

    def descend(method: Any) -> float:
        def step(x: Any, _: Any) -> Any:
            updates, _ = method.update(2 * x, method.init(x))
            return x - 0.1 * updates, None

        return float(jax.lax.scan(step, jnp.array(1e6), length=1000)[0])

    assert descend(clipax.clip_by_global_norm(1.0)) > 0.99e6
    assert descend(clipax.delta_gclip(1.0, 0.1)) < 0.1


def test_the_default_is_that_of_the_published_code() -> None:
    assert inspect.signature(clipax.delta_gclip).parameters["delta"].default == 1e-3


def test_a_known_norm_is_taken() -> None:
    method = clipax.delta_gclip(1.0, 0.125)
    clipped, state = method.update(GRADS, method.init(GRADS), norm=jnp.array(2.0))
    trees.assert_bitwise(clipped, jax.tree.map(lambda leaf: leaf * 0.5, GRADS))
    assert state.norm == 2


# Every row of the table of edge cases.


@pytest.mark.parametrize("max_norm", [13.0, 14.0, math.inf])
def test_edge_norm_within_the_bound(max_norm: float) -> None:
    trees.assert_bitwise(clipped_by(max_norm, GRADS, delta=0.5)[0], GRADS)
    updates = jnp.array([-0.0, 1e-30, -1e-30])
    trees.assert_bitwise(clipped_by(max_norm, updates, delta=0.5)[0], updates)


@pytest.mark.parametrize("size", [1.0, 1e20])
def test_edge_beyond_the_floor_the_bound_does_not_hold(size: float) -> None:
    clipped, state = clipped_by(1.0, size * jnp.array([12.0, 16.0]), delta=0.25)
    trees.assert_close(clipped, size * np.array([3.0, 4.0]), rtol=1e-6)
    np.testing.assert_allclose(state.norm * state.coefficient, 5 * size, rtol=1e-6)


def test_edge_a_bound_of_zero() -> None:
    trees.assert_bitwise(
        clipped_by(0.0, GRADS, delta=0.5)[0], jax.tree.map(lambda leaf: leaf * 0.5, GRADS)
    )
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    trees.assert_bitwise(clipped_by(0.0, zeros, delta=0.5)[0], zeros)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_edge_an_inf_entry(max_norm: float) -> None:
    updates = {**GRADS, "w": jnp.array([-np.inf, 4.0])}
    clipped, state = clipped_by(max_norm, updates, delta=0.5)
    trees.assert_bitwise(clipped["w"], jnp.array([-np.inf, 2.0]))
    trees.assert_bitwise(clipped["b"], jnp.array([[6.0, 0.0]]))
    assert (state.norm, state.coefficient) == (np.inf, 0.5)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_a_nan_entry(max_norm: float) -> None:
    clipped, state = clipped_by(max_norm, {**GRADS, "w": jnp.array([np.nan, np.inf])})
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves((clipped, state.norm)))


def test_edge_finite_entries_whose_norm_overflows() -> None:
    updates = {"w": jnp.full(2, 3e38), "b": jnp.ones(3)}
    clipped, _ = clipped_by(1.0, updates, delta=0.5)
    trees.assert_bitwise(clipped, jax.tree.map(lambda leaf: leaf * 0.5, updates))


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_leaves_that_are_not_measured(max_norm: float) -> None:
    _, state = sequences.beside_unmeasured(clipax.delta_gclip(max_norm), jnp.array([3.0, 4.0]))
    assert state.norm == 5


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_norm must be a number >= 0, got ", bad):
        clipax.delta_gclip(bad)


@pytest.mark.parametrize("bad", [{"w": 1.0}, [1.0], ()])
def test_a_tree_of_bounds_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^max_norm must be one number.* got the tree [\[{(]"):
        clipax.delta_gclip(bad)


@pytest.mark.parametrize("bad", [0, 1, 1.0, -0.5, math.inf, *refusals.NO_NUMBERS])
def test_bad_floors_are_refused(bad: Any) -> None:
    with refusals.refused("delta must be a number in (0, 1), got ", bad):
        clipax.delta_gclip(1.0, bad)


def test_floors_that_are_no_scalar_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^delta must be one number, got an array of shape"):
        clipax.delta_gclip(1.0, jnp.full(2, 0.5))
