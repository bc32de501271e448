"""Clipping without an optimizer, and inside back-propagation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax


def test_clip_tree_tells_what_happened() -> None:
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    for run in (clipax.clip_tree, jax.jit(clipax.clip_tree, static_argnums=1)):
        clipped, info = run(updates, clipax.clip_by_global_norm(6.5))
        trees.assert_close(clipped, {"w": np.array([1.5, 2.0]), "b": np.array([6.0])})
        assert float(info["norm"]) == 13
        assert float(info["coefficient"]) == 0.5


def test_clip_tree_passes_params_known_norms_and_paths() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    clipped, _ = clipax.clip_tree(updates, clipax.clip_by_global_norm(1.0), norm=10.0)
    trees.assert_close(clipped, {"w": np.array([0.3, 0.4], np.float32)})
    params = {"w": jnp.array([0.6, 0.8])}
    relative = clipax.adaptive_grad_clip(0.5)
    clipped, info = clipax.clip_tree(updates, relative, params, per_leaf=True)
    trees.assert_close(clipped, {"w": np.array([0.3, 0.4], np.float32)})
    assert float(info["norm/w"]) == 5


def test_clip_tree_takes_any_transformation() -> None:
    clipped, info = clipax.clip_tree(jnp.ones(2), optax.scale(2.0))
    trees.assert_close(clipped, np.full(2, 2.0))
    assert info == {}


def recurrent_loss(weight: Any, method: Any, steps: int = 30) -> Any:
    """h <- h * w, thirty times: the gradient grows as w**30."""

    def step(hidden: Any, _: None) -> Any:
        if method is not None:
            hidden = clipax.clip_cotangent(hidden, method)
        return hidden * weight, None

    hidden, _ = jax.lax.scan(step, jnp.ones(2), None, length=steps)
    return hidden.sum()


def oracle(weight: float, bound: float, steps: int = 30) -> float:
    """The same backward pass by hand, in NumPy."""
    hidden = [np.ones(2)]
    for _ in range(steps):
        hidden.append(hidden[-1] * weight)
    cotangent, gradient = np.ones(2), 0.0
    for step in reversed(range(steps)):
        gradient += (cotangent * hidden[step]).sum()
        cotangent = cotangent * weight
        cotangent *= min(1.0, bound / np.sqrt((cotangent**2).sum()))
    return gradient


@pytest.mark.parametrize("bound", [0.5, 1.0, 1.8, 100.0, np.inf])
def test_the_cotangent_is_clipped_at_every_step_of_a_scan(bound: float) -> None:
    method = clipax.clip_by_global_norm(bound)
    gradient = jax.jit(jax.grad(lambda weight: recurrent_loss(weight, method)))(1.4)
    np.testing.assert_allclose(gradient, oracle(1.4, bound), rtol=1e-5)
    if bound == np.inf:
        plain = jax.grad(lambda weight: recurrent_loss(weight, None))(1.4)
        np.testing.assert_allclose(gradient, plain, rtol=1e-6)


def test_forwards_it_is_the_identity() -> None:
    _, updates = trees.params_and_updates()
    trees.assert_bitwise(clipax.clip_cotangent(updates, clipax.clip(0.1)), updates)


def test_cotangents_within_the_bound_zero_nan_and_inf() -> None:
    def back(cotangent: Any) -> Any:
        _, pull = jax.vjp(
            lambda x: clipax.clip_cotangent(x, clipax.clip_by_global_norm(1.0)), cotangent
        )
        return pull(cotangent)[0]

    small = jnp.array([0.3, 0.4])
    trees.assert_bitwise(back(small), small)
    trees.assert_bitwise(back(jnp.zeros(2)), jnp.zeros(2))
    assert bool(jnp.isnan(back(jnp.array([1.0, jnp.nan]))).all())
    np.testing.assert_array_equal(back(jnp.array([1.0, jnp.inf])), [0.0, np.nan])


def test_integers_pass_and_trees_are_clipped_together() -> None:
    def loss(x: Any) -> Any:
        y = clipax.clip_cotangent({"x": x, "n": jnp.arange(2)}, clipax.clip_by_global_norm(2.5))
        return (y["x"] * jnp.array([3.0, 4.0])).sum() + y["n"].sum().astype(jnp.float32)

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(2)), [1.5, 2.0])


@pytest.mark.parametrize(("mapped", "names"), [({}, None), ({}, ()), ({"axis_name": "batch"}, ())])
def test_vmap_clips_each_sequence_by_itself(mapped: Any, names: Any) -> None:
    clip = clipax.clip_by_global_norm(1.0, axis_name=names)

    def gradient(scale: Any) -> Any:
        return jax.grad(lambda x: (scale * clipax.clip_cotangent(x, clip)).sum())(jnp.ones(2))

    clipped = jax.vmap(gradient, **mapped)(jnp.array([0.1, 10.0]))
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=1), [0.1 * np.sqrt(2), 1.0], rtol=1e-6)


def test_a_traced_bound_anywhere() -> None:
    def gradient(bound: Any) -> Any:
        method = clipax.clip_by_global_norm(bound)
        return jax.grad(lambda x: clipax.clip_cotangent(x, method).sum())(jnp.ones(4))

    np.testing.assert_allclose(jax.jit(gradient)(1.0), np.full(4, 0.5))
    np.testing.assert_allclose(jax.vmap(gradient)(jnp.array([1.0, 0.5])).sum(axis=1), [2, 1])


def test_a_traced_bound_in_scan_remat_and_jit() -> None:
    def in_scan(weight: Any, bound: Any) -> Any:
        return recurrent_loss(weight, clipax.clip_by_global_norm(bound))

    for wrap in (jax.jit, jax.checkpoint):
        gradient = jax.jit(jax.grad(wrap(in_scan)))(1.4, 1.0)
        np.testing.assert_allclose(gradient, oracle(1.4, 1.0), rtol=1e-5)

    def bounds_of_steps(weight: Any, bounds: Any) -> Any:
        def step(hidden: Any, bound: Any) -> Any:
            method = clipax.clip_by_global_norm(bound)
            return clipax.clip_cotangent(hidden, method) * weight, None

        return jax.lax.scan(step, jnp.ones(2), bounds)[0].sum()

    gradient = jax.jit(jax.grad(bounds_of_steps))(1.4, jnp.ones(30))
    np.testing.assert_allclose(gradient, oracle(1.4, 1.0), rtol=1e-5)


def test_the_bound_has_no_gradient() -> None:
    def loss(bound: Any) -> Any:
        return clipax.clip_cotangent(jnp.ones(2), clipax.clip_by_global_norm(bound)).sum()

    assert float(jax.grad(loss)(1.0)) == 0
