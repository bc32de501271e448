"""Coefficients, and the one place where updates are scaled."""

import itertools
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
    factor = clipax.coefficients.hard(jnp.float32(norm), jnp.float32(max_norm))
    np.testing.assert_allclose(factor, coefficient, rtol=1e-6)


def test_hard_with_eps_is_the_rule_of_torch_bit_for_bit() -> None:
    norms = np.random.default_rng(0).lognormal(0, 3, 1000).astype(np.float32)
    norms[:3] = 0.0, 1.0, 1.0 - 1e-6
    factors = clipax.coefficients.hard(jnp.asarray(norms), jnp.ones(1000), eps=1e-6)
    expected = np.minimum(np.float32(1), np.float32(1) / (norms + np.float32(1e-6)))
    trees.assert_bitwise(factors, expected)


@pytest.mark.parametrize(("norm", "max_norm"), [(0.0, 0.0), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_derivatives_of_hard_are_finite(norm: float, max_norm: float) -> None:
    gradient = jax.grad(clipax.coefficients.hard, argnums=(0, 1))(norm, max_norm)
    assert all(bool(jnp.isfinite(value)) for value in gradient)


SMOOTH = {
    clipax.coefficients.rational: lambda x: 1 / (1 + x),
    clipax.coefficients.square_root: lambda x: 1 / np.sqrt(1 + x * x),
    clipax.coefficients.tanh: lambda x: np.tanh(x) / x,
}
smooth = pytest.mark.parametrize("coefficient", SMOOTH)


@smooth
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smooth_coefficients_equal_numpy(coefficient: Any, dtype: str) -> None:
    sizes = [1e-30, 3e-9, 1e-4, 0.0099, 0.0101, 0.5, 1.0, 1.0001, 3.0, 19.0, 60.0, 1e4, 1e30]
    norm, bound = (grid.astype(dtype) for grid in np.meshgrid(sizes, sizes))
    with trees.double_precision(dtype == "float64"), np.errstate(over="ignore"):
        factors = jax.jit(coefficient)(norm, bound)
        assert factors.dtype == dtype
        assert bool(((factors >= 0) & (factors <= 1)).all())
        expected = SMOOTH[coefficient](norm.astype(np.longdouble) / bound.astype(np.longdouble))
        info = jnp.finfo(dtype)
        np.testing.assert_allclose(factors, expected, rtol=4 * info.eps, atol=float(info.tiny))


@smooth
@pytest.mark.parametrize(
    ("norm", "max_norm", "factor"),
    [
        (0.0, 0.0, 1.0),
        (0.0, 1e-30, 1.0),
        (0.0, 1.0, 1.0),
        (1e-9, 1.0, 1.0),
        (1e-30, 1.0, 1.0),
        (6e4, 1e30, 1.0),
        (1e-30, 0.0, 0.0),
        (5.0, 0.0, 0.0),
        (3e38, 0.0, 0.0),
        (np.inf, 0.0, 0.0),
        (np.inf, 1.0, 0.0),
        (np.inf, 3e38, 0.0),
        (0.0, np.inf, 1.0),
        (3e38, np.inf, 1.0),
        (np.inf, np.inf, 1.0),
        (np.nan, 0.0, np.nan),
        (np.nan, 1.0, np.nan),
        (np.nan, np.inf, np.nan),
    ],
)
def test_edges_of_smooth_coefficients(
    coefficient: Any, norm: float, max_norm: float, factor: float
) -> None:
    result = coefficient(jnp.float32(norm), jnp.float32(max_norm))
    np.testing.assert_array_equal(result, np.float32(factor))
    gradient = jax.grad(coefficient, argnums=(0, 1))(jnp.float32(norm), jnp.float32(max_norm))
    # At the bottom of the range the inverse square of a bound is no number of this dtype.
    if not np.isnan(norm) and max_norm != 1e-30:
        assert all(bool(jnp.isfinite(value)) for value in gradient)


@smooth
def test_derivatives_of_smooth_coefficients(coefficient: Any) -> None:
    norms = np.array([0.0, 1e-20, 1e-6, 1e-3, 0.02, 0.5, 0.999, 1.0, 1.001, 4.0, 60.0, 1e6])
    derivative = jax.vmap(jax.grad(coefficient), in_axes=(0, None))
    # Of 1 / (1 + x), of (1 + x^2)^(-1/2) and of tanh(x) / x, near zero from its series.
    x = np.where(norms < 1e-2, 1.0, norms)
    expected = {
        clipax.coefficients.rational: -1 / (1 + norms) ** 2,
        clipax.coefficients.square_root: -norms * (1 + norms**2) ** -1.5,
        clipax.coefficients.tanh: np.where(
            norms < 1e-2,
            -2 / 3 * norms + 8 / 15 * norms**3,
            ((1 - np.tanh(x) ** 2) * x - np.tanh(x)) / x**2,
        ),
    }[coefficient]
    got = derivative(jnp.asarray(norms, jnp.float32), jnp.float32(1))
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    with trees.double_precision(True):
        np.testing.assert_allclose(derivative(jnp.asarray(norms), 1.0), expected, rtol=1e-9)


@smooth
def test_the_norm_after_a_smooth_coefficient_grows_and_nears_the_bound(coefficient: Any) -> None:
    norms = jnp.geomspace(1e-6, 1e6, 2000)
    clipped = norms * coefficient(norms, jnp.full(2000, 2.0))
    assert bool((jnp.diff(clipped) >= -5e-7).all())
    np.testing.assert_allclose(clipped[-1], 2.0, rtol=1e-5)
    assert bool((clipped <= jnp.minimum(norms, 2.0) * (1 + 3e-7)).all())


def test_smooth_coefficients_are_ordered() -> None:
    norms = jnp.geomspace(0.1, 10.0, 50)
    by = {
        f: f(norms, jnp.ones(50))
        for f in (
            clipax.coefficients.rational,
            clipax.coefficients.square_root,
            clipax.coefficients.tanh,
            clipax.coefficients.hard,
        )
    }
    ordered = list(by.values())
    for lower, upper in itertools.pairwise(ordered):
        assert bool((lower <= upper).all())


@pytest.mark.parametrize(
    ("norm", "max_norm", "factor"),
    [
        (5.0, 1.0, 0.2),
        (0.5, 1.0, 2.0),
        (1e-30, 1.0, 1e30),
        (1e-30, 1e30, float(np.finfo(np.float32).max)),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
        (0.0, np.inf, 1.0),
        (5.0, 0.0, 0.0),
        (np.inf, 1.0, 0.0),
        (5.0, np.inf, 1.0),
        (np.inf, np.inf, 1.0),
        (np.nan, 0.0, np.nan),
        (np.nan, 1.0, np.nan),
        (np.nan, np.inf, np.nan),
    ],
)
def test_normalized(norm: float, max_norm: float, factor: float) -> None:
    got = clipax.coefficients.normalized(jnp.float32(norm), jnp.float32(max_norm))
    np.testing.assert_allclose(got, factor, rtol=1e-6)


@pytest.mark.parametrize(("norm", "max_norm"), [(0.0, 0.0), (0.0, 1.0), (2.0, 1.0), (1.0, np.inf)])
def test_derivatives_of_normalized_are_finite(norm: float, max_norm: float) -> None:
    gradient = jax.grad(clipax.coefficients.normalized, argnums=(0, 1))(norm, max_norm)
    assert all(bool(jnp.isfinite(value)) for value in gradient)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_normalized_descent_has_steps_of_one_length(size: float) -> None:
    method = clipax.clip_by(clipax.global_norm, 2.0, clipax.coefficients.normalized)
    updates = {"w": size * jnp.array([3.0, 0.0]), "b": size * jnp.array(-4.0)}
    scaled, state = method.update(updates, method.init(updates))
    trees.assert_close(scaled, {"w": np.array([1.2, 0.0]), "b": np.array(-1.6)}, rtol=1e-6)
    np.testing.assert_allclose(state.coefficient, 0.4 / size, rtol=1e-6)
    zeros = jax.tree.map(jnp.zeros_like, updates)
    trees.assert_bitwise(method.update(zeros, state)[0], zeros)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scaling_by_one_is_the_identity(dtype: str) -> None:
    _, updates = trees.params_and_updates(dtype)
    extreme = jnp.finfo(dtype)
    updates["edge"] = jnp.array(
        [0.0, -0.0, jnp.inf, extreme.max, extreme.tiny, -extreme.tiny], dtype
    )
    trees.assert_bitwise(
        jax.jit(clipax.coefficients.scale_updates)(updates, jnp.float32(1)), updates
    )


def test_the_product_is_taken_wide() -> None:
    # Below the smallest float16, and right after the product.
    scaled = clipax.coefficients.scale_updates(jnp.full((2,), 6e4, jnp.float16), jnp.float32(1e-8))
    np.testing.assert_allclose(scaled, np.full(2, 6e-4), rtol=1e-3)
    assert scaled.dtype == jnp.float16


def test_coefficients_are_a_prefix_and_none_passes() -> None:
    updates = {"a": {"x": jnp.ones(2), "n": 3}, "b": jnp.ones(2), "c": jnp.ones((2, 2))}
    factors = {"a": jnp.float32(0.5), "b": None, "c": jnp.array([[0.0, 2.0]])}
    scaled = clipax.coefficients.scale_updates(updates, factors)
    trees.assert_close(
        scaled,
        {"a": {"x": np.full(2, 0.5), "n": 3}, "b": np.ones(2), "c": np.array([[0, 2], [0, 2]])},
    )
    assert scaled["a"]["n"] is updates["a"]["n"]


def test_complex_parts_do_not_mix() -> None:
    scaled = clipax.coefficients.scale_updates(jnp.array([complex(np.inf, 1.0)]), jnp.float32(0.5))
    assert (scaled.real[0], scaled.imag[0]) == (np.inf, 0.5)


def test_float64() -> None:
    with trees.double_precision(True):
        leaf = jnp.array([1 / 3])
        trees.assert_bitwise(clipax.coefficients.scale_updates(leaf, jnp.float32(1)), leaf)
        narrow = clipax.coefficients.scale_updates(jnp.float32(3), jnp.float64(1 / 3))
        assert narrow.dtype == jnp.float32


@pytest.mark.parametrize("updates", [{"v": jnp.ones(2)}, [jnp.ones(2)], jnp.ones(2)])
def test_a_prefix_that_does_not_fit_is_named(updates: Any) -> None:
    with pytest.raises(ValueError, match="coefficients must be one value or a tree prefix"):
        clipax.coefficients.scale_updates(updates, {"w": jnp.float32(1)})


def test_masked_nodes_pass() -> None:
    updates = {"a": optax.MaskedNode(), "b": None}
    assert clipax.coefficients.scale_updates(updates, jnp.float32(0)) == updates


@pytest.mark.parametrize("stability", [0.1, 0.01, 0.5])
def test_the_factor_of_psac_is_largest_where_its_docstring_says(stability: float) -> None:
    peak = stability**0.5 - stability
    norms = jnp.asarray([0.0, peak, *np.linspace(0.001, 2, 500)], jnp.float32)
    factors = np.asarray(clipax.coefficients.psac(stability)(norms, jnp.full_like(norms, 3.0)))
    expected = 3 / (2 * stability**0.5 - stability)
    np.testing.assert_allclose(factors[1], expected, rtol=1e-6)
    assert (factors <= factors[1] * (1 + 1e-6)).all()
    rising = np.asarray(norms[2:]) < peak
    assert (np.diff(factors[2:])[rising[1:]] > 0).all()
    assert (np.diff(factors[2:])[~rising[:-1]] < 0).all()


def test_psac_lengthens_small_gradients() -> None:
    norms = jnp.array([1e-6, 0.2])
    lengths = norms * clipax.coefficients.psac(0.1)(norms, jnp.ones(2))
    np.testing.assert_allclose(lengths, [1e-6, 0.375], rtol=1e-4)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize(
    "coefficient",
    [
        clipax.coefficients.hard,
        clipax.coefficients.rational,
        clipax.coefficients.square_root,
        clipax.coefficients.tanh,
    ],
)
@pytest.mark.parametrize("norm", [1e-10, 5.0, 1e10])
def test_a_bound_of_zero_has_the_derivative_from_above(coefficient: Any, norm: float) -> None:
    updates = jnp.array([0.6, 0.8]) * norm
    for factory, expected in (
        (lambda c: clipax.clip_by(clipax.global_norm, c, coefficient), [0.6, 0.8]),
        (lambda c: clipax.smooth_clip_by_value(c, coefficient), [1.0, 1.0]),
    ):

        def clip(bound: Any, factory: Any = factory) -> Any:
            method = factory(bound)
            return method.update(updates, method.init(updates))[0]

        zero = jnp.zeros(())
        np.testing.assert_array_equal(clip(zero), [0.0, 0.0])
        np.testing.assert_allclose(jax.jacfwd(clip)(zero), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jacrev(clip)(zero), expected, rtol=1e-6)
