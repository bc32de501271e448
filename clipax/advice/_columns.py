"""Columns of numbers, collected row by row from a log."""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from clipax.advice import _names
from clipax.advice._log import Floats, Log, LogError, rows

_SHOWN = 8


class Column:
    """The numbers under one name, each with the place of its row."""

    def __init__(self) -> None:
        self.places = array("q")
        self.values = array("d")
        self.text: tuple[int, str] | None = None
        """The first value that is no number, and its place."""


class Columns:
    """Collects what may be a norm, a loss or a step; everything else is left out unread.

    Args:
      source: The name of the file, for messages.
      place: What the place of a row is called: "line", "entry".
      wanted: The column that holds the norms, where the user said so.
    """

    def __init__(self, source: str, place: str, wanted: str | None = None) -> None:
        self.source = source
        self.place = place
        self.wanted = wanted
        self.notes: list[str] = []
        self.columns: dict[str, Column] = {}
        self._is_kept: dict[str, bool] = {}

    def error(self, place: int, message: str) -> LogError:
        return LogError(f"{self.source}, {self.place} {place}: {message}")

    def is_kept(self, name: str) -> bool:
        """Whether a column of this name could be of use."""
        if name not in self._is_kept:
            ranks = (_names.norm_rank(name), _names.loss_rank(name), _names.step_rank(name))
            is_own = _names.is_of_clipax(name)
            is_useful = is_own or any(rank is not None for rank in ranks)
            self._is_kept[name] = name == self.wanted or is_useful
        return self._is_kept[name]

    def add(self, place: int, row: Iterable[tuple[str, Any]], *, is_whole: bool = True) -> None:
        """Takes a row, or drops it where it is the half-written last one."""
        numbers = [(name, value) for name, value in row if self.is_kept(name)]
        if not is_whole and not all(_is_number(value) for _, value in numbers):
            self.drop(place)
            return
        for name, value in numbers:
            if value is None or value == "":
                continue
            column = self.columns.setdefault(name, Column())
            try:
                number = float("x" if isinstance(value, bool) else value)
            except (TypeError, ValueError):
                column.text = column.text or (place, str(value))
                continue
            column.places.append(place)
            column.values.append(number)

    def drop(self, place: int) -> None:
        self.notes.append(
            f"{self.source}, {self.place} {place}: the last row is half-written and left out."
        )

    def choose(self, kind: str) -> Log:
        """The norms under the wanted or the likeliest name, with their losses and steps."""
        name = self._norm_column()
        column = self.columns[name]
        if column.text is not None:
            place, text = column.text
            raise self.error(place, f"{name!r} is {_short(text)!r}, which is no number.")
        places = np.frombuffer(column.places, np.int64)
        norms = np.frombuffer(column.values, np.float64)
        if (negative := np.flatnonzero(norms < 0)).size:
            first = negative[0]
            raise self.error(places[first], f"{name!r} is {norms[first]:g}; no norm is negative.")
        if not np.isfinite(norms).any():
            raise LogError(f"{self.source}: {name!r} has no finite norm in {rows(norms.size)}.")
        step_name, steps = self._aligned(places, _names.step_rank, name)
        loss_name, losses = self._aligned(places, _names.loss_rank, name)
        if loss_name is None and step_name is not None:
            loss_name, losses = self._aligned(places, _names.loss_rank, name, step_name)
        notes = list(self.notes)
        if steps is None or not np.isfinite(steps).all():
            step_name, steps = None, np.arange(norms.size, dtype=np.float64)
            notes.append(f"{self.source} has no column of steps: its rows are counted instead.")
        notes += self._notes_on_norms(name)
        if any(map(_names.is_summary, self._is_kept)):
            notes.append(
                f"{self.source} is the export of a chart of Weights & Biases, in which a value of"
                " a long run may be the mean of several steps: spikes are averaged away then."
            )
        bound = self._bound(name)
        log = Log(norms, steps, losses, name, loss_name, step_name, self.source, kind, bound)
        log, more = self._forward(log, places)
        return log._replace(notes=(*notes, *more))

    def _norm_column(self) -> str:
        if self.wanted is not None:
            if self.wanted in self.columns:
                return self.wanted
            raise LogError(f"{self.source}: no column is named {self.wanted!r}; {self._list()}")
        ranks = self._norm_ranks()
        best = [name for name in ranks if ranks[name] == min(ranks.values())]
        if not best:
            message = "no column looks like a gradient norm, so name it with --column"
            raise LogError(f"{self.source}: {message}; {self._list()}")
        if len(best) > 1:
            raise LogError(
                f"{self.source}: {len(best)} columns may be the global norm; name one with"
                f" --column: {_listed(best)}."
            )
        if _names.is_after_clip(best[0]):
            raise LogError(
                f"{self.source}: {best[0]!r} is the norm after the clip, which says little of the"
                " norms before it: log those (MaxText: 'learning/raw_grad_norm'), or take it"
                f" all the same with --column {best[0]!r}."
            )
        return best[0]

    def _norm_ranks(self) -> dict[str, int]:
        ranks = {name: _names.norm_rank(name, self.columns) for name in self.columns}
        return {name: rank for name, rank in ranks.items() if rank is not None}

    def _notes_on_norms(self, name: str) -> Iterator[str]:
        if _names.is_after_clip(name):
            yield (
                f"{name!r} is the norm after the clip: how large a norm was before it is not in"
                " this log."
            )
        elif _names.beside(name, "clipped_norm") in self.columns:
            yield (
                f"{name!r} is what the method in use measures, the global norm of most of them."
                " What is recommended is for global norms alone: if the method measures others,"
                " such as the largest entry (clip_by_value), log observe(method), whose norm_in"
                " is global."
            )

    def _bound(self, name: str) -> float | None:
        """The bound that the run had, if it was logged and always the same."""
        column = self.columns.get(_names.beside(name, "max_norm") or "")
        values = set(column.values) if column is not None and column.text is None else set()
        (bound,) = values if len(values) == 1 else (math.inf,)
        return bound if 0 < bound < math.inf else None

    def _list(self) -> str:
        norms = [*self._norm_ranks()]
        if norms:
            return f"these look like norms: {_listed(norms)}."
        if self._is_kept:
            return f"the names are {_listed(list(self._is_kept))}."
        return "it has no columns."

    def _aligned(
        self,
        places: Any,
        rank: Callable[[str], int | None],
        but: str,
        by: str | None = None,
    ) -> tuple[str | None, Floats | None]:
        """The likeliest column of a kind, in the rows of the norms; NaN where it has none.

        Lightning writes the loss in a row of its own: there `by`, the column of the steps, says
        what belongs together.
        """
        keys = self._keys(places, by)
        found = []
        for name, column in self.columns.items():
            order = rank(name)
            if order is None or name == but or column.text is not None:
                continue
            others = self._keys(np.frombuffer(column.places, np.int64), by)
            sequence = np.argsort(others, kind="stable")
            index = np.searchsorted(others, keys, sorter=sequence)
            index = sequence[np.minimum(index, others.size - 1)]
            is_there = others[index] == keys
            values = np.frombuffer(column.values, np.float64)[index]
            if is_there.any():
                values = np.where(is_there, values, np.nan)
                found.append((order, -int(np.sum(is_there)), name, values))
        if not found:
            return None, None
        return min(found, key=lambda each: each[:3])[2:]

    def _keys(self, places: Any, by: str | None) -> Any:
        """The steps at some places, NaN where there is none; or the places themselves."""
        if by is None:
            return places
        column = self.columns[by]
        others = np.frombuffer(column.places, np.int64)
        index = np.minimum(np.searchsorted(others, places), others.size - 1)
        steps = np.frombuffer(column.values, np.float64)[index]
        return np.where(others[index] == places, steps, np.nan)

    def _forward(self, log: Log, places: Any) -> tuple[Log, list[str]]:
        """Requires that steps go forward; of equal steps, the last row counts."""
        change = np.diff(log.steps)
        if (back := np.flatnonzero(change < 0)).size:
            first = back[0]
            raise self.error(
                places[first + 1],
                f"step {log.steps[first + 1]:g} comes after step {log.steps[first]:g}; of a"
                " resumed run, give each part as a file of its own.",
            )
        if not (change == 0).any():
            return log, []
        is_last = np.append(change > 0, True)
        note = (
            f"{self.source}: {rows(int(np.sum(~is_last)))} came again under the same step;"
            " the last one counts."
        )
        return take(log, is_last), [note]


def take(log: Log, which: Any) -> Log:
    """Some rows of a log."""
    losses = None if log.losses is None else log.losses[which]
    return log._replace(norms=log.norms[which], steps=log.steps[which], losses=losses)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
