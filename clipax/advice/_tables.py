"""Tables with one row a line: CSV, TSV, or the metric files of MLflow."""

import csv
import re
from collections.abc import Iterator

from clipax.advice import _files, _names
from clipax.advice._columns import Columns
from clipax.advice._files import File
from clipax.advice._log import LogError

_METRIC = re.compile(r"\d{12,14} \S+ -?\d+\s*")
_DELIMITERS = ",\t;"


def delimiter_of(lines: list[str]) -> str | None:
    """What separates the cells, if the first lines are those of a table."""
    for delimiter in sorted(_DELIMITERS, key=lambda each: -lines[0].count(each)):
        found = list(csv.reader(lines[:2], delimiter=delimiter))
        widths = {len(cells) for cells in found}
        names = [cell.strip() for cell in found[0]]
        is_header = any(names) and not any(":" in name or "=" in name for name in names)
        if widths != {1} and len(widths) == 1 and is_header:
            return delimiter
    is_number_each_line = all(map(_is_number, lines[1:])) and len(lines) > 1
    is_name = _names.norm_rank(lines[0]) is not None or _is_number(lines[0])
    return "," if is_number_each_line and is_name else None


def read_table(file: File, delimiter: str, wanted: str | None) -> Columns:
    """A table whose first line names its columns, or one column of numbers without a name."""
    columns = Columns(file.name, "line", wanted)
    lines = _Lines(_files.lines(file))
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader)]
        if len(header) == 1 and _is_number(header[0]):
            columns.add(1, [("norm", header[0])])
            header = ["norm"]
        # Two columns of equal names could not be distinguished.
        for name in header:
            if header.count(name) > 1 and columns.is_kept(name):
                raise columns.error(1, f"two columns are named {name!r}.")
        kept = [(index, name) for index, name in enumerate(header) if columns.is_kept(name)]
        for cells in reader:
            place, is_whole = reader.line_num, lines.is_whole
            if len(cells) == len(header):
                row = [(name, cells[index].strip()) for index, name in kept]
                columns.add(place, row, is_whole=is_whole)
            elif not is_whole:
                columns.drop(place)
            elif cells:
                message = f"has {len(cells)} cells, and the header has {len(header)}."
                raise columns.error(place, message)
    except csv.Error as error:
        raise LogError(f"{file.name}, line {reader.line_num}: {error}.") from error
    return columns


class _Lines:
    """The texts of lines, and whether the last one that was taken is whole."""

    def __init__(self, lines: Iterator[_files.Line]) -> None:
        self.lines = lines
        self.is_whole = True

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.is_whole = line.is_whole
            yield line.text + "\n"


def is_metric_file(first: str) -> bool:
    """Whether a line is one of MLflow's: time in milliseconds, value, step."""
    return _METRIC.fullmatch(first) is not None


def read_metric_file(file: File, wanted: str | None) -> Columns:
    """MLflow's file of one metric, whose name is that of the file."""
    name = file.path.name if file.path else "norm"
    if wanted is not None and wanted != name:
        raise LogError(f"{file.name}: holds the one metric {name!r}, not {wanted!r}.")
    columns = Columns(file.name, "line", name)
    for line in _files.lines(file):
        cells = line.text.split()
        if len(cells) == 3:
            row = [("step", cells[2]), (name, cells[1])]
            columns.add(line.number, row, is_whole=line.is_whole)
        elif not line.is_whole:
            columns.drop(line.number)
        elif cells:
            message = f"has {len(cells)} words; a line of a metric has time, value and step."
            raise columns.error(line.number, message)
    return columns


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
