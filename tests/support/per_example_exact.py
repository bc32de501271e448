"""What clipax makes of a loss in double precision, compared with the gradient of each example."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo

import clipax

BOTH = ("kept", "twice")


class Found(NamedTuple):
    """A tree of arrays."""

    each: Any
    """The gradient of each example, by `vmap` and `grad`."""
    bounds: Any
    """One bound, or one for each leaf. Some examples are over it."""
    clipped: dict[str, tuple[Any, Any]]
    """The sums and the norms, for each kind of memory."""


def clip(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *,
    is_tree: bool = False,
    memories: Sequence[Any] = BOTH,
) -> Found:
    """Clips each example, or each leaf of it."""
    each = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
    squares = jax.tree.map(lambda leaf: jnp.sum(jnp.abs(leaf) ** 2, range(1, leaf.ndim)), each)
    if not is_tree:
        squares = sum(jax.tree.leaves(squares))
    bounds = jax.tree.map(lambda leaf: 0.9 * jnp.median(jnp.sqrt(leaf)), squares)
    clipped = {}
    for memory in memories:
        grad_fn = clipax.clipped_grad(loss_fn, 1.0, mean=False, memory=memory)
        grads, info = grad_fn(params, batch, max_norm=bounds)
        clipped[memory] = (grads, info.norms)
    return Found(each, bounds, clipped)


def assert_exact(found: Found) -> None:
    """Compares to a millionth of the largest entry."""
    each, bounds = jax.tree.map(zoo.wide, found.each), found.bounds
    if isinstance(bounds, jax.Array | np.ndarray):
        norms = oracle.norms(each)
        sums = oracle.weighted_sum(each, oracle.hard(norms, float(bounds)))
    else:
        norms = oracle.norms_of_leaves(each)
        weights = jax.tree.map(lambda norm, bound: oracle.hard(norm, float(bound)), norms, bounds)
        sums = jax.tree.map(oracle.weighted_sum, each, weights)
    for memory, (grads, of_examples) in found.clipped.items():
        _assert_near(of_examples, norms, f"norms, memory={memory!r}")
        _assert_near(grads, sums, f"sums, memory={memory!r}")


def assert_all_exact(found: Found, count: int) -> None:
    """The same for results that are stacked."""
    for place in range(count):
        assert_exact(jax.tree.map(lambda leaf, place=place: leaf[place], found))


def _assert_near(found: Any, wanted: Any, label: str) -> None:
    wanted = jax.tree.map(zoo.wide, wanted)
    # A gradient that is zero but for rounding has no digits to compare.
    largest = max(1e-6, *(np.max(np.abs(leaf), initial=0) for leaf in jax.tree.leaves(wanted)))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(zoo.wide(one), other, 0, 1e-6 * largest, err_msg=label)
