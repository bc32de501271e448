"""Processes that work together: started, waited for, and none left."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence


class ProcessFailedError(Exception):
    """Names the reason, and what every process has written."""


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of the loopback that stays this test's own.

    A port that is only looked up can be given to another before a process listens on it.
    This one is held, in a way in which servers of this user may still share it, as gRPC does.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def run_together(commands: Sequence[Sequence[str]], *, seconds: float) -> list[str]:
    """Runs the commands side by side to their end and gives the output of each.

    As soon as one fails, or when the time is over, it raises. Whatever happens, it ends all
    processes and those that they have started.
    """
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, str(row)) for row in range(len(commands))]
        try:
            for command, file in zip(commands, files, strict=True):
                started.append(start(command, file))
            reason = wait(started, seconds)
        finally:
            for process in started:
                end(process)
        outputs = [file.read_text(errors="replace") for file in files]
    if reason:
        told = map("process {}:\n{}".format, range(len(outputs)), outputs)
        raise ProcessFailedError("\n".join([reason, *told]))
    return outputs


def start(command: Sequence[str], file: pathlib.Path) -> subprocess.Popen[bytes]:
    """In a group of its own, with its output in a file: a full pipe would stop it."""
    with file.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(started: Sequence[subprocess.Popen[bytes]], seconds: float) -> str | None:
    """Until all have succeeded, or there is a reason to wait no longer."""
    deadline = time.monotonic() + seconds
    while True:
        statuses = [process.poll() for process in started]
        failed = [f"process {row} failed with status {s}" for row, s in enumerate(statuses) if s]
        if failed:
            return "; ".join(failed)
        running = [str(row) for row, status in enumerate(statuses) if status is None]
        if not running:
            return None
        if time.monotonic() > deadline:
            return f"process {', '.join(running)} still ran after {seconds} s"
        time.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends its whole group, where there is anything left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
