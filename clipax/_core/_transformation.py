"""What every transformation does before its own rule."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import optax

from clipax._core._mapped import reduced
from clipax._core._typing import Updates

_Factory = TypeVar("_Factory", bound=Callable[..., Any])


def transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any], kind: type | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation of whole leaves, so unreduced leaves are summed first.

    With a `kind`, `update` refuses a state of any other kind.
    """

    def init(params: Updates) -> Any:
        return init_fn(reduced(params))

    def update(
        updates: Updates, state: Any, params: Updates | None = None, **extra_args: Any
    ) -> tuple[Updates, Any]:
        if kind is not None and not isinstance(state, kind):
            raise no_state(kind, state)
        return update_fn(reduced(updates), state, reduced(params), **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def no_state(kind: type, given: Any) -> ValueError:
    name = "None" if given is None else f"an object of type {type(given).__name__}"
    if isinstance(given, kind):
        name = f"the {kind.__name__} of another method, or of other parameters"
    return ValueError(
        f"state must be the {kind.__name__} that init(params) or the last update returned, because"
        f" this method remembers earlier steps or counts them for a schedule, got {name}. Call"
        " state = method.init(params) once, and pass the state that each update returns to the"
        " next."
    )


class _Static:
    """A default that is neither a schedule nor a hyperparameter, whatever its type."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return bool(self.value == _unboxed(other))

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", repr(self.value))


def injectable(factory: _Factory) -> _Factory:
    """Hides functions and integers among the defaults from `optax.inject_hyperparams`.

    `inject_hyperparams` reads the signature, calls every function there as a schedule, and makes
    an array of every integer. But a norm is not a schedule, and the size of a window cannot be
    traced. In the signature, such a default is in a box, which Optax passes on as it is.
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
