"""Clipping without an optimizer, and checks between steps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from clipax._core import _checks, _leaves, _paths
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


def clip_cotangent(
    x: Updates, transformation: optax.GradientTransformation, *, probe: Array | None = None
) -> Updates:
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
      probe: An array of three floats, zeros for instance. What flows back to it, its gradient,
        is the norm before the clip, the norm after it and the share clipped, as `metrics` has
        `norm`, `clipped_norm` and `clip_fraction`. Each place and step needs a row of its own,
        as one of the inputs of a `lax.scan`: gradients of one that is used twice add up.

    Returns:
      `x`. Reverse-mode derivatives are clipped; forward-mode ones are not defined. What
      `transformation` closes over has no gradient.

    Raises:
      ValueError: `transformation` is no transformation; with a `probe`, it has not one clip of
        clipax, or `probe` is no array of three floats.

    | cotangent | result |
    |---|---|
    | within the bound | as it was |
    | of a `probe` | norm, norm after the clip, share clipped |
    | zero | zero |
    | NaN, inf | as the transformation has it |

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
    leaves, treedef = jax.tree.flatten(_leaves.only_measured(x))
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
        raise ValueError(f"probe must be an array of three floats, got {probe!r}.")
    return jnp.asarray(probe)


def _report(state: Any, dtype: Any) -> Array:
    """What a method says of its last update."""
    values = metrics(state)
    if "norm" not in values:
        raise ValueError(
            "transformation must have one clip of clipax to report to probe, got one whose metrics"
            f" are {sorted(values)}."
        )
    names = ("norm", "clipped_norm", "clip_fraction")
    return jnp.stack([values[name].astype(dtype) for name in names])


def check_finite(tree: Any, name: str = "tree") -> None:
    """Raises an error that names every leaf with a NaN or inf.

    It is called between steps, on arrays that hold values: gradients, parameters, an
    optimizer state. `torch.nn.utils.clip_grad_norm_` does this with `error_if_nonfinite`.

    Args:
      tree: Any pytree, sharded too.
      name: What the message calls the tree.

    Raises:
      FloatingPointError: Some entry is NaN or inf: the message has the path, dtype and shape
        of each such leaf, and how many entries are which.
      ValueError: A leaf has no value, as under `jit`.

    | leaf | result |
    |---|---|
    | finite, empty | passes |
    | complex, a NaN in either part | a NaN; otherwise an inf in either part is an inf |
    | None, integer, bool, float0, PRNG key, no array | passes |
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
        "`jax.debug.callback(clipax.check_finite, tree)` checks in it, and `clipax.skip_step`"
        " leaves such steps out.",
    )
    # All counts are on their way before the first is waited for.
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
    """Raises an error once `skip_step` has skipped more than so many steps in a row.

    It is called between steps, every step or now and then. `skip_step` itself skips for as
    long as it takes, since a compiled step cannot raise.

    Args:
      opt_state: An optimizer state with a `SkipState` in it, however deeply nested.
      max_consecutive: How many skipped steps in a row are still all right, an integer >= 1.
        Steps in `skip_ranges` do not count.

    Raises:
      RuntimeError: More steps were skipped in a row: the message says how many, where, with
        which norm, and how to look further.
      ValueError: `opt_state` holds no `SkipState`, or has no values, as under `jit`;
        `max_consecutive` is not an integer >= 1.

    | opt_state | result |
    |---|---|
    | at most `max_consecutive` skipped up to the last step | passes |
    | several `SkipState`s, also one in another | each is held against the number |
    | states of `jax.vmap` | the one with the longest row counts |

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
        raise ValueError("opt_state must hold a state of skip_step, got one without.")
    counts = [(jax.tree_util.keystr(path), state.consecutive_count) for path, state in states]
    check = f"functools.partial(clipax.check_not_stuck, {max_consecutive=})"
    advice = f"`jax.debug.callback({check}, opt_state)` checks in it."
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
    True: "It is above `max_norm` or a spike, or the loss is: log `clipax.metrics(opt_state)`,"
    " whose `raw_norm` shows whether there is a new level, and raise the bound if there is.",
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
                f" Call it outside of jit, on what comes out; {advice}"
            )


def _count_not_finite(leaf: Any) -> tuple[Any, Any]:
    """How many entries are NaN, and how many are inf."""
    if isinstance(leaf, jax.Array):
        return _counts(leaf)
    # Without JAX, which would round doubles.
    return np.isnan(leaf).sum(), (~np.isfinite(leaf) & ~np.isnan(leaf)).sum()


@jax.jit
def _counts(leaf: Array) -> tuple[Array, Array]:
    is_nan = jnp.isnan(leaf)
    return jnp.sum(is_nan), jnp.sum(~jnp.isfinite(leaf) & ~is_nan)


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
