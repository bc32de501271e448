"""Advice as a page of text or as JSON."""

import math
import textwrap
from typing import Any

from clipax.advice._candidates import Candidate
from clipax.advice._log import rows
from clipax.advice._rules import Recommendation, failures, percent
from clipax.advice._statistics import Statistics

_WIDTH = 100
_FIXED = "clipax.clip_by_global_norm("
# Of a candidate, what has a number for each row.
_ROWS = ("max_norm", "coefficient")


def page(
    recommendations: tuple[Recommendation, ...],
    statistics: Statistics,
    candidates: tuple[Candidate, ...],
    limits: tuple[str, ...],
) -> str:
    """What an owner of the run reads: the choices, what they rest on, and what is not known."""
    return "\n\n".join(
        (
            _choices(recommendations),
            _norms(statistics),
            _table(statistics, candidates),
            _notes(limits),
        )
    )


def _choices(recommendations: tuple[Recommendation, ...]) -> str:
    if not recommendations:
        return "No recommendation: there are too few norms."
    lines = []
    for place, choice in enumerate(recommendations, 1):
        lines.append(f"{place}. {choice.code}")
        lines += _wrapped(choice.why, "   ")
        lines += _wrapped(_elsewhere(choice.clip), "   ")
    return "\n".join(lines)


def _elsewhere(clip: str) -> str:
    """What a fixed bound is called in other trainers."""
    if not clip.startswith(_FIXED):
        return ""
    bound = clip.removeprefix(_FIXED).removesuffix(")")
    return (
        f"Elsewhere: max_grad_norm={bound} (Hugging Face, torchtitan), gradient_clip_val={bound}"
        f" (Lightning), --clip-grad {bound} (Megatron)."
    )


def _norms(found: Statistics) -> str:
    quantiles = ", ".join(f"{number(found.quantiles[q])} ({q:g})" for q in found.quantiles)
    facts = {
        "norms": f"{rows(found.row_count)}, median {number(found.median)},"
        f" largest {number(found.largest)}",
        "quantiles": quantiles,
        "drift": f"the median of each {_part(found)} of the log: "
        + " ".join(map(number, found.part_medians))
        + f"; the first {rows(found.start_count)} count as the start",
        "spread": f"a factor of {math.exp(found.spread):.2f} around the running median (one"
        f" standard deviation); tail {found.tail:.1f} times a log-normal one",
        "spikes": _spikes(found),
    }
    lines = []
    for name, text in facts.items():
        lines += _wrapped(text, " " * 11, f"{name:11}")
    return "\n".join(lines)


def _part(found: Statistics) -> str:
    names = {10: "tenth", 5: "fifth", 4: "quarter", 3: "third", 2: "half", 1: "whole"}
    return names.get(len(found.part_medians), f"1/{len(found.part_medians)}")


def _spikes(found: Statistics) -> str:
    limit = f"above {found.spike_ratio:.2g} times the running median"
    if not found.spike_count:
        return f"none {limit}"
    text = f"{found.spike_count} {limit}"
    if found.spike_groups < found.spike_count:
        text += f", in {rows(found.spike_groups, 'group')}, the longest of {found.longest_group}"
    if found.spikes_with_losses:
        text += (
            f"; the loss jumped after {found.spikes_before_jumps} of {found.spikes_with_losses}"
            f" (and after {percent(found.usual_jump_share)} of usual norms)"
        )
    return text


def _table(statistics: Statistics, candidates: tuple[Candidate, ...]) -> str:
    header = (
        "candidate",
        "clipped",
        "start",
        "usual",
        "spikes",
        "mass lost",
        "bound / usual",
        "fit",
    )
    table = [header, *(_cells(statistics, each) for each in candidates)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    legend = (
        "clipped, start, usual, spikes: the share of all norms, of those of the start, of usual"
        " ones after it, and of spikes that a candidate clips. mass lost: what it takes off the"
        " sum of all norms. bound / usual: its bound over the usual norm, from the part of the log"
        " where that is least to where it is most; inf while it warms up. fit: it passes the three"
        " tests, which are in the documentation of clipax.advise."
    )
    return "\n".join([*lines, *_wrapped(legend, "")])


def _cells(statistics: Statistics, each: Candidate) -> tuple[str, ...]:
    return (
        each.code.removeprefix("clipax.") + (" (in use)" if each.kind == "in use" else ""),
        percent(each.clipped),
        percent(each.start_clipped),
        percent(each.usual_clipped),
        percent(each.spikes_clipped),
        percent(each.mass_removed),
        f"{each.least_ratio:.3g} to {each.most_ratio:.3g}",
        "no" if failures(statistics, each) else "yes",
    )


def _notes(limits: tuple[str, ...]) -> str:
    lines = ["What this log cannot tell, and what else to know:"]
    for note in limits:
        lines += _wrapped(note, "  ", "- ")
    return "\n".join(lines)


def _wrapped(text: str, indent: str, first: str = "") -> list[str]:
    start = first or indent
    return textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=indent)


def number(value: float) -> str:
    """A number of three digits."""
    return f"{value:.3g}"


def as_dict(
    recommendations: tuple[Recommendation, ...],
    statistics: Statistics,
    candidates: tuple[Candidate, ...],
    limits: tuple[str, ...],
) -> dict[str, Any]:
    """Everything but the rows; NaN and inf are None."""
    weighed = [
        {name: value for name, value in each._asdict().items() if name not in _ROWS}
        | {"failed": failures(statistics, each)}
        for each in candidates
    ]
    return _plain(
        {
            "recommendations": [each._asdict() for each in recommendations],
            "statistics": statistics._asdict(),
            "candidates": weighed,
            "limits": limits,
        }
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
