"""Files as lines: compressed or not, from a path or from standard input, never binary."""

import contextlib
import gzip
import io
import pathlib
import sys
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from clipax.advice._log import LogError

_HEAD = 1 << 16
_WIDE = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}


class Line(NamedTuple):
    number: int
    text: str
    is_whole: bool
    """Whether it ends as a line does; the last one of a log in writing may not."""


class File(NamedTuple):
    """An open log."""

    name: str
    """What messages call it."""
    path: pathlib.Path | None
    """None for standard input."""
    head: bytes
    """Its first bytes, decompressed."""
    stream: Any


@contextlib.contextmanager
def open_log(path: str) -> Iterator[File]:
    """Opens a path, or standard input for "-", and looks through gzip."""
    if path == "-":
        yield _opened("standard input", None, sys.stdin.buffer)
        return
    if pathlib.Path(path).is_dir():
        raise LogError(f"{path}: is a directory; give the file in it that holds the log.")
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise LogError(f"{path}: {error.strerror or error}.") from error
        yield _opened(path, pathlib.Path(path), raw)


def _opened(name: str, path: pathlib.Path | None, raw: Any) -> File:
    stream: Any = io.BufferedReader(raw, _HEAD)
    try:
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream = io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=stream)), _HEAD)
        head = stream.peek(_HEAD)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LogError(f"{name}, line 1: its gzip data are cut off or damaged.") from error
    except OSError as error:
        raise LogError(f"{name}: {error.strerror or error}.") from error
    if not head:
        raise LogError(f"{name}: is empty.")
    return File(name, path, head, stream)


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes of a text show, or UTF-8."""
    return _WIDE.get(head[:2], "utf-8")


def lines(file: File) -> Iterator[Line]:
    """The lines of a text, without their ends."""
    encoding, stream, number = "utf-8-sig", file.stream, 0
    if wide := _WIDE.get(file.head[:2]):
        encoding = "utf-8"
        stream = _in_utf_8(stream, wide)
    try:
        for number, raw in enumerate(stream, 1):
            if b"\0" in raw:
                raise LogError(f"{file.name}, line {number}: is binary, not text.")
            try:
                text = raw.decode(encoding)
            except UnicodeDecodeError as error:
                message = f"{file.name}, line {number}: is not text in UTF-8."
                raise LogError(message) from error
            encoding = "utf-8"
            yield Line(number, text.rstrip("\r\n"), text.endswith("\n"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"{file.name}, after line {number}: its gzip data are cut off or damaged."
        raise LogError(message) from error
    except OSError as error:
        raise LogError(f"{file.name}, after line {number}: {error.strerror or error}.") from error


def _in_utf_8(stream: Any, encoding: str) -> Iterator[bytes]:
    with io.TextIOWrapper(stream, encoding, errors="replace", newline="") as texts:
        for text in texts:
            yield text.removeprefix("\ufeff").encode()
