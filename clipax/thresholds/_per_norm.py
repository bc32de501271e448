"""A rule for one norm, applied to each norm of a tree by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipax._core import _alike, _checks, _choice, _placement
from clipax._core._typing import Array, Bound, Norms
from clipax.thresholds._fixed import bounded, not_negative
from clipax.thresholds._threshold import Threshold


def per_norm(rule: optax.GradientTransformation) -> Threshold:
    """Lifts a rule for one norm to a tree of norms, each with a state of its own.

    A norm that is not finite never enters a history: its own state and bound stay as they
    were, and those of other norms go on.

    Args:
      rule: An `optax.GradientTransformation` whose `update(norm, state, param_norm)`
        gives the bound of one scalar norm.

    Returns:
      A threshold. Its state holds the states of the rule in stacks: one stack for all scalar
      norms of one dtype, and one for each norm that is an array. `update` takes the last
      bounds as the extra argument `max_norm`.

    Raises:
      ValueError: `rule` is not an `optax.GradientTransformation`.

    Example:
      >>> threshold = per_norm(optax.chain(optax.ema(0.5, debias=False), optax.scale(1.5)))
      >>> threshold.update(jnp.array(4.0), threshold.init(jnp.array(4.0)))[0]
      Array(3., dtype=float32)
    """
    rule = _checks.transformation(rule=rule)

    def init_fn(norms: Norms) -> Any:
        alike = _alike.Alike(norms)
        return tuple(
            _placement.beside(stack, _first_states(rule, stack)) for stack in alike.stack(norms)
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
        alike = _alike.Alike(norms)
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
        bound = not_negative(jnp.asarray(max_norm, norm.dtype))
        return _choice.choose(jnp.isfinite(norm), (bound, new_state), (last, state))

    return Threshold(init_fn, update_fn)


def as_threshold(**argument: Bound | optax.GradientTransformation) -> Threshold:
    """Returns a threshold as it is, lifts other transformations, and makes the rest `fixed`."""
    ((name, value),) = argument.items()
    if isinstance(value, Threshold):
        return value
    if _checks.is_transformation(value):
        return per_norm(value)
    return bounded(_checks.non_negative, is_lower=False, **{name: value})


def _first_states(rule: optax.GradientTransformation, norms: Array) -> Any:
    init = _elementwise(rule.init, norms)
    # An Optax rule puts constants of its state on one device. Under jit, they lie where its
    # arguments do.
    is_on_mesh = not jax.typeof(norms).sharding.mesh.empty
    return (jax.jit(init, keep_unused=True) if is_on_mesh else init)(norms)


def _elementwise(function: Callable[..., Any], array: Array) -> Callable[..., Any]:
    for _ in range(array.ndim):
        function = jax.vmap(function)
    return function
