"""Norms of all examples from one pass that keeps no factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example import _grams
from clipax.per_example._calls import Call
from clipax.per_example._programs import Ref
from clipax.per_example._readings import readings_of
from clipax.per_example._tracing import ExampleProgram
from clipax.per_example._values import values_of


def norms_in_passing(
    call: Call, program: ExampleProgram, differs: Mapping[Ref, bool]
) -> tuple[Any, list[Array]]:
    """The norms of each leaf's gradients, after some values of the program.

    As in `_norms`, norms by Gram matrices lose their digits where products nearly cancel. If that
    happens to one example, the gradients of all are made, one after the other.
    """
    of_leaves = readings_of(program)
    readings = [reading for each in of_leaves for reading in each]
    values = values_of(call, program, {**differs, **dict.fromkeys(readings, True)})
    dtypes = [_leaves.wide_dtype(leaf.dtype) for leaf in jax.tree.leaves(program.gradient)]
    rows = zip(of_leaves, dtypes, strict=True)
    norms = [_joined([values[reading][0] for reading in each], dtype) for each, dtype in rows]
    is_exact = jnp.all(jnp.stack([jnp.all(values[reading][1]) for reading in readings]))
    # The norm of an unused leaf is zero everywhere, and needs the type of one that is made.
    axes = {axis for leaf in jax.tree.leaves(call.batch) for axis in _compat.varying_axes(leaf)}
    norms = [_compat.varying_over(norm, axes) for norm in norms]
    return values, list(
        jax.lax.cond(
            _agreed(is_exact, program), lambda: norms, lambda: _norms_of_made(call, program)
        )
    )


def _joined(norms: Sequence[Array], dtype: Any) -> Array:
    """The norm of each example's leaf from the norms of its parts."""
    rows = [norm.reshape(norm.shape[0], -1).astype(dtype) for norm in norms]
    return _grams.row_norms(jnp.concatenate(rows, 1)).astype(dtype)


def _agreed(is_exact: Array, program: ExampleProgram) -> Array:
    """The same on all devices that have a shard of one gradient, which communicate to make it."""
    shards = {axis for axes in program.shards for axis in axes}
    axes = tuple(shards & _compat.varying_axes(is_exact))
    return _pmin(is_exact.astype(jnp.int32), axes) == 1 if axes else is_exact


# JAX gives it no type.
_pmin: Callable[..., Array] = jax.lax.pmin


def _norms_of_made(call: Call, program: ExampleProgram) -> list[Array]:
    gradients = [program.scope.ref(variable) for variable in program.gradients]

    def norms_of_one(batch: Sequence[Any]) -> list[Array]:
        one = call.with_batch(jax.tree.map(lambda leaf: leaf[None], batch))
        values = values_of(one, program, dict.fromkeys(gradients, True))
        return [_grams.row_norms(values[ref])[0] for ref in gradients]

    return jax.lax.map(norms_of_one, call.batch)
