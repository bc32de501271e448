"""The largest and the smallest floats: measured right, and clipped in their own direction."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

import clipax

MAX = float(np.finfo(np.float32).max)
HUGE = [1e36, 1e37, 1e38, 3e38, MAX]
BOUNDS = [1.0, 1e-3, 1e-8, 1e-30, 10.0]
# With what bounds each by a norm of the whole leaf, which then is the bound.
WHOLE = {
    "clip_by_global_norm": clipax.clip_by_global_norm,
    "clip_by_global_norm, 3": lambda bound: clipax.clip_by_global_norm(bound, 3),
    "clip_by_global_norm, inf": lambda bound: clipax.clip_by_global_norm(bound, math.inf),
    "clip_by_global_norm, 0.5": lambda bound: clipax.clip_by_global_norm(bound, 0.5),
    "clip_by_leaf_norm": clipax.clip_by_leaf_norm,
    "clip_by_leaf_norm, 1": lambda bound: clipax.clip_by_leaf_norm(bound, 1),
    "clip_by_unit_norm": clipax.clip_by_unit_norm,
    "clip_by_block_rms": clipax.clip_by_block_rms,
    "clip_by_average_norm": clipax.clip_by_average_norm,
    "clip_by_value": clipax.clip_by_value,
    "clip_by_spectral_norm": clipax.clip_by_spectral_norm,
    "smooth_clip_by_global_norm": clipax.smooth_clip_by_global_norm,
    "smooth, rational": lambda bound: clipax.smooth_clip_by_global_norm(
        bound, clipax.coefficients.rational
    ),
    "smooth, tanh": lambda bound: clipax.smooth_clip_by_global_norm(
        bound, clipax.coefficients.tanh
    ),
    "smooth_clip_by_value": clipax.smooth_clip_by_value,
    "normalized": lambda bound: clipax.clip_by(
        clipax.global_norm, bound, clipax.coefficients.normalized
    ),
    "clip_by, unit": lambda bound: clipax.clip_by(clipax.unit_norm, bound),
    "torch's eps": lambda bound: clipax.clip_by(
        clipax.global_norm, bound, functools.partial(clipax.coefficients.hard, eps=1e-37)
    ),
}


def clipped_by(method: Any, updates: Any, params: Any = None) -> Any:
    state = method.init(updates if params is None else params)
    return jax.jit(method.update)(updates, state, params)


@pytest.mark.parametrize("name", trees.mostly_slow(WHOLE))
def test_the_largest_floats_come_out_as_long_as_the_bound(name: str) -> None:
    @jax.jit
    def clip(updates: Any, bound: Any) -> Any:
        method = WHOLE[name](bound)
        clipped, state = method.update(updates, method.init(updates))
        return clipped, clipax.metrics(state)

    for bound in BOUNDS:
        for entry in HUGE:
            for updates in (jnp.array([entry]), jnp.array([[-entry]])):
                clipped, values = clip(updates, bound)
                np.testing.assert_allclose(clipped, jnp.sign(updates) * bound, rtol=2e-6)
                np.testing.assert_allclose(values["norm"], entry, rtol=2e-6)
                np.testing.assert_allclose(values["clipped_norm"], bound, rtol=2e-6)
                assert values["clip_fraction"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "float64"])
def test_the_direction_of_the_largest_floats_is_kept(dtype: str) -> None:
    with trees.double_precision(dtype == "float64"):
        largest = float(jnp.finfo(dtype).max) / 8
        direction = np.array([1.0, -0.5, 0.25, 3e-6])
        if dtype == "complex64":
            direction = direction * np.array([1, 1j, 0.6 + 0.8j, 1])
        updates = jnp.asarray(direction * largest).astype(dtype)
        clipped, _ = clipped_by(clipax.clip_by_global_norm(1.0), updates)
        wide = np.asarray(updates).astype(np.complex128 if dtype == "complex64" else np.float64)
        expected = wide / largest / np.linalg.norm(wide / largest)
        rtol = 1e-2 if dtype == "bfloat16" else 2e-6
        np.testing.assert_allclose(np.asarray(clipped).astype(wide.dtype), expected, rtol=rtol)


@pytest.mark.parametrize("ord", [0.5, 1, 1.5, 2, 3, 7, math.inf])
def test_a_norm_that_is_a_float_is_found_at_the_end_of_the_range(ord: float) -> None:
    norm = jax.jit(functools.partial(clipax.global_norm, ord=ord))
    for entry in HUGE:
        for updates in (jnp.array([entry]), jnp.array([0.0, entry, 1e-30]), [jnp.array(-entry)]):
            np.testing.assert_allclose(float(norm(updates)), entry, rtol=2e-6)


@pytest.mark.parametrize("max_norm", [1e-38, 1e-30, 1.0, 1e30, MAX, math.inf])
def test_at_or_under_the_bound_updates_of_any_size_come_back_bit_for_bit(max_norm: float) -> None:
    for entry in (0.0, 1.2e-38, 1e-30, 1.0, 1e20, MAX):
        updates = jnp.array([entry, -0.0, -entry])
        if float(clipax.global_norm(updates)) <= max_norm:
            clipped, _ = clipped_by(clipax.clip_by_global_norm(max_norm), updates)
            trees.assert_bitwise(clipped, updates)


def test_a_coefficient_with_a_floor_is_taken_at_its_word() -> None:
    clipped, _ = clipped_by(clipax.delta_gclip(1.0, 1e-3), jnp.array([1e38]))
    np.testing.assert_allclose(clipped, [1e35], rtol=1e-6)

    def dropped(norm: Any, max_norm: Any) -> Any:
        return jnp.where(norm <= max_norm, 1.0, 0.0)

    for entry in (2.0, 1e20, 1e38):
        clip = clipax.clip_by(clipax.global_norm, 1.0, dropped)
        np.testing.assert_array_equal(clipped_by(clip, jnp.array([entry]))[0], [0.0])


def test_one_huge_unit_leaves_the_others_alone() -> None:
    updates = jnp.array([[1e38, 0.5], [0.0, 0.0]])
    clipped, _ = clipped_by(clipax.clip_by_unit_norm(1.0), updates)
    np.testing.assert_allclose(clipped, [[1.0, 0.5], [0.0, 0.0]], rtol=2e-6)


def test_agc_clips_the_largest_floats_to_their_share_of_the_parameters() -> None:
    params = jnp.full((2, 2), 0.5)
    updates = jnp.array([[1e38, 0.0], [0.0, 1e-4]])
    clipped, _ = clipped_by(clipax.adaptive_grad_clip(0.01), updates, params)
    np.testing.assert_allclose(clipped[0, 0], 0.01 * math.sqrt(0.5), rtol=2e-6)
    assert float(clipped[1, 1]) == float(updates[1, 1])


def test_adagc_starts_from_the_largest_floats() -> None:
    clip = clipax.adagc(warmup_max_norm=1.0)
    updates = {"w": jnp.array([1e38]), "b": jnp.array([1e38])}
    clipped, state = clipped_by(clip, updates)
    np.testing.assert_allclose(clipped["w"], [math.sqrt(0.5)], rtol=2e-6)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.threshold))


@pytest.mark.parametrize("entry", HUGE)
def test_a_clipped_carry_of_the_largest_floats_has_its_bound(entry: float) -> None:
    clip = clipax.u_clip(clipax.clip_by_global_norm(1.0), max_carry=2.0)
    clipped, state = clipped_by(clip, jnp.array([entry]))
    np.testing.assert_allclose(clipped, [1.0], rtol=2e-6)
    np.testing.assert_allclose(state.carry, [2.0], rtol=2e-6)


def test_derivatives_at_the_largest_floats_are_finite() -> None:
    for build in (clipax.clip_by_global_norm, clipax.clip_by_leaf_norm, clipax.clip_by_value):
        clip = build(1.0)

        def total(updates: Any, clip: Any = clip) -> Any:
            return jnp.sum(clip.update(updates, clip.init(updates))[0])

        for entry in (1e36, 1e38):
            assert bool(jnp.isfinite(jax.grad(total)(jnp.array([entry, 1.0]))).all())


@pytest.mark.parametrize("entry", HUGE)
@pytest.mark.parametrize("product", [lambda w, x: jnp.sum(w * x), lambda w, x: jnp.dot(x, w)])
def test_the_largest_gradients_of_examples_are_clipped(product: Any, entry: float) -> None:
    def loss_fn(params: Any, example: Any) -> Any:
        return product(params["w"], example) + 0.25 * params["b"]

    params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    batch = jnp.array([[entry, 0.0], [0.0, 0.25]])
    grads, info = jax.jit(clipax.clipped_grad(loss_fn, 1.0, mean=False))(params, batch)
    np.testing.assert_allclose(info.norms, [entry, np.hypot(0.25, 0.25)], rtol=2e-6)
    np.testing.assert_allclose(grads["w"], [1.0, 0.25], rtol=2e-6)
    np.testing.assert_allclose(grads["b"], 0.25, rtol=2e-6)
