"""Two processes of four devices train as one process of eight; one that fails is told of."""

import fcntl
import json
import pathlib
import socket
import sys
import time
from typing import Any

import numpy as np
import process_training
import pytest
from processes import ProcessFailedError, reserved_port, run_together

# A machine under load takes several times what it takes at rest. Longer than a training process
# that hangs lets itself live, so that it can say where.
SECONDS = process_training.SECONDS + 60.0


def command(out: pathlib.Path, port: int, process: int, of: int, *more: str) -> list[str]:
    """One of so many processes, which have eight devices between them."""
    program = [sys.executable, process_training.__file__]
    which = ["--process-id", str(process), "--num-processes", str(of)]
    where = ["--coordinator", f"127.0.0.1:{port}", "--devices", str(8 // of)]
    return [*program, *which, *where, "--out", str(out), *more]


def norm_in_float64(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in tree.values())))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: pathlib.Path) -> None:
    files = [tmp_path / name for name in ("first", "second", "alone")]
    with reserved_port() as port:
        pair = [command(file, port, row, 2) for row, file in enumerate(files[:2])]
        run_together([*pair, command(files[2], port, 0, 1)], seconds=SECONDS)
    first, second, alone = (json.loads(file.read_text()) for file in files)
    assert first == second
    assert (first["processes"], first["devices"]) == (2, 8)
    assert (alone["processes"], alone["devices"]) == (1, 8)
    expected = norm_in_float64(process_training.initial_params())
    for result in (first, alone):
        np.testing.assert_allclose(result["norm_in_shard_map"], expected, rtol=2e-6)
    assert set(first["runs"]) == set(alone["runs"]) == set(process_training.METHODS)
    for name, run in alone["runs"].items():
        assert_same_run(first["runs"][name], run)
        assert_clipped_the_spikes(name, run["steps"])


def assert_same_run(run: dict[str, Any], expected: dict[str, Any]) -> None:
    """Step by step, in all that was logged: the sums of floats are taken in another order."""
    assert len(run["steps"]) == len(expected["steps"]) == process_training.STEPS
    for step, expected_step in zip(run["steps"], expected["steps"], strict=True):
        assert step.keys() == expected_step.keys()
        for key, value in step.items():
            np.testing.assert_allclose(value, expected_step[key], rtol=2e-6, err_msg=key)
    for key, leaf in run["params"].items():
        np.testing.assert_allclose(leaf, expected["params"][key], rtol=2e-6, atol=5e-7)


def assert_clipped_the_spikes(name: str, steps: list[dict[str, float]]) -> None:
    factors = [step["coefficient"] for step in steps]
    assert all(factors[spike] < 0.1 for spike in process_training.SPIKES), (name, factors)
    assert 1.0 in factors, (name, factors)
    bounds = {step["max_norm"] for step in steps if np.isfinite(step["max_norm"])}
    assert (len(bounds) == 1) == (name == "clip_by_global_norm"), (name, bounds)


@pytest.mark.slow
def test_a_training_process_that_dies_ends_the_other(tmp_path: pathlib.Path) -> None:
    """The other waits for it in a collective."""
    with reserved_port() as port:
        more = ("--methods", "clip_by_global_norm")
        first = command(tmp_path / "first", port, 0, 2, *more)
        second = command(tmp_path / "second", port, 1, 2, *more, "--die-at", "3")
        with pytest.raises(ProcessFailedError) as caught:
            run_together([first, second], seconds=SECONDS)
    assert "process 1 failed with status 1" in str(caught.value)
    assert "RuntimeError: told to die at step 3" in str(caught.value)
    assert not (tmp_path / "first").exists()


# Holds a lock, as does the process that it starts, for as long as one of them lives.
HOLDS_A_LOCK = """
import fcntl, pathlib, subprocess, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleeper, pass_fds=[lock.fileno()])
pathlib.Path(sys.argv[1] + ".held").touch()
print("not done yet", flush=True)
"""
HANGS = HOLDS_A_LOCK + "time.sleep(600)"
FAILS = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1] + ".held").exists():
    time.sleep(0.01)
sys.exit("out of luck")
"""


def python(source: str, lock: pathlib.Path) -> list[str]:
    return [sys.executable, "-c", source, str(lock)]


def assert_nobody_holds(lock: pathlib.Path) -> None:
    assert lock.with_name(lock.name + ".held").exists()
    with lock.open("w") as file:
        for _ in range(1000):  # the kernel may take a moment to bury a process
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            else:
                return
    pytest.fail("A process was left.")


def test_a_failure_is_raised_at_once_and_leaves_nobody(tmp_path: pathlib.Path) -> None:
    lock = tmp_path / "lock"
    with pytest.raises(ProcessFailedError) as caught:
        run_together([python(HANGS, lock), python(FAILS, lock)], seconds=SECONDS)
    # Not: still ran after so many seconds.
    assert str(caught.value).startswith("process 1 failed with status 1\n")
    assert "process 1:\nout of luck" in str(caught.value)
    assert_nobody_holds(lock)


def test_a_hanging_process_is_ended_with_what_it_wrote(tmp_path: pathlib.Path) -> None:
    lock = tmp_path / "lock"
    with pytest.raises(ProcessFailedError) as caught:
        run_together([python("", lock), python(HANGS, lock)], seconds=3.0)
    assert str(caught.value).startswith("process 1 still ran after 3.0 s\n")
    assert "process 1:\nnot done yet" in str(caught.value)
    assert_nobody_holds(lock)


def test_a_process_that_succeeds_leaves_nobody_either(tmp_path: pathlib.Path) -> None:
    lock = tmp_path / "lock"
    assert run_together([python(HOLDS_A_LOCK, lock)], seconds=SECONDS) == ["not done yet\n"]
    assert_nobody_holds(lock)


def test_a_reserved_port_is_nobody_elses() -> None:
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=10.0):
                server.accept()[0].close()
