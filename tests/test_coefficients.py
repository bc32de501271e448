"""Coefficients, and the one place where updates are scaled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax


@pytest.mark.parametrize(
    ("norm", "max_norm", "coefficient"),
    [
        (5.0, 1.0, 0.2),
        (1.0, 1.0, 1.0),
        (0.5, 1.0, 1.0),
        (0.0, 0.0, 1.0),
        (5.0, 0.0, 0.0),
        (np.inf, 1.0, 0.0),
        (np.inf, np.inf, 1.0),
        (5.0, np.inf, 1.0),
        (np.nan, 1.0, np.nan),
        (np.nan, np.inf, np.nan),
        (1e30, 1e-5, 1e-35),
    ],
)
def test_hard(norm: float, max_norm: float, coefficient: float) -> None:
    factor = clipax.hard(jnp.float32(norm), jnp.float32(max_norm))
    np.testing.assert_allclose(factor, coefficient, rtol=1e-6)


def test_hard_with_eps_is_the_rule_of_torch_bit_for_bit() -> None:
    norms = np.random.default_rng(0).lognormal(0, 3, 1000).astype(np.float32)
    norms[:3] = 0.0, 1.0, 1.0 - 1e-6
    factors = clipax.hard(jnp.asarray(norms), jnp.ones(1000), eps=1e-6)
    expected = np.minimum(np.float32(1), np.float32(1) / (norms + np.float32(1e-6)))
    trees.assert_bitwise(factors, expected)


@pytest.mark.parametrize(("norm", "max_norm"), [(0.0, 0.0), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_derivatives_of_hard_are_finite(norm: float, max_norm: float) -> None:
    gradient = jax.grad(clipax.hard, argnums=(0, 1))(norm, max_norm)
    assert all(bool(jnp.isfinite(value)) for value in gradient)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scaling_by_one_is_the_identity(dtype: str) -> None:
    _, updates = trees.params_and_updates(dtype)
    extreme = jnp.finfo(dtype)
    updates["edge"] = jnp.array(
        [0.0, -0.0, jnp.inf, extreme.max, extreme.tiny, -extreme.tiny], dtype
    )
    trees.assert_bitwise(jax.jit(clipax.scale_updates)(updates, jnp.float32(1)), updates)


def test_the_product_is_taken_wide() -> None:
    # Below the smallest float16, and right after the product.
    scaled = clipax.scale_updates(jnp.full((2,), 6e4, jnp.float16), jnp.float32(1e-8))
    np.testing.assert_allclose(scaled, np.full(2, 6e-4), rtol=1e-3)
    assert scaled.dtype == jnp.float16


def test_coefficients_are_a_prefix_and_none_passes() -> None:
    updates = {"a": {"x": jnp.ones(2), "n": 3}, "b": jnp.ones(2), "c": jnp.ones((2, 2))}
    factors = {"a": jnp.float32(0.5), "b": None, "c": jnp.array([[0.0, 2.0]])}
    scaled = clipax.scale_updates(updates, factors)
    trees.assert_close(
        scaled,
        {"a": {"x": np.full(2, 0.5), "n": 3}, "b": np.ones(2), "c": np.array([[0, 2], [0, 2]])},
    )
    assert scaled["a"]["n"] is updates["a"]["n"]


def test_complex_parts_do_not_mix() -> None:
    scaled = clipax.scale_updates(jnp.array([complex(np.inf, 1.0)]), jnp.float32(0.5))
    assert (scaled.real[0], scaled.imag[0]) == (np.inf, 0.5)


def test_float64() -> None:
    with trees.double_precision(True):
        leaf = jnp.array([1 / 3])
        trees.assert_bitwise(clipax.scale_updates(leaf, jnp.float32(1)), leaf)
        narrow = clipax.scale_updates(jnp.float32(3), jnp.float64(1 / 3))
        assert narrow.dtype == jnp.float32


@pytest.mark.parametrize("updates", [{"v": jnp.ones(2)}, [jnp.ones(2)], jnp.ones(2)])
def test_a_prefix_that_does_not_fit_is_named(updates: Any) -> None:
    with pytest.raises(ValueError, match="coefficients must be one value or a tree prefix"):
        clipax.scale_updates(updates, {"w": jnp.float32(1)})


def test_masked_nodes_pass() -> None:
    updates = {"a": optax.MaskedNode(), "b": None}
    assert clipax.scale_updates(updates, jnp.float32(0)) == updates
