# ruff: noqa: T201
"""What XLA's compiler for an H100 makes of a step of Adam behind each method.

    python -m benchmarks.compilers.gpu_programs [--quick] [--output FILE.json]

It needs the extra `cuda` and no GPU: these are counts of what was compiled, and no
measurements. *Reads* are kernels that read a matrix of gradients or parameters only to reduce
it; *kernels* are all that the step launches; *memory* is temporary, and next to none of it.
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

# A plug-in that finds no chip of its own would else stop the run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.compilers import hlo
from benchmarks.compilers.accelerators import chips, compiled_step, layers, why_not
from benchmarks.methods import GROUPS, OPTIMIZERS, SCALED, Optimizer

_GROUPS = ("global", "leaf", "unit", "value", "scalar history")
_WIDTHS = (1024, 4096, 1024, 4096, 1024)
_QUICK_WIDTHS = (96, 160, 96)
_BATCH = 384


class Program(NamedTuple):
    reads: int
    kernels: int
    temporary_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()

    if reason := why_not("cuda"):
        parser.error(reason)
    widths = _QUICK_WIDTHS if arguments.quick else _WIDTHS
    result = {"widths": widths, "batch": _BATCH, "jax": jax.__version__, "tables": {}}
    for dtype in ("float32", "bfloat16"):
        programs = {name: _compiled(optimizer, widths, dtype) for name, optimizer in _forms()}
        print(f"\n{_title(widths, dtype)}\n{_text(programs)}", flush=True)
        result["tables"][dtype] = {name: each._asdict() for name, each in programs.items()}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def _forms() -> list[tuple[str, Optimizer]]:
    rows = {name: wrap for group in _GROUPS for name, wrap in GROUPS[group].rows.items()}
    return [(name, wrap(OPTIMIZERS["adam"])) for name, wrap in rows.items() if name != SCALED]


def _compiled(optimizer: Optimizer, widths: tuple[int, ...], dtype: str) -> Program:
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), layers(*widths)
    )
    compiled = compiled_step(optimizer, chips("h100")[:1], params, _BATCH)
    program = compiled.as_text()
    matrices = {layer["kernel"].size for layer in params}
    return Program(
        reads=len(hlo.passes_for_a_reduction(program, matrices)),
        kernels=hlo.kernels(program),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )


def _title(widths: tuple[int, ...], dtype: str) -> str:
    return f"Step of Adam, {len(widths) - 1} layers of {'-'.join(map(str, widths))}, {dtype}"


def _text(programs: dict[str, Program]) -> str:
    cells = [
        (name, str(each.reads), str(each.kernels), f"{each.temporary_bytes / 2**20:.1f}")
        for name, each in programs.items()
    ]
    return timing.columns([("", "reads", "kernels", "memory, MiB"), *cells])


if __name__ == "__main__":
    main()
