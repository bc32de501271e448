# ruff: noqa: T201
"""What clipping costs, next to what would be used in its place and to the least possible.

    python -m benchmarks [--quick] [--only step clip compile memory scaling] [--output FOLDER]

All that is compared runs interleaved in one process; what counts are ratios of medians.
With `--output`, the figures go to `results.json` and a picture of them to `results.png`.
"""

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

# Torch needs a part of a GPU's memory, and a process that counts a peak another.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import (
    reached,
    work_clip,
    work_compile,
    work_memory,
    work_scaling,
    work_step,
)
from benchmarks.machine import is_gpu, line, machine
from benchmarks.methods import GROUPS, OPTIMIZERS
from benchmarks.reproduce_shared import json_ready
from benchmarks.settings import Settings
from benchmarks.workloads import BIG, MATRICES, SMALL

WORKS = {
    "step": work_step,
    "clip": work_clip,
    "compile": work_compile,
    "memory": work_memory,
    "scaling": work_scaling,
}


def main() -> None:
    arguments = _arguments()
    # A program that was compiled in an earlier run would take no time at all.
    jax.config.update("jax_enable_compilation_cache", False)
    # The load is read before anything here adds to it.
    result: dict[str, Any] = {"machine": machine()}
    settings = Settings(
        arguments.quick,
        arguments.full,
        tuple(arguments.trees),
        tuple(arguments.dtypes),
        tuple(arguments.groups),
        tuple(arguments.optimizers),
    )
    result["settings"] = settings._asdict()
    print(line(result["machine"]), flush=True)
    for name in arguments.only:
        start = time.perf_counter()
        result[name] = []
        for table in WORKS[name].run(settings, _show):
            result[name].append(table)
            # A run that is ended before its time leaves what it has.
            _write(result, arguments.output)
        print(f"\n{name}: {time.perf_counter() - start:.0f} s, compilation too.", flush=True)
    goals = reached.goals(result, is_gpu())
    if arguments.quick:
        _show("What follows is computed as ever, but of sizes that show nothing.")
    if goals:
        _show(reached.text(goals))
    result["reached"] = [goal._asdict() | {"verdict": goal.verdict} for goal in goals]
    _write(result, arguments.output)
    _draw(result, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, to see that it runs")
    add("--full", action="store_true", help="every method on every tree: hours")
    add("--only", nargs="+", choices=WORKS, default=list(WORKS), help="default: all")
    add("--trees", nargs="+", choices=[*BIG, SMALL, MATRICES], default=[], help="default: all")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=[], help="default: all")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=[], help="default: all")
    add("--groups", nargs="+", choices=GROUPS, default=[], help="of methods; default: all")
    add("--output", type=Path, metavar="FOLDER", help="for results.json and results.png")
    arguments = parser.parse_args()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def _show(text: str) -> None:
    print(f"\n{text}", flush=True)


def _write(result: dict[str, Any], folder: Path | None) -> None:
    if folder is not None:
        text = json.dumps(json_ready(result), indent=1, allow_nan=False)
        (folder / "results.json").write_text(text + "\n")


def _draw(result: dict[str, Any], folder: Path | None) -> None:
    if folder is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        _show("Without a picture: matplotlib is not installed (the extra demo).")
        return
    from benchmarks import plot

    about = result["machine"]
    plot.save(
        result,
        f"{about['processor']}, {about['cores']} cores" if not is_gpu() else about["device"],
        folder / "results.png",
    )


if __name__ == "__main__":
    main()
