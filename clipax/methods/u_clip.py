"""U-Clip: adds what was clipped off to the next update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _compat, _kinds, _leaves, _moments
from clipax._core._scaling import in_two
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.coefficients import hard
from clipax.norms import global_norm

# A carry comes out within this many steps. Without a limit, a float32 carry of 2^24 times the
# output would never shrink, because rounding loses the difference.
_MOST_STEPS = 10_000


class UClipState(NamedTuple):
    """The memory of `u_clip`."""

    carry: Updates
    """What was clipped off and has not come out yet; float32, float64 or complex."""
    carry_norm: Array
    """The global L2 norm of the carry."""
    inner_state: Any


def u_clip(
    inner: optax.GradientTransformation,
    *,
    max_carry: jax.typing.ArrayLike | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds what a clip takes off to the next update.

    `u <- clip(u + carry)` and `carry <- u + carry - clip(u + carry)`, from a carry of zero. The
    sum of the outputs is the sum of the inputs less the last carry, so while the carry stays
    bounded, the updates have no bias on average. Put it before the optimizer. After any finite
    updates, half of a usual norm passes within 10,000 steps, besides those of `inner`, because a
    longer carry is cut.

    Args:
      inner: The clip: `clip_by_global_norm(1.0)`, `clip_by_value(1.0)` (the two of the paper) or
        another. It measures the updates with the carry added.
      max_carry: The bound on the carry's global L2 norm, > 0; what is above it is lost. None
        bounds each entry by 10,000 times its output. inf, as in the paper, sets no bound; the
        carry may then never come out.
      axis_name: As in `clip_by_global_norm`, for the norm of the carry.

    Returns:
      A transformation with a `UClipState`: the carry in the structure of the parameters, its norm,
      and the inner state, which `clipax.metrics` reads. An extra argument `norm=` is not passed
      on, because it is not the norm that `inner` needs.

    Raises:
      ValueError: `inner` is not a transformation; `max_carry` is not a number > 0; at `update`,
        the updates have another structure than at `init`.

    | updates | result |
    |---|---|
    | nothing carried and nothing clipped | the updates, bit for bit |
    | zero, with something carried | the carry, clipped |
    | longer than the bound in every step | clipped; the carry grows up to `max_carry` |
    | clipped to less than a 10,000th, no `max_carry` | the carry is 10,000 times the output |
    | clipped to zero | zero; the carry is the whole sum |
    | the sum with the carry overflows | as if it were the largest float |
    | a NaN or inf entry | what `inner` makes of it; the whole state stays |
    | float16, bfloat16 | clipped wide, then rounded; the rounding is not carried |
    | None, integer, bool, float0 leaf | unchanged; nothing is carried |

    Differences from the paper: the carry is bounded, and survives a step that is not finite.

    Example:
      >>> clip = u_clip(clip_by_global_norm(1.0))
      >>> state = clip.init(jnp.zeros(1))
      >>> for size in (2.5, 0.0, 0.0, 0.0):
      ...     clipped, state = clip.update(jnp.array([size]), state)
      ...     print(clipped, state.carry)
      [1.] [1.5]
      [1.] [0.5]
      [0.5] [0.]
      [0.] [0.]

    References:
      Elesedy, Hutter, 2023, https://arxiv.org/abs/2302.02971
    """
    inner = _checks.transformation(inner=inner)
    _checks.axis_name(axis_name=axis_name)
    if max_carry is not None:
        _checks.scalar(_checks.positive, max_carry=max_carry)

    def init_fn(params: Updates) -> UClipState:
        carry = _moments.zeros(params)
        inner_state = inner.init(_moments.zeros(params))
        zero = _moments.zero_norm(carry, axis_name=axis_name)
        return UClipState(carry, zero, inner_state)

    def update_fn(
        updates: Updates,
        state: UClipState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, UClipState]:
        extra_args.pop("norm", None)
        wide = _moments.widened(updates, state.carry)
        totals = _kinds.map_alike(_moments.added, wide, state.carry)
        clipped, inner_state = inner.update(totals, state.inner_state, params, **extra_args)
        if max_carry is None:
            is_finite = _moments.all_finite(totals, axis_name=axis_name)
            rest = _kinds.map_alike(_rest_in_reach, totals, clipped)
            # Chosen before it is measured, so that XLA writes it in place of the old one.
            carry = _choice.choose(is_finite, rest, state.carry)
            carry = jax.tree.map(_compat.optimization_barrier, carry)
            norm = global_norm(carry, axis_name=axis_name)
        else:
            rest = jax.tree.map(jnp.subtract, totals, clipped)
            norm = global_norm(rest, axis_name=axis_name)
            # An update with an entry that is not finite never leaves a finite carry.
            is_finite = jnp.isfinite(norm)
            (bound,) = _leaves.in_dtype_of(norm, max_carry)
            carry = in_two(hard, norm, bound).scale(rest)
            norm = jnp.minimum(norm, bound)
            carry = _choice.choose(is_finite, carry, state.carry)
        others = _choice.choose(
            is_finite, (norm, inner_state), (state.carry_norm, state.inner_state)
        )
        return _moments.narrowed(clipped, updates), UClipState(carry, *others)

    return transformation(init_fn, update_fn, UClipState)


def _rest_in_reach(total: Array, clipped: Array) -> Array:
    """What was clipped off, but no more than can come out in `_MOST_STEPS` steps."""
    if jnp.iscomplexobj(total):
        parts = (total.real, clipped.real), (total.imag, clipped.imag)
        return jax.lax.complex(*(_rest_in_reach(*part) for part in parts))
    rest = total - clipped
    # Where nothing comes out now, as under a bound of zero, there is no measure for later steps.
    most = jnp.where(clipped == 0, jnp.inf, _MOST_STEPS * jnp.abs(clipped))
    return jnp.where(jnp.isfinite(rest), jnp.clip(rest, -most, most), rest)
