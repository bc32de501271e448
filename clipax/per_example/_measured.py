"""Measures the gradient of every example, without making it where that can be avoided."""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _compat, _paths
from clipax._core._reduction import Layout, total_norm
from clipax._core._typing import Array
from clipax.per_example._calls import Call
from clipax.per_example._gradients import LeafGradients, leaf_gradients
from clipax.per_example._in_passing import norms_in_passing
from clipax.per_example._norms import norms_of_leaves
from clipax.per_example._plans import Plan, plans_of
from clipax.per_example._tracing import ExampleProgram, trace
from clipax.per_example._values import values_of


class Traced(NamedTuple):
    """What does not depend on which examples are measured."""

    program: ExampleProgram
    plans: list[Plan]


class Measured(NamedTuple):
    """The gradients of all examples: their norms, and what their sum can be made from."""

    losses: Array
    aux: Any
    gradient: Any
    """The shapes and dtypes of one gradient, in the structure of the parameters."""
    leaves: list[LeafGradients] | None
    """What is kept of each leaf; None if nothing is."""
    leaf_norms: list[Array]
    """One norm per example for each leaf, of the shard that is on this device."""
    shards: list[tuple[Hashable, ...]]
    """The mapped axes over which each leaf's gradient lies in shards."""

    def norms(self) -> Array:
        """One norm per example, over all leaves."""
        return self.norms_over(range(len(self.leaf_norms)))

    def norms_in_tree(self) -> Any:
        """One norm per example and leaf, in the structure of the parameters."""
        places = range(len(self.leaf_norms))
        return _paths.rebuilt(self.gradient, [self.norms_over([place]) for place in places])

    def norms_over(self, places: Sequence[int]) -> Array:
        """One norm per example, over the leaves at some places and all of their shards.

        Mapped axes that hold other examples are left alone.
        """
        parts = [self.leaf_norms[place] for place in places]
        if not parts:
            return jnp.zeros(self.leaf_norms[0].shape, jnp.float32)
        by_shards: dict[tuple[Hashable, ...], list[Array]] = {}
        for place, part in zip(places, parts, strict=True):
            by_shards.setdefault(self.shards[place], []).append(part)
        if len(parts) == 1 and () in by_shards:
            return parts[0]
        rows = [
            _compat.varying_over(jnp.stack(alike, 1), shards)
            for shards, alike in by_shards.items()
        ]
        layouts = tuple(Layout((0,), shards) for shards in by_shards)
        return jax.vmap(functools.partial(total_norm, layouts=layouts, ord=2.0))(rows)


def traced(call: Call) -> Traced:
    """Goes from a call to plans."""
    program = trace(call)
    return Traced(program, plans_of(program))


def measure(call: Call, known: Traced, is_twice: bool, mask: Array | None = None) -> Measured:
    """Goes from a program and plans to factors, then norms.

    Examples that the mask leaves out are measured too, with fewer digits where products cancel.
    """
    program, plans = known
    scope = program.scope
    returned = [(scope.ref(each), scope.depends_on_example(each)) for each in program.returned]
    differs = dict(returned)
    leaves: list[LeafGradients] | None = None
    if is_twice:
        values, norms = norms_in_passing(call, program, differs, mask)
    else:
        for plan in plans:
            differs.update(plan.refs)
        values = values_of(call, program, differs)
        found = [leaf_gradients(plan, values, call.examples) for plan in plans]
        leaves, norms = [leaf.kept() for leaf in found], norms_of_leaves(found, mask)
    losses, *aux = [
        values[ref]
        if flag
        else jnp.broadcast_to(values[ref], (call.examples, *jnp.shape(values[ref])))
        for ref, flag in returned
    ]
    return Measured(
        losses,
        jax.tree.unflatten(program.aux_structure, aux),
        program.gradient,
        leaves,
        # The norm of an unused leaf is zero everywhere, and needs the type of the others.
        [_compat.varying_like(norm, losses) for norm in norms],
        program.shards,
    )
