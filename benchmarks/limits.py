"""The least that a step with a method must move, as a program that moves just that.

A step reads the gradients once for each norm that has to be known before they are scaled, and
reads and writes each memory that has the shape of the parameters. The memories are found in the
state that the method makes, so that a new method has its limit by itself.
"""

import collections
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import workloads

Optimizer = optax.GradientTransformation


class Reads(NamedTuple):
    """Passes that have to end before the updates can be scaled."""

    gradients: int = 1
    params: int = 0
    memories: int = 0


_ENTRYWISE = Reads(gradients=0)
_WITH_PARAMS = Reads(params=1)
_WITH_MEMORIES = Reads(memories=1)
# Of all that one read of the gradients is too little or too much for.
READS = {
    # Each entry has a bound of its own, which needs no norm.
    "acclip": _ENTRYWISE,
    "clip": _ENTRYWISE,
    "clip_by_value": _ENTRYWISE,
    "smooth_clip_by_value": _ENTRYWISE,
    "spam_clip": _ENTRYWISE,
    "adaptive_grad_clip": _WITH_PARAMS,
    "clippy": _WITH_PARAMS,
    # The norm is that of the gradients with the memory.
    "clip21": _WITH_MEMORIES,
    "u_clip": _WITH_MEMORIES,
    # What goes in is compared with what comes out, whose factor has to be known.
    "observe": Reads(gradients=2),
    # The bound on entries needs the largest, and the norm is that of what this bound leaves.
    "stable_spam": Reads(gradients=2),
    # The gradients and the second moments, which are as large.
    "scale_by_stable_adam": Reads(gradients=2),
}


class Traffic(NamedTuple):
    """What is moved besides what the optimizer moves."""

    reads: Reads
    memories: tuple[tuple[tuple[int, ...], str], ...]
    """Shape and dtype of each array that is read and written."""
    leaves: int
    """How many arrays there are for the parameters."""

    @property
    def name(self) -> str:
        reads, dtypes = self.reads, collections.Counter(dtype for _, dtype in self.memories)
        parts = [
            _counted(reads.gradients, "read"),
            _counted(reads.params, "read") + " of the parameters" if reads.params else "",
            _counted(reads.memories, "read") + " of the memory" if reads.memories else "",
            *(
                _counted(-(-arrays // self.leaves), f"{dtype} memory", f"{dtype} memories")
                for dtype, arrays in dtypes.items()
            ),
        ]
        return "limit: alone, and " + ", ".join(filter(None, parts))


def _counted(number: int, one: str, many: str | None = None) -> str:
    words = ("", "one", "two", "three")
    word = words[number] if number < len(words) else str(number)
    return f"{word} {one if number == 1 else many or f'{one}s'}" if number else ""


READ_ONCE = Traffic(Reads(), (), 1).name
"""The limit of a norm of the gradients."""


def traffic(row: str, full: Optimizer, alone: Optimizer, params: Any) -> Traffic | None:
    """Of a row's optimizer, over the optimizer alone; None where it moves nothing else."""
    reads = READS.get(row.removeprefix("optax.").split("(")[0], Reads())
    memories = [(leaf.shape, str(leaf.dtype)) for leaf in _memories(full, alone, params)]
    leaves = len(jax.tree.leaves(params))
    return Traffic(reads, tuple(memories), leaves) if any(reads) or memories else None


def _memories(full: Optimizer, alone: Optimizer, params: Any) -> list[jax.ShapeDtypeStruct]:
    """Arrays of the state with the shape of a parameter that the optimizer alone has not."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.shape}

    def arrays(optimizer: Optimizer) -> list[jax.ShapeDtypeStruct]:
        state = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
        return [leaf for leaf in state if leaf.shape in shapes]

    left = collections.Counter(leaf.shape for leaf in arrays(alone))
    more = []
    # The optimizer's own come last, behind those of a clip or inside a wrapper.
    for leaf in reversed(arrays(full)):
        if left[leaf.shape]:
            left[leaf.shape] -= 1
        else:
            more.append(leaf)
    return more[::-1]


def least(moved: Traffic, alone: Optimizer) -> Optimizer:
    """A step that moves just this: it sums what it reads, and adds to its memories."""

    def init_fn(params: Any) -> Any:
        memories = [jnp.zeros(shape, dtype) for shape, dtype in moved.memories]
        return memories, _sums(moved.reads, params, params, memories), alone.init(params)

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        memories, _, inner = state
        sums = _sums(moved.reads, updates, params, memories)
        # What is donated is written once it was read, or XLA would copy it: by a factor of one.
        one = jnp.where(sums[-1] < 0, 2.0, 1.0) if sums else jnp.ones(())
        memories = [
            _added(memory, leaf, one)
            for memory, leaf in zip(memories, _of_shapes(updates, memories), strict=True)
        ]
        updates, inner = alone.update(updates, inner, params)
        updates = jax.tree.map(lambda leaf: workloads.scaled(leaf, one), updates)
        return updates, (memories, sums, inner)

    return optax.GradientTransformation(init_fn, update_fn)


def _sums(reads: Reads, updates: Any, params: Any, memories: Any) -> list[jax.Array]:
    """A sum for each pass, which begins when the one before has ended."""
    # XLA would else keep what Adam needs too: squares, and float32 of bfloat16 leaves.
    apart, params = jax.lax.optimization_barrier((updates, params))
    sums: list[jax.Array] = []
    for number in range(reads.gradients):
        apart, sums = jax.lax.optimization_barrier((apart, sums))
        sums = [*sums, _sum(apart, _KINDS[number])]
    return [*sums, *(_sum(tree) for tree in [params] * reads.params + [memories] * reads.memories)]


def _sum_of_moduli(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(leaf.astype(jnp.float32)))


# Two passes of one kind would become one.
_KINDS = (workloads.sum_of_squares, _sum_of_moduli)


def _sum(tree: Any, kind: Callable[[jax.Array], jax.Array] = workloads.sum_of_squares) -> Any:
    return sum(map(kind, jax.tree.leaves(tree)))


def _added(memory: jax.Array, leaf: jax.Array, one: jax.Array) -> jax.Array:
    return workloads.scaled(0.9 * memory + leaf.astype(memory.dtype), one)


def _of_shapes(updates: Any, memories: Any) -> list[jax.Array]:
    """For each memory the leaf it belongs to: the next one of its shape, in turns."""
    by_shape = collections.defaultdict(list)
    for leaf in jax.tree.leaves(updates):
        by_shape[leaf.shape].append(leaf)
    turns = {shape: itertools.cycle(leaves) for shape, leaves in by_shape.items()}
    return [next(turns[memory.shape]) for memory in memories]
