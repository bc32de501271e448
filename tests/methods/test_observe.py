"""`observe`: how much a transformation takes away, and how far it turns the step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax


def cosine(one: Any, other: Any) -> float:
    one, other = (
        np.concatenate([np.asarray(leaf, np.complex128).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return float(np.vdot(one, other).real / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize(
    "inner",
    [
        clipax.clip_by_global_norm(0.1),
        clipax.clip_by_value(0.3),
        clipax.clip_by_leaf_norm(0.5),
        optax.scale(-2.0),
        optax.chain(clipax.clip_by_unit_norm(0.2), optax.trace(0.9)),
    ],
)
def test_norms_and_cosine_match_numpy(inner: Any, dtype: str) -> None:
    params, updates = trees.params_and_updates(dtype)
    observed = clipax.observe(inner)
    with jax.numpy_dtype_promotion("standard"):
        out, state = jax.jit(observed.update)(updates, observed.init(params), params)
        alone, inner_state = inner.update(updates, inner.init(params), params)
    trees.assert_close(out, alone, rtol=1e-2 if dtype in ("float16", "bfloat16") else 1e-6)
    trees.assert_same_type(state.inner_state, inner_state)
    np.testing.assert_allclose(state.norm_in, clipax.global_norm(updates), rtol=1e-6)
    np.testing.assert_allclose(state.norm_out, clipax.global_norm(out), rtol=1e-5)
    np.testing.assert_allclose(state.cosine, cosine(updates, out), atol=2e-6)


LARGE = [(512, 160), (257, 300), (16, 4097)]


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize(("size", "factor"), [(1.0, 1e-30), (1e30, 1e-30), (1e-30, 1e30)])
def test_large_leaves_whose_size_changes_far(
    shape: tuple[int, ...], size: float, factor: float
) -> None:
    rng = np.random.default_rng(0)
    updates = jnp.asarray(size * rng.standard_normal(shape), jnp.float32)
    turned = jnp.asarray(factor * rng.uniform(0.1, 1, shape), jnp.float32)
    inner = optax.stateless(lambda updates, params: updates * turned)
    observed = clipax.observe(inner)
    out, state = jax.jit(observed.update)(updates, observed.init(updates))
    norms = [np.linalg.norm(np.asarray(tree, np.float64)) for tree in (updates, out)]
    np.testing.assert_allclose([state.norm_in, state.norm_out], norms, rtol=1e-6)
    np.testing.assert_allclose(state.cosine, cosine(updates, out), rtol=1e-6)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("shape", [(3,), *LARGE])
def test_the_derivative_of_the_cosine(shape: tuple[int, ...]) -> None:
    observed = clipax.observe(clipax.clip_by_value(1.0))
    updates = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    updates = updates.at[0].set(2.0)
    got = jax.grad(lambda u: observed.update(u, observed.init(u))[1].cosine)(updates)
    u = np.asarray(updates, np.float64)
    v, inside = np.clip(u, -1, 1), np.abs(u) < 1
    (a, b), product = map(np.linalg.norm, (u, v)), np.vdot(u, v)
    by_u = v / (a * b) - product * u / (a**3 * b)
    by_v = u / (a * b) - product * v / (a * b**3)
    expected = by_u + inside * by_v
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", [1e-30, 1e20])
def test_cosine_is_safe_in_range(size: float) -> None:
    observed = clipax.observe(clipax.clip_by_value(size))
    updates = jnp.array([1.0, 7.0]) * size
    _, state = observed.update(updates, observed.init(updates))
    np.testing.assert_allclose(state.cosine, 0.8, rtol=1e-5)


def test_zero_before_or_after_has_cosine_zero() -> None:
    for inner, updates in ((optax.identity(), jnp.zeros(2)), (optax.set_to_zero(), jnp.ones(2))):
        observed = clipax.observe(inner)
        _, state = observed.update(updates, observed.init(updates))
        assert float(state.cosine) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_have_no_cosine(bad: float) -> None:
    observed = clipax.observe(clipax.clip_by_global_norm(1.0))
    updates = jnp.array([1.0, bad])
    _, state = observed.update(updates, observed.init(updates))
    assert bool(jnp.isnan(state.cosine))
    np.testing.assert_equal(np.asarray(state.norm_in), np.float32(bad))


def test_leaves_that_the_inner_one_makes_floats_of() -> None:
    observed = clipax.observe(optax.sgd(0.5))
    updates = {"n": jnp.arange(2), "x": jnp.array([3.0, 4.0])}
    with jax.numpy_dtype_promotion("standard"):
        _, state = observed.update(updates, observed.init(updates))
    assert float(state.norm_in) == 5
    np.testing.assert_allclose(state.cosine, -1, rtol=1e-6)


def test_extra_arguments_reach_the_inner_one() -> None:
    observed = clipax.observe(clipax.clip_by_global_norm(1.0))
    updates = jnp.array([3.0, 4.0])
    out, state = observed.update(updates, observed.init(updates), norm=10.0)
    np.testing.assert_allclose(out, [0.3, 0.4], rtol=1e-6)
    assert float(state.inner_state.norm) == 10
    np.testing.assert_allclose(state.norm_in, 5.0, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e38])
def test_the_cosine_of_updates_of_any_size(size: float) -> None:
    observer = clipax.observe(optax.identity())
    updates = jnp.array([size, -size])
    for update in (observer.update, jax.jit(observer.update)):
        _, state = update(updates, observer.init(updates))
        np.testing.assert_allclose(state.cosine, 1.0, rtol=1e-6)
