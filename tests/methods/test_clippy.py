"""Clippy: changes that are bounded by shares of the parameters, against NumPy and by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refusals
import sequences
import trees

import clipax

PARAMS = {"w": jnp.array([2.0, 4.0]), "b": jnp.array([0.0, 1.0])}
UPDATES = {"w": jnp.array([2.0, 1.0]), "b": jnp.array([0.0, 0.25])}


def clipped_by(updates: Any, params: Any, *numbers: Any) -> tuple[Any, Any]:
    method = clipax.clippy(*numbers)
    return method.update(updates, method.init(params), params)


def in_numpy(update: np.ndarray, param: np.ndarray, ratio: float, eps: float) -> np.ndarray:
    update = update.astype(np.result_type(update.dtype, float))
    bound, moves = ratio * np.abs(param.astype(float)) + eps, update != 0
    return update * min(1, (bound[moves] / np.abs(update[moves])).min(initial=1))


@pytest.mark.parametrize(("ratio", "eps"), [(0.5, 0.01), (0.1, 1e-7), (2.0, 0.0), (0.0, 0.1)])
def test_equals_numpy_over_a_spiky_sequence(ratio: float, eps: float) -> None:
    sequence, rng = sequences.spiky(), np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape[1:]).astype(np.float32), sequence
    )
    clipped, states = sequences.scanned(clipax.clippy(ratio, eps), sequence, params)
    for leaf, param, got in zip(*map(jax.tree.leaves, (sequence, params, clipped)), strict=True):
        expected = [in_numpy(update, param, ratio, eps) for update in leaf]
        np.testing.assert_allclose(got, np.stack(expected), rtol=2e-6, atol=1e-37)
    is_clipped = np.concatenate([each < 1 for each in states.coefficient.values()])
    assert 0.01 < np.mean(is_clipped) <= 1


def test_worked_by_hand() -> None:
    clipped, state = clipped_by(UPDATES, PARAMS, 0.5, 0.0)
    np.testing.assert_array_equal(clipped["w"], [1.0, 0.5])
    trees.assert_bitwise(clipped["b"], UPDATES["b"])
    trees.assert_close(state.norm, {"w": 2.0, "b": 0.5}, rtol=0)
    trees.assert_close(state.max_norm, {"w": 1.0, "b": 1.0}, rtol=0)
    trees.assert_close(state.coefficient, {"w": 0.5, "b": 1.0}, rtol=0)


def test_after_an_optimizer_no_parameter_changes_by_more_than_its_share() -> None:
    optimizer = optax.chain(optax.sgd(1.0), clipax.clippy(0.25, 0.125))
    params = {"w": jnp.array([2.0, -4.0, 0.0])}
    state = optimizer.init(params)
    for size in (1.0, 1e3, 1e-3):
        updates, state = optimizer.update({"w": size * jnp.array([1.0, 2.0, -3.0])}, state, params)
        bound = 0.25 * np.abs(params["w"]) + 0.125
        assert (np.abs(updates["w"]) <= bound * (1 + 1e-6)).all()
        params = optax.apply_updates(params, updates)


def test_the_direction_of_a_leaf_stays() -> None:
    rng = np.random.default_rng(2)
    update, param = (jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for _ in range(2))
    clipped, state = clipped_by(1e3 * update, param)
    np.testing.assert_allclose(clipped / (1e3 * update), float(state.coefficient), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_changes_of_any_size(size: float) -> None:
    update, param = jnp.array([3.0, 4.0]) * size, jnp.array([1.0, 1.0]) * size
    clipped, state = clipped_by(update, param, 0.5, 0.0)
    np.testing.assert_allclose(clipped, np.array([0.375, 0.5]) * np.float32(size), rtol=1e-6)
    np.testing.assert_allclose(state.norm, 8.0, rtol=1e-6)


# Every row of the table of edge cases.


def test_edge_within_the_bound() -> None:
    updates = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.0, -0.5])}
    trees.assert_bitwise(clipped_by(updates, PARAMS, 0.5, 0.0)[0], updates)


def test_edge_zero() -> None:
    zeros = jax.tree.map(jnp.zeros_like, UPDATES)
    for numbers in ((), (0.0, 0.0)):
        trees.assert_bitwise(clipped_by(zeros, PARAMS, *numbers)[0], zeros)


def test_edge_a_parameter_of_zero_and_an_update_for_it() -> None:
    clipped, _ = clipped_by(jnp.array([1.0, 1.0]), jnp.array([0.0, 4.0]), 0.5, 0.0)
    np.testing.assert_array_equal(clipped, [0.0, 0.0])


def test_edge_a_parameter_of_zero_and_an_update_of_zero() -> None:
    clipped, _ = clipped_by(jnp.array([0.0, 4.0]), jnp.array([0.0, 4.0]), 0.5, 0.0)
    np.testing.assert_array_equal(clipped, [0.0, 2.0])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_edge_an_inf_entry(value: float) -> None:
    clipped, _ = clipped_by({**UPDATES, "w": jnp.array([value, 1.0])}, PARAMS)
    np.testing.assert_array_equal(clipped["w"], [np.nan, 0.0])
    trees.assert_bitwise(clipped["b"], UPDATES["b"])


def test_edge_a_nan_entry() -> None:
    clipped, _ = clipped_by({**UPDATES, "w": jnp.array([np.nan, 1.0])}, PARAMS)
    assert np.isnan(clipped["w"]).all()
    trees.assert_bitwise(clipped["b"], UPDATES["b"])


def test_edge_leaves_that_are_not_measured() -> None:
    method, params = clipax.clippy(0.5, 0.0), {"float": jnp.array([2.0, 2.0])}
    clipped, state = sequences.beside_unmeasured(method, jnp.array([2.0, -2.0]), params)
    trees.assert_close(clipped, jnp.array([1.0, -1.0]), rtol=0)
    trees.assert_close(jax.tree.leaves(state.norm), [2.0], rtol=0)


# Every bad argument.


@pytest.mark.parametrize("name", ["ratio", "eps"])
@pytest.mark.parametrize("bad", [-1, -1e-9, math.inf, *refusals.NO_NUMBERS])
def test_bad_numbers_are_refused(name: str, bad: Any) -> None:
    with refusals.refused(f"{name} must be a finite number >= 0, got ", bad):
        clipax.clippy(**{name: bad})


def test_missing_params_are_refused() -> None:
    method = clipax.clippy()
    with pytest.raises(ValueError, match=r"^clippy needs params: call update\(updates, state, p"):
        method.update(UPDATES, method.init(PARAMS))
    with pytest.raises(ValueError, match=r"^params must be .*nothing is said of 'b'"):
        method.update(UPDATES, method.init(PARAMS), {"w": PARAMS["w"]})


@pytest.mark.parametrize("bad", [jnp.ones(()), jnp.ones(3)])
def test_params_of_other_shapes_are_refused(bad: Any) -> None:
    method, updates = clipax.clippy(), {"w": jnp.ones(2)}
    for params in (bad, {"w": bad}):
        with pytest.raises(ValueError, match=r"^params must have the shapes of the updates, got "):
            method.update(updates, method.init(updates), params)
