"""One picture of the results: steps, clips, compilation, and time per byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import timing, torch_peer, work_clip, work_scaling
from benchmarks.limits import READ_ONCE
from benchmarks.methods import ALONE
from benchmarks.timing import Table

Results = dict[str, list[Table]]
CLIPAX, OPTAX, TORCH, LEAST = "#0072B2", "#D55E00", "#009E73", "0.55"
ONE_MORE = "limit: one read more"
OURS, THEIRS = "clip_by_global_norm", "optax.clip_by_global_norm"


def save(results: Results, device: str, path: Path) -> None:
    panels: dict[str, Callable[..., None]] = {
        "step": _steps,
        "clip": _clips,
        "compile": _compilation,
        "scaling": _scaling,
    }
    drawn = [name for name in panels if results.get(name)] or ["step"]
    rows = (len(drawn) + 1) // 2
    columns = min(2, len(drawn))
    figure = Figure((5.2 * columns, 3.6 * rows), dpi=160, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(drawn) :]:
        axes.remove()
    for name, axes in zip(drawn, grid, strict=False):
        panels[name](axes, results.get(name, []))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, axis="y")
        axes.tick_params(labelsize="small")
    figure.suptitle(
        f"clip_by_global_norm on {device}; medians, bars of quartiles", fontsize="medium"
    )
    figure.savefig(path)


def _steps(axes: Any, tables: list[Table]) -> None:
    chosen = [t for t in tables if _is(t, optimizer="adam", group="global")]
    names = {ONE_MORE: READ_ONCE, "clipax": OURS, "optax": THEIRS}
    _bars(axes, chosen, names, ALONE)
    axes.set_title("Adam with the clip, over Adam alone", loc="left", fontsize="small")


def _clips(axes: Any, tables: list[Table]) -> None:
    chosen = [t for t in tables if _is(t, group="global", donated=True)]
    names = {"clipax": OURS, "optax": THEIRS, "torch": torch_peer.NAME}
    axes.axhline(
        1.0, color="0.1", linestyle="--", linewidth=1.0, label="limit: one read, then u * c"
    )
    _bars(axes, chosen, names, work_clip.LIMIT)
    axes.set_title("The clip alone, donated, over its limit", loc="left", fontsize="small")


_COLORS = {
    ONE_MORE: LEAST,
    "clipax": CLIPAX,
    "optax": OPTAX,
    "torch": TORCH,
}


def _bars(axes: Any, tables: list[Table], names: dict[str, str], baseline: str) -> None:
    """The ratios of the tables' medians, a group of bars for each table."""
    present = {
        label: name
        for label, name in names.items()
        if any(timing.median_of(table, name) is not None for table in tables)
    }
    width = 0.8 / max(len(present), 1)
    for place, (label, name) in enumerate(present.items()):
        for at, table in enumerate(tables):
            row = next((row for row in table["rows"] if row["name"] == name), None)
            base = timing.median_of(table, baseline)
            if row is None or base is None:
                continue
            middle, low, high = (row[f"{key}_s"] / base for key in ("median", "q1", "q3"))
            x = at + (place - (len(present) - 1) / 2) * width
            spread = np.array([[middle - low], [high - middle]])
            axes.bar(
                x,
                middle,
                width * 0.94,
                color=_COLORS[label],
                yerr=spread,
                ecolor="0.2",
                error_kw={"linewidth": 0.8},
                label=label if at == 0 else None,
            )
            axes.annotate(f"{middle:.2f}", (x, high), (0, 2), ha="center", **_NUMBER)
    wheres = (f"{table['about']['tree']} {table['about']['dtype']}" for table in tables)
    ticks = [where.replace(" ", "\n") for where in wheres]
    axes.set_xticks(range(len(tables)), ticks)
    axes.set_ylabel("ratio of medians", fontsize="small")
    axes.legend(frameon=False, fontsize="small", loc="upper right", ncols=2)
    axes.margins(y=0.35)


_NUMBER: dict[str, Any] = {"textcoords": "offset points", "fontsize": "x-small"}


def _compilation(axes: Any, tables: list[Table]) -> None:
    tables = [table for table in tables if table["about"]["group"] == "global"]
    for name, color in (("clipax", CLIPAX), ("optax", OPTAX)):
        times = {t["about"]["leaves"]: timing.median_of(t, name) for t in tables}
        known = {leaves: seconds for leaves, seconds in times.items() if seconds is not None}
        axes.plot(list(known), list(known.values()), "o-", color=color, label=name)
    axes.set(xscale="log", yscale="log")
    axes.minorticks_off()
    axes.set_xticks([table["about"]["leaves"] for table in tables])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("leaves", fontsize="small")
    axes.set_ylabel("seconds", fontsize="small")
    axes.set_title("To trace, lower and compile the clip, bfloat16", loc="left", fontsize="small")
    axes.legend(frameon=False, fontsize="small")


def _scaling(axes: Any, tables: list[Table]) -> None:
    lines = {work_scaling.CLIP: ("clipax", CLIPAX), work_scaling.READ: ("one read", LEAST)}
    for name, (label, color) in lines.items():
        rows = [next(row for row in t["rows"] if row["name"] == name) for t in tables]
        sizes = [table["about"]["bytes"] for table in tables]
        per_byte = [row["ps_per_byte"] for row in rows]
        axes.plot([size / 2**20 for size in sizes], per_byte, "o-", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0)
    axes.set_xlabel("MiB", fontsize="small")
    axes.set_ylabel("ps per byte", fontsize="small")
    axes.set_title("The clip alone, time per byte", loc="left", fontsize="small")
    axes.legend(frameon=False, fontsize="small")


def _is(table: Table, **about: Any) -> bool:
    return about.items() <= table["about"].items()
