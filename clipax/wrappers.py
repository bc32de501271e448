"""Transformations round other transformations."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax import _leaves
from clipax._typing import Array, AxisName, Updates
from clipax.norms import global_norm


class ObserveState(NamedTuple):
    """What the wrapped transformation did at its last update."""

    norm_in: Array
    """The global L2 norm of what went in."""
    norm_out: Array
    """The global L2 norm of what came out."""
    cosine: Array
    """The cosine of the angle between the two, in [-1, 1]."""
    inner_state: Any


def observe(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Records how much a transformation takes away and how far it turns the step.

    `cosine = <u, v> / (|u|_2 |v|_2)` for the updates `u` that go in and `v` that come out.

    Args:
      inner: Any transformation, a whole chain too.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      The transformation, unchanged in what it does; its state is an `ObserveState` of
      scalars round the inner state, float32 or float64 (where a parameter is).

    | updates | cosine |
    |---|---|
    | zero before or after | 0 |
    | NaN or inf before or after | NaN |

    Example:
      >>> clip = observe(clip_by_value(1.0))
      >>> updates = jnp.array([1.0, 7.0])
      >>> _, state = clip.update(updates, clip.init(updates))
      >>> state.norm_in.round(3), state.norm_out.round(3), state.cosine.round(3)
      (Array(7.071, dtype=float32), Array(1.414, dtype=float32), Array(0.8, dtype=float32))
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Updates) -> ObserveState:
        norm = functools.partial(global_norm, axis_name=axis_name and ())
        # Arrays of their own, since a buffer can be donated only once.
        zero = _leaves.zero_norms(norm, params)
        return ObserveState(zero, zero + 0, zero + 0, inner.init(params))

    def update_fn(
        updates: Updates,
        state: ObserveState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ObserveState]:
        new_updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        norm_in = global_norm(updates, axis_name=axis_name)
        norm_out = global_norm(new_updates, axis_name=axis_name)
        cosine = _cosine(updates, new_updates, axis_name)
        dtype = state.norm_in.dtype
        norm_in, norm_out, cosine = (x.astype(dtype) for x in (norm_in, norm_out, cosine))
        return new_updates, ObserveState(norm_in, norm_out, cosine, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cosine(one: Updates, other: Updates, axis_name: AxisName) -> Array:
    # By polarization, `4 <a, b> = |a + b|^2 - |a - b|^2` on unit vectors: it takes norms
    # alone, so that range and sharding stay the norm's business.
    norm = functools.partial(global_norm, axis_name=axis_name)
    one, other = _measured_in_both(one, other), _measured_in_both(other, one)
    one, other = _unit_vector(one, norm(one)), _unit_vector(other, norm(other))
    total = norm(jax.tree.map(jnp.add, one, other))
    difference = norm(jax.tree.map(jnp.subtract, one, other))
    return (total - difference) * (total + difference) / 4


def _measured_in_both(one: Updates, other: Updates) -> Updates:
    def keep(leaf: Any, partner: Any) -> Any:
        return leaf if _leaves.is_measured(leaf) and _leaves.is_measured(partner) else None

    return jax.tree.map(keep, one, other)


def _unit_vector(updates: Updates, norm: Array) -> Updates:
    divisor = jnp.where(norm == 0, 1.0, norm)

    def divide(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        kind = np.complex64 if jnp.iscomplexobj(leaf) else np.float32
        wide = np.result_type(norm.dtype, kind)
        return leaf.astype(wide) / divisor.astype(wide)

    return jax.tree.map(divide, updates)
