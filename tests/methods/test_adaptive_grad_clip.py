"""Adaptive gradient clipping, against NumPy and worked cases."""

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

PARAMS = jnp.array([[0.6, 0.0], [0.8, 0.0]])
GRADS = jnp.array([[3.0, 0.0], [4.0, 1.0]])


def clipped_by(ratio: Any, updates: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    method = clipax.adaptive_grad_clip(ratio, *args, **kwargs)
    return method.update(updates, method.init(params), params)


def assert_equals_numpy(
    method: Any, summed: Any, ratio: Any, eps: float = 1e-3, shapes: Any = sequences.RANKS
) -> None:
    """`max_norm = ratio * max(|p|, eps)`, unit by unit; one leaf's parameters are zero."""
    sequence = sequences.spiky(shapes)
    params = sequences.at(sequences.spiky(shapes, seed=1), 0)
    params["vector"] = 0 * params["vector"]

    def norm(path: str, leaf: Any) -> Any:
        return None if summed[path] is None else sequences.p_norm(leaf, 2, summed[path])

    def bound(path: str, leaf: Any) -> Any:
        norms = norm(path, np.asarray(leaf)[None])
        if norms is None:
            return None
        ratios = np.reshape(ratio(path), (-1,) + (1,) * leaf.ndim)
        floored = np.broadcast_to(np.maximum(norms, eps), (sequences.COUNT, *norms.shape[1:]))
        return ratios * floored

    norms, bounds = (sequences.by_leaf(f, x) for f, x in ((norm, sequence), (bound, params)))
    sequences.assert_clips(method, sequence, norms, bounds, params)


# The norms of the other conventions are those of `clip_by_unit_norm`, and tested there.
@pytest.mark.slow_but(1)
@pytest.mark.parametrize("convention", [None, "output_first"])
def test_equals_numpy_over_ranks_0_to_6(convention: str | None) -> None:
    unit_axis = None if convention is None else getattr(clipax.units, convention)
    summed = sequences.SUMMED["nfnets" if convention is None else convention]
    method = clipax.adaptive_grad_clip(1.5, unit_axis=unit_axis)
    assert_equals_numpy(method, summed, lambda path: 1.5)


SHAPES = {"kernel": (3, 2, 4), "phase": (3, 4), "vector": (5,)}


def test_equals_numpy_under_a_prefix_of_ratios_with_a_schedule_and_another_eps() -> None:
    def ramp(count: Any) -> Any:
        return 0.125 * (jnp.asarray(count, jnp.float32) + 1)

    ratios = {"kernel": ramp, "phase": jnp.array(2.0), "vector": 1}
    method = clipax.adaptive_grad_clip(ratios, 0.5, unit_axis=(0, -1))
    expected = {**ratios, "kernel": 0.125 * np.arange(1, 61), "phase": 2.0}
    summed = {"kernel": (1,), "phase": (), "vector": (0,)}
    assert_equals_numpy(method, summed, expected.get, 0.5, SHAPES)


@pytest.mark.parametrize(
    "mask",
    [{"kernel": True, "phase": False, "vector": True}, lambda path, leaf: path != "phase"],
)
def test_equals_numpy_under_a_mask(mask: Any) -> None:
    summed = {"kernel": (0,), "phase": None, "vector": (0,)}
    method = clipax.adaptive_grad_clip(0.5, 0.0625, mask=mask)
    assert_equals_numpy(method, summed, lambda path: 0.5, 0.0625, SHAPES)


def test_worked_by_hand() -> None:
    clipped, state = clipped_by(0.5, GRADS, PARAMS)
    np.testing.assert_allclose(clipped, [[0.3, 0.0], [0.4, 0.0005]], rtol=3e-7)
    np.testing.assert_allclose(state.max_norm, [[0.5, 0.0005]], rtol=3e-7)


def test_dreamers_convention_worked_by_hand() -> None:
    updates, params = jnp.array([3.0, 4.0]), jnp.array([0.6, 0.8])
    clipped, _ = clipped_by(0.3, updates, params, unit_axis=clipax.units.whole_leaf)
    np.testing.assert_allclose(clipped, [0.18, 0.24], rtol=3e-7)


def test_the_norm_of_the_update_has_no_floor() -> None:
    clipped, _ = clipped_by(1e-3, jnp.array([3e-9, 4e-9]), jnp.zeros(2), 1e-6)
    np.testing.assert_allclose(clipped, [6e-10, 8e-10], rtol=1e-6)


size = st.floats(2.0**-10, 1e4, width=32)
matrices = hnp.arrays(np.float32, (4, 3), elements=size | size.map(lambda x: -x) | st.just(0.0))


@jax.jit
def clip_traced(updates: Any, params: Any, ratio: Any) -> Any:
    return clipped_by(ratio, updates, params)[0]


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None, database=None)
@hypothesis.given(matrices, matrices, st.floats(2.0**-10, 4.0, width=32))
def test_the_ratio_is_bounded_in_every_unit(
    updates: np.ndarray, params: np.ndarray, ratio: float
) -> None:
    bound = np.float32(ratio)
    clipped = np.asarray(clip_traced(updates, params, bound))
    norms, param_norms, after = (
        np.linalg.norm(x.astype(np.float64), axis=0) for x in (updates, params, clipped)
    )
    max_norms = bound * np.maximum(param_norms, 1e-3)
    assert (after <= max_norms * (1 + 1e-6)).all()
    np.testing.assert_allclose(clipped * norms, updates * np.minimum(norms, max_norms), rtol=1e-6)
    np.testing.assert_allclose(clip_traced(clipped, params, bound), clipped, rtol=1e-6)
    # Layers whose parameters and gradients both grow are clipped alike, if none is at the floor.
    if (param_norms > 1e-3).all():
        trees.assert_bitwise(clip_traced(4 * updates, 4 * params, bound), 4 * clipped)


def test_descent_moves_no_unit_by_more_than_its_share() -> None:
    """The paper's claim: the step stays small against the weights, at any learning rate."""
    params = jnp.asarray(sequences.spiky({"kernel": (6, 5)}, seed=2)["kernel"][0])
    method = clipax.adaptive_grad_clip(0.01)

    def loss(params: Any) -> Any:
        return jnp.sum(jnp.exp(3 * params @ jnp.ones((5,))))

    def step(params: Any, _: Any) -> Any:
        grads = jax.grad(loss)(params)
        clipped, _ = method.update(grads, method.init(params), params)
        return params - 2.0 * clipped, (params, clipped)

    _, (visited, steps) = jax.lax.scan(step, params, length=50)
    shares = np.linalg.norm(steps, axis=1) / np.linalg.norm(visited, axis=1)
    assert (shares <= 0.01 * (1 + 1e-5)).all()
    assert shares.max() > 0.0099
    assert loss(visited[-1]) < loss(params) / 2


# Every row of the table of edge cases.


@pytest.mark.parametrize("ratio", [2.0, 3.0, math.inf])
def test_edge_a_unit_within_its_bound(ratio: float) -> None:
    params = jnp.array([[3.0, 3.0], [4.0, 4.0]])
    updates = jnp.array([[6.0, -0.0], [8.0, 9.9]])
    clipped, state = clipped_by(ratio, updates, params)
    trees.assert_bitwise(clipped, updates)
    trees.assert_bitwise(state.coefficient, jnp.ones((1, 2)))


@pytest.mark.parametrize(("eps", "bound"), [(1e-3, 5e-4), (2.0, 1.0), (0.0, 0.0)])
def test_edge_parameters_of_a_unit_all_zero(eps: float, bound: float) -> None:
    clipped, state = clipped_by(0.5, GRADS, jnp.zeros_like(GRADS), eps)
    np.testing.assert_allclose(state.max_norm, [[bound, bound]], rtol=2e-7)
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=0), [bound, bound], rtol=3e-7)


@pytest.mark.parametrize("param", [PARAMS, jnp.arange(3), jnp.full(2, np.nan)])
def test_edge_none_is_frozen_whatever_its_parameter(param: Any) -> None:
    params = {"frozen": param, "live": PARAMS}
    clipped, state = clipped_by(0.5, {"frozen": None, "live": GRADS}, params)
    assert clipped["frozen"] is None
    trees.assert_bitwise(clipped["live"], clipped_by(0.5, GRADS, PARAMS)[0])
    trees.assert_same_type(state, clipax.adaptive_grad_clip(0.5).init(params))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_edge_an_inf_entry(value: float) -> None:
    params = {"a": jnp.ones((2, 2)), "b": PARAMS}
    updates = {"a": jnp.array([[value, 0.25], [4.0, 0.5]]), "b": GRADS}
    clipped, _ = clipped_by(0.5, updates, params)
    np.testing.assert_array_equal(clipped["a"], [[np.nan, 0.25], [0.0, 0.5]])
    trees.assert_bitwise(clipped["b"], clipped_by(0.5, GRADS, PARAMS)[0])


@pytest.mark.parametrize("ratio", [0.5, math.inf])
def test_edge_a_nan_entry(ratio: float) -> None:
    params = {"a": jnp.ones((2, 2)), "b": PARAMS}
    updates = {"a": jnp.array([[np.nan, 0.25], [4.0, 0.5]]), "b": GRADS}
    clipped, _ = clipped_by(ratio, updates, params)
    np.testing.assert_array_equal(clipped["a"], [[np.nan, 0.25], [np.nan, 0.5]])
    trees.assert_bitwise(clipped["b"], clipped_by(ratio, GRADS, PARAMS)[0])


def test_edge_leaves_that_are_not_measured() -> None:
    method = clipax.adaptive_grad_clip(0.5, mask=lambda path, leaf: path != "out")
    params = {"float": PARAMS, "out": jnp.ones((1, 2)), "float0": jnp.arange(2)}
    out = jnp.array([[np.nan, 1e9]])
    clipped, state = sequences.beside_unmeasured(method, GRADS, params, out=out)
    trees.assert_bitwise(clipped, clipped_by(0.5, GRADS, PARAMS)[0])
    assert len(jax.tree.leaves(state.norm)) == 1


@sequences.far_out
def test_squares_out_of_range_are_measured_right(dtype: str, size: float) -> None:
    tree = {"kernel": jnp.full((4, 2), size, dtype)}
    clipped, state = clipped_by(0.25, tree, tree, 0.0)
    trees.assert_bitwise(clipped["kernel"], tree["kernel"] / 4)
    np.testing.assert_array_equal(state.max_norm["kernel"], state.norm["kernel"] / 4)


# Every bad argument.


@pytest.mark.parametrize("bad", [0, -1, -math.inf, *refusals.NO_NUMBERS])
def test_bad_ratios_are_refused(bad: Any) -> None:
    with refusals.refused("ratio must be a number > 0, got ", bad):
        clipax.adaptive_grad_clip(bad)
    with pytest.raises(ValueError, match=r"^ratio\['w'\] must be a number > 0, got "):
        clipax.adaptive_grad_clip({"w": bad})


@pytest.mark.slow_but(6)
@pytest.mark.parametrize("bad", [-1e-9, -math.inf, *refusals.NO_NUMBERS])
def test_a_bad_eps_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^eps must be a number >= 0, got "):
        clipax.adaptive_grad_clip(0.1, bad)


@pytest.mark.parametrize("params", [None, {"other": PARAMS}, [PARAMS, PARAMS]])
def test_update_needs_params_with_the_structure_of_the_updates(params: Any) -> None:
    method = clipax.adaptive_grad_clip(0.1)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        method.update({"w": GRADS}, method.init({"w": PARAMS}), params)


@pytest.mark.parametrize("name", ["ratio", "unit_axis", "mask"])
@pytest.mark.parametrize("bad", [{"v": 1}, [1, 1], {"w": {"x": 1}}])
def test_a_prefix_that_does_not_fit_is_refused(name: str, bad: Any) -> None:
    method = clipax.adaptive_grad_clip(**{"ratio": 0.1, name: bad})
    good = clipax.adaptive_grad_clip(0.1)
    refusals.assert_prefix_must_fit(name, bad, method, good, {"w": PARAMS})


@pytest.mark.parametrize("name", ["unit_axis", "mask"])
def test_what_must_be_static_is_refused_if_it_is_traced(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be known while tracing, got "):
        jax.jit(lambda value: clipped_by(0.1, GRADS, PARAMS, **{name: value}))(1)


@pytest.mark.parametrize(("bad", "message"), [(2, "no axis 2"), (0.0, "got 0.0")])
def test_axes_that_a_leaf_lacks_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.adaptive_grad_clip(0.1, unit_axis=bad).init(PARAMS)
