"""Clipping each leaf by its own norm, against NumPy and worked cases."""

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

GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0, 0.0]])}


def clipped_by(max_norm: Any, updates: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    method = clipax.clip_by_leaf_norm(max_norm, *args, **kwargs)
    return method.update(updates, method.init(updates))


def ramp(count: Any) -> Any:
    return jnp.asarray(count, jnp.float32) * 0.25


def assert_equals_numpy(
    method: Any, sequence: Any, bound: Any, ord: float = 2, axes: Any = lambda path: None
) -> None:
    norms = sequences.by_leaf(lambda path, x: sequences.p_norm(x, ord, axes(path)), sequence)
    bounds = sequences.by_leaf(lambda path, n: sequences.over_steps(bound(path), n), norms)
    sequences.assert_clips(method, sequence, norms, bounds)


@pytest.mark.parametrize(
    ("ord", "bound"), [(1, 20.0), (2, 4.0), (3, 3.0), (0.5, 200.0), (math.inf, 2.0)]
)
def test_equals_numpy_over_a_spiky_sequence(ord: float, bound: float) -> None:
    method = clipax.clip_by_leaf_norm(bound, ord)
    assert_equals_numpy(method, sequences.spiky(), lambda path: bound, ord)


def test_equals_numpy_under_a_prefix_of_numbers_arrays_and_schedules() -> None:
    max_norm = {"conv": jnp.array(3.0), "dense": ramp, "phase": math.inf, "scale": 0}
    bounds = {**max_norm, "conv": 3.0, "dense": 0.25 * np.arange(sequences.COUNT)}
    method = clipax.clip_by_leaf_norm(max_norm)
    assert_equals_numpy(method, sequences.spiky(), lambda path: bounds[path.split("/")[0]])


AXES = {"conv": (0, 1, 2), "dense": {"bias": None, "kernel": 0}, "phase": (-1,), "scale": None}
SUMMED = {"conv": (0, 1, 2), "dense/kernel": (0,), "phase": (1,)}


@pytest.mark.parametrize(
    ("axes", "ord"), [(AXES, 1), (AXES, 3), (lambda path, leaf: SUMMED.get(path), 2)]
)
def test_equals_numpy_over_chosen_axes(axes: Any, ord: float) -> None:
    method = clipax.clip_by_leaf_norm(2.0, ord, axes=axes)
    assert_equals_numpy(method, sequences.spiky(), lambda path: 2.0, ord, SUMMED.get)


def test_equals_numpy_for_stacked_layers() -> None:
    def stack_axis(path: str, leaf: Any) -> Any:
        return {"conv": (0, -1), "dense/kernel": 0}.get(path)

    summed = {"conv": (1, 2), "dense/kernel": (1,)}
    method = clipax.clip_by_leaf_norm(2.0, stack_axis=stack_axis)
    assert_equals_numpy(method, sequences.spiky(), lambda path: 2.0, 2, summed.get)


MASK = {"conv": False, "dense": {"bias": False, "kernel": True}, "phase": True, "scale": False}


@pytest.mark.parametrize("mask", [MASK, lambda path, leaf: path in ("dense/kernel", "phase")])
def test_equals_numpy_under_a_mask(mask: Any) -> None:
    sequence = sequences.spiky()

    def norm(path: str, leaf: np.ndarray) -> Any:
        return None if path in ("conv", "dense/bias", "scale") else sequences.p_norm(leaf)

    norms = sequences.by_leaf(norm, sequence)
    bounds = jax.tree.map(lambda leaf: np.full_like(leaf, 4.0), norms)
    sequences.assert_clips(clipax.clip_by_leaf_norm(4.0, mask=mask), sequence, norms, bounds)


def test_layers_stacked_by_scan_are_clipped_as_if_they_were_apart() -> None:
    layers = [jnp.asarray(leaf) for leaf in sequences.spiky()["conv"][5:9]]
    stacked, _ = clipped_by(2.0, jnp.stack(layers), stack_axis=0)
    apart, _ = clipped_by(2.0, layers)
    trees.assert_close(stacked, jnp.stack(apart), rtol=5e-7)


@pytest.mark.parametrize(("max_norm", "b"), [(6.0, 6.0), ({"w": 1.0e9, "b": 3.0}, 3.0)])
def test_worked_by_hand(max_norm: Any, b: float) -> None:
    clipped, state = clipped_by(max_norm, GRADS)
    trees.assert_bitwise(clipped, {"w": GRADS["w"], "b": jnp.array([[b, 0.0]])})
    trees.assert_close(state.norm, {"w": 5.0, "b": 12.0}, rtol=0)
    trees.assert_close(state.coefficient, {"w": 1.0, "b": b / 12}, rtol=1e-7)


def test_axes_worked_by_hand_as_in_tensorflow() -> None:
    updates = jnp.array([[3.0, 4.0], [0.0, 2.0]])
    clipped, state = clipped_by(2.5, updates, axes=1)
    trees.assert_bitwise(clipped, jnp.array([[1.5, 2.0], [0.0, 2.0]]))
    trees.assert_bitwise(state.norm, jnp.array([[5.0], [2.0]]))
    nothing_summed, _ = clipped_by(2.5, updates, axes=())
    trees.assert_close(nothing_summed, jnp.array([[2.5, 2.5], [0.0, 2.0]]), rtol=2e-7)


@jax.jit
def clip_traced(updates: Any, max_norm: Any) -> Any:
    return clipped_by(max_norm, updates)[0]


size = st.floats(2.0**-10, 1e4, width=32)
leaf = hnp.arrays(np.float32, (4,), elements=size | size.map(lambda x: -x) | st.just(0.0))


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(leaf, leaf, st.floats(0.015625, 1e4, width=32))
def test_bounds_each_leaf_by_itself_and_keeps_its_direction(
    one: np.ndarray, other: np.ndarray, max_norm: float
) -> None:
    bound = np.float32(max_norm)
    clipped = clip_traced([one, other], bound)
    for got, given in zip(clipped, (one, other), strict=True):
        norm = np.linalg.norm(given.astype(np.float64))
        np.testing.assert_allclose(got * norm, given * min(norm, bound), rtol=1e-6)
        assert np.linalg.norm(np.asarray(got, np.float64)) <= bound * (1 + 1e-6)
    trees.assert_close(clip_traced(clipped, bound), clipped, rtol=5e-7)
    trees.assert_bitwise(clip_traced([8 * one, other], bound)[1], clipped[1])
    trees.assert_bitwise(clip_traced([4 * one, 4 * other], 4 * bound)[0], 4 * clipped[0])


# Every row of the table of edge cases.


@pytest.mark.parametrize("max_norm", [12.0, 12.5, math.inf])
def test_edge_norm_within_the_bound(max_norm: float) -> None:
    trees.assert_bitwise(clipped_by(max_norm, GRADS)[0], GRADS)


def test_edge_zero_and_a_bound_of_zero() -> None:
    updates = {**GRADS, "w": jnp.zeros(2), "empty": jnp.zeros((0, 3))}
    clipped, state = clipped_by(0.0, updates)
    trees.assert_bitwise(clipped, jax.tree.map(jnp.zeros_like, updates))
    trees.assert_close(state.coefficient, {"w": 1.0, "b": 0.0, "empty": 1.0}, rtol=0)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 5.0])
def test_edge_an_inf_entry(max_norm: float, value: float) -> None:
    clipped, _ = clipped_by(max_norm, {**GRADS, "b": jnp.array([[12.0, value]])})
    trees.assert_bitwise(clipped["w"], GRADS["w"] * min(max_norm, 1.0))
    np.testing.assert_array_equal(clipped["b"], [[0.0, np.nan]])


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 5.0, math.inf])
def test_edge_a_nan_entry(max_norm: float, ord: float) -> None:
    updates = {"w": jnp.array([1.0, 1.0]), "b": jnp.array([[12.0, np.nan]])}
    clipped, state = clipped_by(max_norm, updates, ord)
    trees.assert_bitwise(clipped["w"], updates["w"] * min(max_norm, 1.0))
    assert np.isnan(clipped["b"]).all()
    assert np.isnan(state.norm["b"])
    assert np.isfinite(state.norm["w"])


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_edge_leaves_that_are_not_measured(max_norm: float) -> None:
    method = clipax.clip_by_leaf_norm(max_norm, mask=lambda path, leaf: path != "out")
    updates, out = jnp.array([3.0, 4.0]), jnp.array([np.nan, 1e9])
    clipped, state = sequences.beside_unmeasured(method, updates, out=out)
    assert list(jax.tree.leaves(state.norm)) == [5]
    trees.assert_close(clipped, updates * min(max_norm / 5, 1), rtol=2e-7)


@sequences.far_out
@pytest.mark.parametrize("axes", [None, 0])
def test_squares_out_of_range_are_measured_right(dtype: str, size: float, axes: Any) -> None:
    updates = [jnp.full(4, size, dtype), jnp.ones(4, dtype)]
    (clipped, _), state = clipped_by([size, 2.0], updates, axes=axes)
    np.testing.assert_allclose(state.norm["0"], 2 * updates[0].astype("float32")[0], rtol=1e-6)
    np.testing.assert_allclose(clipped.astype("float32"), size / 2, rtol=1e-3)


# Every bad argument.


@pytest.mark.parametrize("bad", refusals.BELOW_ZERO)
def test_bad_bounds_are_refused(bad: Any) -> None:
    with refusals.refused("max_norm must be a number >= 0, got ", bad):
        clipax.clip_by_leaf_norm(bad)
    with pytest.raises(ValueError, match=r"^max_norm\['w'\]\[1\] must be a number >= 0, got "):
        clipax.clip_by_leaf_norm({"w": [1.0, bad], "b": 1.0})


@pytest.mark.parametrize("bad", [0, -1, math.nan, True, "2", [2]])
def test_bad_orders_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^ord must be a number > 0, got "):
        clipax.clip_by_leaf_norm(1.0, bad)


@pytest.mark.parametrize("name", ["ord", "axes", "stack_axis", "mask"])
def test_what_must_be_static_is_refused_if_it_is_traced(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be known while tracing, got "):
        jax.jit(lambda value: clipped_by(1.0, GRADS, **{name: value}))(1)


@pytest.mark.parametrize("name", ["max_norm", "axes", "stack_axis", "mask"])
@pytest.mark.parametrize("bad", [{"w": 1}, {"w": 1, "c": 1}, [1, 1], {"w": [1, 1], "b": 1}])
def test_a_prefix_that_does_not_fit_is_refused(name: str, bad: Any) -> None:
    method = clipax.clip_by_leaf_norm(**{"max_norm": 1.0, name: bad})
    refusals.assert_prefix_must_fit(name, bad, method, clipax.clip_by_leaf_norm(1.0), GRADS)


@pytest.mark.parametrize("name", ["axes", "stack_axis"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (1, r"shape \(2,\) has no axis 1"),
        (-2, "has no axis -2"),
        ((0, 2), "has no axis 2"),
        (True, "must be an integer or a tuple of them, got True"),
        (0.0, "must be an integer or a tuple of them, got 0.0"),
        ("0", "must be an integer or a tuple of them, got '0'"),
    ],
)
def test_axes_that_a_leaf_lacks_are_refused(name: str, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.clip_by_leaf_norm(1.0, **{name: bad}).init(GRADS)


def test_axes_and_stack_axis_for_one_leaf_are_refused() -> None:
    with pytest.raises(ValueError, match="either axes or stack_axis, got axes=1 and stack_axis=0"):
        clipax.clip_by_leaf_norm(1.0, axes={"w": None, "b": 1}, stack_axis=0).init(GRADS)
    clipax.clip_by_leaf_norm(1.0, axes={"w": 0, "b": None}, stack_axis={"w": None, "b": 0}).init(
        GRADS
    )
