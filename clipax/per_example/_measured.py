"""Measures the gradient of every example, without making it where that can be avoided."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _compat, _paths
from clipax._core._reduction import Layout, total_norm
from clipax._core._typing import Array
from clipax.per_example._calls import Call
from clipax.per_example._evaluation import evaluate
from clipax.per_example._gradients import LeafGradients, leaf_gradients
from clipax.per_example._norms import norms_of_leaves
from clipax.per_example._plans import Plan, plans_of
from clipax.per_example._programs import Ref, Values
from clipax.per_example._tracing import ExampleProgram, trace


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
    leaves: list[LeafGradients]
    leaf_norms: list[Array]
    """One norm per example for each leaf, of the shard that is on this device."""
    shards: list[tuple[Hashable, ...]]
    """The mapped axes over which each leaf's gradient lies in shards."""

    def norms(self) -> Array:
        """One norm per example, over all leaves."""
        return self.norms_over(range(len(self.leaves)))

    def norms_in_tree(self) -> Any:
        """One norm per example and leaf, in the structure of the parameters."""
        places = range(len(self.leaves))
        return _paths.rebuilt(self.gradient, [self.norms_over([place]) for place in places])

    def norms_over(self, places: Sequence[int]) -> Array:
        """One norm per example, over the leaves at some places and all of their shards.

        Mapped axes that hold other examples are left alone.
        """
        parts = [self.leaf_norms[place] for place in places]
        if not parts:
            return jnp.zeros(self.leaf_norms[0].shape, jnp.float32)
        layouts = tuple(Layout((), self.shards[place]) for place in places)
        if len(parts) == 1 and not layouts[0].shards:
            return parts[0]
        rows = zip(parts, layouts, strict=True)
        varying = [_compat.varying_over(part, layout.shards) for part, layout in rows]
        return jax.vmap(functools.partial(total_norm, layouts=layouts, ord=2.0))(varying)


def traced(call: Call) -> Traced:
    """Goes from a call to plans."""
    program = trace(call)
    return Traced(program, plans_of(program))


def measure(call: Call, known: Traced | None = None) -> Measured:
    """Goes from a call to norms: program, plans, factors, norms."""
    program, plans = known or traced(call)
    scope, examples = program.scope, call.examples
    returned = [(scope.ref(each), scope.depends_on_example(each)) for each in program.returned]
    differs = dict(returned)
    for plan in plans:
        differs.update(plan.refs)
    values = _values_of(call, program, differs)
    losses, *aux = [
        values[ref] if flag else jnp.broadcast_to(values[ref], (examples, *jnp.shape(values[ref])))
        for ref, flag in returned
    ]
    leaves = [leaf_gradients(plan, values, examples) for plan in plans]
    return Measured(
        losses,
        jax.tree.unflatten(program.aux_structure, aux),
        program.gradient,
        [leaf.kept() for leaf in leaves],
        # The norm of an unused leaf is zero everywhere, and needs the type of the others.
        [_compat.varying_like(norm, losses) for norm in norms_of_leaves(leaves)],
        program.shards,
    )


def _values_of(call: Call, program: ExampleProgram, differs: Mapping[Ref, bool]) -> Values:
    """The values of some variables for all examples, or once if they are the same for all."""
    refs = list(differs)

    def evaluate_one(*example: Any) -> list[Any]:
        return evaluate(program.closed, jax.tree.leaves(example), refs)

    out_axes = [0 if differs[ref] else None for ref in refs]
    found = jax.vmap(evaluate_one, call.in_axes, out_axes)(*call.args)
    return dict(zip(refs, found, strict=True))
