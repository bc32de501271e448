"""The one place where updates are measured, scaled and remembered."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax import _checks, _compat, _leaves, coefficients
from clipax._transformation import transformation
from clipax._typing import Array, AxisName, Bound, Coefficient, Norm, Norms, Updates
from clipax.norms import global_norm
from clipax.thresholds import as_threshold, capped, per_norm


class ClipState(NamedTuple):
    """What happened at the last update; `clipax.metrics` reads it.

    The first three have the structure of the method's norms: a scalar for a global norm,
    a tree of them for leaf norms, of arrays for unit norms. All are float32, or float64
    where the parameters are.
    """

    norm: Norms
    """The norm before clipping."""
    max_norm: Norms
    """The bound that it was held against."""
    coefficient: Norms
    """The factor that was applied: in [0, 1], but of `normalized`, which has no upper end."""
    threshold: Any
    """The state of the rule that gives the bound."""


def clip_by(
    norm: Norm,
    threshold: Bound | optax.GradientTransformation,
    coefficient: Coefficient = coefficients.hard,
    *,
    known_norm: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a clipping method from a norm, a threshold and a coefficient.

    `u <- c * u` with `c = coefficient(norm(u), max_norm)`; `max_norm` is the threshold's.

    Args:
      norm: Measures updates: `(updates) -> norms`, a tree prefix of them. `global_norm`,
        `leaf_norm`, `unit_norm`, `block_rms`, `average_norm`, or your own, which in mapped
        programs sums over shards itself.
      threshold: What bounds the norms: a number, a schedule `count -> value`, a tree
        prefix of them, `relative_to_params(...)`, or any `optax.GradientTransformation`
        that turns one norm into its bound, as `optax.ema(0.9)` does.
      coefficient: `(norm, max_norm) -> factor`, element by element: `hard`, the smooth
        `rational`, `square_root` and `tanh`, `normalized`, or your own.
      known_norm: Whether `update` takes the norm, if it is known already, as the extra
        argument `norm=`, in the structure of the norms, and then does not measure.
      axis_name: As in `global_norm`; the norm is called with it if it is given.

    Returns:
      A transformation whose state is a `ClipState`. `init` takes arrays or
      `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: A number in `threshold` is negative, NaN, boolean, None or a string; at
        `init` and `update`, a prefix does not fit.

    | updates | result |
    |---|---|
    | norm <= max_norm | the updates, bit for bit |
    | all zero | zeros, also for max_norm = 0 |
    | an inf entry | NaN there, zero elsewhere; the history stays as it was |
    | a NaN entry | NaN wherever that norm reaches; the history stays as it was |
    | None, integer, bool, float0 leaf | as it was, not measured |

    A rule of your own recovers as it forgets: whatever finite norms came before, under
    `optax.ema(0.9)` half of a usual norm passes within 7 steps, under `optax.ema(decay)` within
    `log(2) / -log(decay)`.

    Example:
      >>> rule = optax.chain(optax.ema(0.5, debias=False), optax.scale(1.5))
      >>> clip = clip_by(global_norm, rule)
      >>> updates = {"w": jnp.array([3.0, 4.0])}
      >>> clip.update(updates, clip.init(updates))[0]
      {'w': Array([2.25, 3.  ], dtype=float32)}
    """
    _checks.function(norm=norm, coefficient=coefficient)
    threshold = as_threshold(threshold)
    _checks.axis_name(axis_name=axis_name)
    takes_names = _takes_axis_name(norm)

    def measured_over(names: AxisName) -> Norm:
        return norm if names is None else functools.partial(norm, axis_name=names)

    def init_fn(params: Updates) -> ClipState:
        # Mapped axes are rarely bound outside a step, and only its type is asked of the norm.
        names = None if axis_name is None else _leaves.names_bound_here(axis_name)
        zeros = _leaves.zero_norms(measured_over(names), _leaves.only_measured(params))
        nothing_bounds = jax.tree.map(lambda zero: zero + jnp.inf, zeros)
        ones = jax.tree.map(lambda zero: zero + 1, zeros)
        return ClipState(zeros, nothing_bounds, ones, threshold.init(zeros))

    def update_fn(
        updates: Updates,
        state: ClipState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ClipState]:
        is_open = axis_name is None and takes_names
        measure = measured_over(_axes_summed(updates, state.norm) if is_open else axis_name)
        known = extra_args.get("norm") if known_norm else None
        if known is not None:
            norms = _like(state.norm, known, name="norm")
        else:
            norms = _like(state.norm, measure(updates))
        max_norms, threshold_state = threshold.update(
            norms,
            state.threshold,
            _param_norms(measure, updates, params, state.norm),
            max_norm=state.max_norm,
        )
        factors = jax.tree.map(coefficient, norms, max_norms)
        return coefficients.scale_updates(updates, factors), ClipState(
            norms, max_norms, factors, threshold_state
        )

    return transformation(init_fn, update_fn)


def clip_by_history(
    init: Callable[[Array], Any],
    bound: Callable[..., tuple[Array, Any]],
    *,
    norm: Norm,
    max_norm: Bound | None,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """`clip_by` with a bound that each norm's own history gives, and `max_norm` caps.

    `init(zero)` is the history before the first norm, `bound(norm, history)` the bound and
    the history after it.
    """
    threshold = capped(per_norm(optax.GradientTransformation(init, bound)), max_norm)
    return clip_by(norm, threshold, known_norm=norm is global_norm, axis_name=axis_name)


def _takes_axis_name(norm: Norm) -> bool:
    parameters = inspect.signature(norm).parameters.values()
    return any(each.name == "axis_name" or each.kind is each.VAR_KEYWORD for each in parameters)


def _axes_summed(updates: Updates, norms: Norms) -> AxisName:
    """The mapped axes that shard what each norm sums, as far as the last norms tell.

    A leaf's type says that it varies, not whether along its units or within them. Norms
    that vary as it does are those of its units.
    """
    last, treedef = jax.tree.flatten(norms, is_leaf=_leaves.is_none)
    if _compat.untyped_axes() or not any(jnp.ndim(norm) for norm in jax.tree.leaves(norms)):
        return None
    try:
        subtrees = _leaves.up_to(treedef, _leaves.only_measured(updates))
    except ValueError:
        return None  # Whoever compares the norms with the last ones says what is wrong.

    def summed(norm: Array | None, subtree: Updates) -> tuple[Any, ...] | None:
        varying = frozenset[Any]().union(*map(_compat.varying_axes, jax.tree.leaves(subtree)))
        if norm is None or not norm.ndim or not varying:
            return None
        return tuple(sorted(varying - _compat.varying_axes(norm), key=str))

    names = list(map(summed, last, subtrees))
    is_known = any(name is not None for name in names)
    return jax.tree.unflatten(treedef, names) if is_known else None


def _like(template: Norms, norms: Norms, name: str = "updates since `init`") -> Norms:
    """The norms in the structure and dtypes of the state; a frozen leaf's are zero."""

    def conform(kept: Array, norm: Any) -> Array:
        if norm is None:
            return jnp.zeros_like(kept)
        if not jax.tree_util.all_leaves([norm]) or jnp.shape(norm) != kept.shape:
            raise ValueError(
                f"{name} must give norms of shape {kept.shape}, as in the state, got {norm!r}."
            )
        return jnp.asarray(norm).astype(kept.dtype)

    try:
        subtrees = _leaves.up_to(jax.tree.structure(template), norms)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the structure that `init` saw,"
            f" {jax.tree.structure(template)}, got {jax.tree.structure(norms)}."
        ) from error
    kept, treedef = jax.tree.flatten(template)
    return jax.tree.unflatten(treedef, map(conform, kept, subtrees))


def _param_norms(
    measure: Norm, updates: Updates, params: Updates | None, template: Norms
) -> Norms | None:
    """Norms of the parameters where updates are measured; unused ones cost nothing in jit."""
    if params is None:
        return None
    leaves, treedef = jax.tree.flatten(updates, is_leaf=_leaves.is_none)
    try:
        subtrees = _leaves.up_to(treedef, params)
    except ValueError:
        return None  # Only a threshold that needs them can say whether that is wrong.
    matching = [
        param if _leaves.is_measured(leaf) else None
        for leaf, param in zip(leaves, subtrees, strict=True)
    ]
    return _like(template, measure(jax.tree.unflatten(treedef, matching)))
