"""The benchmarks run, and give every figure; how large those are is no business of a test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

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

    assert set(figures) == {"machine", "step", "histories", "compile"}
    machine = figures["machine"]
    assert {"device", "processor", "cores", "load_before", "python", "jax", "optax"} < set(machine)

    step = figures["step"]
    assert step["gradient_norm"] > step["max_norm"]
    assert [row["name"] for row in step["rows"]] == [
        "adam alone",
        "clipax clip + adam",
        "optax clip + adam",
    ]
    histories = figures["histories"]
    assert [row["name"] for row in histories["rows"]] == [
        "clip_by_global_norm",
        "autoclip",
        "clip_by_quantile",
        "zclip",
        "clip_by_mean_std",
    ]
    for table in (step, histories):
        for row in table["rows"]:
            assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
            assert math.isclose(row["ratio"], row["median_ms"] / table["rows"][0]["median_ms"])
            assert f"{row['median_ms']:.2f}" in run.stdout

    compilation = figures["compile"]
    ours, theirs = compilation["rows"]
    assert (ours["name"], theirs["name"]) == ("clipax", "optax")
    assert math.isclose(compilation["ratio"], ours["total_s"] / theirs["total_s"])
    for row in compilation["rows"]:
        assert min(row["trace_s"], row["lower_s"], row["compile_s"]) > 0
        assert 0 < row["min_total_s"] <= row["total_s"] <= row["max_total_s"]


def _reproduced(name, tmp_path):
    output = tmp_path / "figures.json"
    arguments = [name, "--quick", "--output", str(output)]
    command = [sys.executable, "-m", "benchmarks.reproduce", *arguments]
    # Most of a quick run is compilation, and its figures mean nothing.
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(
        command, cwd=_ROOT, env=os.environ | quick, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())
    assert set(figures) == {"machine", name}
    assert figures[name]["seconds"] > 0
    return figures[name], run.stdout


def _check_rows(rows, seeds, stdout):
    """Every method is in the table, and has a finite figure for each seed."""
    for name, row in rows.items():
        assert f"\n{name}  " in stdout
        for key, values in row.items():
            assert len(values) == seeds
            assert all(map(math.isfinite, values))
            if key.startswith("share") or key == "test_accuracy":
                assert all(0 <= value <= 1 for value in values)


@pytest.mark.slow
def test_the_spikes_are_reproduced(tmp_path):
    spikes, stdout = _reproduced("spikes", tmp_path)
    assert set(spikes["tables"]) == {"sgd", "adam"}
    for rows in spikes["tables"].values():
        _check_rows(rows, spikes["seeds"], stdout)
        assert rows["none"]["share_of_steps_clipped"] == [0.0, 0.0]
        # The gradients of a new network times 100 are above a bound of one.
        assert rows["clip_by_global_norm(1.0)"]["share_of_spikes_clipped"] == [1.0, 1.0]
        assert {"autoclip()", "skip_step(z_max=6.0)"} < set(rows)
    assert "acclip(), for the momentum" in spikes["tables"]["sgd"]
    assert "scale_by_stable_adam(), for Adam" in spikes["tables"]["adam"]


@pytest.mark.slow
def test_the_noise_is_reproduced(tmp_path):
    noise, stdout = _reproduced("noise", tmp_path)
    assert math.isclose(noise["distance_at_start"], math.sqrt(noise["dimension"]))
    rows = noise["rows"]
    _check_rows(rows, noise["seeds"], stdout)
    assert rows["none"]["share_of_steps_clipped"] == [0.0] * noise["seeds"]
    assert {"clip_by_value(1.0)", "acclip()", "skip_step(z_max=6.0)"} < set(rows)
    for row in rows.values():
        for final, largest in zip(row["final_distance"], row["largest_distance"], strict=True):
            assert final <= largest


@pytest.mark.slow
def test_the_corruption_is_reproduced(tmp_path):
    corruption, stdout = _reproduced("corruption", tmp_path)
    rows = corruption["rows"]
    for share in map("{:g}".format, corruption["shares"]):
        _check_rows({name: row[share] for name, row in rows.items()}, corruption["seeds"], stdout)
        assert rows["none"][share]["share_of_steps_clipped"] == [0.0] * corruption["seeds"]
        # Under this bound 50 steps lead nowhere, and the gradients stay as long as at the start.
        assert min(rows["clip_by_global_norm(0.1)"][share]["share_of_steps_clipped"]) > 0.9


@pytest.mark.slow
def test_the_histories_are_reproduced(tmp_path):
    history, stdout = _reproduced("history", tmp_path)
    rows = history["rows"]
    for sigma in map("{:g}".format, history["sigmas"]):
        of_sigma = {name: row[sigma] for name, row in rows.items()}
        _check_rows(of_sigma, history["seeds"], stdout)
        # Nine norms in ten are above their tenth percentile.
        for share in of_sigma["autoclip()"]["share_of_steps_clipped"]:
            assert math.isclose(share, 0.9, abs_tol=0.1)
        # Norms before clipping are never below those after it.
        raw, clipped = of_sigma["adagc(raw_history=True)"], of_sigma["adagc()"]
        for high, low in zip(raw["median_bound"], clipped["median_bound"], strict=True):
            assert high >= low > 0
