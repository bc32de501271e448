"""The benchmarks run, and give every figure; how large those are is no business of a test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def test_the_quick_benchmark_runs_and_writes_every_figure(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.adam_step", "--quick", "--output", str(output)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())

    assert set(figures) == {"machine", "step", "compile"}
    machine = figures["machine"]
    assert {"device", "processor", "cores", "load_before", "python", "jax", "optax"} < set(machine)

    step = figures["step"]
    assert step["gradient_norm"] > step["max_norm"]
    assert [row["name"] for row in step["rows"]] == [
        "adam alone",
        "clipax clip + adam",
        "optax clip + adam",
    ]
    for row in step["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert math.isclose(row["ratio"], row["median_ms"] / step["rows"][0]["median_ms"])
        assert f"{row['median_ms']:.2f}" in run.stdout

    compilation = figures["compile"]
    ours, theirs = compilation["rows"]
    assert (ours["name"], theirs["name"]) == ("clipax", "optax")
    assert math.isclose(compilation["ratio"], ours["total_s"] / theirs["total_s"])
    for row in compilation["rows"]:
        assert min(row["trace_s"], row["lower_s"], row["compile_s"]) > 0
        assert 0 < row["min_total_s"] <= row["total_s"] <= row["max_total_s"]
