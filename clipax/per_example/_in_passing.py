"""Norms of all examples from one pass that keeps no factors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _branches, _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example import _grams
from clipax.per_example._calls import Call
from clipax.per_example._evaluation import evaluate
from clipax.per_example._norms import is_inexact
from clipax.per_example._programs import Ref
from clipax.per_example._readings import readings_of
from clipax.per_example._tracing import ExampleProgram
from clipax.per_example._values import values_of


def norms_in_passing(
    call: Call, program: ExampleProgram, differs: Mapping[Ref, bool], mask: Array | None
) -> tuple[Any, list[Array]]:
    """The norms of each leaf's gradients, after some values of the program.

    As in `_norms`, norms by Gram matrices lose their digits where products nearly cancel. If that
    happens to one counted example, the gradients of all are made, one after the other.
    """
    of_leaves = readings_of(program)
    readings = [reading for each in of_leaves for reading in each]
    values = values_of(call, program, {**differs, **dict.fromkeys(readings, True)})
    dtypes = [_leaves.wide_dtype(leaf.dtype) for leaf in jax.tree.leaves(program.gradient)]
    rows = zip(of_leaves, dtypes, strict=True)
    norms = [_joined([values[reading][0] for reading in each], dtype) for each, dtype in rows]
    # The norm of an unused leaf is zero everywhere, and needs the type of one that is made.
    axes = {axis for leaf in jax.tree.leaves(call.batch) for axis in _compat.varying_axes(leaf)}
    norms = [_compat.varying_over(norm, axes) for norm in norms]
    each_exact = [is_exact for _, is_exact in map(values.__getitem__, readings)]
    exact = [jnp.all(_rows(is_exact), 1) for is_exact in each_exact if is_exact is not None]
    if not exact:
        return values, norms
    again = functools.partial(_norms_of_made, call, program)
    is_needed = _agreed(jnp.any(is_inexact(exact, mask)), program)
    return values, list(_branches.where_any(is_needed, again, lambda: norms))


def _rows(array: Array) -> Array:
    return array.reshape(array.shape[0], -1)


def _joined(norms: Sequence[Array], dtype: Any) -> Array:
    """The norm of each example's leaf from the norms of its parts."""
    rows = [_rows(norm).astype(dtype) for norm in norms]
    is_one = len(rows) == 1 and rows[0].shape[1] == 1
    return rows[0][:, 0] if is_one else _grams.row_norms(jnp.concatenate(rows, 1))


def _agreed(is_needed: Array, program: ExampleProgram) -> Array:
    """The same on all devices that have a shard of one gradient, which communicate to make it."""
    shards = {axis for axes in program.shards for axis in axes}
    axes = tuple(shards & _compat.varying_axes(is_needed))
    return _pmax(is_needed.astype(jnp.int32), axes) == 1 if axes else is_needed


# JAX gives it no type.
_pmax: Callable[..., Array] = jax.lax.pmax


def _norms_of_made(call: Call, program: ExampleProgram) -> list[Array]:
    gradients = [program.scope.ref(variable) for variable in program.gradients]

    def norms_of_one(batch: Sequence[Any]) -> list[Array]:
        leaves = jax.tree.leaves(call.with_batch(batch).args)
        made = evaluate(program.closed, leaves, gradients)
        return [_grams.row_norms_in_two_reads(jnp.asarray(each)[None])[0] for each in made]

    return jax.lax.map(norms_of_one, call.batch)
