"""Clipping without an optimizer, and checks to call between steps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from clipax._core import _checks, _leaves, _paths, _rules
from clipax._core._typing import Array, Updates
from clipax.methods.skip_step import SkipState
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


def clip_cotangent(x: Updates, transformation: optax.GradientTransformation) -> Updates:
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

    Returns:
      `x`. Reverse-mode derivatives are clipped; forward-mode derivatives are not defined. Values
      that `transformation` closes over have no gradient.

    Raises:
      ValueError: `transformation` is not a transformation.

    | cotangent | result |
    |---|---|
    | within the bound | unchanged |
    | zero | zero |
    | NaN, inf | what the transformation makes of it |

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
    leaves, treedef = jax.tree.flatten(_rules.only_measured(x))

    def clip(cotangents: list[Array]) -> list[Array]:
        cotangent = jax.tree.unflatten(treedef, cotangents)
        clipped, _ = method.update(cotangent, method.init(cotangent))
        return jax.tree.leaves(clipped)

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    clip_with, closed_over = _opened(clip, leaves)
    passed = iter(_identity(clip_with, closed_over, leaves))
    return jax.tree.map(lambda leaf: next(passed) if _leaves.is_measured(leaf) else leaf, x)


def check_finite(tree: Any, name: str = "tree") -> None:
    """Raises an error that names every leaf with a NaN or inf.

    Call it between steps, on arrays with values: gradients, parameters or an optimizer state.
    `torch.nn.utils.clip_grad_norm_` does the same with `error_if_nonfinite`.

    Args:
      tree: Any pytree; it may be sharded.
      name: The name of the tree in the message.

    Raises:
      FloatingPointError: An entry is NaN or inf. The message gives the path, dtype and shape of
        each such leaf and counts its NaN and inf entries.
      ValueError: A leaf has no value, as under `jit`.

    | leaf | result |
    |---|---|
    | finite, empty | passes |
    | complex, a NaN in either part | counts as NaN; otherwise an inf in either part as inf |
    | None, integer, bool, float0, PRNG key, not an array | passes |
    | traced, or a `jax.ShapeDtypeStruct` | `ValueError` |

    Example:
      >>> grads = {"w": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.zeros(2)}
      >>> check_finite(grads, "grads")
      Traceback (most recent call last):
      FloatingPointError: grads must be finite, got 1 of 2 leaves with NaN or inf:
        w: 1 NaN and 1 inf of 3 entries, float32 of shape (3,)
    """
    measured = [
        (path, leaf) for path, leaf, _ in _paths.positions(tree) if _leaves.is_measured(leaf)
    ]
    _require_values(
        "check_finite",
        name,
        measured,
        "`jax.debug.callback(clipax.check_finite, tree)` checks inside of jit, and"
        " `clipax.skip_step` skips such steps.",
    )
    # All counts are dispatched before the first is waited for.
    counts = jax.device_get([_count_not_finite(leaf) for _, leaf in measured])
    lines = [
        f"\n  {path or name}: {nans} NaN and {infs} inf of {np.size(leaf)}"
        f" entries, {getattr(leaf, 'dtype', 'float')} of shape {np.shape(leaf)}"
        for (path, leaf), (nans, infs) in zip(measured, counts, strict=True)
        if nans or infs
    ]
    if lines:
        raise FloatingPointError(
            f"{name} must be finite, got {len(lines)} of {len(measured)} leaves with NaN or inf:"
            + "".join(lines)
        )


def check_not_stuck(opt_state: Any, max_consecutive: int) -> None:
    """Raises an error if `skip_step` has skipped too many steps in a row.

    Call it between steps, after every step or from time to time. `skip_step` itself never stops
    a run, because a compiled step cannot raise an error.

    Args:
      opt_state: An optimizer state that holds a `SkipState`, however deeply nested.
      max_consecutive: How many skipped steps in a row are allowed, an integer >= 1. Steps in
        `skip_ranges` do not count.

    Raises:
      RuntimeError: More steps than that were skipped in a row. The message says how many, in
        which state, with which norm, and what to check next.
      ValueError: `opt_state` holds no `SkipState`, or has no values, as under `jit`;
        `max_consecutive` is not an integer >= 1.

    | opt_state | result |
    |---|---|
    | at most `max_consecutive` skipped up to the last step | passes |
    | several `SkipState`s, also one inside another | each is checked |
    | states of `jax.vmap` | the member with the most skipped steps in a row is checked |

    Example:
      >>> optimizer = skip_step(optax.sgd(1.0))
      >>> opt_state = optimizer.init(jnp.zeros(1))
      >>> for _ in range(3):
      ...     _, opt_state = optimizer.update(jnp.array([jnp.nan]), opt_state)
      >>> check_not_stuck(opt_state, max_consecutive=3)
      >>> check_not_stuck(opt_state, max_consecutive=2)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      RuntimeError: skip_step skipped the last 3 steps in a row, more than max_consecutive=2, ...
    """
    _checks.positive_integer(max_consecutive=max_consecutive)
    states = list(_skip_states(opt_state, ()))
    if not states:
        raise ValueError("opt_state must hold a state of skip_step, got a state without one.")
    counts = [(jax.tree_util.keystr(path), state.consecutive_count) for path, state in states]
    check = f"functools.partial(clipax.check_not_stuck, {max_consecutive=})"
    advice = f"`jax.debug.callback({check}, opt_state)` checks inside of jit."
    _require_values("check_not_stuck", "opt_state", counts, advice)
    for path, state in states:
        worst = np.argmax(np.asarray(state.consecutive_count))
        row, total, norm = (
            np.asarray(value).flat[worst]
            for value in (state.consecutive_count, state.skipped_count, state.norm)
        )
        if row > max_consecutive:
            raise RuntimeError(
                f"skip_step skipped the last {row} steps in a row, more than {max_consecutive=},"
                f" and {total} in all; see opt_state{jax.tree_util.keystr(path)}. The last norm"
                f" was {norm}. {_ADVICE[bool(np.isfinite(norm))]}"
            )


_ADVICE = {
    False: "`clipax.check_finite(grads)` names the leaves that are not finite; check the"
    " parameters too, which may come from a bad checkpoint.",
    True: "The norm is above `skip_above` or is a spike, or the loss is a spike. Log"
    " `clipax.metrics(opt_state)`, whose `raw_norm` shows whether there is a new level, and raise"
    " the bound if there is.",
}


def _skip_states(tree: Any, above: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], SkipState]]:
    def is_state(node: Any) -> bool:
        return isinstance(node, SkipState)

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state):
        if is_state(node):
            yield (*above, *path), node
            inner = (*above, *path, jax.tree_util.GetAttrKey("inner_state"))
            yield from _skip_states(node.inner_state, inner)


def _require_values(function: str, name: str, leaves: list[tuple[str, Any]], advice: str) -> None:
    for path, leaf in leaves:
        if isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            raise ValueError(
                f"{function} needs values, got {leaf!r} at {path!r} of {name}."
                f" Call it outside of jit, on the results; {advice}"
            )


def _count_not_finite(leaf: Any) -> tuple[Any, Any]:
    """How many entries are NaN, and how many are inf."""
    if isinstance(leaf, jax.Array):
        return _counts(leaf)
    # NumPy, because JAX would round doubles to float32.
    return np.isnan(leaf).sum(), (~np.isfinite(leaf) & ~np.isnan(leaf)).sum()


@jax.jit
def _counts(leaf: Array) -> tuple[Array, Array]:
    is_nan = jnp.isnan(leaf)
    return jnp.sum(is_nan), jnp.sum(~jnp.isfinite(leaf) & ~is_nan)


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
