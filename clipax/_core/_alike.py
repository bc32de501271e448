"""Scalars of a tree in stacks, so that one operation serves them."""

from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _leaves
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
            for row, index in enumerate(group):
                leaves[index] = stack[row]
        return jax.tree.unflatten(self._treedef, leaves)
