"""Seconds to make a state, to trace, to lower and to compile a clip of many leaves.

Nothing is cached. Methods with a norm for each leaf, and those with a memory for each entry,
are found by the state that they make.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.methods import CLIPS, GLOBAL, OPTAX_GLOBAL, Clips, Optimizer
from benchmarks.settings import Settings
from benchmarks.timing import Table
from clipax._demo._methods import METHODS

SHAPE = (16, 16)
NAMES = {GLOBAL: "clipax", OPTAX_GLOBAL: "optax"}
STAGES = ("init", "trace", "lower", "compile")
OPTAX_RMS, OPTAX_ADAM = "optax.clip_by_block_rms", "optax.adam"
PEERS = ("optax", OPTAX_RMS, OPTAX_ADAM)
# Beyond, a compilation of optax's takes many minutes.
MOST_LEAVES_OF_OPTAX = 1000


class Plan(NamedTuple):
    """A group of methods; the last of them is what the others are compared with."""

    group: str
    leaves: int
    dtype: str
    runs: int
    tree: str = f"leaves of {SHAPE}"


def plans(is_quick: bool, is_full: bool) -> list[Plan]:
    dtypes = ("bfloat16", "float32")
    if is_quick:
        few = [Plan("global", leaves, "bfloat16", 2) for leaves in (4, 8)]
        return [*few, *(Plan(group, 4, "bfloat16", 2) for group in ("leaf", "entry"))]
    most = 3 if is_full else 1
    return [
        *(Plan("global", leaves, "bfloat16", 3) for leaves in (10, 100, 1000, 3000)),
        *(Plan("leaf", 1000, dtype, 3) for dtype in dtypes),
        *(Plan("leaf", 3000, dtype, most) for dtype in dtypes),
        *(Plan("entry", 300, dtype, 3) for dtype in dtypes),
    ]


# A wrapper, other names of methods, and one whose singular values are compiled for each shape.
_NOT_FOUND = {"skip_step", "none", "clip_cotangent", "clip_by_spectral_norm"}


def clips(group: str) -> Clips:
    """The methods of a group, the peer last."""
    if group == "global":
        return {NAMES[name]: clip for name, clip in CLIPS["global"].items()}
    built = {name: build() for name, build in METHODS.items() if name not in _NOT_FOUND}
    found = {name: method for name, method in built.items() if _kind(method) == group}
    if group == "leaf":
        return found | {OPTAX_RMS: optax.clip_by_block_rms(1.0)}
    return found | {OPTAX_ADAM: optax.adam(1e-3)}


def _kind(method: Optimizer) -> str:
    """What the method's state grows with: nothing, the number of leaves, or of entries."""
    states = [jax.tree.leaves(jax.eval_shape(method.init, _shapes(count))) for count in (1, 2)]
    if any(leaf.shape == SHAPE for leaf in states[0]):
        return "entry"
    sizes = [sum(leaf.size for leaf in state) for state in states]
    return "leaf" if sizes[1] > sizes[0] else "global"


def _shapes(leaves: int, dtype: str = "float32") -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(SHAPE, dtype)] * leaves


def run(settings: Settings, show: Callable[[str], None]) -> Iterator[Table]:
    # What every first compilation in a process pays is no one's share.
    jax.jit(lambda x: jnp.sqrt(jnp.sum(x))).lower(jnp.zeros(SHAPE)).compile()
    for plan in settings.chosen(plans(settings.is_quick, settings.is_full)):
        if settings.of_groups((plan.group,)):
            made = _table(plan, settings.is_full)
            show(text(made))
            yield made


def _table(plan: Plan, is_full: bool) -> Table:
    group, leaves, dtype, runs, _ = plan
    methods = clips(group)
    peer = [*methods][-1]
    notes = []
    if leaves > MOST_LEAVES_OF_OPTAX and not is_full:
        del methods[peer]
        notes = [f"{peer}, {leaves} leaves: not run, it would take minutes; --full runs it."]
    params = [jnp.ones(SHAPE, dtype) for _ in range(leaves)]
    stages: dict[str, list[tuple[float, ...]]] = {name: [] for name in methods}
    for number in range(runs):
        for name in list(methods)[:: -1 if number % 2 else 1]:
            stages[name].append(_stages(methods[name], params))
    totals = {name: [sum(run) for run in times] for name, times in stages.items()}
    title = f"Compilation of the clip of {leaves} {dtype} leaves of {SHAPE}, {group}"
    about = {"leaves": leaves, "dtype": dtype, "shape": list(SHAPE), "group": group}
    baseline = peer if peer in methods else next(iter(methods))
    made = timing.table(title, totals, baseline, work="compile", **about)
    for row in made["rows"]:
        medians = np.median(stages[row["name"]], axis=0)
        row |= {f"{stage}_s": float(s) for stage, s in zip(STAGES, medians, strict=True)}
    return made | {"notes": notes}


def _stages(clip: Optimizer, params: Any) -> tuple[float, ...]:
    jax.clear_caches()
    times = [time.perf_counter()]
    state = jax.block_until_ready(clip.init(params))
    times.append(time.perf_counter())
    step = jax.jit(lambda updates, state, params: clip.update(updates, state, params))
    traced = step.trace(params, state, params)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return tuple(after - before for before, after in itertools.pairwise(times))


def text(table: Table) -> str:
    has_peer = table["baseline"] in PEERS
    header = ("", *STAGES, "total s", "min", "max", "ratio", "runs")
    cells = [
        (
            row["name"],
            *(f"{row[f'{key}_s']:.2f}" for key in (*STAGES, "median", "min", "max")),
            f"{row['ratio']:.2f}" if has_peer else "",
            str(row["runs"]),
        )
        for row in table["rows"]
    ]
    notes = [f"Ratio: to {table['baseline']}."] if has_peer else []
    return "\n".join(
        [
            f"{table['title']}, medians in seconds",
            timing.columns([header, *cells]),
            *notes,
            *table["notes"],
        ]
    )
