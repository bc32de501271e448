"""The threshold axis: what bounds a norm.

A threshold is an `optax.GradientTransformation` over the tree of norms:
`init(norms)` and `update(norms, state, param_norms) -> (max_norms, state)`.

`fixed` and `relative_to_params` see the tree as a whole. Any other transformation, such
as `optax.chain(optax.ema(0.9), optax.scale(1.5))`, is a rule for one norm: `clip_by` has
`per_norm` lift it, so that every norm has a state of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves, _paths
from clipax._core._typing import Array, Bound, Norms


class Threshold(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """A threshold over the whole tree of norms, which looks after its own history."""


class FixedState(NamedTuple):
    step_count: Array
    """The number of updates so far; int32."""


def fixed(max_norm: Bound) -> Threshold:
    """Bounds norms by a number, a schedule `count -> value`, or a tree prefix of them.

    Args:
      max_norm: >= 0. `inf` never clips. A value that is known only while tracing cannot
        be checked; a negative one then counts as zero.

    Returns:
      A threshold. With a schedule its state counts the updates; otherwise it holds nothing.

    Raises:
      ValueError: A number in `max_norm` is negative, NaN, boolean, None or a string; at
        `init` and `update`, the prefix does not fit.

    Example:
      >>> threshold = fixed(2.0)
      >>> norms = {"w": jnp.array(5.0), "b": jnp.array(1.0)}
      >>> threshold.update(norms, threshold.init(norms))[0]
      {'b': Array(2., dtype=float32), 'w': Array(2., dtype=float32)}
    """
    return bounded(_checks.non_negative, max_norm=max_norm)


def bounded(
    requirement: Callable[..., None], *, is_lower: bool = False, **bound: Bound
) -> Threshold:
    """`fixed` for a bound with a name and a requirement of its own.

    A lower one, <= 0, bounds norms by its modulus.
    """
    ((name, value),) = bound.items()
    _checks.bound(requirement, **bound)
    leaves = jax.tree.leaves(value, is_leaf=_checks.is_bound_leaf)
    is_scheduled = any(map(_checks.is_schedule, leaves))

    def init_fn(norms: Norms) -> Any:
        step_count = jnp.zeros((), jnp.int32)
        bounds_at(step_count, norms)  # a prefix that does not fit
        return FixedState(step_count) if is_scheduled else optax.EmptyState()

    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        del params, extra_args
        if not is_scheduled:
            return bounds_at(None, norms), state
        count = state.step_count
        return bounds_at(count, norms), FixedState(optax.safe_increment(count))

    def bounds_at(count: Array | None, norms: Norms) -> Norms:
        bounds = _paths.spread(value, norms, is_leaf=_checks.is_bound_leaf, name=name)
        sizes, treedef = jax.tree.flatten(norms)
        rows = zip(sizes, bounds, strict=True)
        return jax.tree.unflatten(treedef, [bound_of(norm, leaf, count) for norm, leaf in rows])

    def bound_of(norm: Array, leaf: Any, count: Array | None) -> Array:
        if _checks.is_schedule(leaf):
            # A schedule of Optax promotes its integer count to a float.
            with jax.numpy_dtype_promotion("standard"):
                leaf = leaf(count)
            _checks.scheduled(**{name: leaf})
        return _bound_like(norm, -leaf if is_lower else leaf, name)

    return Threshold(init_fn, update_fn)


def relative_to_params(ratio: Bound, eps: jax.typing.ArrayLike = 1e-3) -> Threshold:
    """Bounds norms by the parameters' own: `max_norm = ratio * max(param_norm, eps)`.

    Args:
      ratio: > 0, in the forms that `fixed` takes.
      eps: >= 0, the least parameter norm, so that a layer that starts at zero can move.

    Returns:
      A threshold with the state of `fixed(ratio)`.

    Raises:
      ValueError: `ratio` is not > 0 or `eps` not >= 0; at `update`, there are no params.

    Example:
      >>> threshold = relative_to_params(0.1)
      >>> threshold.update(jnp.array(5.0), threshold.init(jnp.array(5.0)), jnp.array(2.0))[0]
      Array(0.2, dtype=float32)
    """
    ratios = bounded(_checks.positive, ratio=ratio)
    _checks.scalar(_checks.non_negative, eps=eps)

    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        del extra_args
        if params is None:
            raise ValueError(
                "A bound relative to the parameters needs params with the structure of the"
                " updates: call update(updates, state, params)."
            )
        ratio_tree, state = ratios.update(norms, state)
        bounds = jax.tree.map(
            lambda r, norm: r * jnp.maximum(norm, jnp.asarray(eps).astype(norm.dtype)),
            ratio_tree,
            params,
        )
        return bounds, state

    return Threshold(ratios.init, update_fn)


def per_norm(rule: optax.GradientTransformation) -> Threshold:
    """Lifts a rule for one norm to a tree of norms, each with a state of its own.

    A norm that is not finite never enters a history: for it, and it alone, the rule's
    state and bound stay as they were.

    Args:
      rule: An `optax.GradientTransformation` whose `update(norm, state, param_norm)`
        gives the bound of one scalar norm.

    Returns:
      A threshold. Its state holds the rule's states stacked, one stack for each dtype of the
      norms that are scalars, and one for each norm that is an array. `update` takes the
      last bounds as the extra argument `max_norm`.

    Raises:
      ValueError: `rule` is no `optax.GradientTransformation`.

    Example:
      >>> threshold = per_norm(optax.chain(optax.ema(0.5, debias=False), optax.scale(1.5)))
      >>> threshold.update(jnp.array(4.0), threshold.init(jnp.array(4.0)))[0]
      Array(3., dtype=float32)
    """
    rule = _checks.transformation(rule=rule)

    def init_fn(norms: Norms) -> Any:
        alike = _leaves.Alike(norms)
        return tuple(
            _leaves.beside(stack, _first_states(rule, stack)) for stack in alike.stack(norms)
        )

    def update_fn(
        norms: Norms,
        state: Any,
        params: Norms = None,
        *,
        max_norm: Norms = None,
        **extra_args: Any,
    ) -> Any:
        del extra_args
        alike = _leaves.Alike(norms)
        stacks = alike.stack(norms)
        absent = [None] * len(stacks)
        param_stacks = absent if params is None else alike.stack(params)
        last_stacks = alike.stack(norms if max_norm is None else max_norm)
        results = [
            _elementwise(update_one, stack)(stack, *others)
            for stack, *others in zip(stacks, state, param_stacks, last_stacks, strict=True)
        ]
        return alike.unstack([bound for bound, _ in results]), tuple(s for _, s in results)

    def update_one(norm: Array, state: Any, param_norm: Array | None, last: Array) -> Any:
        # A rule of Optax promotes its integer counters.
        with jax.numpy_dtype_promotion("standard"):
            max_norm, new_state = rule.update(norm, state, param_norm)
        bound = _not_negative(jnp.asarray(max_norm, norm.dtype))
        return _leaves.choose(jnp.isfinite(norm), (bound, new_state), (last, state))

    return Threshold(init_fn, update_fn)


def capped(threshold: Threshold, max_norm: Bound | None) -> Threshold:
    """The smaller of a threshold's bound and a fixed one; None is no cap."""
    if max_norm is None:
        return threshold
    cap = bounded(_checks.positive, max_norm=max_norm)

    def init_fn(norms: Norms) -> Any:
        return threshold.init(norms), cap.init(norms)

    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        bounds, inner = threshold.update(norms, state[0], params, **extra_args)
        caps, outer = cap.update(norms, state[1])
        return jax.tree.map(jnp.minimum, bounds, caps), (inner, outer)

    return Threshold(init_fn, update_fn)


def _first_states(rule: optax.GradientTransformation, norms: Array) -> Any:
    init = _elementwise(rule.init, norms)
    # Constants of a rule of Optax lie on one device; in jit, where its arguments do.
    is_on_mesh = not jax.typeof(norms).sharding.mesh.empty
    return (jax.jit(init, keep_unused=True) if is_on_mesh else init)(norms)


def _elementwise(function: Callable[..., Any], array: Array) -> Callable[..., Any]:
    for _ in range(array.ndim):
        function = jax.vmap(function)
    return function


def reciprocal_bound(z: Array, mean: Array, std: Array, z_max: Array) -> Array:
    """Computes `bound = mean + z_max^2 * std / z`: a worse spike shrinks more.

    Example:
      >>> z, mean, std, z_max = jnp.array([5.0, 1.0, 0.1, 2.0])
      >>> reciprocal_bound(z, mean, std, z_max)
      Array(1.08, dtype=float32)
    """
    return mean + z_max * (z_max / z) * std


def mean_bound(z: Array, mean: Array, std: Array, z_max: Array) -> Array:
    """Computes `bound = mean`: a spike shrinks to the usual norm.

    Example:
      >>> z, mean, std, z_max = jnp.array([5.0, 1.0, 0.1, 2.0])
      >>> mean_bound(z, mean, std, z_max)
      Array(1., dtype=float32)
    """
    del z, std, z_max
    return mean


def limit_bound(z: Array, mean: Array, std: Array, z_max: Array) -> Array:
    """Computes `bound = mean + z_max * std`: a spike becomes the largest usual norm.

    Example:
      >>> z, mean, std, z_max = jnp.array([5.0, 1.0, 0.1, 2.0])
      >>> limit_bound(z, mean, std, z_max)
      Array(1.2, dtype=float32)
    """
    del z
    return mean + z_max * std


def as_threshold(value: Bound | optax.GradientTransformation) -> Threshold:
    """A threshold as it is, a transformation lifted by `per_norm`, anything else `fixed`."""
    if isinstance(value, Threshold):
        return value
    if _checks.is_transformation(value):
        return per_norm(value)
    return fixed(value)


def _bound_like(norm: Array, value: Any, name: str) -> Array:
    bound = jnp.asarray(value).astype(norm.dtype)
    if jnp.broadcast_shapes(bound.shape, norm.shape) != norm.shape:
        raise ValueError(f"{name} of shape {bound.shape} does not fit norms of {norm.shape}.")
    return _leaves.filled_like(norm, _not_negative(bound))


def _not_negative(bound: Array) -> Array:
    """Zero for a traced bound below it, which must not turn the updates round."""
    # At zero, a maximum would have half of the derivative.
    return jnp.where(bound < 0, 0, bound)
