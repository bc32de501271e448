"""Errors that are raised between steps, outside of `jit`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _checks, _leaves, _paths
from clipax._core._shown import shown
from clipax._core._typing import Array
from clipax.methods.skip_step import SkipState


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
            place = f" at {path!r}" if path else ""
            raise ValueError(
                f"{function} needs values, got {shown(leaf)}{place} of {name}."
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
