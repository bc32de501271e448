"""U-Clip: what was clipped off is added to the next update."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _leaves, _mapped, _moments, _placement
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.coefficients import hard, in_two
from clipax.norms import global_norm

# In so many steps, a carry has come out. In float32 one of 2^24 times what comes out would never
# fall at all: the difference is lost to rounding.
_MOST_STEPS = 10_000


class UClipState(NamedTuple):
    carry: Updates
    """What was clipped off so far and is still to come; float32 or float64, or complex."""
    carry_norm: Array
    """The global L2 norm of the carry."""
    inner_state: Any


def u_clip(
    inner: optax.GradientTransformation,
    *,
    max_carry: jax.typing.ArrayLike | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Carries what a clip takes off over to the next update.

    `u <- clip(u + carry)` and `carry <- u + carry - clip(u + carry)`, from a carry of
    zero. Over all steps, what came out is what went in less the last carry: as long as the
    carry stays bounded, the clipped updates have no bias on average.

    It is put before the optimizer. Where the mean of the updates is longer than the bound,
    the carry grows with every step, and `max_carry` ends that.

    A carry takes as many steps to come out as it is longer than the bound, and until then holds
    its direction. Whatever finite updates came before, half of a usual norm passes within 10,000
    steps, beside those that `inner` takes, because a longer carry is cut.

    Args:
      inner: The clip: `clip_by_global_norm(1.0)`, `clip_by_value(1.0)` (the two of the
        paper) or another. It measures the updates with the carry in them.
      max_carry: The bound on the carry's global L2 norm, > 0, to which it is scaled. What
        is cut off there is lost. None bounds each entry by 10,000 times what came out of it;
        inf is no bound, as in the paper, under which a carry may never come out.
      axis_name: As in `clip_by_global_norm`, for the norm of the carry; `inner` has its
        own.

    Returns:
      A transformation whose state is a `UClipState`: the carry in the structure of the
      parameters, its norm, and the inner state, which `clipax.metrics` reads. An extra
      argument `norm=` is not passed on, for it is not the norm that `inner` needs.

    Raises:
      ValueError: `inner` is no transformation; `max_carry` is <= 0, NaN, boolean or a
        string; at `update`, the updates have not the structure that `init` saw.

    | updates | result |
    |---|---|
    | nothing carried and nothing clipped | the updates, bit for bit |
    | zero, with something carried | the carry, clipped |
    | longer than the bound in every step | clipped; the carry grows up to `max_carry` |
    | clipped to less than a 10,000th, no `max_carry` | the carry is 10,000 times what came out |
    | clipped to zero | zero; the carry is the whole sum |
    | the sum with the carry overflows | as if it were the largest float |
    | a NaN or inf entry | what `inner` makes of it; the whole state stays |
    | float16, bfloat16 | clipped wide, then rounded; the rounding is not carried |
    | None, integer, bool, float0 leaf | as it was; nothing is carried |

    Differences from the paper: `max_carry`, also that of None; and that the carry survives a
    step that is not finite.

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
      Elesedy, Hutter, "U-Clip: on-average unbiased stochastic gradient clipping", 2023,
      https://arxiv.org/abs/2302.02971
    """
    inner = _checks.transformation(inner=inner)
    _checks.axis_name(axis_name=axis_name)
    if max_carry is not None:
        _checks.scalar(_checks.positive, max_carry=max_carry)

    def init_fn(params: Updates) -> UClipState:
        norm = functools.partial(global_norm, axis_name=_mapped.bound_here(axis_name))
        carry = _moments.zeros(params)
        inner_state = inner.init(_moments.zeros(params))
        return UClipState(carry, _placement.zero_norms(norm, carry), inner_state)

    def update_fn(
        updates: Updates,
        state: UClipState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, UClipState]:
        extra_args.pop("norm", None)
        wide = _moments.widened(updates, state.carry)
        totals = jax.tree.map(_moments.added, wide, state.carry)
        clipped, inner_state = inner.update(totals, state.inner_state, params, **extra_args)
        rest = _rest_in_reach if max_carry is None else jnp.subtract
        carry = jax.tree.map(rest, totals, clipped)
        norm = global_norm(carry, axis_name=axis_name)
        # An entry that is not finite cannot leave a finite remainder.
        is_finite = jnp.isfinite(norm)
        if max_carry is not None:
            (bound,) = _leaves.in_dtype_of(norm, max_carry)
            carry, norm = in_two(hard, norm, bound).scale(carry), jnp.minimum(norm, bound)
        new_state = UClipState(carry, norm, inner_state)
        return _moments.narrowed(clipped, updates), _choice.choose(is_finite, new_state, state)

    return transformation(init_fn, update_fn, UClipState)


def _rest_in_reach(total: Array, clipped: Array) -> Array:
    """What was clipped off, but no more than can come out in the steps there are."""
    if jnp.iscomplexobj(total):
        parts = (total.real, clipped.real), (total.imag, clipped.imag)
        return jax.lax.complex(*(_rest_in_reach(*part) for part in parts))
    rest = total - clipped
    # Where nothing comes out now, as under a bound of zero, nothing says how much may later.
    most = jnp.where(clipped == 0, jnp.inf, _MOST_STEPS * jnp.abs(clipped))
    return jnp.where(jnp.isfinite(rest), jnp.clip(rest, -most, most), rest)
