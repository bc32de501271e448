"""What the readers give: norms with their steps, losses, origin."""

from typing import Any, NamedTuple

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


class LogError(ValueError):
    """A log that cannot be read; the message is one line with the file and the line in it."""


class Log(NamedTuple):
    """The norms of a run, in the order of its steps."""

    norms: Floats
    """The global norm of each logged step; may hold NaN and inf."""
    steps: Floats
    """The number of each step."""
    losses: Floats | None
    """The loss of each logged step, NaN where there is none; None where no column has it."""
    column: str
    """The name of the column that holds the norms."""
    loss_column: str | None
    step_column: str | None
    """The column of the steps; None where rows are counted instead."""
    source: str
    """The file or files."""
    kind: str
    """The format that was recognized."""
    bound: float | None = None
    """The bound that the run had, where its log says so."""
    notes: tuple[str, ...] = ()
    """What a reader of the advice must know about this log, one sentence each."""


def rows(count: int, noun: str = "row") -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
