"""What happened, as a picture: the loss over the norm of the gradients, method by method."""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipax._demo._training import Record


def write_png(runs: dict[str, Record], args: argparse.Namespace, figures: Any) -> pathlib.Path:
    columns = min(len(runs), 3 if len(runs) <= 9 else 4)
    rows = math.ceil(len(runs) / columns)
    size = (min(9, 2 + 3 * columns), 1 + 2.4 * rows)
    figure = figures.Figure(size, dpi=160, layout="constrained")
    grid = figure.subplots(2 * rows, columns, sharex=True, squeeze=False)
    # A method has two axes, its loss above its norm.
    panels = grid.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    for axes in panels[len(runs) :].flat:
        axes.remove()
    for index, (name, panel) in enumerate(zip(runs, panels, strict=False)):
        _trim(panel, panels[0], index % columns == 0, index + columns >= len(runs))
        _plot_method(name, runs, panel)
    figure.suptitle(
        f"Recurrent network on digits, {args.optimizer}\n"
        f"median and range of {args.seeds} seeds; test accuracy at the right",
        fontsize="medium",
    )
    drawn = [axes.get_legend_handles_labels() for axes in panels[: len(runs)].flat]
    labels = {label: line for pair in drawn for line, label in zip(*pair, strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3, frameon=False)
    path = args.output / "training.png"
    figure.savefig(path)
    return path


def _plot_method(name: str, runs: dict[str, Record], panel: Sequence[Any]) -> None:
    run = runs[name]
    panel[0].set_title(name, loc="left", fontsize="small" if len(name) <= 22 else "x-small")
    panel[0].set_title(f"{run['test_accuracy'].mean():.0%}", loc="right", fontsize="small")
    for axes, key in zip(panel, ("loss", "norm"), strict=True):
        if "none" in runs:
            _plot_curves(axes, runs["none"][key], "0.55", "unclipped")
        if name != "none":
            _plot_curves(axes, run[key], "#0072B2", "with this method")
    if run["max_norm"] is not None:
        bound = np.median(_finite(run["max_norm"]), axis=1)
        panel[1].plot(bound, "--", color="#D55E00", linewidth=1.2, label="bound on the norm")


def _plot_curves(axes: Any, curves: np.ndarray, color: str, label: str) -> None:
    curves, steps = _finite(curves), np.arange(len(curves))
    # The range covers the seeds that are still finite; the median ends where one diverges.
    low, high = np.fmin.reduce(curves, axis=1), np.fmax.reduce(curves, axis=1)
    axes.fill_between(steps, low, high, color=color, alpha=0.35, linewidth=0.6)
    axes.plot(steps, np.median(curves, axis=1), color=color, linewidth=1.2, label=label)


def _finite(curves: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(curves), curves, np.nan)


def _trim(panel: Sequence[Any], first: Sequence[Any], is_left: bool, is_lowest: bool) -> None:
    for axes, other, label in zip(panel, first, ("loss", "gradient norm"), strict=True):
        if axes is not other:
            axes.sharey(other)
        axes.set_yscale("log")
        axes.set_ylabel(label if is_left else "")
        axes.tick_params(labelleft=is_left, labelsize="small")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.minorticks_off()
    panel[0].yaxis.get_major_locator().set_params(subs=(1, 3))
    panel[1].tick_params(labelbottom=is_lowest)
    panel[1].set_xlabel("step" if is_lowest else "")
