"""The program that makes the gradient of one example."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core._compat import core
from clipax._core._shown import shown
from clipax.per_example import _arguments, _mapped
from clipax.per_example._calls import Call
from clipax.per_example._scopes import Scope


class ExampleProgram(NamedTuple):
    """The program of `jax.value_and_grad`, for one example.

    Its outputs are the loss, the leaves of aux, then the leaves of the gradient.
    """

    closed: core.ClosedJaxpr
    scope: Scope
    """The scope of the whole program."""
    gradient: Any
    """The shapes and dtypes of the gradient, in the structure of the parameters."""
    aux_structure: Any
    shards: list[tuple[Hashable, ...]]
    """The mapped axes over which the gradient of each leaf lies in shards."""

    @property
    def gradients(self) -> list[Any]:
        return self.closed.jaxpr.outvars[self._first_gradient :]

    @property
    def returned(self) -> list[Any]:
        """The loss and the leaves of aux."""
        return self.closed.jaxpr.outvars[: self._first_gradient]

    @property
    def _first_gradient(self) -> int:
        return len(self.closed.jaxpr.outvars) - len(jax.tree.leaves(self.gradient))


def trace(call: Call) -> ExampleProgram:
    """Traces the loss and its gradient, without computing anything."""
    loss = call.loss
    differentiate = jax.value_and_grad(
        _checked(loss.function, loss.has_aux), loss.argnums, loss.has_aux
    )
    closed, (value, gradient) = _program_of_example(differentiate, call)
    aux = value[1] if loss.has_aux else None
    shards = _mapped.sharding_axes(
        closed.jaxpr,
        matters=call.for_each_leaf(call.loss.is_of_gradient),
        batched=call.for_each_leaf(call.loss.is_batched),
        gradients=len(jax.tree.leaves(gradient)),
    )
    scope = Scope(closed.jaxpr, call.for_each_leaf(call.loss.is_batched))
    return ExampleProgram(closed, scope, gradient, jax.tree.structure(aux), shards)


def program_of_loss(call: Call) -> core.ClosedJaxpr:
    """The program of the loss alone, in which custom derivatives are still marked."""
    closed, _ = _program_of_example(call.loss.function, call)
    return closed


def _program_of_example(function: Callable[..., Any], call: Call) -> tuple[core.ClosedJaxpr, Any]:
    """The program with the types that `vmap` gives to one example, and its outputs' shapes."""
    programs: list[Any] = []

    def trace_one(*example: Any) -> tuple[()]:
        programs.append(jax.make_jaxpr(function, return_shape=True)(*example))
        return ()

    # Inside a `vmap`, because mesh axes and weak types have to be as they will be in it.
    jax.eval_shape(jax.vmap(trace_one, call.in_axes), *call.args)
    return programs[0]


def _checked(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The loss function, which now refuses to return anything but a scalar loss and arrays."""

    def checked(*args: Any) -> Any:
        try:
            returned = loss_fn(*args)
        except Exception as error:
            error.add_note("clipax calls loss_fn with one example, without the axis of examples.")
            raise
        if has_aux and not (isinstance(returned, tuple) and len(returned) == 2):
            raise ValueError("With has_aux, loss_fn must return a pair (loss, aux).")
        loss, aux = returned if has_aux else (returned, None)
        _check_aux(aux)
        _check_loss(loss)
        return returned

    return checked


def _check_aux(aux: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not _arguments.is_value(leaf):
            raise ValueError(
                f"What loss_fn returns besides must be arrays, got {shown(leaf)} in"
                f" aux{jax.tree_util.keystr(path)}."
            )


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | int | float):
        raise ValueError(
            f"loss_fn must return one real number for one example, got a"
            f" {type(loss).__name__}. To return more than the loss, set has_aux=True and return"
            " a pair (loss, aux)."
        )
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), np.floating):
        kind = f"{jnp.result_type(loss)}{list(jnp.shape(loss))}"
        raise ValueError(
            f"loss_fn must return one real number for one example, got {kind}. It is called"
            " with one example, without the axis of examples. Only arguments in batch_argnums are"
            " split into examples."
        )
