"""Which candidate is recommended: the rules are those in the docstring of `advise`."""

import math
from typing import NamedTuple

from clipax.advice._candidates import Candidate
from clipax.advice._statistics import Statistics

LEAST_NORMS, LEAST_FOR_TWO = 20, 200
# In the whole log after the start, and in its worst tenth.
_USUAL, _USUAL_IN_USE = (0.05, 0.2), (0.25, 0.5)
_SPIKES, _SPIKE_RATIOS = 0.9, 4
_GROUPS, _JUMPS, _MORE_THAN_USUAL = 3, 0.5, 5


class Recommendation(NamedTuple):
    """One choice."""

    code: str
    """A line that wraps `optimizer`, to paste."""
    why: str
    """One sentence, and one more where steps should be left out."""
    clip: str
    """The call that makes the candidate."""


def recommend(
    statistics: Statistics, candidates: tuple[Candidate, ...]
) -> tuple[Recommendation, ...]:
    """The choices by the rules, the first one first; none for a log that is too short."""
    norms = statistics.row_count - statistics.nonfinite_count - statistics.zero_count
    if norms < LEAST_NORMS:
        return ()
    failed = [failures(statistics, candidate) for candidate in candidates]
    fewest = min(map(len, failed))
    ranked = [each for each, tests in zip(candidates, failed, strict=True) if len(tests) == fewest]
    first = ranked[0]
    choices = [_first(statistics, first, candidates)]
    others = [each for each in ranked if is_adaptive(each) != is_adaptive(first)]
    if others and fewest == 0 and norms >= LEAST_FOR_TWO:
        choices.append(_second(statistics, others[0]))
    return tuple(choices)


def failures(statistics: Statistics, candidate: Candidate) -> tuple[str, ...]:
    """The tests that a candidate fails, each in words; a fit one fails none."""
    found = []
    most, most_in_a_part = _USUAL_IN_USE if candidate.kind == "in use" else _USUAL
    if candidate.usual_clipped > most or candidate.most_usual_clipped > most_in_a_part:
        share = percent(candidate.usual_clipped)
        worst = percent(candidate.most_usual_clipped)
        found.append(f"it clips {share} of the usual norms, and {worst} in one part of the log")
    if candidate.late_spikes_clipped < _SPIKES:
        found.append(f"it clips only {percent(candidate.late_spikes_clipped)} of the spikes")
    if candidate.most_ratio == math.inf:
        found.append("it has no bound yet in one part of the log")
    elif candidate.most_ratio > _SPIKE_RATIOS * statistics.spike_ratio:
        found.append(f"its bound is up to {times(candidate.most_ratio)} the usual norm")
    return tuple(found)


def is_adaptive(candidate: Candidate) -> bool:
    return candidate.kind == "adaptive"


def have_spikes_cost(statistics: Statistics) -> bool:
    """Whether the loss jumps after spikes, and not as often after other norms."""
    known, jumps = statistics.spikes_with_losses, statistics.spikes_before_jumps
    if known < _GROUPS:
        return False
    return jumps / known >= max(_JUMPS, _MORE_THAN_USUAL * statistics.usual_jump_share)


def _first(
    statistics: Statistics, first: Candidate, candidates: tuple[Candidate, ...]
) -> Recommendation:
    code, failed = _chained(first), failures(statistics, first)
    why = _reason(statistics, first, candidates)
    if failed:
        why = f"No candidate passes all tests, and this one fails the fewest: {', '.join(failed)}."
    has_cost = have_spikes_cost(statistics)
    if has_cost:
        why += (
            f" The loss jumped after {statistics.spikes_before_jumps} of"
            f" {statistics.spikes_with_losses} groups of spikes: skip_step leaves such steps out."
        )
    if candidates[0].kind == "in use" and candidates[0].usual_clipped > 0.5:
        why += (
            " Your bound normalizes, which can train as well or better: compare the losses of"
            " both before you change it."
        )
    if statistics.nonfinite_count:
        why += " skip_step leaves out the steps whose norm is NaN or inf."
    if has_cost or statistics.nonfinite_count:
        code = f"clipax.skip_step({code}{', z_max=6.0' if has_cost else ''})"
    return Recommendation(f"optimizer = {code}", why, first.code)


def _second(statistics: Statistics, candidate: Candidate) -> Recommendation:
    use = "As simple as it gets, while the norms keep this scale"
    if is_adaptive(candidate):
        use = "For runs whose norms have another scale, since it needs no bound of yours"
    why = f"{use}: it {_acts(statistics, candidate)}."
    return Recommendation(f"optimizer = {_chained(candidate)}", why, candidate.code)


def _chained(candidate: Candidate) -> str:
    return f"optax.chain({candidate.code}, optimizer)"


def _reason(
    statistics: Statistics, candidate: Candidate, candidates: tuple[Candidate, ...]
) -> str:
    acts = _acts(statistics, candidate)
    if candidate.kind == "in use":
        if candidate.clipped == 0:
            return (
                "Keep your bound: it never acted, since no norm was a spike, and it is"
                f" {_size(candidate)} the usual norm, which is near enough to cut one."
            )
        return f"Keep your bound: it {acts}, and is {_size(candidate)} the usual norm."
    if is_adaptive(candidate):
        nearest = min(
            (each for each in candidates if not is_adaptive(each)),
            key=lambda each: len(failures(statistics, each)),
        )
        reason = failures(statistics, nearest)[0]
        return (
            f"No fixed bound fits the whole log (of {nearest.code}: {reason}), and this one"
            f" follows the norms: it {acts}, and is {_size(candidate)} the usual norm."
        )
    return f"A fixed bound is enough: it {acts}, and is {_size(candidate)} the usual norm."


def _acts(statistics: Statistics, candidate: Candidate) -> str:
    usual = f"{percent(candidate.usual_clipped)} of the usual norms"
    if candidate.usual_clipped == 0:
        usual = "none of the usual norms"
    if statistics.spike_count == 0:
        return f"clips {usual}"
    caught = round(candidate.spikes_clipped * statistics.spike_count)
    early = ""
    if statistics.start_spike_count:
        early = f" ({statistics.start_spike_count} of them at the start)"
    return f"clips {caught} of {statistics.spike_count} spikes{early} and {usual}"


def _size(candidate: Candidate) -> str:
    low, high = times(candidate.least_ratio), times(candidate.most_ratio)
    return high if low == high else f"{low.removesuffix(' times')} to {high}"


def percent(share: float) -> str:
    """A share in words of two digits."""
    if math.isnan(share):
        return "-"
    value = 100 * share
    if value == 0 or value >= 9.95:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.05 else "< 0.1 %"


def times(ratio: float) -> str:
    """A ratio in words of two digits."""
    return f"{ratio:.0f} times" if ratio >= 9.95 else f"{ratio:.2g} times"
