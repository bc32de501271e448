"""Advice on a bound from the norms that a run logged."""

from typing import Any, NamedTuple

import numpy as np

from clipax._core import _checks
from clipax._core._shown import shown
from clipax.advice import _candidates, _limits, _report, _rules, _statistics
from clipax.advice._candidates import Candidate, Progress
from clipax.advice._log import Floats
from clipax.advice._rules import Recommendation
from clipax.advice._statistics import Marks, Statistics


class Advice(NamedTuple):
    """What the norms of a run say about its clip; `print` shows it as a page."""

    recommendations: tuple[Recommendation, ...]
    """The choices, the first one first: `code`, a line to paste, and `why`."""
    statistics: Statistics
    """Median, quantiles, drift, spread, tail and spikes."""
    candidates: tuple[Candidate, ...]
    """Each method that was replayed, and what it would have done."""
    limits: tuple[str, ...]
    """What the log cannot show, one sentence each."""
    norms: Floats
    """The norms, as they were given."""
    steps: Floats
    """The number of each step."""
    marks: Marks
    """What each row is: usual, a spike, the start."""

    def __str__(self) -> str:
        return _report.page(*self[:4])

    def as_dict(self) -> dict[str, Any]:
        """Everything but the rows, as numbers, strings, lists and dicts that JSON takes."""
        return _report.as_dict(*self[:4])


def advise(
    norms: Any,
    losses: Any = None,
    *,
    steps: Any = None,
    max_norm: float | None = None,
    every: float | None = None,
    raw: bool = False,
    progress: Progress | None = None,
) -> Advice:
    """Recommends a clip from the gradient norms that a run logged.

    Each candidate is replayed over the norms, open-loop: the bound in use, fixed bounds at
    quantiles of the usual norms, and the adaptive methods. A norm is a *spike* if it is above
    `clip(exp(4 * spread), 3, 100)` times the running median; the others are *usual*. The *start*
    of a log, where norms are often large, is its first tenth, and goes on while the running median
    is more than twice the median, for half of the log at most. A candidate is *fit* if it passes
    three tests after the start:

    | test | a candidate passes if |
    |---|---|
    | spares | it clips at most 5 % of the usual norms, and at most 20 % in any tenth |
    | spares, for the bound in use | 25 % and 50 %: the learning rate was chosen with it |
    | catches | it clips at least 90 % of the spikes |
    | follows | in no tenth is its bound more than 4 times as large as a spike must be there |

    These are all the rules by which one is recommended:

    1. With fewer than 20 finite norms that are not zero, nothing is.
    2. The first fit candidate is, in this order, the simplest first: the bound in use, twice the
       0.99 quantile of the usual norms, that quantile, `zclip`, `clip_by_mean_std`,
       `clip_by_quantile`, `autoclip`. How well a fit candidate does decides nothing.
    3. The first fit candidate of the other kind, fixed or adaptive, is the second choice; with
       fewer than 200 norms, from which an adaptive method has hardly learned, there is none.
    4. `skip_step` goes round the first choice where norms are NaN or inf; and, with `z_max=6.0`,
       where the loss jumps after at least half of three or more groups of spikes, and at least
       five times as often as after usual norms.
    5. Where no candidate is fit, the one that fails the fewest tests is recommended, in the same
       order, and it is said which ones those are.

    Args:
      norms: The global norm before clipping at each logged step, shape [steps]; may hold NaN
        and inf.
      losses: The losses of the same steps, which show whether spikes cost anything; None without.
      steps: The numbers of the steps, which rise. None counts from 0 in steps of `every`.
      max_norm: The bound that the run had, > 0. None leaves it out of the candidates.
      every: How many steps there are from one logged norm to the next, >= 1. None takes it from
        `steps`, and is 1 without them.
      raw: Whether norms that pile up at their largest value are from before the clip all the same.
      progress: Called with a line of text before each part of the work. None is silent.

    Returns:
      An `Advice`: `recommendations`, `statistics`, `candidates` and `limits`.

    Raises:
      ValueError: `norms` have no finite positive number, a negative one or not one axis; they
        look like norms after a clip; `losses` or `steps` have another length; `steps` go back;
        `max_norm` or `every` is out of its range.

    | norms | result |
    |---|---|
    | fewer than 20 that are finite and not zero | statistics, and no recommendation |
    | NaN or inf | counted, not measured; `skip_step` is recommended |
    | zero | counted, not measured |
    | 5 % or more are the largest one | ValueError, without `raw` |

    Example:
      >>> norms = [1.0, 1.2, 0.9, 1.1, 0.8] * 40 + [30.0] + [1.0, 1.2, 0.9, 1.1, 0.8] * 40
      >>> print(advise(norms).recommendations[0].code)
      optimizer = optax.chain(clipax.clip_by_global_norm(2.4), optimizer)
    """
    progress = progress or _candidates.silent
    norms = _series("norms", norms)
    measured = norms[np.isfinite(norms) & (norms > 0)]
    if (norms < 0).any():
        raise ValueError(f"norms must be >= 0, got {norms[norms < 0][0]:g}.")
    if not measured.size:
        raise ValueError("norms must have a finite number > 0, got none.")
    if losses is not None:
        losses = _series("losses", losses, norms.size)
    if max_norm is not None:
        _checks.scalar(_checks.finite_positive, max_norm=max_norm)
        max_norm = float(max_norm)
    if every is not None:
        _checks.scalar(_checks.finite_at_least_one, every=every)
    steps, every = _steps(steps, every, norms.size)
    is_told = False
    try:
        _limits.require_raw(norms, max_norm)
    except ValueError:
        if not raw:
            raise
        is_told = True
    progress("statistics")
    statistics, marks = _statistics.describe(norms, losses)
    candidates = _candidates.weigh(norms, marks, max_norm, progress)
    return Advice(
        recommendations=_rules.recommend(statistics, candidates),
        statistics=statistics,
        candidates=candidates,
        limits=tuple(_limits.limits(norms, statistics, max_norm, every, is_told)),
        norms=norms,
        steps=steps,
        marks=marks,
    )


def _series(name: str, values: Any, size: int | None = None) -> Floats:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be numbers, one for each step, got {shown(values)}."
        ) from error
    if array.ndim != 1 or size not in (None, array.size):
        shape = "[steps]" if size is None else f"[{size}]"
        raise ValueError(f"{name} must have the shape {shape}, got {list(array.shape)}.")
    return array


def _steps(steps: Any, every: float | None, size: int) -> tuple[Floats, float]:
    if steps is None:
        return np.arange(size, dtype=np.float64) * (every or 1), float(every or 1)
    steps = _series("steps", steps, size)
    change = np.diff(steps)
    if not (change > 0).all():
        first = int(np.argmax(~(change > 0)))
        raise ValueError(f"steps must rise, got {steps[first + 1]:g} after {steps[first]:g}.")
    return steps, float(every or (np.median(change) if size > 1 else 1))
