"""The arguments of a loss function, which may be whatever `jax.grad` takes."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core._shown import shown


def arrays_apart(
    loss_fn: Callable[..., Any],
    chosen: Collection[int],
    args: Sequence[Any],
    shared: Mapping[str, Any],
) -> tuple[Callable[..., Any], list[Any]]:
    """Separates arrays from everything that is not an array.

    Args:
      loss_fn: The loss function.
      chosen: The positions of parameters and examples, which stay where they are.
      args: All arguments that are passed by position.
      shared: All arguments that are passed by keyword.

    Returns:
      A function, and its arguments: the chosen ones at their positions, then a list of all other
      arrays. Anything else reaches `loss_fn` as it is, as under `jax.grad`: a flag stays a flag.
    """
    others = {place: value for place, value in enumerate(args) if place not in chosen}
    leaves, structure = jax.tree.flatten((others, dict(shared)))
    is_array = [isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in leaves]

    def loss_of_arrays(*given: Any) -> Any:
        arrays = iter(given[-1])
        rows = zip(leaves, is_array, strict=True)
        values = [next(arrays) if flag else leaf for leaf, flag in rows]
        rest, keywords = jax.tree.unflatten(structure, values)
        return loss_fn(
            *(rest.get(place, each) for place, each in enumerate(given[:-1])), **keywords
        )

    alone = [value if place in chosen else None for place, value in enumerate(args)]
    arrays = [leaf for leaf, flag in zip(leaves, is_array, strict=True) if flag]
    return loss_of_arrays, [*alone, arrays]


def named_last(
    loss_fn: Callable[..., Any],
    names: Sequence[str],
    args: Sequence[Any],
    shared: Mapping[str, Any],
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Makes some keyword arguments of a loss function a dict, its last argument by position.

    Returns:
      The function, and what it gets by position and by keyword.
    """
    for name in names:
        if name not in shared:
            raise ValueError(
                f"batch_argnames has {name!r}, and the arguments that are passed by keyword are"
                f" {sorted(shared)}."
            )

    def loss_of_named(*given: Any, **keywords: Any) -> Any:
        return loss_fn(*given[:-1], **given[-1], **keywords)

    named = {name: shared[name] for name in names}
    rest = {name: value for name, value in shared.items() if name not in named}
    return loss_of_named, (*args, named), rest


def as_array(leaf: Any) -> Any:
    """Makes a number of Python an array, as `jax.grad` does."""
    return jnp.asarray(leaf) if type(leaf) in (float, complex) else leaf


def is_value(leaf: Any) -> bool:
    """Whether JAX can compute with it."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    try:
        jax.typeof(leaf)
    except (TypeError, ValueError):
        return False
    return True


def refuse_two_meanings(loss_fn: Any, count: int, own: Mapping[str, Any]) -> None:
    """Refuses keywords of clipax's own that are also arguments of the loss function.

    Args:
      loss_fn: The loss function.
      count: How many arguments it gets by position.
      own: The keywords of clipax, with None for those that are not given.
    """
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):  # Some callables have no signature.
        return
    for place, parameter in enumerate(parameters):
        is_named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        is_given = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and place < count
        name = parameter.name
        if is_named and not is_given and own.get(name) is not None:
            raise ValueError(
                f"{name} is an argument of this function and one of loss_fn, so it is not clear"
                " which of them is meant. Wrap loss_fn in a function that calls its argument"
                f" something else: lambda *args, loss_{name}=None: loss_fn(*args,"
                f" {name}=loss_{name})."
            )


def of_examples(examples: int, kind: Any, **argument: Any) -> jax.Array | None:
    """Checks an argument that has one boolean or integer for each example, or is None."""
    ((name, value),) = argument.items()
    if value is None:
        return None
    words = "booleans" if kind is np.bool_ else "integers"
    wanted = f"{name} must be {examples} {words}, one an example"
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{wanted}, got {shown(value)}.") from error
    if array.shape != (examples,) or not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{wanted}, got {array.dtype}{list(array.shape)}.")
    return array


def names(**argument: Any) -> tuple[str, ...]:
    """Checks an argument that gives one name, several, or none."""
    ((name, value),) = argument.items()
    names = (value,) if isinstance(value, str) else value
    good = isinstance(names, Sequence) and all(isinstance(each, str) for each in names)
    if not good or len(set(names)) != len(names):
        raise ValueError(f"{name} must be a name or several different ones, got {shown(value)}.")
    return tuple(names)


def position(**argument: Any) -> int:
    """Checks an argument that gives one position."""
    ((name, value),) = argument.items()
    if not _is_position(value):
        raise ValueError(f"{name} must be a position >= 0, got {shown(value)}.")
    return int(value)


def positions(**argument: Any) -> tuple[int, ...]:
    """Checks an argument that gives one position or several."""
    ((name, value),) = argument.items()
    positions = (
        (value,)
        if isinstance(value, int | np.integer)
        else tuple(value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else (None,)
    )
    good = all(map(_is_position, positions))
    if not good or not positions or len(set(positions)) != len(positions):
        raise ValueError(
            f"{name} must be a position >= 0 or several different ones, got {shown(value)}."
        )
    return tuple(int(each) for each in positions)


def float_dtype(**argument: Any) -> Any:
    """Checks a dtype of real numbers, and returns None or what NumPy calls it."""
    ((name, value),) = argument.items()
    if value is None:
        return None
    wanted = f"{name} must be a dtype of real numbers, such as jnp.float32"
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise ValueError(f"{wanted}, got {shown(value)}.") from error
    if not jnp.issubdtype(dtype, np.floating):
        raise ValueError(f"{wanted}, got {shown(value)}.")
    return dtype


def _is_position(value: Any) -> bool:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_integer and int(value) >= 0
