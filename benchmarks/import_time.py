# ruff: noqa: T201
"""How long `import clipax` takes next to `import optax`, which it imports.

    python -m benchmarks.import_time [--rounds 15]

Every import runs in a fresh interpreter, and the two take turns. The interpreter itself times the
import, so its own start does not count. Bytecode is written before. The limit holds for the time
of the processor, because on a busy machine that varies less than the wall clock's.
"""

import argparse
import os
import subprocess
import sys

from benchmarks import timing

LIMIT = 1.15
_MODULES = ("optax", "clipax")
_TIMED = """
import time
wall, processor = time.perf_counter(), time.process_time()
import {module}
print(time.process_time() - processor, time.perf_counter() - wall)
"""


def measured(rounds: int) -> dict[str, timing.Seconds]:
    """Seconds of each import in each round, of the processor and on the wall clock."""
    clocks = ("processor", "wall clock")
    seconds: dict[str, timing.Seconds] = {
        clock: {module: [] for module in _MODULES} for clock in clocks
    }
    for module in _MODULES:
        _import(module)
    for number in range(rounds):
        for module in _MODULES if number % 2 else reversed(_MODULES):
            for clock, value in zip(clocks, _import(module), strict=True):
                seconds[clock][module].append(value)
    return seconds


def _import(module: str) -> list[float]:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    command = [sys.executable, "-c", _TIMED.format(module=module)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(value) for value in run.stdout.split()]


def main() -> None:
    """Prints the medians and whether the limit holds, which is also the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="imports of each module")
    rounds = parser.parse_args().rounds
    tables = {
        clock: timing.table(f"Import, {clock}", seconds, "optax")
        for clock, seconds in measured(rounds).items()
    }
    print("\n\n".join(map(timing.text, tables.values())))
    ratio = timing.ratio_of(tables["processor"], "clipax", "optax")
    holds = ratio <= LIMIT
    print(f"\nclipax over optax: {ratio:.3f}, limit {LIMIT}: {'holds' if holds else 'missed'}")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
