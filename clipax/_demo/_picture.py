"""What happened, as a picture: the loss over the norm of the gradients, method by method."""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from clipax._demo._training import Record
from clipax.plot import CLIPPED, plot

_COLORS = {"unclipped": "0.55", "with this method": CLIPPED}


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
    for axes, first in zip(panels[1 : len(runs)].flat, [*panels[0]] * len(runs), strict=False):
        axes.sharey(first)
    for index, (name, panel) in enumerate(zip(runs, panels, strict=False)):
        _plot_method(name, runs, panel)
        _trim(panel, index % columns == 0, index + columns >= len(runs))
    figure.suptitle(
        f"Recurrent network on digits, {args.optimizer}\n"
        f"median and range of {args.seeds} seeds; test accuracy at the right",
        fontsize="medium",
    )
    drawn = [axes.get_legend_handles_labels() for axes in panels[: len(runs)].flat]
    labels = {label: line for pair in drawn for line, label in zip(*pair, strict=True)}
    # One color is of one run, so that its name is said once.
    labels = {label: line for label, line in labels.items() if not label.startswith("norm, ")}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3, frameon=False)
    path = args.output / "training.png"
    figure.savefig(path)
    return path


def _plot_method(name: str, runs: dict[str, Record], panel: Sequence[Any]) -> None:
    run = runs[name]
    panel[0].set_title(name, loc="left", fontsize="small" if len(name) <= 22 else "x-small")
    panel[0].set_title(f"{run['test_accuracy'].mean():.0%}", loc="right", fontsize="small")
    shown = {"unclipped": runs.get("none"), "with this method": None if name == "none" else run}
    drawn = {label: record for label, record in shown.items() if record is not None}
    for axes in panel:
        axes.set_prop_cycle(color=[_COLORS[label] for label in drawn])
    series = {
        label: {key: record[key] for key in ("norm", "max_norm", "loss")}
        for label, record in drawn.items()
    }
    plot(series, axes=panel[::-1])


def _trim(panel: Sequence[Any], is_left: bool, is_lowest: bool) -> None:
    for axes, label in zip(panel, ("loss", "gradient norm"), strict=True):
        axes.set_yscale("log")
        axes.set_ylabel(label if is_left else "")
        axes.tick_params(labelleft=is_left, labelsize="small")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("")
        axes.minorticks_off()
    panel[0].yaxis.get_major_locator().set_params(subs=(1, 3))
    panel[1].tick_params(labelbottom=is_lowest)
    panel[1].set_xlabel("step" if is_lowest else "")
