"""Clipping for people without an optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipax import _leaves
from clipax._typing import Array, Updates
from clipax.metrics import metrics


def clip_tree(
    updates: Updates,
    transformation: optax.GradientTransformation,
    params: Updates | None = None,
    *,
    per_leaf: bool = False,
    **extra_args: Any,
) -> tuple[Updates, dict[str, Array]]:
    """Applies a method to a tree once, with a fresh state.

    Args:
      updates: Any pytree: gradients, a sum of them, a model's difference, ...
      transformation: Any method without a history; with one, it has seen nothing yet.
      params: What `adaptive_grad_clip` measures against.
      per_leaf: Whether what happened is told leaf by leaf too.
      **extra_args: What its `update` takes, as `norm=`.

    Returns:
      The clipped tree, and what happened: `clipax.metrics` of the state.

    Example:
      >>> clipped, info = clip_tree(jnp.array([3.0, 4.0]), clip_by_global_norm(1.0))
      >>> clipped, info["norm"]
      (Array([0.6, 0.8], dtype=float32), Array(5., dtype=float32))
    """
    transformation = optax.with_extra_args_support(transformation)
    state = transformation.init(updates if params is None else params)
    clipped, state = transformation.update(updates, state, params, **extra_args)
    return clipped, metrics(state, per_leaf=per_leaf)


def clip_cotangent(x: Updates, transformation: optax.GradientTransformation) -> Updates:
    """Passes a tree on unchanged, and clips what flows back through it.

    Forwards `y = x`; backwards `dx = clip(dy)`. Round the carry of a `lax.scan` it bounds
    the gradient at every step of back-propagation through time, before it can explode.
    What it clips is the cotangent of the whole tree: of a batch together, unless it stands
    inside a `vmap`, and divided by the batch's size already if the loss is a mean. In a
    `vmap` whose axis has a name, the method needs `axis_name=()` to clip each by itself.

    Args:
      x: Any pytree. Leaves without a tangent (integers) pass through.
      transformation: Any method without a history or parameters.

    Returns:
      `x`. Reverse-mode derivatives are clipped; forward-mode ones are not defined.

    | cotangent | result |
    |---|---|
    | within the bound | as it was |
    | zero | zero |
    | NaN, inf | as the transformation has it |

    Example:
      >>> def loss(x):
      ...     y = clip_cotangent(x, clip_by_global_norm(2.5))
      ...     return 3.0 * y[0] + 4.0 * y[1]
      >>> jax.grad(loss)(jnp.array([1.0, 1.0]))
      Array([1.5, 2. ], dtype=float32)

    References:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks",
      2013, https://arxiv.org/abs/1211.5063
    """
    leaves, treedef = jax.tree.flatten(_leaves.only_measured(x))

    def clip(cotangents: list[Array]) -> list[Array]:
        cotangent = jax.tree.unflatten(treedef, cotangents)
        clipped, _ = transformation.update(cotangent, transformation.init(cotangent))
        return jax.tree.leaves(clipped)

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    # A bound that is traced must not be closed over: the backward pass runs in another trace.
    clip, traced = jax.closure_convert(clip, leaves)
    passed = iter(_identity(clip, traced, leaves))
    return jax.tree.map(lambda leaf: next(passed) if _leaves.is_measured(leaf) else leaf, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(clip: Callable[..., Any], traced: list[Array], leaves: list[Array]) -> list[Array]:
    del clip, traced
    return leaves


def _forwards(
    clip: Callable[..., Any], traced: list[Array], leaves: list[Array]
) -> tuple[list[Array], list[Array]]:
    del clip
    return leaves, traced


def _backwards(
    clip: Callable[..., Any], traced: list[Array], cotangents: list[Array]
) -> tuple[list[Array], list[Array]]:
    return [jnp.zeros_like(value) for value in traced], clip(cotangents, *traced)


_identity.defvjp(_forwards, _backwards)
