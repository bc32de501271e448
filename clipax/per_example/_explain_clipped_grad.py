"""Printing the plan for each leaf."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from clipax._core import _checks, _compat, _leaves
from clipax.per_example._calls import ArgNames, ArgNums, call_of, loss_of
from clipax.per_example._measured import Traced, traced
from clipax.per_example._memory import Memory, check_memory, second_pass
from clipax.per_example._overlooked import overlooked
from clipax.per_example._plans import DO_NOT_COMPARE, MUTABLE, Plan

_HEAD = ("leaf", "shape", "norm of one example", "why", "products", "kept")
_NUMBERS = {"products", "kept"}


def explain_clipped_grad(
    loss_fn: Callable[..., Any],
    *args: Any,
    argnums: ArgNums = 0,
    batch_argnums: ArgNums = 1,
    batch_argnames: ArgNames = (),
    prng_argnum: int | None = None,
    has_aux: bool = False,
    memory: Memory = "auto",
    **shared: Any,
) -> None:
    """Prints how the norm of each leaf is found, and what that costs for one example.

    Args:
      loss_fn: As in `clipped_grad`, like the other arguments.
      *args: The arguments of the gradient function, of which only shapes matter:
        `jax.ShapeDtypeStruct`s will do.
      argnums: The position or positions of the parameters.
      batch_argnums: The position or positions of the arguments with the examples.
      batch_argnames: The names of keyword arguments with the examples.
      prng_argnum: The position of a PRNG key that is split, one for each example.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      memory: As in `clipped_grad`, with one bound.
      **shared: The arguments of the gradient function that are passed by keyword.

    The last columns are the number of multiplications for the norm, and how many numbers are
    kept for the sum, as a share of the leaf's size. With "twice", none are kept. If the examples
    together keep more numbers than there are parameters, a line says what keeps fewer.
    Another says what would help a leaf that is made for each example although its factors are
    smaller.

    Raises:
      ValueError: As `clipped_grad`.

    Example:
      >>> def loss_fn(params, x):
      ...     return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
      >>> params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
      >>> explain_clipped_grad(loss_fn, params, jnp.zeros((32, 8)))
      leaf  shape   norm of one example   why                              products   kept
      b     (4,)    made for each example comes from mul                          4   100%
      w     (8, 4)  norms of two vectors  a product that sums over nothing       12    38%
      total                                                                      16    44%
      All 32 examples keep 14 times the parameters; microbatch_size= keeps those of a few examples,
      memory="twice" none.
    """
    _checks.function(loss_fn=loss_fn)
    _checks.flag(has_aux=has_aux)
    check_memory(memory)
    own: dict[str, Any] = {
        "argnums": argnums,
        "batch_argnums": batch_argnums,
        "has_aux": has_aux,
        "batch_argnames": batch_argnames,
        "prng_argnum": prng_argnum,
    }
    usual = {"argnums": 0, "batch_argnums": 1, "batch_argnames": (), "has_aux": False}
    given = {name: value for name, value in own.items() if value != usual.get(name)}
    if memory != "auto":
        given["memory"] = memory
    call = call_of(loss_of(loss_fn, **own), args, shared, **given)
    if not _compat.bound_axes():
        # The way to a norm does not depend on how arrays are sharded. In a mapped program, types
        # say what the loss may do, so there the arrays stay.
        call = call._replace(args=jax.tree.map(_shape, call.args))
    known = traced(call)
    plans = known.plans
    if second_pass(memory, call, known) is not None:
        plans = [plan._replace(entries=0) for plan in plans]
    rows = [_HEAD, *map(_row, plans), *_total(plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(_HEAD, row, widths, strict=True)
        print(  # noqa: T201
            " ".join(
                text.rjust(width + 2) if name in _NUMBERS else text.ljust(width)
                for name, text, width in cells
            ).rstrip()
        )
    for line in [*_advice(plans, call.examples), *_help(known)]:
        print(line)  # noqa: T201


def _shape(leaf: Any) -> Any:
    return _compat.shape_dtype_struct(leaf.shape, leaf.dtype)


def _row(plan: Plan) -> tuple[str, ...]:
    return (plan.name, str(plan.shape), plan.way.value, plan.why, *_numbers([plan]))


def _total(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    return [("total", "", "", "", *_numbers(plans))] if len(plans) > 1 else []


def _numbers(plans: Sequence[Plan]) -> tuple[str, str]:
    return f"{sum(plan.cost for plan in plans):,}", f"{_share_kept(plans):.0%}"


def _share_kept(plans: Sequence[Plan]) -> float:
    size = sum(math.prod(plan.shape) for plan in plans)
    return sum(plan.entries for plan in plans) / max(1, size)


def _advice(plans: Sequence[Plan], examples: Any) -> list[str]:
    # A symbolic number of examples says nothing of the memory.
    times = examples * _share_kept(plans) if _leaves.is_known(examples) else 0
    if times <= 1:
        return []
    return [
        f"All {examples} examples keep {times:.2g} times the parameters; microbatch_size= keeps"
        " those of a few examples,",
        'memory="twice" none.',
    ]


_HELP = {
    DO_NOT_COMPARE: "it has products that do not compare. Use it in one shape, or in parts that"
    " do not overlap.",
    f"comes from {MUTABLE}": f"it comes from {MUTABLE}. Use others.",
}


def _help(known: Traced) -> list[str]:
    """Says what would give factors to leaves that have none although they would be smaller."""
    found = []
    for plan, variable in zip(known.plans, known.program.gradients, strict=True):
        entries = overlooked(plan, known.program.scope, variable)
        if entries is not None:
            why = f"it {plan.why}. Do that to activations instead, where it gives the same."
            why = _HELP.get(plan.why, why)
            found.append(f"No factors for {plan.name} ({entries:,} numbers): {why}")
    return found
