"""A log from its file, or from the files of a resumed run, whatever wrote them."""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from clipax.advice import _columns, _extras, _files, _records, _tables, _text
from clipax.advice._columns import Columns
from clipax.advice._files import File
from clipax.advice._log import Log, LogError, rows

# Not a dictionary that Python printed, nor a line of text that opens with a bracket.
_JSON = re.compile(r"\{(?!')|\[\s*(\{(?!')|$)")
Reader = Callable[[File, str | None], Columns]


def read(paths: str | Sequence[str], column: str | None = None) -> Log:
    """The norms in a file, or in several files of one run.

    Args:
      paths: A path, "-" for standard input, or the paths of a resumed run. Where the steps of
        two of them overlap, those of the later one count.
      column: The column of the norms. None finds it by its name.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise LogError("no log to read.")
    log = _read_one(paths[0], column)
    for path in paths[1:]:
        log = _resumed(log, _read_one(path, column))
    return log


def _read_one(path: str, column: str | None) -> Log:
    with _files.open_log(path) as file:
        kind, reader = _reader(file)
        return reader(file, column).choose(kind)


def _reader(file: File) -> tuple[str, Reader]:
    """The name of the format and what reads it, from the first bytes of a file."""
    if _extras.is_event_file(file):
        return "TensorBoard events", _extras.read_event_file
    if _extras.is_run_file(file):
        return "a Weights & Biases run", _extras.read_run_file
    wide = _files.encoding_of(file.head)
    head = file.head.decode(wide, errors="replace").lstrip("\ufeff")
    if "\0" in head:
        raise LogError(
            f"{file.name}, line {head[: head.index(chr(0))].count(chr(10)) + 1}: is binary."
        )
    starts = [line for line in head.splitlines() if line.strip()]
    if not starts:
        raise LogError(f"{file.name}: has no line with text in its first {len(head):,} bytes.")
    first = starts[0].lstrip()
    if _JSON.match(first):
        if _records.is_record(first):
            return "JSON lines", _records.read_lines
        kind = "trainer_state.json" if '"log_history"' in head else "JSON"
        return kind, _records.read_document
    if _tables.is_metric_file(first):
        return "an MLflow metric", _tables.read_metric_file
    # The last line of the head may be cut off.
    complete = starts[:-1] if len(file.head) >= len(head) > 60_000 and len(starts) > 1 else starts
    if delimiter := _tables.delimiter_of(complete):
        kind = "TSV" if delimiter == "\t" else "CSV"
        return kind, functools.partial(_table, delimiter)
    return "text", _text.read_text


def _table(delimiter: str, file: File, column: str | None) -> Columns:
    return _tables.read_table(file, delimiter, column)


def _resumed(log: Log, later: Log) -> Log:
    """One log of two; the later one counts from its first step to its last."""
    notes = [*log.notes, *later.notes]
    source = f"{log.source} + {later.source}"
    if log.step_column is None or later.step_column is None:
        notes.append(f"{later.source} is taken to go on where the file before it ends.")
        start = log.steps[-1] + 1 - later.steps[0]
        later = later._replace(steps=later.steps + start)
    is_kept = (log.steps < later.steps[0]) | (log.steps > later.steps[-1])
    if dropped := int(np.sum(~is_kept)):
        notes.append(
            f"The steps {later.steps[0]:g} to {later.steps[-1]:g} are those of {later.source}:"
            f" {rows(dropped)} before it under the same steps are left out."
        )
    log = _columns.take(log, is_kept)
    order = np.argsort(np.concatenate([log.steps, later.steps]), kind="stable")
    losses = None
    if log.losses is not None and later.losses is not None:
        losses = np.concatenate([log.losses, later.losses])[order]
    return log._replace(
        norms=np.concatenate([log.norms, later.norms])[order],
        steps=np.concatenate([log.steps, later.steps])[order],
        losses=losses,
        loss_column=None if losses is None else log.loss_column,
        source=source,
        bound=log.bound if log.bound == later.bound else None,
        notes=tuple(notes),
    )
