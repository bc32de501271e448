"""Clipping without an optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _checks, _leaves, _rules
from clipax._core._compat import core
from clipax._core._shown import shown
from clipax._core._typing import Array, Updates
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
      transformation: Any method. A history, if it has one, is empty.
      params: The parameters, for methods whose `update` needs them.
      per_leaf: Whether the metrics have the values of each leaf too.
      **extra_args: Extra arguments of the method's `update`, such as `norm=`.

    Returns:
      The clipped tree, and the `clipax.metrics` of the state.

    Raises:
      ValueError: `transformation` is not a transformation.

    Example:
      >>> clipped, info = clip_tree(jnp.array([3.0, 4.0]), clip_by_global_norm(1.0))
      >>> clipped, info["norm"]
      (Array([0.6, 0.8], dtype=float32), Array(5., dtype=float32))
    """
    transformation = _checks.transformation(transformation=transformation)
    state = transformation.init(updates if params is None else params)
    clipped, state = transformation.update(updates, state, params, **extra_args)
    return clipped, metrics(state, per_leaf=per_leaf)


def clip_cotangent(
    x: Updates, transformation: optax.GradientTransformation, *, probe: Array | None = None
) -> Updates:
    """Returns a tree unchanged and clips the gradient that flows back through it.

    The forward pass is `y = x` and the backward pass is `dx = clip(dy)`. Around the carry of a
    `lax.scan`, it bounds the gradient at every step of back-propagation through time, before it
    can explode.

    It clips the cotangent of the whole tree. For a batch, that is one cotangent of all examples,
    already divided by the batch size if the loss is a mean; inside a `vmap`, it is one cotangent
    per example. If the axis of that `vmap` has a name, the method needs `axis_name=()`.

    Args:
      x: Any pytree. Leaves without a tangent (integers) pass through.
      transformation: Any method without a history or parameters. Values that it closes over may
        be traced: a bound, a step count, a key.
      probe: An array of three floats, such as zeros. Its gradient is the norm before clipping,
        the norm after clipping and the share clipped: the values `norm`, `clipped_norm` and
        `clip_fraction` of `metrics`. Gradients of a probe that is used twice add up, so each
        place and step needs a row of its own, such as an input of a `lax.scan`.

    Returns:
      `x`. Reverse-mode derivatives are clipped; forward-mode derivatives are not defined. Values
      that `transformation` closes over have no gradient.

    Raises:
      ValueError: `transformation` is not a transformation; with a `probe`, it is not one clip of
        clipax, or `probe` is not an array of three floats.

    | cotangent | result |
    |---|---|
    | within the bound | unchanged |
    | of a `probe` | norm, norm after clipping, share clipped |
    | zero | zero |
    | NaN, inf | what the transformation makes of it |

    Example:
      >>> def loss(x):
      ...     y = clip_cotangent(x, clip_by_global_norm(2.5))
      ...     return 3.0 * y[0] + 4.0 * y[1]
      >>> jax.grad(loss)(jnp.array([1.0, 1.0]))
      Array([1.5, 2. ], dtype=float32)
      >>> def watched(x, probe):
      ...     y = clip_cotangent(x, clip_by_global_norm(2.5), probe=probe)
      ...     return 3.0 * y[0] + 4.0 * y[1]
      >>> jax.grad(watched, argnums=1)(jnp.array([1.0, 1.0]), jnp.zeros(3))
      Array([5. , 2.5, 1. ], dtype=float32)

    References:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks",
      2013, https://arxiv.org/abs/1211.5063
    """
    method = _checks.transformation(transformation=transformation)
    leaves, treedef = jax.tree.flatten(_rules.only_measured(x))
    probes = [] if probe is None else [_checked_probe(probe)]

    def clip(cotangents: list[Array]) -> list[Array]:
        cotangent = jax.tree.unflatten(treedef, cotangents)
        clipped, state = method.update(cotangent, method.init(cotangent))
        return [*jax.tree.leaves(clipped), *(_report(state, probe.dtype) for probe in probes)]

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    clip_with, closed_over = _opened(clip, leaves)
    passed = iter(_identity(clip_with, closed_over, leaves, probes))
    return jax.tree.map(lambda leaf: next(passed) if _leaves.is_measured(leaf) else leaf, x)


def _checked_probe(probe: Any) -> Array:
    is_array = isinstance(probe, (jax.Array, np.ndarray))
    is_right = is_array and probe.shape == (3,) and jnp.issubdtype(probe.dtype, np.floating)
    if not is_right:
        raise ValueError(f"probe must be an array of three floats, got {shown(probe)}.")
    return jnp.asarray(probe)


def _report(state: Any, dtype: Any) -> Array:
    """The norms before and after the last update of a method, and the share clipped."""
    values = metrics(state)
    if "norm" not in values:
        raise ValueError(
            "transformation must have one clip of clipax to report to probe, got one whose metrics"
            f" are {sorted(values)}."
        )
    names = ("norm", "clipped_norm", "clip_fraction")
    return jnp.stack([values[name].astype(dtype) for name in names])


def _opened(
    function: Callable[..., Any], leaves: list[Array]
) -> tuple[Callable[..., list[Array]], list[Array]]:
    """Converts a closure into a function `(closed_over, leaves) -> leaves` and its values.

    The backward pass is another trace, and traced values of this trace can enter it only as
    residuals. `jax.closure_convert` finds only floats; the constants of the traced program are
    all values that the closure holds.
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

    # Keys become their data, because in jax 0.7 keys cannot leave a branch of `cond` as residuals.
    closed_over = [
        value if implementation is None else jax.random.key_data(value)
        for value, implementation in zip(program.consts, implementations, strict=True)
    ]
    return opened, closed_over


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(
    clip: Callable[..., Any], closed_over: list[Array], leaves: list[Array], probes: list[Array]
) -> list[Array]:
    del clip, closed_over, probes
    return leaves


def _forwards(
    clip: Callable[..., Any], closed_over: list[Array], leaves: list[Array], probes: list[Array]
) -> tuple[list[Array], list[Array]]:
    del clip, probes
    return leaves, closed_over


def _backwards(
    clip: Callable[..., Any], closed_over: list[Array], cotangents: list[Array]
) -> tuple[None, list[Array], list[Array]]:
    made = clip(closed_over, cotangents)
    return None, made[: len(cotangents)], made[len(cotangents) :]


_identity.defvjp(_forwards, _backwards)
