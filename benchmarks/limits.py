"""The least that a step with a method must move, as a program that moves just that.

A step reads the gradients once for each norm that has to be known before they are scaled, and
reads and writes each memory that has the shape of the parameters. The memories are found in the
state that the method makes, so that a new method has its limit by itself.
"""

import collections
import itertools
from typing import Any, NamedTuple

import jax
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
        memories = [jax.numpy.zeros(shape, dtype) for shape, dtype in moved.memories]
        return memories, _sums(moved.reads, params, params, memories), alone.init(params)

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        memories, _, inner = state
        sums = _sums(moved.reads, updates, params, memories)
        memories = list(map(_added, memories, _of_shapes(updates, memories)))
        updates, inner = alone.update(updates, inner, params)
        return updates, (memories, sums, inner)

    return optax.GradientTransformation(init_fn, update_fn)


def _sums(reads: Reads, updates: Any, params: Any, memories: Any) -> list[Any]:
    """The sums of squares of each pass."""
    passes = [updates] * reads.gradients + [params] * reads.params + [memories] * reads.memories
    made: list[Any] = []
    for tree in passes:
        # XLA would else keep the squares, which Adam needs too, and make two passes one.
        apart, _ = jax.lax.optimization_barrier((tree, made))
        made = [*made, list(map(workloads.sum_of_squares, jax.tree.leaves(apart)))]
    return made


def _added(memory: jax.Array, leaf: jax.Array) -> jax.Array:
    return 0.9 * memory + leaf.astype(memory.dtype)


def _of_shapes(updates: Any, memories: Any) -> list[jax.Array]:
    """For each memory the leaf it belongs to: the next one of its shape, in turns."""
    by_shape = collections.defaultdict(list)
    for leaf in jax.tree.leaves(updates):
        by_shape[leaf.shape].append(leaf)
    turns = {shape: itertools.cycle(leaves) for shape, leaves in by_shape.items()}
    return [next(turns[memory.shape]) for memory in memories]
