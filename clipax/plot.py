"""Drawing what a run recorded: its norms, its bound, its clipped steps, its loss."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from clipax._core._shown import shown

NORM, CLIPPED, BOUND = "#a9a9a9", "#0072b2", "#d55e00"
# The keys of `metrics` that are drawn, or that say how.
_KEYS = (
    "norm",
    "raw_norm",
    "clipped_norm",
    "max_norm",
    "coefficient",
    "clip_fraction",
    "is_skipped",
    "loss",
)
# A picture is about as many pixels wide.
_MAX_POINTS = 2000

Series = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def plot(runs: Any, *, steps: Any = None, axes: Any = None) -> tuple[Any, ...]:
    """Draws the norms of a run, its bound, the steps that it clipped and its loss.

    One run is drawn in full: the norm before clipping in grey, the norm after clipping in blue,
    the bound as a dashed line, a mark at the bottom for each clipped step and a cross for each
    skipped one. Of several runs, each has one color for its norm, its dashed bound and its loss.

    Args:
      runs: One run, or a dict from the names of several runs to each. A run is what `replay`
        returns; a dict with keys of `metrics`, and `"loss"`, to arrays [steps]; or a list with
        such a dict of scalars for each step. Arrays [steps, ...], of seeds or of leaves, are
        drawn as their median and their range.
      steps: The numbers of the steps, shape [steps]. None counts from 0.
      axes: The matplotlib axes to draw on: those for the norms, or two, for the norms and for
        the losses. None makes a figure, with a legend, by `matplotlib.pyplot`.

    Returns:
      The axes: those of the norms, then those of the losses where these are drawn.

    Raises:
      ModuleNotFoundError: matplotlib is not installed; the extra `plot` installs it.
      ValueError: A run has neither norms nor a bound, or series of different lengths; `steps`
        does not fit; `axes` are more than two.

    | run | drawn |
    |---|---|
    | bounds of inf, norms of 0, NaN or inf | a gap, because the scale is logarithmic |
    | no step is clipped or skipped | no norm after clipping, since it would cover the other |
    | `raw_norm`, of `skip_step` | instead of `norm`, which keeps that of the last step taken |
    | more than 2000 steps | the median and the range of neighbors |

    Example:
      >>> run = replay(clip_by_global_norm(2.0), [1.0, 4.0, 2.0])
      >>> (norms,) = plot(run)
      >>> [line.get_label() for line in norms.get_lines()]
      ['norm', 'norm after clipping', 'bound', 'clipped']
    """
    several = None if _is_run(runs) else runs
    found = {name: _series(run) for name, run in (several or {"": runs}).items()}
    numbers = {name: _steps(steps, series) for name, series in found.items()}
    panels = _panels(axes, any("loss" in series for series in found.values()))
    for name, series in found.items():
        norms, *losses = (_Drawing(panel, numbers[name]) for panel in panels)
        draw = _draw_in_full if several is None else _draw_one_of_several
        color = draw(norms, series, name)
        if losses and "loss" in series:
            losses[0].line(series["loss"], name or "loss", color)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:g}")
    # Where there are few decades, others have numbers too, as 60 and not as a power.
    panels[0].yaxis.set_minor_formatter(
        importlib.import_module("matplotlib.ticker").LogFormatter()
    )
    for panel, label in zip(panels, ("norm", "loss"), strict=False):
        panel.set(xlabel="step", ylabel=label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        if axes is None and panel.get_lines():
            panel.legend(frameon=False, fontsize="small")
    return panels


def _is_run(value: Any) -> bool:
    is_of_names = isinstance(value, Mapping) and not any(key in value for key in _KEYS)
    return not is_of_names or not value


def _series(run: Any) -> Series:
    """What a run recorded, as arrays [steps, seeds or leaves]."""
    if hasattr(run, "_asdict"):
        run = run._asdict()
    elif isinstance(run, list | tuple) and all(isinstance(step, Mapping) for step in run):
        shared = [key for key in _KEYS if run and all(key in step for step in run)]
        run = {key: [step[key] for step in run] for key in shared}
    if not isinstance(run, Mapping) or not {"norm", "raw_norm", "max_norm"} & {*run}:
        got = sorted(run) if isinstance(run, Mapping) else type(run).__name__
        raise ValueError(
            "runs must be what replay returns, or have 'norm' or 'max_norm' as metrics does,"
            f" got {got}."
        )
    series = {key: _array(key, run[key]) for key in _KEYS if run.get(key) is not None}
    lengths = {key: len(array) for key, array in series.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"runs must have one number for each step, got {lengths}.")
    return series


def _array(key: str, values: Any) -> Any:
    try:
        if isinstance(values, Mapping):  # One series for each leaf.
            values = np.stack([np.asarray(leaf) for leaf in values.values()], axis=1)
        array = np.asarray(jax.device_get(values), np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{key} must be numbers, one for each step, got {shown(values)}."
        ) from error
    if array.ndim == 0:
        raise ValueError(f"{key} must have an axis of steps, got {shown(values)}.")
    return array.reshape(len(array), -1)


def _steps(steps: Any, series: Series) -> Any:
    length = len(next(iter(series.values())))
    numbers = np.arange(length) if steps is None else np.asarray(steps)
    if numbers.shape != (length,):
        raise ValueError(f"steps must have the shape [{length}], got {list(numbers.shape)}.")
    return numbers


def _panels(axes: Any, has_loss: bool) -> tuple[Any, ...]:
    if axes is None:
        try:
            pyplot = importlib.import_module("matplotlib.pyplot")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"clipax.plot needs {error.name}, which is not installed:"
                " pip install 'clipax[plot]'",
                name=error.name,
            ) from error
        size = (10, 3.6) if has_loss else (7, 3.6)
        axes = pyplot.subplots(1, 1 + has_loss, figsize=size, layout="constrained")[1]
    panels = tuple(np.ravel(axes))
    if len(panels) not in (1, 2):
        raise ValueError(
            f"axes must be those of the norms, or of norms and losses, got {len(panels)}."
        )
    return panels if has_loss else panels[:1]


class _Drawing(NamedTuple):
    """Axes, and the numbers of the steps along them."""

    axes: Any
    steps: Any

    def line(self, values: Any, label: str, color: str | None, style: str = "-") -> str | None:
        """Draws a median with its range, and returns its color."""
        low, middle, high, every = _thinned(values)
        if not np.isfinite(middle).any():
            return color
        steps = self.steps[::every]
        (line,) = self.axes.plot(
            steps, middle, style, color=color, linewidth=1.2, label=label or None
        )
        if every > 1 or values.shape[1] > 1:
            shade = {"color": line.get_color(), "alpha": 0.3, "linewidth": 0.4}
            self.axes.fill_between(steps, low, high, **shade)
        return line.get_color()

    def marks(self, is_marked: Any, marker: str, label: str) -> None:
        """Marks steps at the bottom, whatever the scale is."""
        rows = np.flatnonzero(is_marked)
        # Neighbors have one mark.
        every = -(-len(self.steps) // _MAX_POINTS)
        rows = rows[np.unique(rows // every, return_index=True)[1]]
        if rows.size:
            self.axes.plot(
                self.steps[rows],
                np.full(rows.size, 0.03),
                marker,
                color="black",
                markersize=5,
                linestyle="",
                label=label,
                transform=self.axes.get_xaxis_transform(),
            )


def _draw_in_full(drawing: _Drawing, series: Series, _: str) -> str | None:
    norm, is_skipped, is_clipped = _norm(series), _is_skipped(series), _is_clipped(series)
    if norm is not None:
        drawing.line(_on_log_scale(norm), "norm", NORM)
    after = series.get("clipped_norm")
    if after is None and {"norm", "coefficient"} <= {*series}:
        after = series["norm"] * series["coefficient"]
    if after is not None and (is_clipped | is_skipped).any():
        after = np.where(is_skipped[:, None], np.nan, after)
        drawing.line(_on_log_scale(after), "norm after clipping", CLIPPED)
    if "max_norm" in series:
        drawing.line(_on_log_scale(series["max_norm"]), "bound", BOUND, "--")
    drawing.marks(is_clipped, "|", "clipped")
    drawing.marks(is_skipped, "x", "skipped")
    return CLIPPED


def _draw_one_of_several(drawing: _Drawing, series: Series, name: str) -> str | None:
    norm, color = _norm(series), None
    if norm is not None:
        color = drawing.line(_on_log_scale(norm), f"norm, {name}", None)
    if "max_norm" in series:
        color = drawing.line(_on_log_scale(series["max_norm"]), f"bound, {name}", color, "--")
    return color


def _norm(series: Series) -> Any:
    return series.get("raw_norm", series.get("norm"))


def _is_skipped(series: Series) -> Any:
    length = len(next(iter(series.values())))
    return (series.get("is_skipped", np.zeros((length, 1))) > 0).any(axis=1)


def _is_clipped(series: Series) -> Any:
    if "coefficient" in series:
        is_clipped = series["coefficient"] < 1
    else:
        is_clipped = series.get("clip_fraction", np.zeros((1, 1))) > 0
    # The state of a clip keeps what it did in the last step that was taken.
    return is_clipped.any(axis=1) & ~_is_skipped(series)


def _on_log_scale(values: Any) -> Any:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _thinned(values: Any) -> tuple[Any, Any, Any, int]:
    """The least, the median and the largest of each few steps, and how many steps these are."""
    every = max(1, -(-len(values) // _MAX_POINTS))
    # The last step is repeated, so that all groups are of one size.
    whole = np.pad(values, ((0, -len(values) % every), (0, 0)), mode="edge")
    groups = whole.reshape(-1, every, values.shape[1])
    low, high = (extreme.reduce(groups, axis=(1, 2)) for extreme in (np.fmin, np.fmax))
    # A line ends where one of several seeds diverges, but passes a few steps that are not finite.
    each = np.sort(np.median(groups, axis=2), axis=1)  # NaN comes last
    place = np.maximum(np.isfinite(each).sum(axis=1) - 1, 0) // 2
    return low, np.take_along_axis(each, place[:, None], axis=1)[:, 0], high, every
