"""What norms have done: their usual size, drift, spread, tail, spikes."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from clipax.advice._log import Floats

Mask = np.ndarray[Any, np.dtype[np.bool_]]

PARTS = 10
# A spike is this many times the usual norm at its step, or more where norms spread widely.
LEAST_SPIKE, MOST_SPIKE = 3.0, 100.0
SPIKE_SIGMAS = 4.0
_BLOCK, _LEAST_BLOCK = 15, 7
_MAX_BLOCKS = 100
_START = 2.0
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
# Of a normal distribution, one in a hundred is this many standard deviations above the median.
_NORMAL_Q99 = 2.3263
_TO_SIGMA = 1.4826
_JUMP_ROWS = 3


class Statistics(NamedTuple):
    """What a log holds; shares are of rows."""

    row_count: int
    """How many norms were logged, NaN and inf too."""
    nonfinite_count: int
    first_rows_nonfinite: int
    """How many of them are in a row from the first one on, as loss scaling makes them."""
    zero_count: int
    start_count: int
    """How many rows the start takes, in which norms are often large: the first part of the log,
    and on while the running median is more than twice the median; half of the log at most."""
    median: float
    """Of finite norms that are not zero, as all that follows."""
    largest: float
    quantiles: dict[float, float]
    part_medians: tuple[float, ...]
    """The median of each tenth of the log, or of fewer parts of a short one."""
    drift: float
    """The largest of these medians, the start left out, divided by the smallest."""
    spread: float
    """The standard deviation of the logarithm of the norms around the usual norm, robustly."""
    tail: float
    """The 0.99 quantile of that logarithm in units of a normal one's: 1 is log-normal."""
    spike_ratio: float
    """How many times the usual norm a spike is, at least."""
    spike_count: int
    start_spike_count: int
    """How many of them are at the start."""
    spike_groups: int
    """How many groups of spikes there are; one spike is a group."""
    longest_group: int
    spikes_before_jumps: int
    """After how many groups the loss jumped within three rows."""
    spikes_with_losses: int
    """How many groups have losses around them, of which the above is a part."""
    usual_jump_share: float
    """The share of the other rows that a jump of the loss follows; NaN without losses."""


class Marks(NamedTuple):
    """What each row is."""

    usual_norm: Floats
    """The running median of the norms."""
    is_usual: Mask
    is_spike: Mask
    """Not before the first usual norm."""
    is_start: Mask
    part: np.ndarray[Any, np.dtype[np.int64]]
    """Which part of the log a row is in."""


def describe(norms: Floats, losses: Floats | None = None) -> tuple[Statistics, Marks]:
    """Statistics of norms, and the rows that they rest on."""
    is_measured = np.isfinite(norms) & (norms > 0)
    logs = np.log(norms[is_measured])
    place = np.flatnonzero(is_measured)
    usual = _running_median(logs)
    deviation = logs - usual
    center = float(np.median(deviation))
    spread = _TO_SIGMA * float(np.median(np.abs(deviation - center)))
    limit = min(max(np.log(LEAST_SPIKE), SPIKE_SIGMAS * spread), np.log(MOST_SPIKE))
    is_high = deviation > limit
    first_usual = int(np.argmin(is_high))

    def whole(values: Any, empty: Any, dtype: Any) -> Any:
        array = np.full(norms.size, empty, dtype)
        array[place] = values
        return array

    index = np.arange(place.size)
    usual_norm = np.exp(np.interp(np.arange(norms.size), place, usual))
    count = part_count(place.size)
    part = np.arange(norms.size) * count // norms.size
    medians = _part_medians(norms, is_measured, part)
    start = _start(usual_norm, float(np.exp(np.median(logs))), count)
    if not (whole(~is_high, False, bool) & (np.arange(norms.size) >= start)).any():
        start = 0
    is_start = np.arange(norms.size) < start
    marks = Marks(
        usual_norm=usual_norm,
        is_usual=whole(~is_high, False, bool),
        is_spike=whole(is_high & (index >= first_usual), False, bool),
        is_start=is_start,
        part=part,
    )
    settled = _part_medians(norms, is_measured & ~is_start, part)
    groups = _groups(np.flatnonzero(marks.is_spike))
    jumps, known, share = _jumps(losses, groups, marks)
    is_finite = np.isfinite(norms)
    tail = float(np.quantile(deviation, 0.99)) - center
    statistics = Statistics(
        row_count=norms.size,
        nonfinite_count=int(np.sum(~is_finite)),
        first_rows_nonfinite=int(np.argmax(is_finite)),
        zero_count=int(np.sum(norms == 0)),
        start_count=start,
        median=float(np.exp(np.median(logs))),
        largest=float(np.exp(np.max(logs))),
        quantiles={q: float(np.exp(np.quantile(logs, q))) for q in _QUANTILES},
        part_medians=medians,
        drift=float(np.nanmax(settled) / np.nanmin(settled)),
        spread=spread,
        tail=tail / (_NORMAL_Q99 * spread) if spread > 0 else 1.0,
        spike_ratio=float(np.exp(limit)),
        spike_count=int(np.sum(marks.is_spike)),
        start_spike_count=int(np.sum(marks.is_spike & marks.is_start)),
        spike_groups=len(groups),
        longest_group=max((last - first + 1 for first, last in groups), default=0),
        spikes_before_jumps=jumps,
        spikes_with_losses=known,
        usual_jump_share=share,
    )
    return statistics, marks


def part_count(count: int) -> int:
    """Ten parts, or fewer where they would have less than five rows."""
    return max(1, min(PARTS, count // 5))


def _part_medians(norms: Floats, is_measured: Mask, part: Any) -> tuple[float, ...]:
    """The median of each part; NaN where a part has no norm that is finite and not zero."""
    chosen = (norms[is_measured & (part == number)] for number in range(part[-1] + 1))
    return tuple(float(np.median(each)) if each.size else float("nan") for each in chosen)


def _start(usual_norm: Floats, median: float, part_count: int) -> int:
    """How many rows the start takes."""
    if part_count == 1:
        return 0
    first, most = usual_norm.size // part_count, usual_norm.size // 2
    is_settled = usual_norm[first:most] <= _START * median
    return first + int(np.argmax(is_settled)) if is_settled.any() else most


def _running_median(logs: Floats) -> Floats:
    """Medians of blocks, each of three in a row, and straight lines between their middles."""
    shortest = max(1, min(10, logs.size // _LEAST_BLOCK))
    count = min(_MAX_BLOCKS, max(logs.size // _BLOCK, shortest))
    edges = np.arange(count + 1) * logs.size // count
    medians = np.array([np.median(logs[start:end]) for start, end in itertools.pairwise(edges)])
    if count > 2:
        # A group of spikes may be most of a block, but not of its neighbours.
        medians[1:-1] = np.median([medians[:-2], medians[1:-1], medians[2:]], axis=0)
    return np.interp(np.arange(logs.size), (edges[:-1] + edges[1:] - 1) / 2, medians)


def _groups(spikes: Any) -> list[tuple[int, int]]:
    """The first and the last row of spikes that are next to each other, or one row apart."""
    if not spikes.size:
        return []
    cuts = np.flatnonzero(np.diff(spikes) > 2)
    firsts = spikes[np.concatenate([[0], cuts + 1])]
    lasts = spikes[np.concatenate([cuts, [spikes.size - 1]])]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _jumps(
    losses: Floats | None, groups: list[tuple[int, int]], marks: Marks
) -> tuple[int, int, float]:
    """How many groups of spikes a jump of the loss follows, of how many, and how usual it is."""
    if losses is None or losses.size <= 2 * _JUMP_ROWS:
        return 0, 0, float("nan")
    is_known = np.isfinite(losses)
    if is_known.sum() < losses.size / 2:
        return 0, 0, float("nan")
    index = np.arange(losses.size)
    filled = np.interp(index, index[is_known], losses[is_known])
    change = filled - _running_median(filled)
    limit = SPIKE_SIGMAS * _TO_SIGMA * float(np.median(np.abs(change - np.median(change))))
    # The loss of a step is computed before its update: what a spike does is seen from the next.
    if limit <= 0:
        return 0, 0, float("nan")
    after = np.maximum.reduce([np.roll(filled, -shift) for shift in range(1, _JUMP_ROWS + 1)])
    has_diverged = np.logical_or.reduce(
        [np.roll(~is_known, -shift) for shift in range(1, _JUMP_ROWS + 1)]
    )
    is_jump = (after - filled > limit) | has_diverged
    is_jump[-_JUMP_ROWS:] = False
    known = [(first, last) for first, last in groups if last < losses.size - _JUMP_ROWS]
    jumped = sum(bool(is_jump[first] or is_jump[last]) for first, last in known)
    return jumped, len(known), float(np.mean(is_jump[marks.is_usual]))
