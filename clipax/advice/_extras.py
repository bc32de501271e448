"""Logs in binary, read by the packages that write them: TensorBoard, Weights & Biases."""

import importlib
import json
from collections.abc import Iterator
from typing import Any

from clipax.advice._columns import Columns
from clipax.advice._files import File
from clipax.advice._log import LogError

_FILE_HEAD, _PIECE_HEAD, _BLOCK = 7, 7, 1 << 15
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def is_event_file(file: File) -> bool:
    """Whether a file is one of TensorBoard's: its first record, after the length, shows it."""
    return b"brain.Event:" in file.head[:64]


def is_run_file(file: File) -> bool:
    """Whether a file is that of an offline run of Weights & Biases."""
    return file.head[:4] == b":W&B"


def read_event_file(file: File, wanted: str | None) -> Columns:
    """The scalars of a TensorBoard event file."""
    loader = _require(
        "tensorboard.backend.event_processing.event_file_loader", file, "tensorboard"
    )
    tensors = _require("tensorboard.util.tensor_util", file, "tensorboard")
    columns = Columns(file.name, "event", wanted)
    steps: dict[int, int] = {}
    try:
        for event in loader.EventFileLoader(_path(file)).Load():
            for value in event.summary.value:
                if not columns.is_kept(value.tag) or not value.HasField("tensor"):
                    continue
                array = tensors.make_ndarray(value.tensor)
                if array.shape in ((), (1,)) and array.dtype.kind in "fiu":
                    # Scalars of one step come one by one; the step is their row.
                    place = steps.setdefault(event.step, len(steps) + 1)
                    row = [(value.tag, float(array.reshape(())))]
                    columns.add(place, [*row, ("step", event.step)])
    except Exception as error:
        raise LogError(f"{file.name}: TensorBoard cannot read it ({_line(error)}).") from error
    return columns


def read_run_file(file: File, wanted: str | None) -> Columns:
    """The history of an offline run of Weights & Biases."""
    messages = _require("wandb.proto.wandb_internal_pb2", file, "wandb")
    columns = Columns(file.name, "record", wanted)
    for place, data in _records(file, columns):
        record = messages.Record()
        try:
            record.ParseFromString(data)
            items = [
                (item.key or "/".join(item.nested_key), json.loads(item.value_json))
                for item in record.history.item
            ]
        except Exception as error:
            raise columns.error(place, f"wandb cannot read it ({_line(error)}).") from error
        columns.add(place, [item for item in items if not isinstance(item[1], dict | list)])
    return columns


def _records(file: File, columns: Columns) -> Iterator[tuple[int, bytes]]:
    """The records of a file in blocks, as LevelDB writes its log.

    A block holds pieces, each behind its checksum, length and kind; a record is one piece, or
    goes on from its first piece to its last. The file itself has a head before all of that.
    """
    place, record = 1, b""
    start = len(file.stream.read(_FILE_HEAD))
    while block := file.stream.read(_BLOCK - start):
        at, end, start = 0, len(block) - _PIECE_HEAD, 0
        while at <= end:
            length = int.from_bytes(block[at + 4 : at + 6], "little")
            kind = block[at + 6]
            at += _PIECE_HEAD
            if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
                raise columns.error(place, "is no record of a run.")
            if at + length > len(block):
                columns.drop(place)
                return
            record += block[at : at + length]
            at += length
            if kind in (_WHOLE, _LAST):
                yield place, record
                place, record = place + 1, b""


def _path(file: File) -> str:
    if file.path is None:
        raise LogError(f"{file.name}: a binary log must be a file.")
    return str(file.path)


def _require(module: str, file: File, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LogError(
            f"{file.name}: to read it needs {extra}: pip install 'clipax[{extra}]'."
        ) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
