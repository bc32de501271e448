"""Clipping by the global norm, against NumPy and worked cases."""

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

GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0, 0.0]])}
HALF = {"w": jnp.array([1.5, 2.0]), "b": jnp.array([[6.0, 0.0]])}


def clipped_by(max_norm: Any, updates: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    method = clipax.clip_by_global_norm(max_norm, *args, **kwargs)
    return method.update(updates, method.init(updates))


def ramp(count: Any) -> Any:
    return jnp.asarray(count, jnp.float32) * 0.5


def oracle_norm(sequence: Any, ord: float) -> np.ndarray:
    flat = [leaf.reshape(sequences.COUNT, -1) for leaf in jax.tree.leaves(sequence)]
    return sequences.p_norm(np.concatenate(flat, axis=1), ord).reshape(-1)


@pytest.mark.parametrize("ord", [1, 2, 3, 0.5, math.inf])
def test_equals_numpy_over_a_spiky_sequence(ord: float) -> None:
    sequence = sequences.spiky()
    norms = oracle_norm(sequence, ord)
    bound = float(np.median(norms))
    method = clipax.clip_by_global_norm(bound, ord)
    sequences.assert_clips(method, sequence, norms, np.full_like(norms, bound))


def test_equals_numpy_in_double_precision() -> None:
    with trees.double_precision(True):
        sequence = sequences.spiky(dtype=np.float64)
        norms = oracle_norm(sequence, 2)
        method = clipax.clip_by_global_norm(10.0)
        sequences.assert_clips(method, sequence, norms, np.full_like(norms, 10), rtol=1e-13)


def test_a_schedule_is_read_at_the_number_of_past_updates() -> None:
    sequence = sequences.spiky()
    bounds = 0.5 * np.arange(sequences.COUNT)
    method = clipax.clip_by_global_norm(ramp)
    sequences.assert_clips(method, sequence, oracle_norm(sequence, 2), bounds)


@pytest.mark.parametrize(("max_norm", "ord"), [(6.5, 2), (9.5, 1), (6.0, math.inf)])
def test_worked_by_hand(max_norm: float, ord: float) -> None:
    clipped, state = clipped_by(max_norm, GRADS, ord)
    trees.assert_close(clipped, HALF, rtol=2e-7)
    trees.assert_close(state[:3], (2 * max_norm, max_norm, 0.5), rtol=2e-7)


def test_torch_worked_by_hand() -> None:
    clipped, _ = clipped_by(6.5, GRADS, eps=1e-6)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) * (6.5 / 13.000001), GRADS)
    trees.assert_close(clipped, expected, rtol=2e-7)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 6.5])
def test_the_factor_is_torchs_to_the_last_bit(max_norm: float) -> None:
    norms = np.concatenate(
        [np.geomspace(1e-8, 1e8, 400), max_norm - np.linspace(0, 2e-6, 40)], dtype=np.float32
    )
    method = clipax.clip_by_global_norm(max_norm, eps=1e-6)
    state = method.init(GRADS)

    def factor(norm: Any) -> Any:
        return method.update(GRADS, state, norm=norm)[1].coefficient

    factors = jax.jit(jax.vmap(factor))(norms)
    # torch: clamp(max_norm / (total_norm + 1e-6), max=1.0) in float32, and a number over a
    # tensor is its reciprocal times the number.
    reciprocals = np.float32(1.0) / (norms + np.float32(1e-6))
    trees.assert_bitwise(factors, np.minimum(np.float32(max_norm) * reciprocals, np.float32(1)))


def test_a_known_norm_is_taken_and_the_updates_are_not_reduced() -> None:
    method = clipax.clip_by_global_norm(1.0)
    state = method.init(GRADS)
    clipped, new_state = method.update(GRADS, state, norm=jnp.array(2.0))
    trees.assert_bitwise(clipped, jax.tree.map(lambda leaf: leaf * 0.5, GRADS))
    assert new_state.norm == 2.0

    def program(**extra: Any) -> str:
        return jax.jit(method.update).lower(GRADS, state, GRADS, **extra).compile().as_text()

    def reductions(**extra: Any) -> str:
        return str(jax.make_jaxpr(lambda: method.update(GRADS, state, **extra))())

    assert " reduce(" in program()
    assert "reduce_sum" in reductions()
    assert " reduce(" not in program(norm=jnp.array(2.0))
    assert "reduce_sum" not in reductions(norm=jnp.array(2.0))


size = st.floats(2.0**-10, 1e4, width=32)
moderate = size | size.map(lambda x: -x) | st.just(0.0)


@jax.jit
def clip_traced(updates: jax.Array, max_norm: jax.Array) -> jax.Array:
    return clipped_by(max_norm, updates)[0]


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(
    hnp.arrays(np.float32, (7,), elements=moderate),
    st.floats(0.015625, 1e4, width=32),
    st.integers(-8, 8),
)
def test_bounds_the_norm_and_keeps_the_direction(
    updates: np.ndarray, max_norm: float, power: int
) -> None:
    bound = np.float32(max_norm)
    clipped = np.asarray(clip_traced(updates, bound))
    norm = np.linalg.norm(updates.astype(np.float64))
    np.testing.assert_allclose(clipped * norm, updates * min(norm, bound), rtol=1e-6)
    assert np.linalg.norm(clipped.astype(np.float64)) <= bound * (1 + 1e-6)
    np.testing.assert_allclose(clip_traced(clipped, bound), clipped, rtol=5e-7)
    scale = np.float32(2.0**power)
    trees.assert_bitwise(clip_traced(scale * updates, scale * bound), scale * clipped)


def test_the_cliff_that_gradient_descent_falls_from() -> None:
    """Pascanu et al.: plain descent diverges where the gradient explodes, clipped does not."""

    def descend(method: Any) -> float:
        def step(carry: Any, _: Any) -> Any:
            x, state = carry
            updates, state = method.update(jax.grad(lambda x: x**4)(x), state)
            return (x - 0.1 * updates, state), None

        start = jnp.array(10.0)
        (x, _), _ = jax.lax.scan(step, (start, method.init(start)), length=300)
        return float(x)

    assert not math.isfinite(descend(clipax.clip_by_global_norm(math.inf)))
    assert abs(descend(clipax.clip_by_global_norm(1.0))) < 0.2


# Every row of the table of edge cases.


@pytest.mark.parametrize("max_norm", [13.0, 13.5, math.inf])
def test_edge_norm_within_the_bound(max_norm: float) -> None:
    clipped, state = clipped_by(max_norm, GRADS)
    trees.assert_bitwise(clipped, GRADS)
    assert state.coefficient == 1


def test_edge_norm_within_the_bound_for_an_eps_of_zero_that_is_traced() -> None:
    """As under `optax.inject_hyperparams`, which traces the defaults too."""
    for size in (3.0, 41.0, 47.0, 55.0):
        method = optax.inject_hyperparams(clipax.clip_by_global_norm)(size)
        updates = jnp.array([size])
        trees.assert_bitwise(method.update(updates, method.init(updates))[0], updates)


@pytest.mark.parametrize("eps", [0.0, 1e-6, jnp.array(0.0), jnp.array(1e-6)])
def test_edge_zero_updates_and_a_bound_of_zero(eps: float) -> None:
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    trees.assert_bitwise(clipped_by(0.0, zeros, eps=eps)[0], zeros)


@pytest.mark.parametrize("size", [2e-38, 1e-30, 1.0, 1e20])
@pytest.mark.parametrize("eps", [0.0, jnp.array(0.0)])
def test_edge_finite_updates_and_a_bound_of_zero(size: float, eps: Any) -> None:
    updates = jax.tree.map(lambda leaf: size * leaf, GRADS)
    clipped, state = clipped_by(0.0, updates, eps=eps)
    trees.assert_bitwise(clipped, jax.tree.map(jnp.zeros_like, GRADS))
    assert state.coefficient == 0


@pytest.mark.parametrize("size", [1.2e-38, 1e-30, 1.0, 1e37, 3.4e38])
def test_edge_finite_updates_and_a_bound_of_inf(size: float) -> None:
    updates = {"w": jnp.array([size, -size, 0.0, -0.0]), "b": jnp.array([size])}
    trees.assert_bitwise(clipped_by(math.inf, updates)[0], updates)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_edge_an_inf_entry(value: float, max_norm: float) -> None:
    clipped, state = clipped_by(max_norm, {**GRADS, "w": jnp.array([value, 4.0])})
    trees.assert_bitwise(clipped["b"], jnp.zeros((1, 2)))
    assert np.isnan(clipped["w"][0])
    assert clipped["w"][1] == 0
    assert (state.norm, state.coefficient) == (np.inf, 0)


@pytest.mark.parametrize("other", [1.0, np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_edge_a_nan_entry(ord: float, max_norm: float, other: float) -> None:
    clipped, state = clipped_by(max_norm, {**GRADS, "w": jnp.array([np.nan, other])}, ord)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves((clipped, state.norm)))


def test_edge_finite_entries_whose_norm_overflows() -> None:
    updates = {"w": jnp.full(2, 3e38), "b": jnp.ones(3)}
    clipped, state = clipped_by(1.0, updates)
    trees.assert_bitwise(clipped, jax.tree.map(jnp.zeros_like, updates))
    assert np.isposinf(state.norm)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_leaves_that_are_not_measured(max_norm: float) -> None:
    _, state = sequences.beside_unmeasured(
        clipax.clip_by_global_norm(max_norm), jnp.array([3.0, 4.0])
    )
    assert state.norm == 5


@sequences.far_out
def test_squares_out_of_range_are_measured_right(dtype: str, size: float) -> None:
    updates = jnp.full(4, size, dtype)
    clipped, state = clipped_by(size, updates)
    np.testing.assert_allclose(state.norm, 2 * updates[0].astype("float32"), rtol=1e-6)
    np.testing.assert_allclose(clipped.astype("float32"), size / 2, rtol=1e-3)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_norm_whose_inverse_is_subnormal_is_clipped_to_the_bound(eps: float) -> None:
    clipped, _ = clipped_by(1e38, jnp.array([2e38, 0.0]), eps=eps)
    np.testing.assert_allclose(clipped, [1e38, 0.0], rtol=1e-6)


# Every bad argument.


@pytest.mark.parametrize("name", ["max_norm", "eps"])
@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_numbers_are_refused(name: str, bad: Any) -> None:
    with refusals.refused(f"{name} must be a number >= 0, got ", bad):
        clipax.clip_by_global_norm(**{"max_norm": 1.0, name: bad})


@pytest.mark.parametrize("bad", [{"w": 1.0, "b": 2.0}, [1.0], (1.0, 2.0), {}])
def test_a_tree_of_bounds_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^max_norm must be one number.* got the tree [\[{(]"):
        clipax.clip_by_global_norm(bad)


def test_a_bound_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_norm must be one number, .* shape \(2,\)"):
        clipax.clip_by_global_norm(jnp.ones(2))


@pytest.mark.parametrize("bad", [0, -1, -math.inf, math.nan, True, "2", [2], 1j])
def test_bad_orders_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^ord must be a number > 0, got "):
        clipax.clip_by_global_norm(1.0, bad)


def test_an_order_that_is_traced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ord must be known while tracing, got "):
        jax.jit(lambda order: clipped_by(1.0, GRADS, order))(2.0)


def test_a_traced_bound_that_is_negative_counts_as_zero() -> None:
    ones = np.ones(7, np.float32)
    trees.assert_bitwise(clip_traced(ones, np.float32(-1.0)), 0 * ones)
