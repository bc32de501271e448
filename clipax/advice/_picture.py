"""Advice as a picture: the norms with the bounds over them, beside their distribution."""

import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipax.advice._advise import Advice
from clipax.advice._candidates import Candidate
from clipax.advice._rules import percent

_COLORS = {"in use": "#000000", "first": "#D55E00", "second": "#009E73"}
_MAX_POINTS = 3000
_BINS = 60


def write_png(advice: Advice, path: pathlib.Path) -> None:
    """Draws the norms, the bound in use and those recommended, and the steps that these clip.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    figures = importlib.import_module("matplotlib.figure")
    figure = figures.Figure((9, 4.2), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _draw_norms(left, advice)
    shown = list(_shown(advice))
    for role, candidate in shown:
        _draw_bound(left, right, advice, role, candidate)
    for role, candidate in shown:
        if role == "first":
            _draw_clipped(left, advice, candidate)
    _draw_histogram(right, advice)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    left.set(xlabel="step", ylabel="gradient norm")
    right.set(xlabel="norms logged")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def _shown(advice: Advice) -> Iterator[tuple[str, Candidate]]:
    """The bound in use and the recommended ones."""
    by_code = {each.code: each for each in advice.candidates}
    chosen = [each.clip for each in advice.recommendations]
    for each in advice.candidates:
        if each.kind == "in use" and each.code not in chosen:
            yield "in use", each
    for role, code in zip(("first", "second"), chosen, strict=False):
        yield role, by_code[code]


def _draw_norms(axes: Any, advice: Advice) -> None:
    norms = np.where(np.isfinite(advice.norms) & (advice.norms > 0), advice.norms, np.nan)
    if norms.size <= _MAX_POINTS:
        axes.plot(advice.steps, norms, ".", color="0.6", markersize=3, label="logged norms")
        return
    chunks = np.array_split(np.arange(norms.size), _MAX_POINTS)
    firsts = [rows[0] for rows in chunks]
    low, high = (extreme.reduceat(norms, firsts) for extreme in (np.fmin, np.fmax))
    label = "logged norms, from the least to the largest"
    steps = advice.steps[firsts]
    axes.fill_between(steps, low, high, color="0.7", linewidth=0.4, label=label)


def _draw_bound(left: Any, right: Any, advice: Advice, role: str, candidate: Candidate) -> None:
    every = max(1, advice.norms.size // _MAX_POINTS)
    bound = np.where(np.isfinite(candidate.max_norm), candidate.max_norm, np.nan)
    name = {"in use": "bound in use", "first": "recommended", "second": "second choice"}[role]
    left.plot(
        advice.steps[::every],
        bound[::every],
        "--" if role == "in use" else "-",
        color=_COLORS[role],
        linewidth=1.2,
        label=f"{name}: {candidate.code.removeprefix('clipax.')}",
    )
    low, high = np.nanquantile(bound, (0.05, 0.95)) if np.isfinite(bound).any() else (1, 1)
    right.axhspan(low, high, color=_COLORS[role], alpha=0.15, linewidth=0)
    right.axhline(np.sqrt(low * high), color=_COLORS[role], linewidth=1.2)


def _draw_clipped(axes: Any, advice: Advice, candidate: Candidate) -> None:
    """The steps that a candidate clips, or the largest of them where they are many."""
    is_clipped = np.isfinite(advice.norms) & (candidate.coefficient < 1)
    rows = np.flatnonzero(is_clipped)
    if rows.size > _MAX_POINTS:
        rows = np.sort(rows[np.argsort(advice.norms[rows])[-_MAX_POINTS:]])
    label = f"clipped as recommended ({percent(candidate.clipped)} of the norms)"
    size = 12 if rows.size <= 300 else 4
    axes.scatter(
        advice.steps[rows],
        advice.norms[rows],
        s=size,
        color=_COLORS["first"],
        label=label,
        zorder=3,
    )


def _draw_histogram(axes: Any, advice: Advice) -> None:
    norms = advice.norms[np.isfinite(advice.norms) & (advice.norms > 0)]
    low, high = norms.min(), norms.max()
    if low == high:
        low, high = low / 2, high * 2
    bins = np.geomspace(low, high, _BINS)
    axes.hist(norms, bins=bins, orientation="horizontal", color="0.7")
