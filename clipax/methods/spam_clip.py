"""SPAM's clipping: each entry against its own second moment."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _leaves, _mapped, _moments, _placement
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import Array, AxisName, Bound, Norms, Updates
from clipax.coefficients import scale_updates
from clipax.norms import global_norm, leaf_norm
from clipax.thresholds import Threshold, bounded


class SpamClipState(NamedTuple):
    clip: ClipState
    rms: Updates
    """The root of each entry's running mean square, after clipping; 0 is no history."""
    step_count: Array
    """The number of the last step that it has learned from, 0 for that of a reset; int32."""


@injectable
def spam_clip(
    square_ratio: Bound = 5000.0,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    warmup_steps: int = 20,
    reset_every: int | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each entry whose square is far above the running mean of its squares.

    `u_i <- u_i * min(1, sqrt(square_ratio * v_i) / |u_i|)` for entry `i`, and then
    `v_i <- decay * v_i + (1 - decay) * |u_i|^2`: the history holds clipped entries, and not
    the one that is held against it. `v_i` starts at zero and has no bias correction, as in
    Adam's own state. A complex entry keeps its phase.

    This is the clipping of SPAM alone. The momentum that SPAM resets and the learning rate
    that it then warms up belong to the optimizer: this transformation goes before it in a
    chain, keeps second moments of its own, and resets only these.

    Whatever finite updates came before, half of a usual norm passes within 100 steps. From
    usual entries `s` times the root of `v_i`, it takes
    `log(s^2 / square_ratio) / log(decay + (1 - decay) * square_ratio)` steps, or until a reset.

    Args:
      square_ratio: The bound on an entry's square over the mean of its squares, > 0: a number, a
        scalar array, a schedule `count -> value`, or a tree prefix of them. At or under 1,
        clipped entries would pull their own bound down to zero.
      decay: The weight of the past in the mean of squares, in [0, 1).
      warmup_steps: The first step, counted from 1, at which an entry can be clipped, >= 1.
        Each reset makes its step number 0, so that the means learn from `warmup_steps` steps
        after a reset, and from one fewer at the start.
      reset_every: At every multiple of it, a step finds the means at zero, >
        `warmup_steps`; SPAM has 500. None is never.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `SpamClipState`. Its `clip` is a `ClipState` of trees
      with a scalar a leaf: `norm` is the largest `|u_i| / sqrt(v_i)` of the entries that can
      be clipped now, `max_norm` is `sqrt(square_ratio)`, `coefficient` the smallest factor that an
      entry was scaled by, so that the `clip_fraction` of `metrics` is the share of leaves
      with a clipped entry. `rms`, the root of `v`, is float32 (float64 for float64 leaves) in
      the shape of the parameters.

    Raises:
      ValueError: A number is out of its range, NaN, boolean, None or a string, or
        `reset_every` is not > `warmup_steps`; at `init`, a prefix does not fit; at `update`,
        the updates have another structure than at `init`.

    The defaults are those of the paper's code, apart from the reset.

    | entry | result |
    |---|---|
    | in a step before number `warmup_steps`, from the start or a reset | as it was, bit for bit |
    | square <= square_ratio * v_i | as it was, bit for bit |
    | zero | zero, which v_i learns |
    | zero in every step so far | the first other one passes as it is |
    | NaN or inf | NaN; in warm-up as it was. No entry of any leaf is learned, no step counted |
    | beside a NaN or inf entry | clipped as ever |
    | None, integer, bool, float0 leaf | as it was, not measured |

    Derivatives exist where no entry equals its bound. They are finite everywhere.

    Differences from the paper: an entry that has had only zero gradients is not clipped;
    there its bound is zero, and it is clipped to zero until the next reset. An infinite
    entry is not turned into the bound. The root of `v` is kept, not `v`, so that neither 1e20
    nor 1e-25 leaves the range of float32. Differences from the paper's code: the reset is off.
    It starts and resets at the same steps as there.

    Example:
      >>> clip = spam_clip(9.0, decay=0.75, warmup_steps=1)
      >>> state = clip.init(jnp.zeros(2))
      >>> for entry in (2.0, 10.0):  # the root of 0.25 * 2^2 is 1: the bound is 3
      ...     clipped, state = clip.update(jnp.array([entry, 0.5]), state)
      >>> clipped
      Array([3. , 0.5], dtype=float32)

    References:
      Huang, Zhu, Jin, Liu, Wang, Liu, "SPAM: spike-aware Adam with momentum reset for stable
      LLM training", 2025, https://arxiv.org/abs/2501.06842
    """
    _checks.scalar(_checks.decay_rate, decay=decay)
    _checks.positive_integer(warmup_steps=warmup_steps)
    if reset_every is not None:
        _checks.positive_integer(reset_every=reset_every)
        if reset_every <= warmup_steps:
            raise ValueError(
                f"reset_every must be > warmup_steps, or nothing would ever be clipped, got"
                f" {reset_every!r} and warmup_steps={warmup_steps!r}."
            )
    roots = _root_of(bounded(_checks.positive, square_ratio=square_ratio))
    record = clip_by(functools.partial(leaf_norm, ord=math.inf), roots, axis_name=axis_name)

    def init_fn(params: Updates) -> SpamClipState:
        rms = _moments.zero_moduli(params)
        names = _mapped.bound_here(axis_name)
        zero = _placement.zero_norms(functools.partial(global_norm, axis_name=names), rms)
        return SpamClipState(record.init(rms), rms, zero.astype(jnp.int32))

    def update_fn(
        updates: Updates,
        state: SpamClipState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, SpamClipState]:
        del params, extra_args
        rms, step = state.rms, optax.safe_increment(state.step_count)
        if reset_every is not None:
            step = jnp.where(step >= reset_every, 0, step)
            rms = _choice.choose(step == 0, jax.tree.map(jnp.zeros_like, rms), rms)
        wide = _moments.widened(updates, rms)
        is_on = step >= warmup_steps
        usual = jax.tree.map(lambda size: jnp.where(is_on & (size > 0), size, jnp.inf), rms)
        relative = jax.tree.map(_relative, wide, usual)
        _, clip = record.update(relative, state.clip)
        clipped = _leaves.map_measured(_clip_leaf, wide, usual, clip.max_norm)

        def learn(old: Array, x: Array) -> Array:
            return _moments.power_mean(old, x, 1 - decay)

        learned = jax.tree.map(learn, rms, clipped), step, clip.threshold
        is_finite = _moments.all_finite(wide, axis_name=axis_name)
        before = state.rms, state.step_count, state.clip.threshold
        rms, count, threshold = _choice.choose(is_finite, learned, before)
        clip = clip._replace(threshold=threshold)
        return _moments.narrowed(clipped, updates), SpamClipState(clip, rms, count)

    return transformation(init_fn, update_fn, SpamClipState)


def _root_of(ratios: Threshold) -> Threshold:
    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        bounds, state = ratios.update(norms, state, params, **extra_args)
        return jax.tree.map(jnp.sqrt, bounds), state

    return Threshold(ratios.init, update_fn)


def _relative(x: Array, usual: Array) -> Array:
    modulus = jnp.abs(x)
    return _moments.in_range(modulus / usual, modulus)


def _clip_leaf(x: Array, usual: Array, root: Array) -> Array:
    # An infinite bound would be infinite in the derivative by the ratio too.
    is_bounded = jnp.isfinite(usual)
    bound = jnp.where(is_bounded, root * jnp.where(is_bounded, usual, 1.0), jnp.inf)
    modulus = jnp.abs(x)
    exceeds = modulus > bound
    # The direction first: the one factor to the bound can be too small for a float.
    direction = _moments.divided(x, jnp.where(exceeds, modulus, 1.0))
    return jnp.where(exceeds, scale_updates(direction, jnp.where(exceeds, bound, 1.0)), x)
