"""Seconds to trace, to lower and to compile a clip of many leaves, with nothing cached."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.methods import CLIPS, Optimizer
from benchmarks.timing import Table

SHAPE, DTYPE = (16, 16), "bfloat16"
NAMES = {"clip_by_global_norm": "clipax", "optax.clip_by_global_norm": "optax"}
STAGES = ("trace", "lower", "compile")
# Beyond, a compilation of optax's takes many minutes.
MOST_LEAVES_OF_OPTAX = 1000


def counts(is_quick: bool) -> tuple[int, ...]:
    return (4, 8) if is_quick else (10, 100, 1000, 3000)


def run(is_quick: bool, is_full: bool, show: Callable[[str], None]) -> list[Table]:
    # What every first compilation in a process pays is no one's share.
    jax.jit(lambda x: jnp.sqrt(jnp.sum(x))).lower(jnp.zeros(SHAPE, DTYPE)).compile()
    tables = [_table(leaves, is_quick, is_full) for leaves in counts(is_quick)]
    show(text(tables))
    return tables


def _table(leaves: int, is_quick: bool, is_full: bool) -> Table:
    clips = {NAMES[name]: clip for name, clip in CLIPS["global"].items()}
    notes = []
    if leaves > MOST_LEAVES_OF_OPTAX and not is_full:
        del clips["optax"]
        notes = [f"optax, {leaves} leaves: not run, it would take minutes; --full runs it."]
    updates = [jax.ShapeDtypeStruct(SHAPE, DTYPE)] * leaves
    stages: dict[str, list[tuple[float, ...]]] = {name: [] for name in clips}
    for number in range(2 if is_quick else 3):
        for name in list(clips)[:: -1 if number % 2 else 1]:
            stages[name].append(_stages(clips[name], updates))
    totals = {name: [sum(run) for run in runs] for name, runs in stages.items()}
    title = f"Compilation of the clip of {leaves} {DTYPE} leaves of {SHAPE}"
    about = {"leaves": leaves, "dtype": DTYPE, "shape": list(SHAPE)}
    made = timing.table(title, totals, list(clips)[-1], work="compile", **about)
    for row in made["rows"]:
        medians = np.median(stages[row["name"]], axis=0)
        row |= {f"{stage}_s": float(s) for stage, s in zip(STAGES, medians, strict=True)}
    return made | {"notes": notes}


def _stages(clip: Optimizer, updates: Any) -> tuple[float, ...]:
    jax.clear_caches()
    state = jax.eval_shape(clip.init, updates)
    times = [time.perf_counter()]
    traced = jax.jit(lambda updates, state: clip.update(updates, state)).trace(updates, state)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return tuple(after - before for before, after in itertools.pairwise(times))


def text(tables: list[Table]) -> str:
    header = ("leaves", "", *STAGES, "total s", "min", "max", "ratio", "runs")
    cells = [
        (
            str(table["about"]["leaves"]),
            row["name"],
            *(f"{row[f'{key}_s']:.2f}" for key in (*STAGES, "median", "min", "max")),
            f"{row['ratio']:.2f}" if table["baseline"] == "optax" else "",
            str(row["runs"]),
        )
        for table in tables
        for row in table["rows"]
    ]
    notes = [note for table in tables for note in table["notes"]]
    title = f"Compilation of the clip alone, {DTYPE} leaves of {SHAPE}, medians in seconds"
    return "\n".join([title, timing.columns([header, *cells], left=2), "Ratio: to optax.", *notes])
