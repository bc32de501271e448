"""What a log cannot show, each as a sentence or as a refusal."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from clipax.advice._log import Floats, rows
from clipax.advice._rules import LEAST_FOR_TWO, LEAST_NORMS, percent
from clipax.advice._statistics import Statistics

# So many norms at one bound are no accident.
_PILE, _PILE_ROWS, _PILE_WIDTH = 0.05, 5, 3e-3
# From here on, it is worth another learning rate.
_LONGER = 1.2


def require_raw(norms: Floats, max_norm: float | None) -> None:
    """Refuses norms that pile up at their largest value, or at the bound in use.

    A narrow band under that value must hold 5 % of the norms and three times as many as the
    band ten times as wide that lies under it.
    """
    finite = norms[np.isfinite(norms) & (norms > 0)]
    unit = resolution(finite)
    for top in {float(np.max(finite)), max_norm or float(np.max(finite))}:
        width = max(_PILE_WIDTH * top, unit)
        pile = int(np.sum(np.abs(finite - top) <= width))
        beside = int(np.sum((finite < top - width) & (finite >= top - 11 * width)))
        above = int(np.sum(finite > top + width))
        is_pile = pile >= max(_PILE_ROWS, _PILE * finite.size) and pile > 3 * beside
        if is_pile and above <= 0.01 * finite.size:
            raise ValueError(
                f"{pile} of {finite.size} norms are {top:g}, the largest: these look like norms"
                " after a clip, which hide how large they were before it. Log them before it, as"
                " the return value of torch's clip_grad_norm_, or say that they are raw (raw=True,"
                " --raw)."
            )


def resolution(norms: Floats) -> float:
    """The unit to which all norms are rounded; 0 where there is none of 0.0001 or more."""
    sample = norms[:: max(1, norms.size // 10_000)]
    for digits in range(5):
        if np.allclose(sample, np.round(sample, digits), rtol=0, atol=1e-9):
            return 10.0**-digits
    return 0.0


def limits(
    norms: Floats, statistics: Statistics, max_norm: float | None, every: float, is_told: bool
) -> Iterator[str]:
    """What the reader of the advice must know, where it applies."""
    found = statistics
    measured = norms[np.isfinite(norms) & (norms > 0)]
    yield (
        "The replay is open-loop: it clips the norms of this log, and with another clip the later"
        " norms would have been others."
    )
    if every > 1:
        yield (
            f"The log has a norm every {every:g} steps: a spike between them is not in it, and a"
            f" window or an average over n norms of the replay is one over {every:g} n steps."
            " If a logged norm is the mean of those steps, spikes are averaged away too."
        )
    if measured.size < LEAST_NORMS:
        yield f"{rows(measured.size, 'norm')} are too few for a recommendation; it needs 20."
    elif measured.size < LEAST_FOR_TWO:
        yield (
            f"The log is short ({rows(measured.size, 'norm')}): spikes rarer than one in"
            f" {measured.size} are not in it, and adaptive methods are still warming up."
        )
    unit = resolution(measured)
    smallest = float(np.nanmin(found.part_medians))
    if unit and unit / smallest > 0.01:
        yield (
            f"The norms are rounded to {unit:g}, which is {percent(unit / smallest)} of the usual"
            " norm where it is smallest."
        )
    yield from _bad_rows(found)
    if is_told:
        yield "The norms pile up at their largest value as after a clip; they count as raw here."
    if max_norm is not None:
        yield from _bound_in_use(measured, found, max_norm)


def _bad_rows(found: Statistics) -> Iterator[str]:
    if found.nonfinite_count:
        first = ""
        if found.first_rows_nonfinite:
            first = (
                f", {found.first_rows_nonfinite} of them the first ones, as where loss scaling"
                " looks for its scale and leaves those steps out by itself"
            )
        yield f"{rows(found.nonfinite_count, 'norm')} are NaN or inf{first}."
    if found.zero_count:
        yield (
            f"{rows(found.zero_count, 'norm')} are exactly zero, steps without a gradient: they"
            " are left out of the statistics, but zclip, clip_by_mean_std and autoclip learn them."
        )


def _bound_in_use(measured: Any, found: Statistics, max_norm: float) -> Iterator[str]:
    share = float(np.mean(measured > max_norm))
    if share > 0.5:
        ratio = found.median / max_norm
        longer = (
            f" Under a bound that seldom acts, SGD takes steps some {ratio:.2g} times as long, so"
            " that its learning rate must be that much smaller; Adam hardly sees a factor that is"
            " nearly the same at all steps."
        )
        yield (
            f"Your bound of {max_norm:g} clips {percent(share)} of the norms: it normalizes the"
            " gradient rather than clips it, and may be what holds the learning rate."
            f"{longer if ratio >= _LONGER else ''}"
        )
    elif share == 0:
        yield f"Your bound of {max_norm:g} is above all norms: in this log it never acted."
