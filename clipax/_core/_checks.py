"""Argument checks: each names the argument, what was given and what is right."""

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


def is_schedule(value: Any) -> bool:
    # A callable pytree without numbers, as a module of static fields, is no tree of bounds.
    return _rules.is_function(value) or (callable(value) and not jax.tree.leaves(value))


def non_negative(**arguments: Any) -> None:
    """Requires numbers >= 0, where a number is given; `inf` is one."""
    _require(arguments, lambda value: value >= 0, "a number >= 0")


def positive(**arguments: Any) -> None:
    """Requires numbers > 0, where a number is given; `inf` is one."""
    _require(arguments, lambda value: value > 0, "a number > 0")


def non_positive(**arguments: Any) -> None:
    """Requires numbers <= 0, where a number is given; `-inf` is one."""
    _require(arguments, lambda value: value <= 0, "a number <= 0")


def finite_positive(**arguments: Any) -> None:
    """Requires finite numbers > 0, where a number is given."""
    _require(arguments, lambda value: 0 < value < math.inf, "a finite number > 0")


def finite_non_negative(**arguments: Any) -> None:
    """Requires finite numbers >= 0."""
    _require(arguments, lambda value: 0 <= value < math.inf, "a finite number >= 0")


def inside_unit_interval(**arguments: Any) -> None:
    """Requires numbers in (0, 1), where a number is given: quantiles."""
    _require(arguments, lambda value: 0 < value < 1, "a number in (0, 1)")


def decay_rate(**arguments: Any) -> None:
    """Requires numbers in [0, 1), where a number is given: the EMA weight of the past."""
    _require(arguments, lambda value: 0 <= value < 1, "a number in [0, 1)")


def bound(requirement: Callable[..., None], **arguments: Any) -> None:
    """Checks every number in a bound: a number, a schedule or a tree of them."""
    for name, value in arguments.items():
        found = jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_bound_leaf_or_none)
        for path, leaf in found:
            # A class may have fields without a value, as a layer without bias.
            is_empty_field = leaf is None and path and isinstance(path[-1], GetAttrKey)
            if not is_schedule(leaf) and not is_empty_field:
                requirement(**{name + jax.tree_util.keystr(path): leaf})


def one_bound(requirement: Callable[..., None], **arguments: Any) -> None:
    """As `bound`, for methods that have one norm and so take no tree of bounds."""
    for name, value in arguments.items():
        is_one = value is None or is_bound_leaf(value) or jax.tree_util.all_leaves([value])
        if not is_one:
            advice = " A schedule with numbers in it needs a lambda." if callable(value) else ""
            raise ValueError(
                f"{name} must be one number, array or schedule, got the tree {value!r}:"
                f" this method has one norm for all leaves.{advice}"
            )
        if not is_schedule(value):
            scalar(requirement, **{name: value})


def scalar(requirement: Callable[..., None], **arguments: Any) -> None:
    """Requires one number, not an array of them."""
    requirement(**arguments)
    for name, value in arguments.items():
        if np.ndim(value) != 0:
            raise ValueError(f"{name} must be one number, got an array of shape {value.shape}.")


def axes(**arguments: Any) -> None:
    """Requires an integer, a tuple of them or None, where it is no function and no tree."""
    static(**arguments)
    for name, value in arguments.items():
        if callable(value) or not (jax.tree_util.all_leaves([value]) or isinstance(value, tuple)):
            continue
        for axis in value if isinstance(value, tuple) else (value,):
            is_integer = isinstance(axis, int | np.integer) and not isinstance(axis, bool)
            if not is_integer and axis is not None and jax.tree_util.all_leaves([axis]):
                raise ValueError(f"{name} must be an integer or a tuple of them, got {value!r}.")


def static(**arguments: Any) -> None:
    """Requires values that are known while tracing."""
    arrays = [name for name, value in arguments.items() if isinstance(value, jax.Array)]
    if arrays:
        raise ValueError(
            f"{arrays[0]} must be known while tracing, got the array {arguments[arrays[0]]}."
            f"{_advice_on_injection(arrays)}"
        )


def _advice_on_injection(names: list[str]) -> str:
    """What helps where `optax.inject_hyperparams` took static arguments for other ones."""
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
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        if value > np.iinfo(np.int32).max:
            raise ValueError(f"{name} must be an integer < 2^31, got {value!r}.")


def warmup(warmup_steps: int | None, window_size: int) -> int:
    """How many values a window needs before it counts: half of it where nothing is given."""
    steps = max(1, window_size // 2) if warmup_steps is None else warmup_steps
    positive_integer(warmup_steps=steps)
    return steps


def flag(**arguments: Any) -> None:
    """Requires True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {value!r}.")


def axis_name(**arguments: Any) -> None:
    """Requires names, and that no leaf's mapped axes are named twice."""
    for name, value in arguments.items():
        if _rules.is_function(value):
            raise ValueError(
                f"{name} must be a name, several, or a tree prefix of them, got {value!r}."
            )
        for leaf in jax.tree.leaves(value, is_leaf=_rules.is_rule_value):
            names = _rules.names_of(leaf)
            twice = {axis for axis in names if names.count(axis) > 1}
            if twice:
                raise ValueError(f"{name} must name {twice.pop()!r} once, got {leaf!r}.")


def function(**arguments: Any) -> None:
    """Requires functions."""
    # A function that was called as a schedule, on an integer, gave an array or None.
    called = [name for name, x in arguments.items() if x is None or isinstance(x, jax.Array)]
    for name, value in arguments.items():
        if not is_schedule(value):
            advice = _advice_on_injection(called) if name in called else ""
            raise ValueError(f"{name} must be a function, got {value!r}.{advice}")


def is_transformation(value: Any) -> bool:
    """Whether it can be used as a transformation: of optax, or with its two functions."""
    is_instance = not isinstance(value, type)
    return is_instance and all(callable(getattr(value, name, None)) for name in ("init", "update"))


def transformation(**argument: Any) -> optax.GradientTransformationExtraArgs:
    """Requires a transformation, and gives it back as one that takes extra arguments."""
    ((name, value),) = argument.items()
    if not is_transformation(value):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation, got {value!r}, which is no object"
            " with the functions `init` and `update`."
        )
    if not isinstance(value, optax.GradientTransformation):  # as optax.MultiSteps
        parameters = inspect.signature(value.update).parameters.values()
        takes_extra = any(each.kind is each.VAR_KEYWORD for each in parameters)
        kind = (
            optax.GradientTransformationExtraArgs if takes_extra else optax.GradientTransformation
        )
        value = kind(value.init, value.update)
    return optax.with_extra_args_support(value)


def norms(values: Any) -> None:
    """Requires that a norm of the user's own gives real numbers."""
    for leaf in jax.tree.leaves(values):
        if not isinstance(leaf, (float, np.ndarray, np.generic, jax.Array)) or not _is_real(leaf):
            raise ValueError(f"norm must give real numbers, got {leaf!r}.")


def scheduled(**arguments: Any) -> None:
    """Requires that a schedule gives real numbers; those below zero count as zero."""
    for name, value in arguments.items():
        is_number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
        if not is_number or not _is_real(value):
            raise ValueError(f"{name} must be a schedule that gives numbers, got {value!r}.")


def known_norm(**arguments: Any) -> None:
    """Requires real numbers >= 0, NaN or inf, where one is given: norms that were measured."""
    for name, value in arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            _require(
                {name + jax.tree_util.keystr(path): leaf},
                lambda item: not item < 0,
                "a norm, a number >= 0, or a tree of them in the structure of the method's",
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
            raise ValueError(f"{name} must be {wanted}, got {value!r}.")
        if isinstance(value, jax.Array) and not _is_known(value):
            continue
        for item in _as_floats(value):
            if not (holds(item) and (is_nan_allowed or not math.isnan(item))):
                raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def _as_floats(value: Any) -> list[float]:
    try:
        return [float(item) for item in np.asarray(value).ravel()]
    except OverflowError:
        return [math.nan]  # An integer beyond all floats, which no requirement holds of.


def _is_known(array: jax.Array) -> bool:
    return not isinstance(array, jax.core.Tracer) and array.is_fully_addressable


def _is_real(value: Any) -> bool:
    dtype = getattr(value, "dtype", np.dtype(float))
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)


def _is_bound_leaf_or_none(node: Any) -> bool:
    return node is None or is_bound_leaf(node)


def is_bound_leaf(node: Any) -> bool:
    """A schedule may be a pytree itself, as `jax.tree_util.Partial`; JAX refuses iterators."""
    return isinstance(node, Iterator) or is_schedule(node)
