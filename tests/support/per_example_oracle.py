"""What clipping of each example gives, from every gradient in NumPy, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import trees

import clipax

BOUND = 0.05


def gradients(loss_fn: Any, *args: Any, argnums: Any = 0, batch_argnums: Any = (1,)) -> Any:
    """The gradient of each example, by `vmap` and `grad`."""
    in_axes = [0 if position in batch_argnums else None for position in range(len(args))]
    each = trees.quick_jit(jax.vmap(jax.grad(loss_fn, argnums), in_axes))(*args)
    return jax.tree.map(zoo.wide, each)


def norms_of_leaves(each: Any) -> Any:
    """One norm an example for each leaf."""
    return jax.tree.map(
        lambda leaf: np.sqrt(np.sum(np.abs(leaf.reshape(len(leaf), -1)) ** 2, 1)), each
    )


def norms(each: Any) -> np.ndarray:
    """One norm an example over all leaves."""
    return np.sqrt(sum(norm**2 for norm in jax.tree.leaves(norms_of_leaves(each))))


def hard(norm: np.ndarray, bound: Any) -> np.ndarray:
    return np.minimum(1, bound / np.maximum(norm, 1e-300))


def weighted_sum(each: Any, weights: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: np.einsum("b,b...->...", weights, leaf), each)


def clipped_leaf_by_leaf(loss_fn: Any, params: Any, batch: Any) -> Any:
    """The norms, and the sums of the clipped gradients, with the same bound for each leaf."""
    each = gradients(loss_fn, params, batch)
    separate = norms_of_leaves(each)
    sums = jax.tree.map(lambda leaf, norm: weighted_sum(leaf, hard(norm, BOUND)), each, separate)
    return separate, sums


def clip_leaf_by_leaf(loss_fn: Any, params: Any, batch: Any) -> Any:
    """The same by clipax."""
    bounds = jax.tree.map(lambda _: BOUND, params)
    grads, info = clipax.clipped_grad(loss_fn, bounds, mean=False)(params, batch)
    return info.norms, grads


def assert_clipped(loss_fn: Any, params: Any, batch: Any, tolerance: float = 2e-5) -> None:
    """Compares clipax with the plain way, leaf by leaf."""
    found = trees.quick_jit(functools.partial(clip_leaf_by_leaf, loss_fn))(params, batch)
    zoo.assert_near(found, clipped_leaf_by_leaf(loss_fn, params, batch), tolerance)


def assert_the_same(loss_fn: Any, w: jax.Array, batch: jax.Array, **options: Any) -> None:
    """Compares clipax with the plain way in double precision, for one parameter."""

    def run(w: jax.Array, batch: jax.Array) -> Any:
        each = jax.vmap(jax.grad(loss_fn), (None, 0))(w, batch)
        bound = jnp.median(jax.vmap(jnp.linalg.norm)(each.reshape(len(each), -1)))
        clip = clipax.clipped_grad(loss_fn, 1.0, mean=False, **options)
        grads, info = clip(w, batch, max_norm=0.9 * bound)
        return each, grads, info.norms, 0.9 * bound

    each, grads, found, bound = trees.quick_jit(run)(w, batch)
    each = zoo.wide(each)
    wanted = norms(each)
    zoo.assert_near(found, wanted, 1e-6)
    zoo.assert_near(grads, weighted_sum(each, hard(wanted, float(bound))), 1e-6)


def assert_leaves_the_same(loss_fn: Any, params: Any, batch: Any, **options: Any) -> None:
    """The same for several parameters, and the norms leaf by leaf."""

    def run(params: Any, batch: Any) -> Any:
        each = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        clip = clipax.clipped_grad(loss_fn, BOUND, mean=False, **options)
        by_leaf = clipax.per_example_norms(loss_fn, per_leaf=True, **options)
        return each, by_leaf(params, batch), clip(params, batch)[0]

    each, found, grads = trees.quick_jit(run)(params, batch)
    each = jax.tree.map(np.asarray, each)
    zoo.assert_near(found, norms_of_leaves(each), 1e-6)
    zoo.assert_near(grads, weighted_sum(each, hard(norms(each), BOUND)), 1e-6)
