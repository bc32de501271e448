"""What a clip takes in memory: temporary bytes of a step of Adam, and a GPU's peak."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import machine, timing, workloads
from benchmarks.methods import GLOBAL, GROUPS, OBSERVED, OPTIMIZERS, SKIPPED
from benchmarks.settings import Settings
from benchmarks.timing import Table
from benchmarks.work_step import Step, jitted_step
from benchmarks.workloads import BIG, Tree

_ROOT = Path(__file__).resolve().parent.parent


# The first of each group is what the others are compared with.
ROWS = {"global": tuple(GROUPS["global"].rows), "wrappers": (GLOBAL, OBSERVED, SKIPPED)}


class Plan(NamedTuple):
    tree: str
    dtype: str


def plans(is_quick: bool) -> list[Plan]:
    every = [Plan(name, dtype) for name in BIG for dtype in ("float32", "bfloat16")]
    return every[:1] if is_quick else every


def run(settings: Settings, show: Callable[[str], None]) -> Iterator[Table]:
    tables = [
        _table(workloads.tree(*plan, settings.is_quick), group, settings.is_quick)
        for plan in settings.chosen(plans(settings.is_quick))
        for group in settings.of_groups(tuple(ROWS))
    ]
    show(text(tables))
    yield from tables


def _table(tree: Tree, group: str, is_quick: bool) -> Table:
    names = ROWS[group]
    rows = [{"name": name, "temp_bytes": _temp_bytes(group, name, tree)} for name in names]
    if machine.is_gpu():
        for row in rows:
            row["peak_bytes"] = _peak_in_a_process(group, row["name"], tree, is_quick)
    for kind in ("temp", "peak"):
        base = rows[0].get(f"{kind}_bytes")
        for row in rows:
            taken = row.get(f"{kind}_bytes")
            is_known = base is not None and taken is not None
            row[f"{kind}_share"] = (taken - base) / tree.bytes if is_known else None
    title = f"Memory of a step of Adam: {tree}; parameters and state donated"
    about = {"tree": tree.name, "dtype": tree.dtype, "tree_bytes": tree.bytes, "group": group}
    about |= {"work": "memory"}
    return {"title": title, "about": about, "baseline": names[0], "rows": rows, "notes": []}


def _temp_bytes(group: str, name: str, tree: Tree) -> int | None:
    """As the compiler counts them."""
    optimizer = GROUPS[group].rows[name](OPTIMIZERS["adam"])
    params = {key: jax.ShapeDtypeStruct(shape, tree.dtype) for key, shape in tree.shapes.items()}
    state = jax.eval_shape(optimizer.init, params)
    program = jitted_step(optimizer).lower(params, state, params).compile()
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _peak_in_a_process(group: str, name: str, tree: Tree, is_quick: bool) -> int:
    """In one of its own: an allocator's peak never falls."""
    arguments = [group, name, tree.name, tree.dtype, "quick" if is_quick else ""]
    command = [sys.executable, "-m", "benchmarks.work_memory", *arguments]
    made = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return int(made.stdout.split()[-1])


def peak_bytes(group: str, name: str, tree: Tree) -> int | None:
    """What the device's allocator held at most, where it counts that."""
    step = Step(GROUPS[group].rows[name](OPTIMIZERS["adam"]), workloads.gradients(tree))
    for _ in range(3):
        step.run()
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def text(tables: list[Table]) -> str:
    def share(row: dict[str, Any], kind: str) -> str:
        known = row[f"{kind}_share"]
        return "" if known is None else f"{100 * known:.2f} %"

    def size(row: dict[str, Any], kind: str) -> str:
        known = row.get(f"{kind}_bytes")
        return "" if known is None else f"{known / 1e6:.3f}"

    header = ("tree", "dtype", "", "temp MB", "of tree", "peak MB", "of tree")
    cells = [
        (
            table["about"]["tree"],
            table["about"]["dtype"],
            row["name"],
            *(cell(row, kind) for kind in ("temp", "peak") for cell in (size, share)),
        )
        for table in tables
        for row in table["rows"]
    ]
    title = "Memory of a step of Adam: temporary, as the compiler counts; a GPU's peak"
    note = "Of tree: what is above the first of its group, as a share of the tree's bytes."
    return "\n".join([title, timing.columns([header, *cells], left=3), note])


if __name__ == "__main__":
    group, name, tree_name, dtype, quick = sys.argv[1:]
    sys.stdout.write(f"{peak_bytes(group, name, workloads.tree(tree_name, dtype, bool(quick)))}\n")
