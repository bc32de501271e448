"""Clipping singular values, against NumPy's decomposition and worked cases."""

import functools
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
from spectral import (
    FORMULAS,
    clip_matrix,
    clipped_by,
    either_way,
    spectral_norm,
    with_singular_values,
)

import clipax
from clipax.coefficients import hard, rational, square_root, tanh

GRADS = {"kernel": jnp.array([[0.0, -3.0], [1.0, 0.0]]), "bias": jnp.array([3.0, 4.0])}


# Over a long sequence: spikes, plateaus, zeros and single NaNs.

COUNT = 400
SHAPES = {
    "attention": (6, 2, 3),
    "bias": (6,),
    "conv": (2, 3, 2, 4),
    "layers": (3, 4, 5),
    "phase": (4, 3),
    "scale": (),
}
# What each leaf is as a stack of matrices, of one if nothing is stacked.
READ = {
    "attention": lambda x: x.reshape(1, 6, 6),
    "bias": lambda x: x.reshape(1, 6, 1),
    "conv": lambda x: x.reshape(1, 12, 4),
    "layers": lambda x: x,
    "phase": lambda x: x.reshape(1, 4, 3),
    "scale": lambda x: x.reshape(1, 1, 1),
}
UNIT_AXIS = dict.fromkeys(SHAPES, -1) | {"attention": (1, 2)}
STACK_AXIS = dict.fromkeys(SHAPES) | {"layers": 0}
BAD_STEPS = {"attention": 33, "bias": 57, "conv": 150, "layers": 151, "phase": 300, "scale": 301}


def long_run() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    sequence = {}
    for name, shape in SHAPES.items():
        values = rng.normal(size=(COUNT, *shape))
        if name == "phase":
            values = values + 1j * rng.normal(size=values.shape)
        sizes = rng.lognormal(sigma=0.7, size=COUNT)
        sizes[[7, 120, 390]] *= 100.0
        sizes[[11, 12, 260]] = 0.0
        sizes[45] = 1e-6
        values *= sizes.reshape((-1,) + (1,) * len(shape))
        values[200:220] = values[200]
        values.reshape(COUNT, -1)[BAD_STEPS[name], -1] = np.nan
        sequence[name] = values.astype(np.complex64 if name == "phase" else np.float32)
    return sequence


def a_ramp(count: Any) -> Any:
    return 0.01 * jnp.asarray(count, jnp.float32)


@functools.cache
def decomposed_run() -> Any:
    """For each leaf: u, s and vh of every matrix of every step in float64."""
    sequence = long_run()

    def decompose(name: str) -> Any:
        leaf = sequence[name]
        wide = leaf.astype(np.result_type(leaf.dtype, np.float64))
        x = np.stack([READ[name](step) for step in wide])
        return np.linalg.svd(np.nan_to_num(x), full_matrices=False)

    return sequence, {name: decompose(name) for name in sequence}


def assert_equals_numpy(method: Any, formula: Any, bounds: Any, error: float = 3e-6) -> None:
    sequence, parts = decomposed_run()
    clipped, states = sequences.scanned(method, sequence)
    factors = []
    for name, leaf in sequence.items():
        u, s, vh = parts[name]
        norm, bound = s[:, :, 0], np.broadcast_to(np.reshape(bounds, (-1, 1)), s[:, :, 0].shape)
        f = formula(s, bound[..., None])
        expected = ((u * f[..., None, :]) @ vh).reshape(leaf.shape)
        factor = np.where(norm > 0, f[..., 0] / np.where(norm > 0, norm, 1), 1.0)
        good = np.ones(COUNT, bool)
        good[BAD_STEPS[name]] = False
        # An error in proportion to the largest singular value, which is all that float32 has.
        allowed = np.broadcast_to(
            norm[..., None, None], (*norm.shape, *u.shape[2:3], vh.shape[-1])
        )
        off = np.abs(clipped[name] - expected) - error * allowed.reshape(leaf.shape)
        assert (off[good] <= 1e-37).all(), (name, off[good].max())
        got = (states.norm[name], states.max_norm[name], states.coefficient[name])
        for one, other in zip(got, (norm, bound, factor), strict=True):
            shape = (COUNT, *([3, 1, 1] if name == "layers" else []))
            assert one.shape == shape
            np.testing.assert_allclose(one[good], other.reshape(shape)[good], rtol=1e-5)
        # The step with a NaN is loud in its matrix, and there alone.
        bad = READ[name](clipped[name][BAD_STEPS[name]])
        assert np.isnan(bad[-1]).all()
        assert np.isfinite(bad[:-1]).all()
        assert np.isnan(states.norm[name][BAD_STEPS[name]]).any()
        is_kept = good & (factor == 1).all(1)
        if formula is FORMULAS[hard]:
            same = states.coefficient[name].reshape(COUNT, -1).min(1) == 1
            assert (clipped[name] == leaf)[is_kept & same].all()
        factors.append(factor[good].ravel())
    assert np.mean(np.concatenate(factors) < 1) > 0.05


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("coefficient", trees.mostly_slow(FORMULAS, [hard, square_root]))
def test_equals_numpy_over_a_long_run(coefficient: Any) -> None:
    method = clipax.clip_by_spectral_norm(
        2.0, coefficient, unit_axis=UNIT_AXIS, stack_axis=STACK_AXIS, exact_norm=True
    )
    assert_equals_numpy(method, FORMULAS[coefficient], 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [hard, square_root])
def test_equals_numpy_over_a_long_run_by_iterations(coefficient: Any) -> None:
    method = clipax.clip_by_spectral_norm(
        2.0,
        coefficient,
        iterations=16,
        unit_axis=UNIT_AXIS,
        stack_axis=STACK_AXIS,
        exact_norm=True,
    )
    assert_equals_numpy(method, FORMULAS[coefficient], 2.0)


def test_equals_numpy_under_a_schedule_with_rules_that_are_functions() -> None:
    method = clipax.clip_by_spectral_norm(
        a_ramp,
        unit_axis=lambda path, leaf: UNIT_AXIS[path],
        stack_axis=lambda path, leaf: STACK_AXIS[path],
        exact_norm=True,
    )
    assert_equals_numpy(method, FORMULAS[hard], 0.01 * np.arange(COUNT))


def test_a_bound_for_each_leaf() -> None:
    clipped, state = clipped_by({"kernel": 2.0, "bias": lambda count: 2.5}, GRADS)
    trees.assert_close(clipped["kernel"], jnp.array([[0.0, -2.0], [1.0, 0.0]]))
    trees.assert_close(clipped["bias"], jnp.array([1.5, 2.0]))
    assert state.threshold.step_count == 1


# Cases worked by hand.


@either_way
def test_worked_by_hand(iterations: int | None) -> None:
    diagonal = jnp.diag(jnp.array([3.0, 1.0]))
    clipped, state = clipped_by(2.0, diagonal, iterations=iterations)
    trees.assert_close(clipped, jnp.diag(jnp.array([2.0, 1.0])), atol=3e-7)
    trees.assert_close(state[:3], (jnp.array(3.0), jnp.array(2.0), jnp.array(2 / 3)))
    clipped, state = clipped_by(1.0, diagonal, square_root, iterations=iterations)
    expected = jnp.diag(jnp.array([3 / math.sqrt(10), 1 / math.sqrt(2)]))
    trees.assert_close(clipped, expected, atol=3e-7)
    trees.assert_close(state.coefficient, jnp.array(1 / math.sqrt(10)))
    # Turned by a quarter, and with a wide third column that nothing reaches.
    clipped, _ = clipped_by(2.0, jnp.array([[0.0, -3.0, 0.0], [1.0, 0.0, 0.0]]))
    trees.assert_close(clipped, jnp.array([[0.0, -2.0, 0.0], [1.0, 0.0, 0.0]]), atol=3e-7)
    # All ones: one singular value, 4.
    clipped, _ = clipped_by(1.0, jnp.ones((2, 2, 2, 2)), iterations=iterations)
    trees.assert_close(clipped, jnp.full((2, 2, 2, 2), 0.25), atol=3e-7)


@pytest.mark.slow
def test_the_axes_of_a_kernel() -> None:
    """Each reading against the matrix written out."""
    kernel = np.random.default_rng(1).normal(size=(3, 2, 4, 5)).astype(np.float32)

    def assert_reads(as_matrix: Any, undo: Any, **rules: Any) -> None:
        clipped, state = clipped_by(1.5, jnp.asarray(kernel), **rules)
        expected = undo(clip_matrix(as_matrix(kernel), 1.5))
        np.testing.assert_allclose(clipped, expected, atol=3e-6)
        np.testing.assert_allclose(state.norm, spectral_norm(as_matrix(kernel)), rtol=1e-6)

    assert_reads(lambda x: x.reshape(24, 5), lambda x: x.reshape(3, 2, 4, 5))
    assert_reads(
        lambda x: x.reshape(3, 40),
        lambda x: x.reshape(3, 2, 4, 5),
        unit_axis=clipax.units.output_first,
    )
    assert_reads(lambda x: x.reshape(6, 20), lambda x: x.reshape(3, 2, 4, 5), unit_axis=(2, 3))
    assert_reads(
        lambda x: x.transpose(0, 3, 1, 2).reshape(15, 8),
        lambda x: x.reshape(3, 5, 2, 4).transpose(0, 2, 3, 1),
        unit_axis=(1, -2),
    )
    stacked, state = clipped_by(1.5, jnp.asarray(kernel), stack_axis=(0, 2))
    assert state.norm.shape == (3, 1, 4, 1)
    for i in range(3):
        for j in range(4):
            expected = clip_matrix(kernel[i, :, j], 1.5)
            np.testing.assert_allclose(stacked[i, :, j], expected, atol=3e-6)


def test_attention_and_torch_have_rules_at_hand() -> None:
    query = jnp.asarray(with_singular_values([4.0, 2.0, 1.0, 0.5], 8), jnp.float32)
    as_leaf = query.T.reshape(4, 2, 4)
    clipped, _ = clipped_by(1.5, as_leaf, unit_axis=clipax.units.nfnets)
    np.testing.assert_allclose(clipped.reshape(4, 8).T, clip_matrix(query, 1.5), atol=2e-6)
    torch_kernel = query.T.reshape(4, 2, 2, 2)
    clipped, _ = clipped_by(1.5, torch_kernel, unit_axis=clipax.units.output_first)
    np.testing.assert_allclose(clipped.reshape(4, 8).T, clip_matrix(query, 1.5), atol=2e-6)


def test_bounds_that_follow_the_largest_singular_value() -> None:
    """Yukhimchuk et al. have such bounds for each layer: here a moving average of raw norms."""
    rng = np.random.default_rng(2)
    updates = rng.normal(size=(60, 2, 4, 3)).astype(np.float32)
    updates[[20, 21, 40], 1] *= 30.0
    updates[30, 0, 0, 0] = np.nan
    rule = optax.chain(optax.ema(0.9), optax.scale(1.5))
    method = clipax.clip_by_spectral_norm(rule, stack_axis=0)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        clipped, states = sequences.scanned(method, updates)
    for layer in range(2):
        average, weight, last = 0.0, 0.0, 0.0
        for step in range(60):
            x = updates[step, layer].astype(np.float64)
            if np.isfinite(x).all():
                average = 0.9 * average + 0.1 * spectral_norm(x)
                weight = 0.9 * weight + 0.1
                last = 1.5 * average / weight
                expected = clip_matrix(x, last)
                np.testing.assert_allclose(
                    clipped[step, layer], expected, atol=1e-6 * spectral_norm(x)
                )
            np.testing.assert_allclose(states.max_norm[step, layer], last, rtol=1e-5)
    assert np.isnan(clipped[30, 0]).all()
    assert (states.coefficient[[20, 40], 1] < 0.5).all()


# What it is for.


@either_way
def test_an_outlier_is_cut_in_its_own_direction(iterations: int | None) -> None:
    """The claim of Yukhimchuk et al.: the norm of all entries shrinks the signal with it."""
    rng = np.random.default_rng(3)
    signal = with_singular_values(np.linspace(0.5, 1.0, 24), 32, seed=4)
    u, v = rng.normal(size=(32, 1)), rng.normal(size=(24, 1))
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    updates = jnp.asarray(signal + 100.0 * u @ v.T, jnp.float32)

    def left_of_signal(clipped: Any) -> float:
        beside = (np.eye(32) - u @ u.T) @ np.asarray(clipped) @ (np.eye(24) - v @ v.T)
        wanted = (np.eye(32) - u @ u.T) @ signal @ (np.eye(24) - v @ v.T)
        return float(np.sum(beside * wanted) / np.sum(wanted**2))

    clipped, _ = clipped_by(1.0, updates, iterations=iterations)
    np.testing.assert_allclose(left_of_signal(clipped), 1.0, atol=0.01)
    np.testing.assert_allclose(u.T @ np.asarray(clipped) @ v, 1.0, atol=0.01)
    by_leaf = clipax.clip_by_leaf_norm(float(np.linalg.norm(signal)))
    clipped, _ = by_leaf.update(updates, by_leaf.init(updates))
    assert left_of_signal(clipped) < 0.05


size = st.floats(2.0**-6, 1e3, width=32)
matrices = hnp.arrays(np.float32, (4, 3), elements=size | size.map(lambda x: -x) | st.just(0.0))


@functools.partial(jax.jit, static_argnums=2)
def clip_traced(updates: Any, max_norm: Any, iterations: int | None) -> Any:
    return clipped_by(max_norm, updates, iterations=iterations)[0]


@either_way
@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(matrices, st.floats(0.0625, 1e3, width=32), st.integers(0, 10))
def test_bounds_the_spectral_norm_and_turns_with_the_matrix(
    iterations: int | None, updates: np.ndarray, max_norm: float, seed: int
) -> None:
    bound, norm = np.float32(max_norm), spectral_norm(updates)
    clipped = clip_traced(updates, bound, iterations)
    # 12 iterations leave 2.5^-12 of the bound.
    atol = 4e-6 * norm + (0 if iterations is None else 2.5**-12 * max_norm)
    assert spectral_norm(clipped) <= max_norm * (1 + 3e-6) + atol
    np.testing.assert_allclose(clipped, clip_matrix(updates, max_norm), rtol=0, atol=atol)
    again = clip_traced(clipped, bound, iterations)
    np.testing.assert_allclose(again, clipped, rtol=0, atol=atol)
    np.testing.assert_allclose(
        clip_traced(updates.T, bound, iterations), clipped.T, rtol=0, atol=atol
    )
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0].astype(np.float32)
    turned = clip_traced(turn @ updates, bound, iterations)
    np.testing.assert_allclose(turned, turn @ np.asarray(clipped), rtol=0, atol=2 * atol)
    doubled = clip_traced(4 * updates, 4 * bound, iterations)
    np.testing.assert_allclose(doubled, 4 * clipped, rtol=0, atol=8 * atol)


# Every row of the table of edge cases.


@pytest.mark.slow_but(6)
@either_way
@pytest.mark.parametrize(
    "dtype",
    trees.mostly_slow(["float16", "bfloat16", "float32", "complex64"], ["bfloat16", "complex64"]),
)
@pytest.mark.parametrize("max_norm", [3.0001, 1e4, math.inf])
def test_edge_within_the_bound(max_norm: float, dtype: str, iterations: int | None) -> None:
    updates = jnp.asarray([[3.0, -0.0, 0.0], [0.0, 1e-4, -1 / 3]], dtype)
    clipped, state = clipped_by(max_norm, updates, iterations=iterations)
    trees.assert_bitwise(clipped, updates)
    assert state.coefficient == 1
    soft, _ = clipped_by(math.inf, updates, square_root, iterations=iterations)
    trees.assert_bitwise(soft, updates)


@pytest.mark.slow_but(2)
@either_way
@pytest.mark.parametrize("coefficient", trees.mostly_slow([hard, square_root], [hard]))
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_edge_zeros_and_a_bound_of_zero(
    max_norm: float, coefficient: Any, iterations: int | None
) -> None:
    zeros = {"a": jnp.zeros((3, 4)), "b": jnp.zeros((2, 2, 2))}
    clipped, state = clipped_by(max_norm, zeros, coefficient, iterations=iterations)
    trees.assert_bitwise(clipped, zeros)
    assert state.norm == {"a": 0, "b": 0}
    ones = jax.tree.map(jnp.ones_like, zeros)
    clipped, state = clipped_by(0.0, ones, coefficient, iterations=iterations)
    trees.assert_close(clipped, zeros, rtol=0)
    assert state.coefficient == {"a": 0, "b": 0}


@either_way
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 2.0, 1e9])
def test_edge_vectors_are_clipped_by_their_norm(max_norm: float, iterations: int | None) -> None:
    rng = np.random.default_rng(11)
    shapes = [(), (5,), (5, 1), (1, 5), (1, 1, 5), (3, 1, 1), (2, 3)]
    updates = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    updates[1] = updates[1].at[2].set(np.inf)
    by_norm = clipax.clip_by_leaf_norm(max_norm)
    expected = by_norm.update(updates, by_norm.init(updates))

    def unit_axis(path: str, leaf: Any) -> Any:
        return None if leaf.shape == (2, 3) else -1

    got = clipped_by(max_norm, updates, iterations=iterations, unit_axis=unit_axis)
    trees.assert_bitwise(got, expected)


def test_edge_stacked_vectors() -> None:
    biases = jnp.array([[3.0, 4.0], [0.6, 0.8]])
    clipped, state = clipped_by(2.5, biases, stack_axis=0)
    trees.assert_close(clipped, jnp.array([[1.5, 2.0], [0.6, 0.8]]))
    trees.assert_close(state.norm, jnp.array([[5.0], [1.0]]))


@either_way
def test_edge_no_entries(iterations: int | None) -> None:
    updates = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((2, 0, 3)), "c": jnp.zeros((0, 3, 3))}
    stack_axis = {"a": None, "b": 0, "c": 0}
    clipped, state = clipped_by(1.0, updates, iterations=iterations, stack_axis=stack_axis)
    trees.assert_bitwise(clipped, updates)
    assert not any(bool(norm.any()) for norm in jax.tree.leaves(state.norm))


@either_way
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_edge_narrow_dtypes_are_computed_in_float32(dtype: str, iterations: int | None) -> None:
    updates = jnp.asarray(with_singular_values([40.0, 3.0, 1e-3], 5), dtype)
    clipped, state = clipped_by(2.0, updates, iterations=iterations)
    wide, _ = clipped_by(2.0, updates.astype("float32"), iterations=iterations)
    trees.assert_bitwise(clipped, wide.astype(dtype))
    assert state.norm.dtype == jnp.float32


@either_way
def test_edge_complex_entries_change_their_phase_as_real_ones_their_sign(
    iterations: int | None,
) -> None:
    real = jnp.array([[4.0, 1.0], [2.0, 4.0]])
    clipped, _ = clipped_by(0.1, real, iterations=iterations)
    # All singular values are cut: what is left is a rotation.
    rotation = np.array([[8.0, -1.0], [1.0, 8.0]]) / math.sqrt(65)
    np.testing.assert_allclose(clipped, 0.1 * rotation, atol=1e-6)
    phases = np.exp(1j * np.array([[0.3], [1.2]]))
    turned = jnp.asarray(phases * np.asarray(real), jnp.complex64)
    clipped, _ = clipped_by(0.1, turned, iterations=iterations)
    np.testing.assert_allclose(clipped, 0.1 * phases * rotation, atol=1e-6)


@pytest.mark.slow_but(9)
@either_way
@pytest.mark.parametrize("coefficient", trees.mostly_slow([hard, square_root], [hard]))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_an_entry_that_is_not_finite(
    max_norm: float, value: float, coefficient: Any, iterations: int | None
) -> None:
    rng = np.random.default_rng(12)
    good = {
        "a": jnp.asarray(rng.normal(size=(4, 3))),
        "b": jnp.asarray(rng.normal(size=(2, 3, 3))),
    }
    good = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), good)
    bad = {**good, "b": good["b"].at[1, 2, 2].set(value)}
    rules = {"iterations": iterations, "stack_axis": {"a": None, "b": 0}}
    expected, _ = clipped_by(max_norm, good, coefficient, **rules)
    clipped, state = clipped_by(max_norm, bad, coefficient, **rules)
    trees.assert_bitwise((clipped["a"], clipped["b"][0]), (expected["a"], expected["b"][0]))
    np.testing.assert_array_equal(state.norm["b"][1], [[np.abs(value)]])
    if max_norm == math.inf and np.isinf(value):
        trees.assert_bitwise(clipped, bad)
    else:
        assert np.isnan(clipped["b"][1]).all()


@pytest.mark.parametrize("value", [complex(np.nan, 1), complex(1, np.inf)])
def test_edge_a_complex_entry_that_is_not_finite(value: complex) -> None:
    updates = jnp.array([[1.0 + 0j, 2.0], [3.0, value]])
    clipped, _ = clipped_by(1.0, updates)
    assert np.isnan(clipped).all()


@either_way
@pytest.mark.parametrize("mask", [lambda path, leaf: path != "out", {"float": True, "out": False}])
def test_edge_leaves_that_are_not_measured(mask: Any, iterations: int | None) -> None:
    others = {**sequences.unmeasured(), "out": jnp.array([[np.nan, 1e9], [1.0, 2.0]])}
    if isinstance(mask, dict):
        mask = {name: True for name in others if others[name] is not None} | mask
        mask["masked"] = sequences.unmeasured()["masked"]
        mask["none"] = None
    updates = {"float": jnp.diag(jnp.array([3.0, 1.0])), **others}
    clipped, state = clipped_by(2.0, updates, mask=mask, iterations=iterations)
    (norm,) = jax.tree.leaves(state.norm)
    trees.assert_close(norm, jnp.array(3.0))
    trees.assert_close(clipped["float"], jnp.diag(jnp.array([2.0, 1.0])), atol=3e-7)
    sequences.assert_untouched(clipped, others)


def test_edge_a_leaf_that_is_frozen_after_init() -> None:
    method = clipax.clip_by_spectral_norm(2.0)
    state = method.init({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))})
    clipped, new_state = method.update({"a": None, "b": 4 * jnp.eye(2)}, state)
    assert clipped["a"] is None
    trees.assert_close(clipped["b"], 2 * jnp.eye(2))
    trees.assert_same_type(new_state, state)


@pytest.mark.slow_but(3)
@either_way
@sequences.far_out
def test_squares_out_of_range_are_measured_right(
    dtype: str, size: float, iterations: int | None
) -> None:
    x = with_singular_values([4.0, 1.0, 0.5], 6)
    updates = jnp.asarray(x * size / 8, dtype)
    unit = float(updates.astype("float32")[0, 0]) / float(x[0, 0])
    clipped, state = clipped_by(2 * unit, updates, iterations=iterations)
    np.testing.assert_allclose(state.norm, 4 * unit, rtol=2e-3)
    expected = clip_matrix(np.asarray(updates, np.float64), 2 * unit)
    np.testing.assert_allclose(
        np.asarray(clipped, np.float64),
        expected,
        atol=unit * (2e-3 if dtype == "float16" else 1e-5),
    )
    tiny, _ = clipped_by(1e-34, updates, square_root, iterations=iterations)
    assert spectral_norm(tiny) <= 1e-34 * (1 + 1e-5)


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_norm must be a number >= 0, got ", bad):
        clipax.clip_by_spectral_norm(bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "10", math.nan, [3]])
def test_bad_iterations_are_refused(bad: Any) -> None:
    with refusals.refused("iterations must be an integer >= 1, got ", bad):
        clipax.clip_by_spectral_norm(1.0, iterations=bad)


@pytest.mark.parametrize("bad", ["hard", None, 1.0, True, jnp.array(1.0)])
def test_bad_coefficients_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^coefficient must be a function, got "):
        clipax.clip_by_spectral_norm(1.0, bad)


@pytest.mark.parametrize("bad", [tanh, rational, functools.partial(hard, eps=1e-6)])
def test_coefficients_that_products_do_not_give_are_refused(bad: Any) -> None:
    clipax.clip_by_spectral_norm(1.0, bad)
    with pytest.raises(ValueError, match=r"^coefficient must be hard or square_root with iter"):
        clipax.clip_by_spectral_norm(1.0, bad, iterations=10)


@pytest.mark.parametrize("name", ["iterations", "unit_axis", "stack_axis", "mask"])
def test_what_must_be_static_is_refused_if_it_is_traced(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be known while tracing, got "):
        jax.jit(lambda value: clipped_by(1.0, GRADS, **{name: value}))(1)


@pytest.mark.parametrize("name", ["max_norm", "stack_axis", "mask"])
@pytest.mark.parametrize("bad", [{"kernel": 1}, {"kernel": 1, "b": 1}, [1, 1]])
def test_a_prefix_that_does_not_fit_is_refused(name: str, bad: Any) -> None:
    method = clipax.clip_by_spectral_norm(**{"max_norm": 1.0, name: bad})
    refusals.assert_prefix_must_fit(name, bad, method, clipax.clip_by_spectral_norm(1.0), GRADS)


@pytest.mark.parametrize("bad", [{"kernel": 1}, [1, 1]])
def test_a_prefix_of_columns_that_does_not_fit_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^unit_axis must be one value or a tree prefix"):
        clipped_by(1.0, GRADS, unit_axis=bad)


@pytest.mark.parametrize("name", ["unit_axis", "stack_axis"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (2, r"shape \(2, 2\) has no axis 2"),
        ((0, -3), "has no axis -3"),
        (True, "must be an integer or a tuple of them, got True"),
        ("last", "must be an integer or a tuple of them, got 'last'"),
    ],
)
def test_axes_that_a_leaf_lacks_are_refused(name: str, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_by(1.0, GRADS["kernel"], **{name: bad})


def test_an_axis_that_is_both_stacked_and_a_column_is_refused() -> None:
    message = r"^unit_axis=-1 and stack_axis=2 must name different axes .* \(2, 3, 4\)"
    with pytest.raises(ValueError, match=message):
        clipped_by(1.0, jnp.ones((2, 3, 4)), stack_axis=2)


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("size", [8e37, 1e38, 3e38])
@pytest.mark.parametrize("iterations", [None, 10])
def test_the_largest_floats_are_clipped(size: float, iterations: int | None) -> None:
    method = clipax.clip_by_spectral_norm(size / 2, iterations=iterations)
    updates = jnp.diag(jnp.array([size, size / 4]))
    for update in (method.update, jax.jit(method.update)):
        clipped, _ = update(updates, method.init(updates))
        np.testing.assert_allclose(np.diag(clipped), [size / 2, size / 4], rtol=2e-4)
