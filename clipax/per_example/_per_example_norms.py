"""Measuring the gradient of each example."""

from collections.abc import Callable
from typing import Any

from clipax._core import _checks
from clipax.per_example._calls import ArgNames, ArgNums, Call, call_of, loss_of
from clipax.per_example._measured import measure, traced
from clipax.per_example._memory import Memory, check_memory, is_twice
from clipax.per_example._meshes import with_automatic_axes
from clipax.per_example._microbatches import in_parts


def per_example_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: ArgNums = 0,
    batch_argnums: ArgNums = 1,
    batch_argnames: ArgNames = (),
    prng_argnum: int | None = None,
    has_aux: bool = False,
    per_leaf: bool = False,
    memory: Memory = "auto",
) -> Callable[..., Any]:
    """Makes a function that returns the norm of each example's gradient.

    Args:
      loss_fn: As in `clipped_grad`, like the next five arguments.
      argnums: The position or positions of the parameters.
      batch_argnums: The position or positions of the arguments with the examples.
      batch_argnames: The names of keyword arguments with the examples.
      prng_argnum: The position of a PRNG key that is split, one for each example.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      per_leaf: Whether each leaf has norms of its own.
      memory: As in `clipped_grad`. Norms alone take one pass with "twice" too.

    Returns:
      `norm_fn(*args, **shared) -> norms` of shape (examples,), in float32 (float64 for float64
      parameters); with `per_leaf`, in the structure of the parameters.

    Raises:
      ValueError: As `clipped_grad`.

    Example:
      >>> def loss_fn(w, example):
      ...     return jnp.sum(w * example)
      >>> per_example_norms(loss_fn)(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]))
      Array([5. , 0.5], dtype=float32)
    """
    _checks.function(loss_fn=loss_fn)
    _checks.flag(has_aux=has_aux, per_leaf=per_leaf)
    check_memory(memory)
    loss = loss_of(loss_fn, argnums, batch_argnums, has_aux, batch_argnames, prng_argnum)

    def step(call: Call) -> tuple[tuple[()], Any]:
        known = traced(call)
        measured = measure(call, known, is_twice(memory, call, known))
        return (), measured.norms_in_tree() if per_leaf else measured.norms()

    def norms_of(call: Call) -> tuple[Any]:
        return (step(call)[1] if call.examples else in_parts(step, call, (), 1, ())[1],)

    def norm_fn(*args: Any, **shared: Any) -> Any:
        call = call_of(loss, args, shared)
        (norms,) = with_automatic_axes(norms_of, call, out=("examples",))
        return norms

    return norm_fn
