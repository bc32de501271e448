"""Clipping for people without an optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from clipax import _checks, _leaves
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

    Raises:
      ValueError: `transformation` is no transformation.

    Example:
      >>> clipped, info = clip_tree(jnp.array([3.0, 4.0]), clip_by_global_norm(1.0))
      >>> clipped, info["norm"]
      (Array([0.6, 0.8], dtype=float32), Array(5., dtype=float32))
    """
    transformation = _checks.transformation(transformation=transformation)
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
      transformation: Any method without a history or parameters. What it closes over may be
        traced: a bound, the number of a step, a key.

    Returns:
      `x`. Reverse-mode derivatives are clipped; forward-mode ones are not defined. What
      `transformation` closes over has no gradient.

    Raises:
      ValueError: `transformation` is no transformation.

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
    method = _checks.transformation(transformation=transformation)
    leaves, treedef = jax.tree.flatten(_leaves.only_measured(x))

    def clip(cotangents: list[Array]) -> list[Array]:
        cotangent = jax.tree.unflatten(treedef, cotangents)
        clipped, _ = method.update(cotangent, method.init(cotangent))
        return jax.tree.leaves(clipped)

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    clip_with, closed_over = _opened(clip, leaves)
    passed = iter(_identity(clip_with, closed_over, leaves))
    return jax.tree.map(lambda leaf: next(passed) if _leaves.is_measured(leaf) else leaf, x)


def _opened(
    function: Callable[..., Any], leaves: list[Array]
) -> tuple[Callable[..., list[Array]], list[Array]]:
    """A function `(closed_over, leaves) -> leaves`, and what the given one closes over.

    The backward pass runs in another trace, which no traced value of this one may enter but
    through the residuals. `jax.closure_convert` finds floats alone; the constants of a
    program are all that there are.
    """
    program = jax.make_jaxpr(function)(leaves)
    implementations = [
        jax.random.key_impl(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else None
        for value in program.consts
    ]

    def rewrapped(value: Array, implementation: Any) -> Array:
        if implementation is None:
            return value
        return jax.random.wrap_key_data(value, impl=implementation)

    def opened(closed_over: list[Array], leaves: list[Array]) -> list[Array]:
        values = list(map(rewrapped, closed_over, implementations))
        return list(core.jaxpr_as_fun(core.ClosedJaxpr(program.jaxpr, values))(*leaves))

    # As their data, since keys cannot leave a branch of `cond` as residuals (jax 0.7).
    closed_over = [
        value if implementation is None else jax.random.key_data(value)
        for value, implementation in zip(program.consts, implementations, strict=True)
    ]
    return opened, closed_over


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(
    clip: Callable[..., Any], closed_over: list[Array], leaves: list[Array]
) -> list[Array]:
    del clip, closed_over
    return leaves


def _forwards(
    clip: Callable[..., Any], closed_over: list[Array], leaves: list[Array]
) -> tuple[list[Array], list[Array]]:
    del clip
    return leaves, closed_over


def _backwards(
    clip: Callable[..., Any], closed_over: list[Array], cotangents: list[Array]
) -> tuple[None, list[Array]]:
    return None, clip(closed_over, cotangents)


_identity.defvjp(_forwards, _backwards)
