"""The arguments of a loss function, which may be whatever `jax.grad` takes."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np


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
    good = all(
        isinstance(each, int | np.integer) and not isinstance(each, bool) and each >= 0
        for each in positions
    )
    if not good or not positions or len(set(positions)) != len(positions):
        raise ValueError(
            f"{name} must be a position >= 0 or several different ones, got {value!r}."
        )
    return tuple(int(each) for each in positions)
