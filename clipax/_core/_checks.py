"""Argument checks: each error names the argument, its value, what would be right."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey

from clipax._core import _rules
from clipax._core._shown import shown


def is_schedule(value: Any) -> bool:
    # A callable pytree without numbers, such as a module of static fields, is no tree of bounds.
    return _rules.is_function(value) or (callable(value) and not jax.tree.leaves(value))


def non_negative(**arguments: Any) -> None:
    """Requires numbers >= 0, `inf` included."""
    _require(arguments, lambda value: value >= 0, "a number >= 0")


def positive(**arguments: Any) -> None:
    """Requires numbers > 0, `inf` included."""
    _require(arguments, lambda value: value > 0, "a number > 0")


def non_positive(**arguments: Any) -> None:
    """Requires numbers <= 0, `-inf` included."""
    _require(arguments, lambda value: value <= 0, "a number <= 0")


def finite_positive(**arguments: Any) -> None:
    """Requires finite numbers > 0."""
    _require(arguments, lambda value: 0 < value < math.inf, "a finite number > 0")


def finite_at_least_one(**arguments: Any) -> None:
    """Requires finite numbers >= 1."""
    _require(arguments, lambda value: 1 <= value < math.inf, "a finite number >= 1")


def finite_non_negative(**arguments: Any) -> None:
    """Requires finite numbers >= 0."""
    _require(arguments, lambda value: 0 <= value < math.inf, "a finite number >= 0")


def inside_unit_interval(**arguments: Any) -> None:
    """Requires numbers in (0, 1), such as quantiles."""
    _require(arguments, lambda value: 0 < value < 1, "a number in (0, 1)")


def decay_rate(**arguments: Any) -> None:
    """Requires numbers in [0, 1), such as the weight of the past in an average."""
    _require(arguments, lambda value: 0 <= value < 1, "a number in [0, 1)")


def bound(requirement: Callable[..., None], **arguments: Any) -> None:
    """Applies a requirement to every number in a bound, which may be a tree of them."""
    for name, value in arguments.items():
        found = jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_bound_leaf_or_none)
        for path, leaf in found:
            # A class may have fields without a value, such as the bias of a layer without one.
            is_empty_field = leaf is None and path and isinstance(path[-1], GetAttrKey)
            if not is_schedule(leaf) and not is_empty_field:
                requirement(**{name + jax.tree_util.keystr(path): leaf})


def one_bound(requirement: Callable[..., None], **arguments: Any) -> None:
    """Applies a requirement to a bound that may not be a tree, for methods with one norm."""
    for name, value in arguments.items():
        is_one = value is None or is_bound_leaf(value) or jax.tree_util.all_leaves([value])
        if not is_one:
            advice = " Wrap a schedule that holds numbers in a lambda." if callable(value) else ""
            raise ValueError(
                f"{name} must be one number, array or schedule, got the tree {shown(value)}:"
                f" this method has one norm for all leaves.{advice}"
            )
        if not is_schedule(value):
            scalar(requirement, **{name: value})


def scalar(requirement: Callable[..., None], **arguments: Any) -> None:
    """Applies a requirement to one number, which may not be an array of several."""
    requirement(**arguments)
    for name, value in arguments.items():
        if np.ndim(value) != 0:
            raise ValueError(f"{name} must be one number, got an array of shape {value.shape}.")


def axes(**arguments: Any) -> None:
    """Requires an integer, a tuple of integers, None, a function or a tree."""
    static(**arguments)
    for name, value in arguments.items():
        if callable(value) or not (jax.tree_util.all_leaves([value]) or isinstance(value, tuple)):
            continue
        for axis in value if isinstance(value, tuple) else (value,):
            is_integer = isinstance(axis, int | np.integer) and not isinstance(axis, bool)
            if not is_integer and axis is not None and jax.tree_util.all_leaves([axis]):
                raise ValueError(
                    f"{name} must be an integer or a tuple of them, got {shown(value)}."
                )


def static(**arguments: Any) -> None:
    """Requires values that are known while tracing."""
    arrays = [name for name, value in arguments.items() if isinstance(value, jax.Array)]
    if arrays:
        raise ValueError(
            f"{arrays[0]} must be known while tracing, got the array {arguments[arrays[0]]}."
            f"{_advice_on_injection(arrays)}"
        )


def _advice_on_injection(names: list[str]) -> str:
    """The advice for an argument that `optax.inject_hyperparams` turned into an array."""
    return f" Under `optax.inject_hyperparams`, pass `static_args={tuple(names)!r}`."


def order(ord: float) -> float:
    """Requires the order of a p-norm."""
    static(ord=ord)
    scalar(positive, ord=ord)
    return float(ord)


def positive_integer(**arguments: Any) -> None:
    """Requires integers >= 1 that are known while tracing."""
    static(**arguments)
    for name, value in arguments.items():
        is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not is_integer or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {shown(value)}.")
        if value > np.iinfo(np.int32).max:
            raise ValueError(f"{name} must be an integer < 2^31, got {shown(value)}.")


def warmup(warmup_steps: int | None, window_size: int) -> int:
    """Checks how many values a window needs before it bounds; None is half of the window."""
    steps = max(1, window_size // 2) if warmup_steps is None else warmup_steps
    positive_integer(warmup_steps=steps)
    return steps


def flag(**arguments: Any) -> None:
    """Requires True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {shown(value)}.")


def axis_name(**arguments: Any) -> None:
    """Requires names of mapped axes, none of them twice for one leaf."""
    for name, value in arguments.items():
        if _rules.is_function(value):
            raise ValueError(
                f"{name} must be a name, several names, or a tree prefix of them, got"
                f" {shown(value)}."
            )
        for leaf in jax.tree.leaves(value, is_leaf=_rules.is_rule_value):
            names = _rules.names_of(leaf)
            twice = {axis for axis in names if names.count(axis) > 1}
            if twice:
                raise ValueError(f"{name} must name {twice.pop()!r} once, got {shown(leaf)}.")


def function(**arguments: Any) -> None:
    """Requires functions."""
    # `optax.inject_hyperparams` calls a function as a schedule, which gives an array or None.
    called = [name for name, x in arguments.items() if x is None or isinstance(x, jax.Array)]
    for name, value in arguments.items():
        if not is_schedule(value):
            advice = _advice_on_injection(called) if name in called else ""
            raise ValueError(f"{name} must be a function, got {shown(value)}.{advice}")


def is_transformation(value: Any) -> bool:
    """Whether the value has the two functions of a transformation."""
    is_instance = not isinstance(value, type)
    return is_instance and all(callable(getattr(value, name, None)) for name in ("init", "update"))


def transformation(**argument: Any) -> optax.GradientTransformationExtraArgs:
    """Requires a transformation and returns it as one that takes extra arguments."""
    ((name, value),) = argument.items()
    if not is_transformation(value):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation, got {shown(value)}, which is not an"
            " object with the functions `init` and `update`."
        )
    if not isinstance(value, optax.GradientTransformation):  # such as optax.MultiSteps
        parameters = inspect.signature(value.update).parameters.values()
        takes_extra = any(each.kind is each.VAR_KEYWORD for each in parameters)
        kind = (
            optax.GradientTransformationExtraArgs if takes_extra else optax.GradientTransformation
        )
        value = kind(value.init, value.update)
    return optax.with_extra_args_support(value)


def norms(values: Any) -> None:
    """Requires that a user's norm function returns real numbers."""
    for leaf in jax.tree.leaves(values):
        if not isinstance(leaf, (float, np.ndarray, np.generic, jax.Array)) or not _is_real(leaf):
            raise ValueError(f"norm must give real numbers, got {shown(leaf)}.")


def scheduled(**arguments: Any) -> None:
    """Requires that a schedule returns real numbers; negative ones count as zero later."""
    for name, value in arguments.items():
        is_number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
        if not is_number or not _is_real(value):
            raise ValueError(f"{name} must be a schedule that gives numbers, got {shown(value)}.")


def known_norm(**arguments: Any) -> None:
    """Requires norms that were measured elsewhere: real numbers >= 0, NaN or inf."""
    for name, value in arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            _require(
                {name + jax.tree_util.keystr(path): leaf},
                lambda item: not item < 0,
                "a norm, a number >= 0, or a tree of norms with the structure of the state's norm",
                is_nan_allowed=True,
            )


def _require(
    arguments: dict[str, Any],
    holds: Callable[[float], bool],
    wanted: str,
    *,
    is_nan_allowed: bool = False,
) -> None:
    for name, value in arguments.items():
        is_number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
        if not is_number or isinstance(value, bool) or not _is_real(value):
            raise ValueError(f"{name} must be {wanted}, got {shown(value)}.")
        if isinstance(value, jax.Array) and not _is_known(value):
            continue
        for item in _as_floats(value):
            if not (holds(item) and (is_nan_allowed or not math.isnan(item))):
                raise ValueError(f"{name} must be {wanted}, got {shown(value)}.")


def _as_floats(value: Any) -> list[float]:
    try:
        return [float(item) for item in np.asarray(value).ravel()]
    except OverflowError:
        return [math.nan]  # No requirement accepts an integer beyond all floats.


def _is_known(array: jax.Array) -> bool:
    return not isinstance(array, jax.core.Tracer) and array.is_fully_addressable


def _is_real(value: Any) -> bool:
    dtype = getattr(value, "dtype", np.dtype(float))
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)


def _is_bound_leaf_or_none(node: Any) -> bool:
    return node is None or is_bound_leaf(node)


def is_bound_leaf(node: Any) -> bool:
    """Whether the node is a leaf in a tree of bounds.

    A schedule counts, because it can be a pytree itself, such as `jax.tree_util.Partial`. An
    iterator counts, because JAX would refuse to traverse it.
    """
    return isinstance(node, Iterator) or is_schedule(node)
