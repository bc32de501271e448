"""The methods that could have clipped a run, each replayed over its norms."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from clipax.advice._log import Floats
from clipax.advice._replay import replay
from clipax.advice._statistics import Marks, Mask
from clipax.methods.autoclip import autoclip
from clipax.methods.clip_by_global_norm import clip_by_global_norm
from clipax.methods.clip_by_mean_std import clip_by_mean_std
from clipax.methods.clip_by_quantile import clip_by_quantile
from clipax.methods.zclip import zclip

# The simplest first: what clips outliers before what clips a share of all norms.
_ADAPTIVE: tuple[tuple[Callable[..., Any], tuple[float, ...], dict[str, Any]], ...] = (
    (zclip, (), {"max_norm": None}),
    (clip_by_mean_std, (), {}),
    (clip_by_quantile, (0.98,), {"learning_rate": 0.1}),
    (autoclip, (0.98,), {"window_size": 100, "warmup_steps": 20}),
)
# Code, kind, bounds and coefficients.
Replayed = tuple[str, str, Any, Any]
Progress = Callable[[str], None]


class Candidate(NamedTuple):
    """What a method would have done; shares are of rows, and clipped is what it made smaller."""

    code: str
    """The call that makes it."""
    kind: str
    """"in use", "fixed" or "adaptive"."""
    clipped: float
    """The share of finite norms that it clips."""
    start_clipped: float
    """The share of the start that it clips; NaN where there is none."""
    usual_clipped: float
    """The share of usual norms after the start that it clips."""
    most_usual_clipped: float
    """The same in the part of the log where it is largest."""
    spikes_clipped: float
    """The share of spikes that it clips; NaN where there are none."""
    late_spikes_clipped: float
    """The share of spikes after the start that it clips; NaN where there are none."""
    mass_removed: float
    """The share that it takes off the sum of all norms: what clipping loses."""
    least_ratio: float
    """The median of its bound divided by the usual norm in the part where that is least."""
    most_ratio: float
    """And in the part where it is largest."""
    max_norm: Floats
    """Its bound at each row."""
    coefficient: Floats
    """The factor at each row."""


def silent(text: str) -> None:
    """Takes a line of progress, and shows nothing."""
    del text


def weigh(
    norms: Floats, marks: Marks, max_norm: float | None, progress: Progress = silent
) -> tuple[Candidate, ...]:
    """Replays each candidate: first the bound in use, then those that are simplest."""
    return tuple(
        _weighed(code, kind, bound, coefficient, norms, marks)
        for code, kind, bound, coefficient in (
            *_replayed_fixed(norms, marks, max_norm, progress),
            *_replayed_adaptive(norms, progress),
        )
    )


def _replayed_fixed(
    norms: Floats, marks: Marks, max_norm: float | None, progress: Progress
) -> Iterator[Replayed]:
    """The bound in use, and fixed bounds from the quantiles of usual norms after the start."""
    usual = norms[marks.is_usual & ~marks.is_start]
    top = float(np.quantile(usual, 0.99))
    chosen = [rounded_up(bound) for bound in (2 * top, top, *np.quantile(usual, (0.9, 0.5)))]
    bounds = list(dict.fromkeys(chosen if max_norm is None else [max_norm, *chosen]))
    progress("fixed bounds")
    # One program for all of them.
    replayed = jax.vmap(lambda bound: replay(clip_by_global_norm(bound), norms))(np.array(bounds))
    for index, bound in enumerate(bounds):
        yield (
            f"clipax.clip_by_global_norm({bound!r})",
            "in use" if bound == max_norm else "fixed",
            np.asarray(replayed.max_norm[index]),
            np.asarray(replayed.coefficient[index]),
        )


def _replayed_adaptive(norms: Floats, progress: Progress) -> Iterator[Replayed]:
    for factory, args, settings in _ADAPTIVE:
        given = [*map(repr, args), *(f"{key}={value!r}" for key, value in settings.items())]
        code = f"clipax.{factory.__name__}({', '.join(given)})"
        progress(code)
        replayed = replay(factory(*args, **settings), norms)
        yield code, "adaptive", np.asarray(replayed.max_norm), np.asarray(replayed.coefficient)


def _weighed(
    code: str, kind: str, bound: Any, coefficient: Any, norms: Floats, marks: Marks
) -> Candidate:
    is_clipped = np.isfinite(norms) & (coefficient < 1)
    is_late = ~marks.is_start
    usual = marks.is_usual & is_late
    parts = [usual & (marks.part == part) for part in range(marks.part[-1] + 1)]
    parts = [rows for rows in parts if rows.any()]
    ratios = [float(np.median(bound[rows] / marks.usual_norm[rows])) for rows in parts]
    is_finite = np.isfinite(norms)
    finite = norms[is_finite]
    return Candidate(
        code=code,
        kind=kind,
        clipped=share(is_clipped, is_finite),
        start_clipped=share(is_clipped, is_finite & marks.is_start),
        usual_clipped=share(is_clipped, usual),
        most_usual_clipped=max(share(is_clipped, rows) for rows in parts),
        spikes_clipped=share(is_clipped, marks.is_spike),
        late_spikes_clipped=share(is_clipped, marks.is_spike & is_late),
        mass_removed=float(np.sum(finite * (1 - coefficient[is_finite])) / np.sum(finite)),
        least_ratio=min(ratios),
        most_ratio=max(ratios),
        max_norm=bound,
        coefficient=coefficient,
    )


def share(is_so: Mask, rows: Mask) -> float:
    """The share of some rows that are so; NaN of none."""
    return float(np.mean(is_so[rows])) if rows.any() else math.nan


def rounded_up(value: float) -> float:
    """The next number of two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(round(value / unit, 6)) * unit:.2g}")
