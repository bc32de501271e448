"""Scalars of a tree in stacks, so that one operation serves them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves
from clipax._core._operations import sums_in_one_loop
from clipax._core._typing import Array


class Alike:
    """Stacks the scalars of a tree that have one dtype, so that one operation serves them.

    Each array is a stack of its own, because it may be sharded in its own way.
    """

    def __init__(self, tree: Any):
        leaves, self._treedef = jax.tree.flatten(tree)
        groups: dict[Any, list[int]] = {}
        for index, leaf in enumerate(leaves):
            # Sharding does not matter here, because a state must always have one structure.
            is_scalar = jnp.ndim(leaf) == 0
            groups.setdefault(leaf.dtype if is_scalar else index, []).append(index)
        self._groups = list(groups.values())

    def stack(self, tree: Any) -> list[Array]:
        """Stacks a tree of the same structure."""
        leaves = _leaves.up_to(self._treedef, tree)
        return [jnp.stack([leaves[index] for index in group]) for group in self._groups]

    def unstack(self, stacks: list[Array]) -> Any:
        """Undoes `stack`."""
        leaves: list[Any] = [None] * sum(map(len, self._groups))
        for group, stack in zip(self._groups, stacks, strict=True):
            for entry, index in zip(_entries(stack), group, strict=True):
                leaves[index] = entry
        return jax.tree.unflatten(self._treedef, leaves)


@jax.custom_jvp
@jax.jit
def _entries(stack: Array) -> list[Array]:
    if stack.ndim > 1 or len(stack) == 1:
        return rows_of(stack)
    result: list[Array] = jax.lax.platform_dependent(stack, cpu=_in_buffers, default=rows_of)
    return result


@_entries.defjvp
def _entries_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    return jax.jvp(rows_of, primals, tangents)


def rows_of(stack: Array) -> list[Array]:
    return [jax.lax.squeeze(row, (0,)) for row in jax.lax.split(stack, [1] * len(stack))]


def _in_buffers(stack: Array) -> list[Array]:
    """The entries of a vector by sums over parts of it, each of which gives all of its entries.

    XLA for CPUs would compile whatever uses an entry for each entry anew, as it reads another
    place of the vector. What uses buffers is compiled once.
    """
    length = math.isqrt(len(stack) - 1) + 1
    parts = [stack[start : start + length] for start in range(0, len(stack), length)]
    return [entry for part in parts for entry in _summed_out(part)]


def _summed_out(part: Array) -> list[Array]:
    places = np.arange(len(part))
    alone = [jnp.where(places == place, part, 0) for place in places]
    return sums_in_one_loop(alone, 0)
