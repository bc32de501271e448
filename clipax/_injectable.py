"""Factories whose defaults `optax.inject_hyperparams` leaves alone."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Factory = TypeVar("_Factory", bound=Callable[..., Any])


class _Static:
    """A default that is no schedule and no hyperparameter, whatever its type."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", repr(self.value))


def injectable(factory: _Factory) -> _Factory:
    """Hides functions and integers among the defaults from `optax.inject_hyperparams`.

    It reads the signature, calls every function there as a schedule, and makes an array of
    every integer; but a norm is no schedule, and no window has a traced size. In the
    signature, such a default is in a box that it hands on as it is.
    """
    signature = inspect.signature(factory)
    boxed = [
        parameter.replace(default=_Static(parameter.default))
        if _is_taken_wrongly(parameter.default)
        else parameter
        for parameter in signature.parameters.values()
    ]

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = {name: _unboxed(value) for name, value in kwargs.items()}
        return factory(*map(_unboxed, args), **given)

    wrapper.__signature__ = signature.replace(parameters=boxed)  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def _is_taken_wrongly(default: Any) -> bool:
    if default is inspect.Parameter.empty or isinstance(default, bool):
        return False
    return callable(default) or isinstance(default, int)


def _unboxed(value: Any) -> Any:
    return value.value if isinstance(value, _Static) else value
