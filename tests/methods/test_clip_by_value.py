"""Clipping each entry, against NumPy and worked cases."""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import clipax

GRADS = jnp.array([3.0, -0.5, -4.0])


def clipped_by(*args: Any, updates: Any, **kwargs: Any) -> tuple[Any, Any]:
    method = clipax.clip_by_value(*args, **kwargs)
    return method.update(updates, method.init(updates))


def ramp(count: Any) -> Any:
    return 0.0625 * jnp.asarray(count, jnp.float32)


def of_both_sides(pick: Any, field: Any) -> Any:
    """With a lower bound, a field of the state is a pair."""
    return jax.tree.map(pick, *field) if isinstance(field, tuple) else field


def assert_equals_numpy(method: Any, top: Any, bottom: Any, shapes: Any) -> None:
    """Entries between the bounds; `norm`, `max_norm`, `coefficient` as the docstring has them."""
    sequence = sequences.spiky(shapes)
    clipped, states = sequences.scanned(method, sequence)
    norm = of_both_sides(np.maximum, states.norm)
    max_norm = of_both_sides(np.maximum, states.max_norm)
    coefficient = of_both_sides(np.minimum, states.coefficient)
    for name, leaf in sequence.items():
        highest, lowest = (
            np.broadcast_to(np.reshape(side(name), (-1,) + (1,) * (leaf.ndim - 1)), leaf.shape)
            for side in (top, bottom)
        )
        wide = leaf.astype(np.result_type(leaf.dtype, np.float64))
        modulus = np.abs(wide)
        reach = highest if np.iscomplexobj(leaf) else np.where(wide > 0, highest, -lowest)
        factor = np.where(modulus > reach, reach / np.where(modulus > 0, modulus, 1.0), 1.0)
        rows = (sequences.COUNT, -1)
        np.testing.assert_allclose(clipped[name], wide * factor, rtol=1e-6)
        assert (clipped[name] == leaf)[factor == 1].all()
        np.testing.assert_allclose(norm[name], modulus.reshape(rows).max(1), rtol=1e-6)
        np.testing.assert_allclose(coefficient[name], factor.reshape(rows).min(1), rtol=1e-6)
        larger = np.maximum(highest, -lowest).reshape(rows)[:, 0]
        np.testing.assert_allclose(max_norm[name], larger, rtol=1e-6)
        assert 0 < np.mean(factor < 1) < 1


REAL = {"conv": (2, 3, 2, 4), "kernel": (5, 6), "scale": ()}


@pytest.mark.parametrize("max_value", [0.25, 1.0, 3])
def test_equals_numpy_over_a_spiky_sequence(max_value: float) -> None:
    method = clipax.clip_by_value(max_value)
    shapes = {**REAL, "phase": (3, 2)}
    assert_equals_numpy(method, lambda name: max_value, lambda name: -max_value, shapes)


STEPS = np.arange(sequences.COUNT)
PREFIX = {"conv": jnp.array(0.5), "kernel": ramp, "scale": 2}
TOPS = {"conv": 0.5, "kernel": 0.0625 * STEPS, "scale": 2.0}
NEGATIVE = {"conv": lambda count: -ramp(count), "kernel": -0.25, "scale": np.float32(-1)}
BOTTOMS = {"conv": -0.0625 * STEPS, "kernel": -0.25, "scale": -1.0}


@pytest.mark.parametrize(
    ("max_value", "min_value", "top", "bottom"),
    [
        (1.0, -0.25, lambda name: 1.0, lambda name: -0.25),
        (0.5, 0, lambda name: 0.5, lambda name: 0.0),
        (PREFIX, None, TOPS.get, lambda name: -np.asarray(TOPS[name])),
        (PREFIX, NEGATIVE, TOPS.get, BOTTOMS.get),
        (math.inf, NEGATIVE, lambda name: math.inf, BOTTOMS.get),
    ],
)
def test_equals_numpy_between_two_bounds_of_every_form(
    max_value: Any, min_value: Any, top: Any, bottom: Any
) -> None:
    assert_equals_numpy(clipax.clip_by_value(max_value, min_value), top, bottom, REAL)


def test_worked_by_hand() -> None:
    clipped, state = clipped_by(1.0, updates=GRADS)
    trees.assert_bitwise(clipped, jnp.array([1.0, -0.5, -1.0]))
    trees.assert_bitwise(state[:3], (jnp.array(4.0), jnp.array(1.0), jnp.array(0.25)))
    clipped, state = clipped_by(1.5, -0.25, updates=GRADS)
    trees.assert_bitwise(clipped, jnp.array([1.5, -0.25, -0.25]))
    picks = (np.maximum, np.maximum, np.minimum)
    folded = tuple(map(of_both_sides, picks, state[:3]))
    trees.assert_bitwise(folded, (jnp.array(4.0), jnp.array(1.5), jnp.array(0.0625)))
    clipped, _ = clipped_by(2.5, updates=jnp.array([3 + 4j, -1j]))
    trees.assert_bitwise(clipped, jnp.array([1.5 + 2j, -1j]))


def test_clip_is_clip_by_value_under_the_name_of_optax() -> None:
    method = clipax.clip(1.0)
    state = method.init(GRADS)
    trees.assert_bitwise(method.update(GRADS, state), clipped_by(1.0, updates=GRADS))
    with pytest.raises(ValueError, match=r"^max_value must be a number >= 0, got -1"):
        clipax.clip(-1)


size = st.floats(2.0**-10, 1e4, width=32)
entries = hnp.arrays(np.float32, (6,), elements=size | size.map(lambda x: -x) | st.just(0.0))


@jax.jit
def clip_traced(updates: Any, max_value: Any, min_value: Any) -> Any:
    return clipped_by(max_value, min_value, updates=updates)[0]


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(entries, size | st.just(0.0), size | st.just(0.0))
def test_bounds_each_entry_whatever_the_others(
    updates: np.ndarray, max_value: float, depth: float
) -> None:
    top, bottom = np.float32(max_value), np.float32(-depth)
    clipped = clip_traced(updates, top, bottom)
    np.testing.assert_array_equal(clipped, np.minimum(np.maximum(updates, bottom), top))
    np.testing.assert_array_equal(clip_traced(clipped, top, bottom), clipped)
    np.testing.assert_array_equal(clip_traced(-updates, -bottom, -top), -clipped)
    trees.assert_bitwise(clip_traced(4 * updates, 4 * top, 4 * bottom), 4 * clipped)


def test_one_wild_coordinate_does_not_slow_the_others() -> None:
    """Pan and Li: coordinate-wise clipping keeps what the global norm would shrink with it."""
    grads = jnp.array([1e4, 0.5, -0.25])
    clipped, _ = clipped_by(1.0, updates=grads)
    trees.assert_bitwise(clipped, jnp.array([1.0, 0.5, -0.25]))
    by_norm = clipax.clip_by_global_norm(1.0)
    assert abs(by_norm.update(grads, by_norm.init(grads))[0][1]) < 1e-4


def test_heavy_tailed_noise_is_survived() -> None:
    """Descent on a parabola under Cauchy noise: plain, it is thrown off; clipped, it arrives."""
    noise = jnp.asarray(np.random.default_rng(0).standard_cauchy((500, 8)), jnp.float32)

    def descend(method: Any) -> float:
        def step(x: Any, noise: Any) -> Any:
            updates, _ = method.update(x + noise, method.init(x))
            return x - 0.02 * updates, jnp.linalg.norm(x - 0.02 * updates)

        _, distances = jax.lax.scan(step, jnp.full(8, 2.0), noise)
        return float(jnp.max(distances[300:]))

    assert descend(clipax.clip_by_value(1.0)) < 1.0
    assert descend(clipax.clip_by_value(math.inf)) > 2.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("max_value", [0.3, 1.0, 1 / 3, 100.1])
def test_a_bound_between_two_narrow_numbers_is_rounded_once(dtype: str, max_value: float) -> None:
    rounded = jnp.asarray(max_value, dtype)
    updates = jnp.asarray([1e4, -1e4, rounded, -rounded, max_value / 2, -0.0], dtype)
    clipped, _ = clipped_by(max_value, updates=updates)
    expected = jnp.array([rounded, -rounded, rounded, -rounded, updates[4], updates[5]])
    trees.assert_bitwise(clipped, expected)
    trees.assert_bitwise(clipped_by(max_value, updates=clipped)[0], clipped)


# Every row of the table of edge cases.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("max_value", [4.0, 5.0, math.inf])
def test_edge_an_entry_within_the_bounds(max_value: float, dtype: str) -> None:
    updates = jnp.asarray([4.0, -4.0, 1e-4, 0.0, -0.0, 1 / 3], dtype)
    clipped, state = clipped_by(max_value, updates=updates)
    trees.assert_bitwise(clipped, updates)
    assert state.coefficient == 1


@pytest.mark.parametrize("max_value", [0.0, 2.5])
def test_edge_inf_becomes_the_bound(max_value: float) -> None:
    updates = jnp.array([np.inf, -np.inf, 0.0])
    clipped, state = clipped_by(max_value, updates=updates)
    np.testing.assert_array_equal(clipped, [max_value, -max_value, 0.0])
    assert (state.norm, state.coefficient) == (np.inf, 0)
    clipped, _ = clipped_by(max_value, -1.5, updates=updates)
    np.testing.assert_array_equal(clipped, [max_value, -1.5, 0.0])


@pytest.mark.parametrize(
    "value", [complex(np.inf, 1), complex(1, -np.inf), complex(np.inf, np.inf)]
)
def test_edge_complex_with_an_infinite_part(value: complex) -> None:
    clipped, _ = clipped_by(1.0, updates=jnp.array([value, 0.5j]))
    assert np.isnan(clipped[0])
    trees.assert_bitwise(clipped[1], jnp.array(0.5j))


@pytest.mark.parametrize("bounds", [(0.0,), (1.0,), (math.inf,), (1.0, -2.0), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_edge_nan_stays_nan_and_harms_no_other(dtype: str, bounds: Any) -> None:
    updates = jnp.asarray([np.nan, 3.0, -0.5], dtype)
    clipped, state = clipped_by(*bounds, updates=updates)
    expected, _ = clipped_by(*bounds, updates=updates[1:])
    assert np.isnan(clipped[0])
    trees.assert_bitwise(clipped[1:], expected)
    assert np.isnan(of_both_sides(np.maximum, state.norm))


@pytest.mark.parametrize("bounds", [(0,), (0.0, 0.0), (0.0, -0.0)])
def test_edge_bounds_of_zero(bounds: Any) -> None:
    clipped, _ = clipped_by(*bounds, updates=jnp.array([3.0, -0.5, 0.0, np.inf]))
    np.testing.assert_array_equal(clipped, np.zeros(4))


@pytest.mark.parametrize("bounds", [(0.0,), (1.0,), (1.0, -2.0), (math.inf,)])
def test_edge_leaves_that_are_not_measured(bounds: Any) -> None:
    clipped, state = sequences.beside_unmeasured(clipax.clip_by_value(*bounds), GRADS)
    trees.assert_bitwise(clipped, clipped_by(*bounds, updates=GRADS)[0])
    assert max(jax.tree.leaves(state.norm)) == 4
    assert len(jax.tree.leaves(state.norm)) == len(bounds)


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_upper_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_value must be a number >= 0, got ", bad):
        clipax.clip_by_value(bad)
    with pytest.raises(ValueError, match=r"^max_value\['w'\] must be a number >= 0, got "):
        clipax.clip_by_value({"w": bad})


@pytest.mark.parametrize("bad", [x for x in (1, math.inf, *refusals.NO_NUMBERS) if x is not None])
def test_bad_lower_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("min_value must be a number <= 0, got ", bad):
        clipax.clip_by_value(1.0, bad)
    with pytest.raises(ValueError, match=r"^min_value\['w'\] must be a number <= 0, got "):
        clipax.clip_by_value(1.0, {"w": bad})


@pytest.mark.parametrize("name", ["max_value", "min_value"])
@pytest.mark.parametrize("bad", [{"v": 0.0}, [0.0, 0.0], {"w": [0.0]}])
def test_a_prefix_that_does_not_fit_is_refused(name: str, bad: Any) -> None:
    method = clipax.clip_by_value(**{"max_value": 1.0, name: bad})
    good = clipax.clip_by_value(1.0, -1.0 if name == "min_value" else None)
    refusals.assert_prefix_must_fit(name, bad, method, good, {"w": GRADS})


def test_a_lower_bound_for_a_complex_leaf_is_refused() -> None:
    method, updates = clipax.clip_by_value(1.0, -1.0), {"w": jnp.array([1j])}
    with pytest.raises(ValueError, match=r"^min_value must be None for complex leaves"):
        method.init(updates)
    with pytest.raises(ValueError, match=r"^min_value must be None for complex leaves"):
        method.update(updates, method.init({"w": jnp.zeros(1)}))
