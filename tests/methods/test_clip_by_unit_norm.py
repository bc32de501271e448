"""Clipping each output unit by its own norm, against NumPy and worked cases."""

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

GRADS = {"kernel": jnp.array([[3.0, 0.5], [4.0, 0.0]]), "bias": jnp.array([6.0, 8.0])}


def clipped_by(max_norm: Any, updates: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    method = clipax.clip_by_unit_norm(max_norm, *args, **kwargs)
    return method.update(updates, method.init(updates))


def assert_equals_numpy(
    method: Any, summed: Any, bound: Any, ord: float = 2, shapes: Any = sequences.RANKS
) -> None:
    sequence = sequences.spiky(shapes)
    norms = sequences.by_leaf(
        lambda path, leaf: sequences.p_norm(leaf, ord, summed[path]), sequence
    )
    bounds = jax.tree.map(lambda norm: sequences.over_steps(bound, norm), norms)
    sequences.assert_clips(method, sequence, norms, bounds)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("convention", ["output_last", "output_first", "nfnets", "whole_leaf"])
def test_equals_numpy_over_ranks_0_to_6(convention: str) -> None:
    method = clipax.clip_by_unit_norm(2.0, unit_axis=getattr(clipax.units, convention))
    assert_equals_numpy(method, sequences.SUMMED[convention], 2.0)


SHAPES = {"kernel": (3, 2, 4), "phase": (3, 4), "vector": (5,)}


@pytest.mark.parametrize("ord", [1, 3, 0.5, math.inf])
def test_equals_numpy_in_every_order_and_by_default_along_the_last_axis(ord: float) -> None:
    summed = {"kernel": (0, 1), "phase": (0,), "vector": (0,)}
    assert_equals_numpy(clipax.clip_by_unit_norm(2.0, ord), summed, 2.0, ord, SHAPES)


UNIT_AXES = {
    "an axis": (1, {"kernel": (0, 2), "phase": (0,), "vector": (0,)}),
    "axes, stacked layers": ((0, -1), {"kernel": (1,), "phase": (), "vector": (0,)}),
    "a prefix": (
        {"kernel": (1, 2), "phase": None, "vector": 0},
        {"kernel": (0,), "phase": (0, 1), "vector": (0,)},
    ),
    "a function": (
        lambda path, leaf: {"kernel": -1, "phase": None, "vector": 0}[path],
        {"kernel": (0, 1), "phase": (0, 1), "vector": ()},
    ),
}


@pytest.mark.parametrize("form", UNIT_AXES)
def test_equals_numpy_under_a_schedule_in_every_form_of_unit_axis(form: str) -> None:
    unit_axis, summed = UNIT_AXES[form]
    method = clipax.clip_by_unit_norm(
        lambda count: jnp.asarray(count, jnp.float32) * 0.125, unit_axis=unit_axis
    )
    bounds = 0.125 * np.arange(sequences.COUNT)
    assert_equals_numpy(method, summed, bounds, 2, SHAPES)


def test_worked_by_hand() -> None:
    clipped, state = clipped_by({"kernel": 1.0, "bias": 5.0}, GRADS)
    expected = {"kernel": np.array([[0.6, 0.5], [0.8, 0.0]]), "bias": np.array([3.0, 4.0])}
    trees.assert_close(clipped, expected, rtol=2e-7)
    trees.assert_bitwise(state.norm, {"kernel": jnp.array([[5.0, 0.5]]), "bias": jnp.array(10.0)})
    by_row, _ = clipped_by(2.0, GRADS, unit_axis=clipax.units.output_first)
    np.testing.assert_allclose(by_row["kernel"][1], [2.0, 0.0], rtol=2e-7)


def test_a_tree_with_one_unit_a_leaf_is_clipped_as_leaves() -> None:
    updates = sequences.at(sequences.spiky(sequences.RANKS), 7)
    as_leaves = clipax.clip_by_leaf_norm(2.0)
    expected, _ = as_leaves.update(updates, as_leaves.init(updates))
    clipped, _ = clipped_by(2.0, updates, unit_axis=clipax.units.whole_leaf)
    trees.assert_bitwise(clipped, expected)


size = st.floats(2.0**-10, 1e4, width=32)
matrices = hnp.arrays(np.float32, (4, 3), elements=size | size.map(lambda x: -x) | st.just(0.0))


@jax.jit
def clip_traced(updates: Any, max_norm: Any) -> Any:
    return clipped_by(max_norm, updates)[0]


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(matrices, st.floats(0.015625, 1e4, width=32), st.permutations(range(3)))
def test_bounds_each_unit_and_no_unit_knows_of_the_others(
    updates: np.ndarray, max_norm: float, order: list[int]
) -> None:
    bound = np.float32(max_norm)
    clipped = np.asarray(clip_traced(updates, bound))
    norms = np.linalg.norm(updates.astype(np.float64), axis=0)
    np.testing.assert_allclose(clipped * norms, updates * np.minimum(norms, bound), rtol=1e-6)
    after = np.linalg.norm(clipped.astype(np.float64), axis=0)
    assert (after <= np.minimum(norms, bound) * (1 + 1e-6)).all()
    np.testing.assert_allclose(clip_traced(clipped, bound), clipped, rtol=5e-7)
    np.testing.assert_allclose(clip_traced(updates[:, order], bound), clipped[:, order], rtol=5e-7)
    trees.assert_bitwise(clip_traced(4 * updates, 4 * bound), 4 * clipped)


# Every row of the table of edge cases.


def test_edge_a_unit_within_the_bound() -> None:
    updates = jnp.array([[3.0, 1e-3, 0.0, -0.0], [4.0, 0.7, 0.0, -0.5]])
    clipped, state = clipped_by(1.0, updates)
    trees.assert_bitwise(clipped[:, 1:], updates[:, 1:])
    assert (clipped[:, 0] < updates[:, 0]).all()
    np.testing.assert_array_equal(state.coefficient[0, 1:], 1.0)


@pytest.mark.parametrize("unit_axis", [None, -1, 0, (0, -1), (0, 1), clipax.units.output_first])
def test_edge_rank_0_and_1_are_one_unit(unit_axis: Any) -> None:
    updates = {"scalar": jnp.array(5.0), "vector": jnp.array([3.0, 4.0]), "n": jnp.ones((2, 2))}
    clipped, state = clipped_by(2.5, updates, unit_axis=unit_axis)
    trees.assert_bitwise(clipped["vector"], updates["vector"] / 2)
    trees.assert_bitwise(clipped["scalar"], updates["scalar"] / 2)
    assert state.norm["scalar"].shape == state.norm["vector"].shape == ()


def test_edge_rank_1_has_units_where_a_function_says_so() -> None:
    clipped, state = clipped_by(3.5, jnp.array([3.0, 4.0]), unit_axis=lambda path, leaf: 0)
    trees.assert_bitwise(clipped, jnp.array([3.0, 3.5]))
    trees.assert_bitwise(state.norm, jnp.array([3.0, 4.0]))


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_a_nan_entry(max_norm: float, ord: float) -> None:
    updates = {**GRADS, "kernel": jnp.array([[np.nan, 0.5], [4.0, 0.0]])}
    clipped, state = clipped_by(max_norm, updates, ord)
    assert np.isnan(clipped["kernel"][:, 0]).all()
    trees.assert_bitwise(clipped["kernel"][:, 1], updates["kernel"][:, 1] * min(max_norm, 1.0))
    np.testing.assert_array_equal(np.isnan(state.norm["kernel"]), [[True, False]])
    assert np.isfinite(clipped["bias"]).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_edge_an_inf_entry(value: float) -> None:
    clipped, _ = clipped_by(1.0, jnp.array([[value, 0.5], [4.0, 0.0]]))
    np.testing.assert_array_equal(clipped, [[np.nan, 0.5], [0.0, 0.0]])


def test_edge_units_of_zero_and_without_entries_under_a_bound_of_zero() -> None:
    updates = [jnp.array([[0.0, 1.0], [0.0, 2.0]]), jnp.zeros((0, 2)), jnp.zeros((2, 0))]
    clipped, state = clipped_by(0.0, updates)
    trees.assert_bitwise(clipped, jax.tree.map(jnp.zeros_like, updates))
    trees.assert_bitwise(state.coefficient["0"], jnp.array([[1.0, 0.0]]))


@pytest.mark.parametrize("max_norm", [0.0, math.inf])
@pytest.mark.parametrize("mask", [lambda path, leaf: path != "out", {"float": True, "out": False}])
def test_edge_leaves_that_are_not_measured(mask: Any, max_norm: float) -> None:
    others = {**sequences.unmeasured(), "out": jnp.array([[np.nan, 1e9]])}
    if isinstance(mask, dict):
        mask = {name: True for name in others if others[name] is not None} | mask
        mask["masked"] = sequences.unmeasured()["masked"]
        mask["none"] = None
    updates = {"float": jnp.array([[3.0, 2.0], [4.0, 0.0]]), **others}
    clipped, state = clipped_by(max_norm, updates, mask=mask)
    (norm,) = jax.tree.leaves(state.norm)
    trees.assert_bitwise(norm, jnp.array([[5.0, 2.0]]))
    trees.assert_bitwise(clipped["float"], updates["float"] * min(max_norm, 1.0))
    sequences.assert_untouched(clipped, others)


@sequences.far_out
def test_squares_out_of_range_are_measured_right(dtype: str, size: float) -> None:
    updates = jnp.stack([jnp.full(4, size, dtype), jnp.ones(4, dtype)], axis=1)
    clipped, state = clipped_by(size, updates)
    np.testing.assert_allclose(state.norm[0], 2 * updates[0].astype("float32"), rtol=1e-6)
    np.testing.assert_allclose(clipped[:, 0].astype("float32"), size / 2, rtol=1e-3)


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_norm must be a number >= 0, got ", bad):
        clipax.clip_by_unit_norm(bad)
    with pytest.raises(ValueError, match=r"^max_norm\['kernel'\] must be a number >= 0, got "):
        clipax.clip_by_unit_norm({"kernel": bad, "bias": 1.0})


@pytest.mark.parametrize("bad", [0, -1, math.nan, True, "2", [2]])
def test_bad_orders_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^ord must be a number > 0, got "):
        clipax.clip_by_unit_norm(1.0, bad)


@pytest.mark.parametrize("name", ["ord", "unit_axis", "mask"])
def test_what_must_be_static_is_refused_if_it_is_traced(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be known while tracing, got "):
        jax.jit(lambda value: clipped_by(1.0, GRADS, **{name: value}))(1)


@pytest.mark.parametrize("name", ["max_norm", "unit_axis", "mask"])
@pytest.mark.parametrize("bad", [{"kernel": 1}, {"kernel": 1, "b": 1}, [1, 1]])
def test_a_prefix_that_does_not_fit_is_refused(name: str, bad: Any) -> None:
    method = clipax.clip_by_unit_norm(**{"max_norm": 1.0, name: bad})
    refusals.assert_prefix_must_fit(name, bad, method, clipax.clip_by_unit_norm(1.0), GRADS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (2, r"shape \(2, 2\) has no axis 2"),
        ((0, -3), "has no axis -3"),
        (lambda path, leaf: 1, r"shape \(2,\) has no axis 1"),
        (True, "must be an integer or a tuple of them, got True"),
        (1.0, "must be an integer or a tuple of them, got 1.0"),
        ("last", "must be an integer or a tuple of them, got 'last'"),
    ],
)
def test_axes_that_a_leaf_lacks_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.clip_by_unit_norm(1.0, unit_axis=bad).init(GRADS)
