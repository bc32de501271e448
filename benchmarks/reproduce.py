# ruff: noqa: T201
"""What published claims about clipping look like in small, on a CPU, in a few minutes.

    python -m benchmarks.reproduce [spikes|noise|corruption|history] [--quick] [--output FILE.json]

Without a name, all four. Seeds are fixed, every method sees the same data, and none is tuned.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import (
    reproduce_corruption,
    reproduce_history,
    reproduce_noise,
    reproduce_spikes,
)
from benchmarks.machine import machine
from benchmarks.reproduce_shared import json_ready

EXPERIMENTS = {
    "spikes": reproduce_spikes,
    "noise": reproduce_noise,
    "corruption": reproduce_corruption,
    "history": reproduce_history,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()

    result: dict[str, Any] = {"machine": machine()}
    print(" · ".join(f"{name}: {value}" for name, value in result["machine"].items()))
    for name in EXPERIMENTS if arguments.experiment is None else [arguments.experiment]:
        start = time.perf_counter()
        result[name] = EXPERIMENTS[name].run(is_quick=arguments.quick)
        result[name]["seconds"] = time.perf_counter() - start
        print(f"\n{EXPERIMENTS[name].table(result[name])}")
        print(f"In {result[name]['seconds']:.0f} s, compilation too.", flush=True)
    if arguments.output is not None:
        text = json.dumps(json_ready(result), indent=2, allow_nan=False)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
