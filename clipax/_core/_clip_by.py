"""The one place where updates are measured, scaled and remembered."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax import coefficients
from clipax._core import _checks, _compat, _leaves, _paths, _transformation
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import (
    Array,
    AxisName,
    Bound,
    Coefficient,
    LeafRule,
    Norm,
    Norms,
    Updates,
)
from clipax.norms import global_norm
from clipax.thresholds import Threshold, as_threshold, capped, per_norm


class ClipState(NamedTuple):
    """What happened at the last update; `clipax.metrics` reads it.

    The first three have the structure of the method's norms: a scalar for a global norm; for
    leaf norms a dict of them by the leaves' paths, such as "encoder/kernel", whatever
    contains the leaves; of arrays for unit norms. All are float32, or float64 where the
    parameters are.
    """

    norm: Norms
    """The norm before clipping."""
    max_norm: Norms
    """The bound that it was held against."""
    coefficient: Norms
    """The factor that was applied: in [0, 1], but of `normalized`, which has no upper end. Below
    the smallest normal number of its dtype, it may be recorded as 0."""
    threshold: Any
    """The state of the rule that gives the bound."""


@injectable
def clip_by(
    norm: Norm,
    threshold: Bound | optax.GradientTransformation,
    coefficient: Coefficient = coefficients.hard,
    *,
    known_norm: bool = False,
    mask: LeafRule = True,
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
      mask: Which leaves are measured and clipped: True, a tree prefix of booleans, or a
        function `(path, leaf) -> bool`. The norm sees None in the place of the others.
      axis_name: As in `global_norm`; the norm is called with it if it is given.

    Returns:
      A transformation whose state is a `ClipState`. `init` takes arrays or
      `jax.ShapeDtypeStruct`s. With a fixed bound, `update` needs no state: None, or the state
      of another transformation, counts as a new one.

    Raises:
      ValueError: A number in `threshold` is negative, NaN, boolean, None or a string; at
        `init` and `update`, a prefix does not fit; at `update`, there is no state of this
        method and its threshold has a history, or a schedule.

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
    _checks.flag(known_norm=known_norm)
    _checks.static(mask=mask)
    _checks.axis_name(axis_name=axis_name)
    takes_names = _takes_axis_name(norm)

    def measured_over(names: AxisName) -> Norm:
        def measured(updates: Updates) -> Norms:
            norms = norm(updates) if names is None else norm(updates, axis_name=names)
            _checks.norms(norms)
            return norms

        return measured

    structures: dict[Any, Any] = {}

    def is_own(state: Any) -> bool:
        """Whether it may be a state of this method, and is none of another threshold."""
        if not isinstance(state, ClipState):
            return False
        shapes = jax.tree.map(lambda norm: (norm.shape, norm.dtype), state.norm)
        key = jax.tree.structure(state.norm), tuple(jax.tree.leaves(shapes))
        if key not in structures:
            structures[key] = jax.tree.structure(jax.eval_shape(threshold.init, state.norm))
        return bool(jax.tree.structure(state.threshold) == structures[key])

    def init_fn(params: Updates) -> ClipState:
        # Mapped axes are rarely bound outside a step, and only its type is asked of the norm.
        names = None if axis_name is None else _leaves.names_bound_here(axis_name)
        zeros = _leaves.zero_norms(measured_over(names), _leaves.only_measured(params, mask))
        if _compat.stands_for_params(params) and not jax.tree.leaves(zeros):
            # In the place of all leaves, none of which is known here.
            zeros = jnp.zeros((), jnp.float32)
            return ClipState(*[zeros] * len(ClipState._fields))
        nothing_bounds = jax.tree.map(lambda zero: zero + jnp.inf, zeros)
        ones = jax.tree.map(lambda zero: zero + 1, zeros)
        history = threshold.init(zeros)
        for zero in jax.tree.leaves(zeros)[:1]:
            history = _leaves.beside(zero, history)
        return ClipState(zeros, nothing_bounds, ones, history)

    def update_fn(
        updates: Updates,
        state: ClipState | Any,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ClipState]:
        wanted = updates if mask is True else _leaves.only_measured(updates, mask)
        last = state if is_own(state) else None
        names = axis_name
        if names is None and takes_names and last is not None:
            names = _axes_summed(wanted, last.norm)
        measure = measured_over(names)
        known = extra_args.get("norm") if known_norm else None
        if known is None:
            norms = _paths.flat(measure(wanted))
        else:
            _checks.known_norm(norm=known)
            norms = _paths.flat(jax.tree.map(jnp.asarray, known))
        is_alike = last is not None and isinstance(last.norm, dict) == isinstance(norms, dict)
        if last is not None and (is_alike or known is not None):
            norms = _like(last.norm, norms, **({} if known is None else {"name": "norm"}))
            history = last.threshold
        else:
            last, history = None, _no_history(threshold, norms, state)
        max_norms, history = threshold.update(
            norms,
            history,
            _param_norms(measure, wanted, params, norms),
            max_norm=norms if last is None else last.max_norm,
        )
        factors = coefficients.in_two(coefficient, norms, max_norms)
        clipped = _leaves.over(updates, factors.scale(wanted))
        return clipped, ClipState(norms, max_norms, factors.product, history)

    return transformation(init_fn, update_fn)


def clip_by_history(
    init: Callable[[Array], Any],
    bound: Callable[..., tuple[Array, Any]],
    *,
    norm: Norm,
    max_norm: Bound | None,
    mask: LeafRule,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """`clip_by` with a bound that each norm's own history gives, and `max_norm` caps.

    `init(zero)` is the history before the first norm, `bound(norm, history)` the bound and
    the history after it.
    """
    threshold = capped(per_norm(optax.GradientTransformation(init, bound)), max_norm)
    is_known = norm is global_norm
    return clip_by(norm, threshold, known_norm=is_known, mask=mask, axis_name=axis_name)


def _takes_axis_name(norm: Norm) -> bool:
    parameters = inspect.signature(norm).parameters.values()
    return any(each.name == "axis_name" or each.kind is each.VAR_KEYWORD for each in parameters)


def _no_history(threshold: Threshold, norms: Norms, state: Any) -> Any:
    """The state of a threshold that remembers nothing, for who calls a clip without a state."""
    fresh = threshold.init(norms)
    if jax.tree.leaves(fresh):
        raise _transformation.no_state(ClipState, state)
    return fresh


def _axes_summed(updates: Updates, norms: Norms) -> AxisName:
    """The mapped axes that shard what each norm sums, as far as the last norms tell.

    A leaf's type says that it varies, not whether along its units or within them. Norms
    that vary as it does are those of its units.
    """
    if _compat.untyped_axes() or not any(jnp.ndim(norm) for norm in jax.tree.leaves(norms)):
        return None
    names: dict[str, Any] = {}
    leaves = {path: leaf for path, leaf, is_leaf in _paths.positions(updates) if is_leaf}
    last = norms if isinstance(norms, dict) else {"": norms}
    for path, leaf in leaves.items():
        norm = last.get(path)
        varying = _compat.varying_axes(leaf) if _leaves.is_measured(leaf) else frozenset()
        is_of_units = norm is not None and norm.ndim and varying
        names[path] = (
            tuple(sorted(varying - _compat.varying_axes(norm), key=str)) if is_of_units else None
        )
    if all(name is None for name in names.values()):
        return None
    return names if isinstance(norms, dict) else names[""]


def _like(template: Norms, norms: Norms, name: str = "updates since `init`") -> Norms:
    """The norms in the structure and dtypes of the state; a frozen leaf's are zero."""
    kept, given = _by_path(template), _by_path(norms)
    # What has no leaf may stand for all that was there, as where leaves are frozen together.
    hollow = [path for path, norm in given.items() if norm is None]

    def is_there(path: str) -> bool:
        return path in given or any(not up or path.startswith(f"{up}/") for up in hollow)

    added = [path for path in given if given[path] is not None and kept.get(path) is None]
    if added or not all(map(is_there, kept)):
        raise ValueError(
            f"{name} must have the structure that `init` saw, with the norms"
            f" {sorted(kept)}, got {sorted(given)}."
        )

    def conform(path: str, zero: Array | None) -> Array | None:
        norm = given.get(path)
        if zero is None or norm is None:
            return None if zero is None else jnp.zeros_like(zero)
        if not jax.tree_util.all_leaves([norm]) or jnp.shape(norm) != zero.shape:
            raise ValueError(
                f"{name} must give norms of shape {zero.shape}, as in the state, got {norm!r}."
            )
        return jnp.asarray(norm).astype(zero.dtype)

    conformed = {path: conform(path, zero) for path, zero in kept.items()}
    return conformed if isinstance(template, dict) else conformed[""]


def _by_path(norms: Norms) -> dict[str, Any]:
    return norms if isinstance(norms, dict) else {"": norms}


def _param_norms(
    measure: Norm, updates: Updates, params: Updates | None, template: Norms
) -> Norms | None:
    """Norms of the parameters where updates are measured; unused ones cost nothing in jit."""
    if params is None:
        return None
    by_path = {path: leaf for path, leaf, is_leaf in _paths.positions(params) if is_leaf}
    leaves, treedef = jax.tree.flatten(updates)
    matching = [
        by_path.get(path) if _leaves.is_measured(leaf) else None
        for path, leaf in zip(_paths.of_leaves(updates), leaves, strict=True)
    ]
    found = zip(leaves, matching, strict=True)
    if any(_leaves.is_measured(leaf) and param is None for leaf, param in found):
        return None  # Only a threshold that needs them can say whether that is wrong.
    return _like(template, _paths.flat(measure(jax.tree.unflatten(treedef, matching))))
