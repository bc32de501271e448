"""Interleaved rounds, their medians, and tables of them."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Table = dict[str, Any]
Seconds = dict[str, list[float]]

_WARM_UPS = 2


class Work(NamedTuple):
    """Something to be timed."""

    run: Callable[[Any], Any]
    """The timed part, of what `prepare` gave. It returns when all of its work is done."""
    prepare: Callable[[], Any] = lambda: None
    """What has to be there before, and is not timed."""


def interleaved(works: dict[str, Work], rounds: int, pause: float = 0.0) -> Seconds:
    """Seconds of each work in each round.

    The works take turns, so that a machine that slows down slows all of them down. Each is
    first, second, ... and last equally often, after one neighbour and after the other.
    """
    for work in works.values():
        for _ in range(_WARM_UPS):
            work.run(work.prepare())
    names, seconds = list(works), {name: [] for name in works}
    for number in range(rounds):
        turns, turn = divmod(number, len(names))
        order = names[turn:] + names[:turn]
        for name in reversed(order) if turns % 2 else order:
            prepared = works[name].prepare()
            # Threads of the work before may still wait for more, and keep a core busy.
            time.sleep(pause)
            start = time.perf_counter()
            works[name].run(prepared)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(
    title: str,
    seconds: Seconds,
    baseline: str,
    limits: dict[str, str] | None = None,
    **about: Any,
) -> Table:
    """A row for each work; its ratio is its median over that of the baseline.

    `limits` names the row that a row cannot be faster than.
    """
    base = float(np.median(seconds[baseline]))
    rows = [_row(name, values, base) for name, values in seconds.items()]
    for row in rows:
        if limits and row["name"] in limits:
            row["limit"] = limits[row["name"]]
            row["over_limit"] = row["median_s"] / float(np.median(seconds[row["limit"]]))
    return {"title": title, "about": about, "baseline": baseline, "rows": rows}


def _row(name: str, seconds: Sequence[float], base: float) -> dict[str, Any]:
    low, q1, median, q3, high = (float(x) for x in np.percentile(seconds, (0, 25, 50, 75, 100)))
    return {
        "name": name,
        "median_s": median,
        "q1_s": q1,
        "q3_s": q3,
        "min_s": low,
        "max_s": high,
        "ratio": median / base,
        "runs": len(seconds),
    }


def median_of(table: Table, name: str) -> float | None:
    """None where the table has no such row."""
    return next((row["median_s"] for row in table["rows"] if row["name"] == name), None)


def ratio_of(table: Table, one: str, other: str) -> float | None:
    """The ratio of two medians, where both were measured."""
    above, below = median_of(table, one), median_of(table, other)
    return None if above is None or below is None else above / below


def text(table: Table) -> str:
    has_limits = any("limit" in row for row in table["rows"])

    def over_limit(row: dict[str, Any]) -> tuple[str, ...]:
        return (f"{row['over_limit']:.2f}" if "limit" in row else "",) if has_limits else ()

    cells = [
        (
            row["name"],
            *(f"{1e3 * row[f'{key}_s']:.2f}" for key in ("median", "q1", "q3", "min", "max")),
            *over_limit(row),
            f"{row['ratio']:.2f}",
            str(row["runs"]),
        )
        for row in table["rows"]
    ]
    limit = ("over limit",) if has_limits else ()
    header = ("", "median ms", "q1", "q3", "min", "max", *limit, "ratio", "runs")
    notes = [f"Ratio: to {table['baseline']}.", *table.get("notes", [])]
    return "\n".join([table["title"], columns([header, *cells]), *notes])


def columns(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Aligned text: so many columns to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        aligned = (
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(cells)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, rows))
