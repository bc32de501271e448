"""JSON: an object a line, or one document such as `trainer_state.json`."""

import json
from collections.abc import Iterator
from typing import Any

from clipax.advice import _files
from clipax.advice._columns import Columns
from clipax.advice._files import File
from clipax.advice._log import LogError


def is_record(first: str) -> bool:
    """Whether a line is a whole object by itself, and no document of a run."""
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and not any(
        isinstance(value, list) for value in record.values()
    )


def read_lines(file: File, wanted: str | None) -> Columns:
    """An object a line; objects inside objects give names with slashes."""
    columns = Columns(file.name, "line", wanted)
    for line in _files.lines(file):
        if not line.text.strip():
            continue
        try:
            record = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            if not line.is_whole:
                columns.drop(line.number)
                continue
            raise columns.error(line.number, f"is not JSON ({_reason(error)}).") from error
        if not isinstance(record, dict):
            raise columns.error(line.number, "is not a JSON object.")
        columns.add(line.number, _flat(record))
    return columns


def read_document(file: File, wanted: str | None) -> Columns:
    """A document: a list of objects, an object that holds one, or an object of lists."""
    text = "\n".join(line.text for line in _files.lines(file))
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{file.name}, line {error.lineno}: the JSON breaks off here ({error.msg})."
        raise LogError(message) from error
    except RecursionError as error:
        raise LogError(f"{file.name}: its JSON is nested too deeply.") from error
    columns = Columns(file.name, "entry", wanted)
    for place, record in enumerate(_records(document), 1):
        columns.add(place, _flat(record))
    if not columns.columns:
        found = f"an object of {', '.join(map(repr, document))}" if _is_object(document) else ""
        message = f"no list of logged steps in it{found and ', only ' + found[:80]}"
        raise LogError(f"{file.name}: {message}.")
    return columns


def _records(document: Any) -> Iterator[dict[str, Any]]:
    if _is_object(document):
        lists = {name: value for name, value in document.items() if isinstance(value, list)}
        of_records = [value for value in lists.values() if any(map(_is_object, value))]
        if not of_records:
            length = max(map(len, lists.values()), default=0)
            for index in range(length):
                yield {name: value[index] for name, value in lists.items() if index < len(value)}
            return
        # Of a trainer's state, `log_history` is the longest.
        document = document.get("log_history", max(of_records, key=len))
    if isinstance(document, list):
        yield from filter(_is_object, document)


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if _is_object(value):
            yield from _flat(value, f"{prefix}{name}/")
        elif not isinstance(value, list):
            yield prefix + name, value


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _reason(error: Exception) -> str:
    return getattr(error, "msg", "nested too deeply")
