"""How near clipped singular values are to exact ones, and where other formulas fail."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import trees
from spectral import (
    FORMULAS,
    clip_matrix,
    clipped_by,
    either_way,
    spectral_norm,
    with_singular_values,
)

from clipax.coefficients import hard, square_root


@pytest.mark.parametrize("coefficient", FORMULAS)
@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4), (2, 2)])
def test_nothing_jumps_at_the_bound(shape: tuple[int, ...], coefficient: Any) -> None:
    """Vectors of SPECTRA's code do: whole up to the bound, softly clipped above it."""

    def as_in_spectra(x: np.ndarray, c: float) -> np.ndarray:
        norm = np.linalg.norm(x)
        return x if norm <= c else x / np.sqrt(1 + (norm / c) ** 2)

    x = np.array([3.0, 0.0, 0.0, 4.0], np.float32).reshape(shape)
    if shape == (2, 2):
        x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    below, above = x * np.float32(0.99999), x * np.float32(1.00001)
    jump = np.linalg.norm(as_in_spectra(above, 5.0) - as_in_spectra(below, 5.0))
    assert 1.4 < jump < 1.5
    one, _ = clipped_by(5.0, jnp.asarray(below), coefficient)
    other, _ = clipped_by(5.0, jnp.asarray(above), coefficient)
    assert np.linalg.norm(one - other) < 2e-4


def polar(x: np.ndarray, steps: int) -> np.ndarray:
    """The quintic Newton-Schulz iteration that converges to the polar factor."""
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x.T @ x
        x = x @ (1.875 * np.eye(len(gram)) - 1.25 * gram + 0.375 * gram @ gram)
    return x


def hardcap(x: np.ndarray, c: float, steps: int) -> np.ndarray:
    """The identity that caps singular values by two polar factors."""
    o = polar(x, steps)
    rest = c * o - x
    return (c * o + x - rest @ polar(rest, steps).T @ o) / 2


def test_small_singular_values_need_no_polar_factor() -> None:
    s = np.logspace(-5, 1, 24)
    assert np.allclose(hardcap(np.diag([3.0, 1.0]), 2.0, 30), np.diag([2.0, 1.0]))
    x = with_singular_values(s, 32)
    for steps in (10, 15):
        wrong = spectral_norm(hardcap(x, 1.0, steps) - clip_matrix(x, 1.0))
        assert wrong == pytest.approx(1 / 8, rel=0.1)
    clipped, _ = clipped_by(1.0, jnp.asarray(x, jnp.float32), iterations=10)
    assert spectral_norm(clipped - clip_matrix(x, 1.0)) < 2.5**-10


@either_way
@pytest.mark.parametrize("coefficient", [hard, square_root])
def test_a_spike_of_any_size_is_bounded(coefficient: Any, iterations: int | None) -> None:
    """To take off what exceeds the bound would leave the rounding error of the spike."""
    x = with_singular_values([1e10, 1.0, 0.5], 6).astype(np.float32)
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    by_difference = x - (u * np.maximum(s - 1, 0)) @ vh
    assert spectral_norm(by_difference) > 10
    clipped, _ = clipped_by(1.0, jnp.asarray(x), coefficient, iterations=iterations)
    assert spectral_norm(clipped) <= 1 + 1e-5


@pytest.mark.slow
def test_what_lies_beside_a_bad_matrix_is_decomposed_alone() -> None:
    """NumPy raises for the stack; nothing of the NaN may reach the other layers."""
    updates = np.random.default_rng(6).normal(size=(3, 4, 4)).astype(np.float32)
    alone, _ = clipped_by(1.0, jnp.asarray(updates[::2]), stack_axis=0)
    updates[1, 0, 0] = np.nan
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.svd(updates)
    clipped, _ = clipped_by(1.0, jnp.asarray(updates), stack_axis=0)
    trees.assert_bitwise(clipped[::2], alone)
    assert np.isnan(clipped[1]).all()


# How accurate it is.

SPECTRA = {
    "flat": np.linspace(0.5, 1.0, 48),
    "gaussian": np.linalg.svd(np.random.default_rng(7).normal(size=(48, 48)))[1],
    "falling": np.logspace(0, -8, 48),
    "spiked": np.r_[1.0, np.linspace(2e-3, 1e-4, 47)],
    "low rank": np.r_[1.0, 0.3, 0.1, np.zeros(45)],
    "at the bound": 1 + np.linspace(-0.2, 0.2, 48) ** 3,
}


def unconverged(least: float, iterations: int) -> float:
    """How far singular values that begin at `least` are from one in the end."""
    for _ in range(iterations):
        floor = max(least, 0.03)
        scaled = least * math.sqrt(3 / (1 + floor + floor**2))
        least = scaled * (3 - scaled**2) / 2
    return 1 - least


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("over", [1.0, 2.0, 30.0, 1e3, 1e4])
def test_errors_of_both_ways(name: str, over: float) -> None:
    """In units of max_norm, `over` times which the largest singular value is."""
    x = with_singular_values(SPECTRA[name] / SPECTRA[name].max(), 64)
    c = float(np.float32(1 / over))
    frobenius = np.linalg.norm(x) / c
    wide = jnp.asarray(x, jnp.float32)
    for coefficient in (hard, square_root):
        exact = clip_matrix(wide, c, FORMULAS[coefficient])

        def error(iterations: int | None, co: Any = coefficient, exact: Any = exact) -> float:
            clipped, _ = clipped_by(c, wide, co, iterations=iterations)
            return spectral_norm(clipped - exact) / c

        assert error(None) <= 1e-5 * over + 5e-6
        for iterations in (10, 15, 20):
            rounding = 1e-6 * over + 5e-6
            at_the_bound = 2.5**-iterations if coefficient is hard else 0
            left = unconverged(1 / math.hypot(frobenius, 1), iterations)
            if left < 0.1:
                assert error(iterations) <= rounding + at_the_bound + 2 * left


def test_how_many_iterations_are_enough() -> None:
    assert unconverged(1e-3, 10) < 2e-5
    assert unconverged(1e-5, 15) < 1e-5
    assert unconverged(1e-7, 20) < 1e-5
    assert unconverged(1e-3, 8) > 0.1


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("iterations", trees.mostly_slow([1, 2, 4, 7], [1, 7]))
@pytest.mark.parametrize("largest", [1.5, 10.0, 1e2, 1e4])
def test_with_too_few_iterations(iterations: int, largest: float) -> None:
    s = np.r_[largest, np.geomspace(1e-5, min(largest, 30.0), 60), np.linspace(0.9, 1.1, 19)]
    updates = jnp.diag(jnp.asarray(s, jnp.float32))
    for coefficient in (hard, square_root):
        clipped, _ = clipped_by(1.0, updates, coefficient, iterations=iterations)
        got, exact = np.diag(clipped), FORMULAS[coefficient](s, 1.0)
        assert (got > 0).all()
        above = 0.4 if coefficient is hard else 1e-6
        assert (got <= exact * (1 + above) + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_the_recorded_norm_by_iterations_is_a_bound(name: str, dtype: str) -> None:
    x = with_singular_values(SPECTRA[name], 64)
    if dtype == "complex64":
        x = x * np.exp(1j * np.arange(48))
    _, state = clipped_by(math.inf, jnp.asarray(x, dtype), iterations=1, exact_norm=True)
    ratio = float(state.norm) / spectral_norm(x)
    assert 1 - 3e-6 <= ratio <= 48 ** (1 / 2048) + 3e-6
    _, state = clipped_by(math.inf, jnp.eye(32, dtype=dtype), iterations=1, exact_norm=True)
    np.testing.assert_allclose(state.norm, 32 ** (1 / 2048), rtol=1e-6)
