"""A step of Adam and of SGD, alone and behind each method.

The parameters and the optimizer's state are donated, as in training. The gradients are
not: they come from outside here, and are needed again for the next step.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

import clipax
from benchmarks import limits as limits_of
from benchmarks import machine, timing, workloads
from benchmarks.methods import (
    ALONE,
    CLIPS,
    GROUPS,
    OPTIMIZERS,
    PAIRS,
    READ,
    SCALED,
    SPECTRAL,
    Optimizer,
)
from benchmarks.settings import Settings
from benchmarks.timing import Table, Work
from benchmarks.workloads import BIG, MATRICES, SMALL


class Plan(NamedTuple):
    """Which groups run on a tree."""

    tree: str
    dtype: str
    optimizer: str
    groups: tuple[str, ...]


def plans(is_quick: bool, is_full: bool) -> list[Plan]:
    """Every method with Adam on both big trees, and with SGD on one; the rest for a few."""
    every = tuple(name for name in GROUPS if name != SPECTRAL)
    core, first = tuple(CLIPS), ("global",)
    leaf, gpt2 = BIG
    if is_full:
        names = (leaf, gpt2, SMALL)
        chosen = [(n, d, o, every) for n in names for d in _DTYPES for o in OPTIMIZERS]
    elif is_quick:
        chosen = [
            (leaf, "float32", "adam", every),
            (gpt2, "float32", "adam", (*first, "metrics")),
            (leaf, "bfloat16", "sgd", (*first, "momentum")),
        ]
    else:
        chosen = [
            (leaf, "float32", "adam", every),
            (leaf, "float32", "sgd", every),
            (gpt2, "float32", "adam", every),
            (gpt2, "float32", "sgd", core),
            (leaf, "bfloat16", "adam", core),
            (gpt2, "bfloat16", "adam", core),
            (gpt2, "bfloat16", "sgd", first),
            (SMALL, "float32", "adam", first),
            (SMALL, "float32", "sgd", first),
            (SMALL, "bfloat16", "adam", first),
        ]
    spectral = (MATRICES, "float32", "adam", (SPECTRAL,))
    return [_possible(Plan(*each)) for each in (*chosen, spectral)]


_DTYPES = ("float32", "bfloat16")


def _possible(plan: Plan) -> Plan:
    fitting = (name for name in plan.groups if plan.optimizer in GROUPS[name].optimizers)
    return plan._replace(groups=tuple(fitting))


def run(settings: Settings, show: Callable[[str], None]) -> Iterator[Table]:
    for plan in settings.chosen(plans(settings.is_quick, settings.is_full)):
        if plan.optimizer not in (settings.optimizers or OPTIMIZERS):
            continue
        tree = workloads.tree(plan.tree, plan.dtype, settings.is_quick)
        gradients = workloads.gradients(tree)
        rounds = _rounds(tree, settings.is_quick)
        for group in settings.of_groups(plan.groups):
            made = _table(tree, gradients, plan.optimizer, group, rounds)
            show(timing.text(made))
            yield made


def _rounds(tree: workloads.Tree, is_quick: bool) -> int:
    if is_quick:
        return 3
    # The smaller, the more the median needs.
    return 30 if tree.bytes > 50e6 else 99


# Where its buffers lie in memory makes a row faster or slower by several percent, round after
# round. So every row has new ones now and then, allocated in another order.
_PLACEMENTS = 3


def _table(tree: workloads.Tree, gradients: Any, optimizer: str, group: str, rounds: int) -> Table:
    wrapped, limits = with_limits(group, optimizer, gradients)
    rows = [*wrapped]
    seconds: timing.Seconds = {name: [] for name in rows}
    for placement in range(_PLACEMENTS):
        turned = rows[placement:] + rows[:placement]
        steps = {name: Step(wrapped[name], gradients, name == READ) for name in turned}
        works = {name: Work(step.run) for name, step in steps.items()}
        for name, measured in timing.interleaved(works, rounds // _PLACEMENTS).items():
            seconds[name] += measured
        _require_the_same(steps, tree)
        del steps, works
        machine.release_memory()
    title = f"Step of {optimizer}, {group}: {tree}; parameters and state donated"
    about = {"tree": tree.name, "dtype": tree.dtype, "optimizer": optimizer, "group": group}
    baseline = GROUPS[group].baseline
    made = timing.table(title, seconds, baseline, limits, work="step", **about)
    return made | {"notes": _by_limit(limits)}


def _by_limit(limits: dict[str, str]) -> list[str]:
    rows = collections.defaultdict(list)
    for name, limit in limits.items():
        rows[limit].append(name)
    return [f"Over {limit}: {', '.join(names)}." for limit, names in rows.items()]


def with_limits(
    group: str, optimizer: str, params: Any
) -> tuple[dict[str, Optimizer], dict[str, str]]:
    """The optimizers of a group and of their limits, and the name of each row's limit."""
    wrapped = {name: wrap(OPTIMIZERS[optimizer]) for name, wrap in GROUPS[group].rows.items()}
    alone = wrapped[ALONE]
    least, limits = {}, {}
    for name in wrapped:
        moved = limits_of.traffic(name, wrapped[name], alone, params)
        if name not in (ALONE, SCALED):
            limits[name] = ALONE if moved is None else moved.name
        if name not in (ALONE, SCALED) and moved is not None:
            least[moved.name] = limits_of.least(moved, alone)
    return {ALONE: alone} | least | wrapped, limits


class Step:
    """Training with the same gradients again and again."""

    def __init__(self, optimizer: Optimizer, gradients: Any, returns_metrics: bool = False):
        self.params = workloads.parameters(gradients)
        self._state = optimizer.init(self.params)
        self._gradients = gradients
        self._step = jitted_step(optimizer, returns_metrics)

    def run(self, _: Any = None) -> None:
        made = self._step(self.params, self._state, self._gradients)
        self.params, self._state, _ = jax.block_until_ready(made)


@functools.cache
def jitted_step(optimizer: Optimizer, returns_metrics: bool = False) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, gradients: Any) -> Any:
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        seen = clipax.metrics(opt_state, per_leaf=True) if returns_metrics else {}
        return optax.apply_updates(params, updates), opt_state, seen

    return step


def _require_the_same(steps: dict[str, Step], tree: workloads.Tree) -> None:
    """After as many steps each, so that peers must have done the same work."""
    # Optax adds the sums of bfloat16 leaves in bfloat16, and ends elsewhere.
    if tree.dtype == "float32":
        for ours, theirs in _pairs(steps):
            workloads.require_close(steps[ours].params, steps[theirs].params, theirs)


def _pairs(steps: dict[str, Step]) -> Iterator[tuple[str, str]]:
    yield from ((PAIRS[name], name) for name in steps if name in PAIRS)
    if READ in steps:
        yield "clip_by_leaf_norm", READ
