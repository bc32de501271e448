"""The clip alone, next to optax's, torch's and the least that it can take.

The least is one read of what is measured, and then one read and write of what is scaled.
Every run starts from gradients above the bound, restored in place before the clock starts.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, timing, torch_peer, workloads
from benchmarks.methods import CLIPS, PAIRS, Optimizer
from benchmarks.settings import Settings
from benchmarks.timing import Table, Work
from benchmarks.workloads import BIG, SMALL

MAX_NORM = 1.0
LIMIT = "limit: read, then scale"
READS = ("one read: sum of squares", "one read: dot")
COLUMNS = "one read: sums of columns"
SCALE = "scale by a number"


class Plan(NamedTuple):
    """A tree, the groups that run on it, and whether its gradients are donated."""

    tree: str
    dtype: str
    groups: tuple[str, ...]
    donates: bool


def plans(is_quick: bool, is_full: bool) -> list[Plan]:
    every, first = tuple(CLIPS), ("global",)
    leaf, gpt2 = BIG
    if is_quick:
        return [
            Plan(leaf, "float32", every, True),
            Plan(gpt2, "float32", first, False),
            Plan(SMALL, "bfloat16", first, True),
        ]
    small = every if is_full else first
    return [
        *(Plan(name, "float32", every, donates) for name in BIG for donates in (True, False)),
        *(Plan(name, "bfloat16", every, True) for name in BIG),
        # Optax's clip of a thousand leaves takes up to a minute to compile.
        *(Plan(SMALL, dtype, small, True) for dtype in ("float32", "bfloat16")),
    ]


def run(settings: Settings, show: Callable[[str], None]) -> Iterator[Table]:
    for plan in settings.chosen(plans(settings.is_quick, settings.is_full)):
        tree = workloads.tree(plan.tree, plan.dtype, settings.is_quick)
        pristine = workloads.gradients(tree)
        rounds = _rounds(tree, settings.is_quick)
        for group in settings.of_groups(plan.groups):
            made = _table(tree, pristine, group, plan.donates, rounds)
            machine.release_memory()
            show(timing.text(made))
            yield made


def _rounds(tree: workloads.Tree, is_quick: bool) -> int:
    if is_quick:
        return 3
    return 20 if tree.bytes > 200e6 else 40 if tree.bytes > 50e6 else 200


def _table(tree: workloads.Tree, pristine: Any, group: str, donates: bool, rounds: int) -> Table:
    params = workloads.parameters(pristine) if group == "unit" else None
    clips = {name: Clip(clip, pristine, params, donates) for name, clip in CLIPS[group].items()}
    works = {name: clip.work for name, clip in clips.items()}
    measured = pristine if params is None else (pristine, params)
    notes = []
    if group == "global" and donates:
        notes = _with_torch(works, clips, pristine, tree)
    if group == "unit":
        works[COLUMNS] = _held(_SUM_COLUMNS, measured)
    works |= reads(measured) | {SCALE: _held(_SCALE, pristine)}
    seconds = timing.interleaved(works, rounds, pause=0.005)
    notes += _require_the_same(clips, tree)
    read = min(READS, key=lambda name: np.median(seconds[name]))
    limit = np.add(seconds[read], seconds[SCALE]).tolist()
    about = {"tree": tree.name, "dtype": tree.dtype, "group": group, "donated": donates}
    how = "donated" if donates else "not donated"
    title = f"Clip alone, {group}: {tree}; {how}"
    made = timing.table(title, {LIMIT: limit} | seconds, LIMIT, work="clip", **about)
    return made | {"notes": notes}


class Clip:
    """One clip, of gradients that are whole again before each run."""

    def __init__(self, clip: Optimizer, pristine: Any, params: Any, donates: bool):
        donated = (0, 1) if donates else (1,)
        self._clipped = jax.jit(clip.update, donate_argnums=donated)
        self._pristine, self._params = pristine, params
        self._donates = donates
        self._updates = jax.tree.map(jnp.copy, pristine)
        self._state = clip.init(pristine)
        self.result: Any = None
        self.work = Work(self._run, self._prepare)

    def _prepare(self) -> Any:
        # The memory that a run without donation has taken is given back first.
        self._updates = self.result if self._donates and self.result else self._updates
        self.result = None
        self._updates = jax.block_until_ready(workloads.restored(self._updates, self._pristine))
        return self._updates

    def _run(self, updates: Any) -> None:
        made = self._clipped(updates, self._state, self._params)
        self.result, self._state = jax.block_until_ready(made)


def reads(measured: Any) -> dict[str, Work]:
    """The plainest programs that read every byte once."""
    return {name: _held(program, measured) for name, program in PROGRAMS.items()}


def _dot(leaf: jax.Array) -> jax.Array:
    return jnp.vdot(leaf, leaf, preferred_element_type=jnp.float32)


def _scaled(leaf: jax.Array) -> jax.Array:
    return workloads.scaled(leaf, jnp.float32(0.3))


PROGRAMS = {
    name: jax.jit(functools.partial(jax.tree.map, number))
    for name, number in zip(READS, (workloads.sum_of_squares, _dot), strict=True)
}
_SUM_COLUMNS = jax.jit(
    functools.partial(jax.tree.map, functools.partial(workloads.sum_of_squares, axis=0))
)
_SCALE = jax.jit(functools.partial(jax.tree.map, _scaled), donate_argnums=0)


def _held(program: Callable[[Any], Any], pristine: Any) -> Work:
    """A program that runs on a copy of its own, restored before each run."""
    held = jax.tree.map(jnp.copy, pristine)

    def restore() -> None:
        nonlocal held
        held = jax.block_until_ready(workloads.restored(held, pristine))

    def run(_: Any) -> None:
        nonlocal held
        made = jax.block_until_ready(program(held))
        held = made if program is _SCALE else held

    return Work(run, restore)


def _with_torch(
    works: dict[str, Work], clips: dict[str, Clip], pristine: Any, tree: workloads.Tree
) -> list[str]:
    """Adds torch's clip to the works, once it has given what ours gives."""
    reason = torch_peer.why_not()
    if reason:
        return [f"Without torch: {reason}."]
    work, tensors = torch_peer.work(pristine, MAX_NORM)
    ours = clips["clip_by_global_norm"]
    for each in (ours.work, work):
        each.run(each.prepare())
    theirs = torch_peer.arrays(tensors)
    # Torch's sums of millions of float32 squares are off by up to a few thousandths.
    rtol = 5e-3 if tree.dtype == "float32" else 0.03
    workloads.require_close(ours.result, theirs, torch_peer.NAME, rtol)
    works[torch_peer.NAME] = work
    return [_says_where(torch_peer.NAME, theirs, ours.result)]


def _require_the_same(clips: dict[str, Clip], tree: workloads.Tree) -> list[str]:
    """Raises where results in float32 differ; says by how much they do in bfloat16."""
    notes = []
    for theirs in (name for name in clips if name in PAIRS):
        ours, other = clips[PAIRS[theirs]].result, clips[theirs].result
        if tree.dtype == "float32":
            workloads.require_close(ours, other, theirs, rtol=1e-4)
        else:
            notes.append(_says_where(theirs, other, ours))
    return notes


def _says_where(name: str, theirs: Any, ours: Any) -> str:
    squares = [
        sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(t))
        for t in (theirs, ours)
    ]
    return f"{name} ends at {(squares[0] / squares[1]) ** 0.5:.4f} times our norm."
