"""Clipping singular values only where no cheap bound shows that they are small enough."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from spectral import clipped_by, either_way, spectral_norm, with_singular_values

import clipax
from clipax._spectral import _bounds, _spectral
from clipax._spectral._matrices import MatrixView
from clipax.coefficients import square_root

VIEW = MatrixView((), (0,), (1,))


def random_matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(20).normal(size=(rows, columns)).astype(np.float32)


SHAPES = [random_matrix(40, 40), random_matrix(30, 90), random_matrix(90, 30)]
MATRICES = [
    *SHAPES,
    with_singular_values(np.logspace(0, -8, 24), 32),
    with_singular_values(np.ones(24), 32),
    np.outer(np.arange(1.0, 9.0), np.arange(-3.0, 4.0)),
    np.eye(5),
    1e-25 * SHAPES[0],
    3e33 * SHAPES[0],
    SHAPES[0] * np.exp(1j * SHAPES[0]),
]


def as_leaf(x: np.ndarray) -> Any:
    return jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("x", MATRICES, ids=range(len(MATRICES)))
def test_each_bound_is_on_its_side_of_the_largest_singular_value(x: np.ndarray) -> None:
    leaf = as_leaf(x)
    norm = spectral_norm(x)
    frobenius = jnp.float32(np.linalg.norm(x.astype(np.result_type(x, np.float64))))
    below = float(_bounds.from_below(VIEW, leaf, frobenius))
    assert 0.45 * norm <= below <= norm * (1 + 1e-6)
    of_products = float(_bounds.from_products(VIEW.matrices(leaf)))
    of_frobenius = float(_bounds.from_frobenius(frobenius))
    assert norm * 1.0005 <= of_products <= of_frobenius * 1.0001
    assert of_products <= 1.3 * norm


def test_how_near_the_bounds_of_random_entries_are() -> None:
    x = np.random.default_rng(21).normal(size=(768, 768)).astype(np.float32)
    norm = spectral_norm(x)
    ratio = float(_bounds.from_products(jnp.asarray(x))) / norm
    assert 1.1 < ratio < 1.21
    below = _bounds.from_below(VIEW, jnp.asarray(x), jnp.linalg.norm(x))
    assert 0.65 < float(below) / norm < 0.85


def test_the_estimate_is_exact_for_one_direction() -> None:
    x = np.outer(np.arange(1.0, 9.0), np.arange(-3.0, 4.0)).astype(np.float32)
    _, state = clipped_by(1e6, jnp.asarray(x))
    np.testing.assert_allclose(state.norm, spectral_norm(x), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-37, 1e-32, math.nan, math.inf])
def test_a_norm_out_of_the_usual_range_is_no_bound(size: float) -> None:
    assert math.isnan(_bounds.from_frobenius(jnp.float32(size)))


@pytest.mark.slow_but(2)
@either_way
@pytest.mark.parametrize(
    "over",
    [0.5, *(pytest.param(over, marks=pytest.mark.slow) for over in (0.99, 1.01, 1.1, 1.5)), 30],
)
def test_the_result_does_not_depend_on_how_the_norm_is_known(
    over: float, iterations: int | None
) -> None:
    for x in SHAPES:
        bound, leaf = over * spectral_norm(x), jnp.asarray(x)
        clipped, state = clipped_by(bound, leaf, iterations=iterations)
        exact, exact_state = clipped_by(bound, leaf, iterations=iterations, exact_norm=True)
        trees.assert_close(state.coefficient, exact_state.coefficient, rtol=1e-6)
        if over < 1:
            trees.assert_close(clipped, exact, rtol=1e-5, atol=1e-5)
            trees.assert_close(state.norm, exact_state.norm, rtol=1e-6)
        else:
            trees.assert_bitwise(clipped, leaf)


def test_edge_not_clipped() -> None:
    x = jnp.asarray(SHAPES[0])
    _, state = clipped_by(1e3, x)
    assert state.norm < 0.9 * spectral_norm(x)
    _, state = clipped_by(1e3, x, exact_norm=True)
    np.testing.assert_allclose(state.norm, spectral_norm(x), rtol=1e-5)


@pytest.mark.parametrize("max_norm", [math.inf, np.float32(np.inf), {"w": math.inf}])
def test_edge_max_norm_inf_as_a_number(max_norm: Any) -> None:
    tree = {"w": jnp.asarray(SHAPES[0])}
    clipped, state = clipped_by(max_norm, tree)
    trees.assert_bitwise(clipped, tree)
    np.testing.assert_allclose(state.norm["w"], spectral_norm(SHAPES[0]), rtol=1e-5)


def test_a_threshold_that_learns_gets_exact_norms() -> None:
    rule = optax.scale(100.0)
    _, state = clipped_by(rule, jnp.asarray(SHAPES[0]))
    np.testing.assert_allclose(state.norm, spectral_norm(SHAPES[0]), rtol=1e-5)


@pytest.mark.slow
def test_layers_are_recorded_each_by_itself() -> None:
    layers = jnp.stack([jnp.asarray(SHAPES[0]), 100 * jnp.asarray(SHAPES[0])])
    bound = 10 * spectral_norm(SHAPES[0])
    clipped, state = clipped_by(bound, layers, stack_axis=0)
    for row, layer in enumerate(layers):
        one, alone = clipped_by(bound, layer)
        trees.assert_close(clipped[row], one, rtol=1e-5, atol=1e-4)
        trees.assert_close(state.norm[row, 0, 0], alone.norm, rtol=1e-6)
    trees.assert_bitwise(clipped[0], layers[0])


@pytest.mark.parametrize("bad", [0, 1, None, "no"])
def test_exact_norm_must_be_a_boolean(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^exact_norm must be True or False, got "):
        clipax.clip_by_spectral_norm(1.0, exact_norm=bad)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that a program decomposes a leaf."""
    calls: list[bool] = []
    measure = _spectral.measure

    def counted(x: Any, iterations: int | None) -> Any:
        jax.debug.callback(lambda: calls.append(True))
        return measure(x, iterations)

    monkeypatch.setattr(_spectral, "measure", counted)
    return calls


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(
    ("over", "times"), [(100.0, 0), (1.5, 0), (0.9, 1), (0.01, 1), (math.inf, 1)]
)
def test_a_matrix_within_its_bound_is_not_decomposed(
    decomposed: list[bool], over: float, times: int
) -> None:
    x = jnp.asarray(SHAPES[0])
    method = clipax.clip_by_spectral_norm(over * spectral_norm(x))
    jax.block_until_ready(jax.jit(method.update)(x, method.init(x)))
    jax.effects_barrier()
    assert len(decomposed) == times


@pytest.mark.slow
def test_a_soft_coefficient_decomposes_what_it_changes(decomposed: list[bool]) -> None:
    x = jnp.asarray(SHAPES[0])
    for over, times in ((2.0, 1), (1e6, 0)):
        decomposed.clear()
        method = clipax.clip_by_spectral_norm(over * spectral_norm(x), square_root)
        jax.block_until_ready(jax.jit(method.update)(x, method.init(x)))
        jax.effects_barrier()
        assert len(decomposed) == times


@pytest.mark.slow
def test_vmap_decomposes_nothing_if_no_member_needs_it(decomposed: list[bool]) -> None:
    members = jnp.stack([jnp.asarray(SHAPES[0]), 2 * jnp.asarray(SHAPES[0])])
    for over, needed in ((30.0, False), (1.5, True)):
        decomposed.clear()
        method = clipax.clip_by_spectral_norm(over * spectral_norm(SHAPES[0]))
        states = jax.vmap(method.init)(members)
        clipped, states = jax.jit(jax.vmap(method.update))(members, states)
        jax.effects_barrier()
        assert bool(decomposed) == needed
        for row, member in enumerate(members):
            one, state = method.update(member, method.init(member))
            trees.assert_close(clipped[row], one, rtol=1e-5, atol=1e-5)
            trees.assert_close(states.norm[row], state.norm, rtol=1e-6)
