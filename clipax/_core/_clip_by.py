"""The one place that joins a norm, a threshold, a coefficient into a method."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax import coefficients
from clipax._core import (
    _checks,
    _compat,
    _leaves,
    _mapped,
    _norm_trees,
    _paths,
    _placement,
    _rules,
    _scaling,
    _transformation,
)
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import (
    AxisName,
    Bound,
    Coefficient,
    LeafRule,
    Norm,
    Norms,
    Updates,
)
from clipax.thresholds import Threshold
from clipax.thresholds._per_norm import as_threshold


class ClipState(NamedTuple):
    """What happened at the last update; `clipax.metrics` reads it.

    The first three fields have the structure of the method's norms: a scalar for a global norm,
    a dict of scalars for leaf norms, a dict of arrays for unit norms. Its keys are the paths of
    the leaves, such as "encoder/kernel", whatever contains the leaves. All are float32, or
    float64 where the parameters are.
    """

    norm: Norms
    """The norm before clipping."""
    max_norm: Norms
    """The bound on that norm."""
    coefficient: Norms
    """The factor that was applied, in [0, 1]; that of `normalized` can exceed 1. A factor below
    the smallest normal number of its dtype may be recorded as 0."""
    threshold: Any
    """The state of the rule that gives the bound."""


@injectable
def clip_by(
    norm: Norm,
    threshold: Bound | optax.GradientTransformation,
    coefficient: Coefficient = coefficients.hard,
    *,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a clipping method from a norm, a threshold and a coefficient.

    `u <- c * u` with `c = coefficient(norm(u), max_norm)`, where the threshold gives `max_norm`.

    Args:
      norm: Measures updates: `(updates) -> norms`, a tree prefix of them. `global_norm`,
        `leaf_norm`, `unit_norm`, `block_rms`, `average_norm`, or your own, which must
        sum over shards itself in mapped programs.
      threshold: What bounds the norms: a number, a schedule `count -> value`, a tree
        prefix of them, `relative_to_params(...)`, or any `optax.GradientTransformation`
        that turns one norm into its bound, as `optax.ema(0.9)` does.
      coefficient: `(norm, max_norm) -> factor`, element by element: `hard`, the smooth
        `rational`, `square_root` and `tanh`, `normalized`, or your own.
      mask: Which leaves are measured and clipped: True, a tree prefix of booleans, or a
        function `(path, leaf) -> bool`. The norm sees None in place of the others.
      axis_name: As in `global_norm`. If it is given, the norm is called with it.

    Returns:
      A transformation whose state is a `ClipState`. `init` takes arrays or
      `jax.ShapeDtypeStruct`s. With a fixed bound, `update` needs no state: None, or the state
      of another transformation, counts as a new one. `update` takes norms that are known
      already as the extra argument `norm=`, in the structure of the state's, and then does not
      measure the updates. A single number is a norm of the whole tree: every method in a chain
      that has one norm takes it, and methods with a norm for each leaf or unit ignore it.

    Raises:
      ValueError: A number in `threshold` is negative, NaN, boolean, None or a string; at
        `init` and `update`, a prefix does not fit; at `update`, the state is missing or
        another method's, and the threshold has a history or a schedule.

    | updates | result |
    |---|---|
    | norm <= max_norm | the updates, bit for bit |
    | all zero | zeros, also for max_norm = 0 |
    | an inf entry | NaN there, zero elsewhere; the history stays as it was |
    | a NaN entry | NaN wherever that norm reaches; the history stays as it was |
    | None, integer, bool, float0 leaf | unchanged, not measured |

    A rule of your own recovers as fast as it forgets. After any finite norms, half of a usual
    norm passes within 7 steps under `optax.ema(0.9)`, and within `log(2) / -log(decay)` steps
    under `optax.ema(decay)`.

    Example:
      >>> rule = optax.chain(optax.ema(0.5, debias=False), optax.scale(1.5))
      >>> clip = clip_by(global_norm, rule)
      >>> updates = {"w": jnp.array([3.0, 4.0])}
      >>> clip.update(updates, clip.init(updates))[0]
      {'w': Array([2.25, 3.  ], dtype=float32)}
    """
    _checks.function(norm=norm, coefficient=coefficient)
    rule = as_threshold(threshold=threshold)
    _checks.static(mask=mask)
    _checks.axis_name(axis_name=axis_name)
    takes_names = _mapped.takes_axis_name(norm)

    def measured(updates: Updates, **names: AxisName) -> Norms:
        norms = norm(updates, **names)
        _checks.norms(norms)
        return norms

    structures: dict[Any, Any] = {}

    def is_own(state: Any) -> bool:
        """Whether this may be a state of this method, with the history of this threshold."""
        if not isinstance(state, ClipState):
            return False
        shapes = jax.tree.map(lambda norm: (norm.shape, norm.dtype), state.norm)
        key = jax.tree.structure(state.norm), tuple(jax.tree.leaves(shapes))
        if key not in structures:
            structures[key] = jax.tree.structure(jax.eval_shape(rule.init, state.norm))
        return bool(jax.tree.structure(state.threshold) == structures[key])

    def init_fn(params: Updates) -> ClipState:
        wanted = _rules.only_measured(params, mask)
        zeros = _placement.zero_norms(measured, wanted, axis_name=axis_name)
        if _compat.stands_for_params(params) and not jax.tree.leaves(zeros):
            # One placeholder is in place of all parameters, so no leaf is known here.
            zeros = jnp.zeros((), jnp.float32)
            return ClipState(*[zeros] * len(ClipState._fields))
        nothing_bounds = jax.tree.map(lambda zero: zero + jnp.inf, zeros)
        ones = jax.tree.map(lambda zero: zero + 1, zeros)
        history = rule.init(zeros)
        for zero in jax.tree.leaves(zeros)[:1]:
            history = _placement.beside(zero, history)
        return ClipState(zeros, nothing_bounds, ones, history)

    def update_fn(
        updates: Updates,
        state: ClipState | Any,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ClipState]:
        wanted = updates if mask is True else _rules.only_measured(updates, mask)
        last = state if is_own(state) else None
        names = axis_name
        if names is None and takes_names and last is not None:
            names = _mapped.summed_according_to(last.norm, wanted)
        measure = _mapped.with_names(measured, names)
        norms = given_norms(measure, wanted, last, extra_args.get("norm"))
        if norms is None:
            norms = _paths.flat(measure(wanted))
            if last is not None and isinstance(last.norm, dict) != isinstance(norms, dict):
                last = None
            if last is not None:
                norms = _norm_trees.conformed(norms, last.norm)
        max_norms, history = rule.update(
            norms,
            _no_history(rule, norms, state) if last is None else last.threshold,
            _norm_trees.of_params(measure, wanted, params, norms),
            max_norm=norms if last is None else last.max_norm,
        )
        factors = _scaling.in_two(coefficient, norms, max_norms)
        clipped = _leaves.over(updates, factors.scale(wanted))
        return clipped, ClipState(norms, max_norms, factors.product, history)

    def given_norms(
        measure: Norm, wanted: Updates, last: ClipState | None, given: Any
    ) -> Norms | None:
        if given is None:
            return None
        template = _paths.flat(jax.eval_shape(measure, wanted)) if last is None else last.norm
        return _norm_trees.known(given, template)

    return transformation(init_fn, update_fn)


def _no_history(threshold: Threshold, norms: Norms, state: Any) -> Any:
    """Makes the state of a threshold that remembers nothing, for callers without a state."""
    fresh = threshold.init(norms)
    if jax.tree.leaves(fresh):
        raise _transformation.no_state(ClipState, state)
    return fresh
