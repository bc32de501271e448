"""Advice as a picture: the norms with the bounds over them, beside their distribution."""

import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipax.advice._advise import Advice
from clipax.advice._candidates import Candidate
from clipax.advice._rules import percent
from clipax.plot import BOUND, plot

_COLORS = {"in use": "#000000", "first": BOUND, "second": "#009E73"}
_NAMES = {"in use": "in use", "second": "second choice"}
_BINS = 60


def write_png(advice: Advice, path: pathlib.Path) -> None:
    """Draws the norms as the first choice clips them, with the bound in use and the second choice.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    figures = importlib.import_module("matplotlib.figure")
    figure = figures.Figure((9, 4.2), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    shown = dict(_shown(advice))
    first = shown.get("first")
    run = {"norm": advice.norms}
    if first is not None:
        run |= {"max_norm": first.max_norm, "coefficient": first.coefficient}
        clipped = f"clips {percent(first.clipped)} of the norms"
        left.set_title(f"{_code(first)} {clipped}", loc="left", fontsize="medium")
    plot(run, steps=advice.steps, axes=left)
    others = {
        f"{_NAMES[role]}: {_code(each)}": {"max_norm": each.max_norm}
        for role, each in shown.items()
        if role != "first"
    }
    if others:
        left.set_prop_cycle(color=[_COLORS[role] for role in shown if role != "first"])
        plot(others, steps=advice.steps, axes=left)
    _draw_histogram(right, advice)
    for role, each in shown.items():
        _draw_range(right, each, _COLORS[role])
    left.set_ylabel("gradient norm")
    right.set(xlabel="norms logged")
    right.spines[["top", "right"]].set_visible(False)
    right.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _code(candidate: Candidate) -> str:
    return candidate.code.removeprefix("clipax.")


def _shown(advice: Advice) -> Iterator[tuple[str, Candidate]]:
    """The bound in use and the recommended ones."""
    by_code = {each.code: each for each in advice.candidates}
    chosen = [each.clip for each in advice.recommendations]
    for each in advice.candidates:
        if each.kind == "in use" and each.code not in chosen:
            yield "in use", each
    for role, code in zip(("first", "second"), chosen, strict=False):
        yield role, by_code[code]


def _draw_range(axes: Any, candidate: Candidate, color: str) -> None:
    """Where the bound is at most steps."""
    bound = candidate.max_norm[np.isfinite(candidate.max_norm)]
    if bound.size:
        low, high = np.quantile(bound, (0.05, 0.95))
        axes.axhspan(low, high, color=color, alpha=0.15, linewidth=0)
        axes.axhline(np.sqrt(low * high), color=color, linewidth=1.2)


def _draw_histogram(axes: Any, advice: Advice) -> None:
    norms = advice.norms[np.isfinite(advice.norms) & (advice.norms > 0)]
    low, high = norms.min(), norms.max()
    if low == high:
        low, high = low / 2, high * 2
    bins = np.geomspace(low, high, _BINS)
    axes.hist(norms, bins=bins, orientation="horizontal", color="0.7")
