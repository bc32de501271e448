"""The benchmarks run, and give every figure; how large those are is no business of a test."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import trees

from benchmarks import (
    limits,
    methods,
    per_example,
    timing,
    torch_peer,
    work_clip,
    work_compile,
    work_memory,
    work_scaling,
    work_step,
    workloads,
)
from benchmarks.compilers import accelerators
from benchmarks.per_example_models import MODELS

_ROOT = Path(__file__).resolve().parent.parent


def _ran(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    # Most of a quick run is compilation, and its figures mean nothing.
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(
        command, cwd=_ROOT, env=os.environ | quick, capture_output=True, text=True, check=False
    )


# -- python -m benchmarks ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_gives_every_figure(tmp_path):
    # One test, so that workers do not each make the run.
    run = _ran("benchmarks", "--quick", "--output", str(tmp_path))
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    works = ("step", "clip", "compile", "memory", "scaling")
    assert set(results) == {"machine", "settings", "reached", *works}
    picture = (tmp_path / "results.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    for check in (_machine, _tables, _steps, _clips, _compilations, _memory, _sizes, _verdicts):
        check(results, run.stdout)


def _machine(results, stdout):
    machine = results["machine"]
    assert {"device", "processor", "cores", "load_before", "python", "jax"} < set(machine)
    first_line = stdout.splitlines()[0]
    assert all(f"{name}: {value}" in first_line for name, value in machine.items())


def _tables(results, stdout):
    for work in ("step", "clip", "compile", "scaling"):
        for table in results[work]:
            medians = {row["name"]: row["median_s"] for row in table["rows"]}
            for row in table["rows"]:
                assert 0 < row["min_s"] <= row["q1_s"] <= row["median_s"]
                assert row["median_s"] <= row["q3_s"] <= row["max_s"]
                assert math.isclose(row["ratio"], row["median_s"] / medians[table["baseline"]])
                assert row["runs"] >= 2


def _steps(results, stdout):
    expected = [
        (plan.tree, plan.dtype, plan.optimizer, group, list(methods.GROUPS[group].rows))
        for plan in work_step.plans(is_quick=True, is_full=False)
        for group in plan.groups
    ]
    assert [
        (
            *(table["about"][key] for key in ("tree", "dtype", "optimizer", "group")),
            [name for name in _names(table) if not name.startswith("limit: alone")],
        )
        for table in results["step"]
    ] == expected
    for table in results["step"]:
        _limits(table)
        assert table["title"] in stdout
        for row in table["rows"]:
            assert re.search(
                rf"^{re.escape(row['name'])} +{1e3 * row['median_s']:.2f} ", stdout, re.M
            )


def _limits(table):
    """Each method has one, which ran in the same table."""
    medians = {row["name"]: row["median_s"] for row in table["rows"]}
    for row in table["rows"]:
        is_one = row["name"] in (methods.ALONE, methods.SCALED) or row["name"].startswith("limit")
        assert ("limit" in row) != is_one
        if not is_one:
            assert math.isclose(row["over_limit"], row["median_s"] / medians[row["limit"]])


def _clips(results, stdout):
    tables = iter(results["clip"])
    for tree, dtype, groups, donates in work_clip.plans(is_quick=True, is_full=False):
        for group in groups:
            table = next(tables)
            about = {"tree": tree, "dtype": dtype, "group": group, "donated": donates}
            assert about.items() < table["about"].items()
            columns = [work_clip.COLUMNS] if group == "unit" else []
            least = [*columns, *work_clip.READS, work_clip.SCALE]
            has_torch = group == "global" and donates and "torch" in results["machine"]
            peers = [torch_peer.NAME] if has_torch else []
            clips = list(methods.CLIPS[group])
            assert _names(table) == [work_clip.LIMIT, *clips, *peers, *least]
            assert table["title"] in stdout
    assert next(tables, None) is None
    assert ("Without torch: torch is not installed." in stdout) != ("torch" in results["machine"])


def _compilations(results, stdout):
    plans = work_compile.plans(is_quick=True, is_full=False)
    for plan, table in zip(plans, results["compile"], strict=True):
        about = {"group": plan.group, "leaves": plan.leaves, "dtype": plan.dtype}
        assert about.items() < table["about"].items()
        assert _names(table) == list(work_compile.clips(plan.group))
        for row in table["rows"]:
            assert min(row[f"{stage}_s"] for stage in work_compile.STAGES) > 0


def _memory(results, stdout):
    for table in results["memory"]:
        assert _names(table) == list(work_memory.ROWS[table["about"]["group"]])
        alone, *others = (row["temp_bytes"] for row in table["rows"])
        for row, temp_bytes in zip(table["rows"][1:], others, strict=True):
            share = (temp_bytes - alone) / table["about"]["tree_bytes"]
            assert math.isclose(row["temp_share"], share)


def _sizes(results, stdout):
    sizes = [table["about"]["bytes"] for table in results["scaling"]]
    assert sizes == work_scaling.sizes(is_quick=True)
    for table in results["scaling"]:
        assert _names(table) == [work_scaling.CLIP, work_scaling.READ]
        for row in table["rows"]:
            per_byte = 1e12 * row["median_s"] / table["about"]["bytes"]
            assert math.isclose(row["ps_per_byte"], per_byte)
            assert f"{per_byte:.1f}" in stdout


def _verdicts(results, stdout):
    goals = results["reached"]
    for part in (
        "over Adam alone, CPU",
        "over Adam alone, GPU",
        "over optax's, GPU",
        "torch's clip_grad_norm_, CPU",
        "torch's clip_grad_norm_, GPU",
        "clip_by_leaf_norm over",
        "clip_by_block_rms over",
        "adaptive_grad_clip over",
        "scalar history",
        "metrics",
        "clip_by_global_norm over optax's",
        "compile time",
        "temp memory over",
        "over its own limit",
        "skip_step(clip_by_global_norm) over",
        "observe(clip_by_global_norm) over",
        "scale_by_stable_adam over",
        "nothing above its bound over",
        "over optax.clip_by_block_rms",
        "over optax.adam",
        "temp memory of skip_step",
        "temp memory of observe",
    ):
        assert any(part in goal["work"] for goal in goals)
    for goal in goals:
        assert goal["verdict"] in stdout
        if goal["ratio"] is None:
            assert goal["verdict"].startswith("not measured: ")
        else:
            under = goal["ratio"] < goal["bar"]
            assert goal["verdict"] == ("reached" if under else "not reached")
        assert "GPU" not in goal["work"] or goal["verdict"] == (
            "not measured: no GPU; tests/test_cuda.py reads the compiled programs"
        )


def _names(table):
    return [row["name"] for row in table["rows"]]


@pytest.mark.parametrize(("is_quick", "is_full"), [(True, False), (False, False), (False, True)])
def test_every_method_is_in_a_plan(is_quick, is_full):
    planned = {
        row
        for plan in work_step.plans(is_quick, is_full)
        for group in plan.groups
        for row in methods.GROUPS[group].rows
    }
    # `clip` is another name of `clip_by_value`.
    factories = set(trees.public_factories()) - {"clip"}
    assert factories <= {re.match(r"[\w.]+", row)[0] for row in planned}


def _limit(name, dtype):
    """What a row has to move, and the programs of its limit and of the optimizer alone."""
    params = {"kernel": jax.ShapeDtypeStruct((128, 256), dtype)}
    group = next(each for each in methods.GROUPS.values() if name in each.rows)
    optimizer = methods.OPTIMIZERS[group.optimizers[0]]
    alone = group.rows[methods.ALONE](optimizer)
    moved = limits.traffic(name, group.rows[name](optimizer), alone, params)
    programs = []
    for each in (alone if moved is None else limits.least(moved, alone), alone):
        state = jax.eval_shape(each.init, params)
        programs.append(work_step.jitted_step(each).lower(params, state, params).compile())
    return moved, *programs


# Reads of the gradients and parameters, reads of memories, and memories in float32.
MOVED = {
    "clip_by_global_norm": (1, 0, 0),
    "clip_by_value": (0, 0, 0),
    "adaptive_grad_clip": (2, 0, 0),
    "observe(clip_by_global_norm)": (2, 0, 0),
    "spam_clip": (0, 0, 1),
    "u_clip(clip_by_global_norm)": (1, 1, 1),
}


@pytest.mark.usefixtures("_promotes")
@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_limit_moves_just_its_bytes(name, dtype):
    moved, limit, alone = _limit(name, dtype)
    reads, of_memories, memories = MOVED[name]
    assert len(moved.memories if moved else ()) == memories
    width = 4 if dtype == "float32" else 2
    # A memory is read and written, and the gradients are read for it.
    wanted = reads * width + of_memories * 4 + memories * (8 + width)
    more, base = (each.cost_analysis()["bytes accessed"] for each in (limit, alone))
    assert (more - base) / (128 * 256) == pytest.approx(wanted, rel=0.01, abs=0.01)
    # No copy of anything, but a few sums.
    assert limit.memory_analysis().temp_size_in_bytes < 128 * 256


def test_a_limit_names_what_is_moved():
    reads = limits.Reads(gradients=2, memories=1)
    memories = (((3,), "float32"),) * 4
    name = limits.Traffic(reads, memories, leaves=2).name
    assert name == "limit: alone, and two reads, one read of the memory, two float32 memories"
    assert limits.READ_ONCE == "limit: alone, and one read"


def test_many_leaves_and_entries_are_found_by_the_state():
    leaf, entry = (set(work_compile.clips(group)) for group in ("leaf", "entry"))
    assert {"clip_by_leaf_norm", "adaptive_grad_clip", "optax.clip_by_block_rms"} < leaf
    assert {"u_clip", "clip21", "spam_clip", "acclip", "optax.adam"} < entry
    assert not leaf & entry
    assert "clip_by_global_norm" not in leaf | entry


@pytest.mark.slow
def test_all_that_a_gpu_has_to_show_runs(tmp_path):
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python3").chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = [_ROOT / "benchmarks" / "on_gpu.sh", "--quick", tmp_path / "out"]
    run = subprocess.run(
        command, env=os.environ | quick | path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    parts = ("contract", "step_leaf", "step_gpt2", "clip", "memory", "per_example")
    assert tuple(summary["parts"]) == parts
    assert summary["device"] in run.stdout
    for name, part in summary["parts"].items():
        assert part["status"] == "ok"
        assert (tmp_path / "out" / f"{name}.txt").read_text()
        assert ("results" in part) == (name != "contract")


def test_works_take_turns():
    order = []
    works = {name: timing.Work(order.append, lambda name=name: name) for name in "abc"}
    seconds = timing.interleaved(works, rounds=6)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 6)
    # Two of each to warm up, then all turns forwards and all of them backwards.
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab" + "cba" + "acb" + "bac"


def test_a_table_has_medians_quartiles_and_ratios():
    table = timing.table("", {"one": [3.0, 1.0, 2.0, 5.0, 4.0], "other": [6.0] * 3}, "one")
    one, other = table["rows"]
    keys = ("min_s", "q1_s", "median_s", "q3_s", "max_s", "ratio", "runs")
    assert [one[key] for key in keys] == [1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 5]
    assert (other["ratio"], other["runs"]) == (2.0, 3)
    assert timing.ratio_of(table, "other", "one") == 2.0
    assert timing.ratio_of(table, "none", "one") is None


def test_time_per_byte_is_flat_or_not_where_caches_do_not_reach():
    def table(size, ps_per_byte):
        return {"about": {"bytes": size}, "rows": [{"name": "x", "ps_per_byte": ps_per_byte}]}

    tables = [table(2**20, 1.0), table(2**28, 50.0), table(2**30, 60.0)]
    assert work_scaling.flatness(tables, "x") == 1.2
    assert work_scaling.flatness(tables[:2], "x") is None


def test_the_tree_is_that_of_gpt2():
    tree = workloads.tree("GPT-2 small", "float32", is_quick=False)
    assert len(tree.shapes) == 148
    assert tree.bytes == 4 * 124_439_808


def test_an_unknown_work_is_refused():
    run = _ran("benchmarks", "--only", "all")
    assert run.returncode == 2
    assert "invalid choice: 'all'" in run.stderr


# -- benchmarks.compilers and benchmarks.reproduce ------------------------------------------------


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("benchmarks.compilers.tpu_memory", "tpu"),
        ("benchmarks.pod", "tpu"),
        ("benchmarks.compilers.gpu_programs", "cuda"),
    ],
)
def test_a_compiler_that_is_not_there_is_named(module, extra):
    if not accelerators.why_not(extra):
        pytest.skip(f"the extra {extra} is installed")
    run = _ran(module)
    assert run.returncode == 2
    assert f'not installed: pip install "clipax[{extra}]"' in run.stderr


@pytest.mark.slow
def test_the_risk_of_a_late_bound_is_reproduced(tmp_path):
    output = tmp_path / "figures.json"
    arguments = ["--spikes", "--quick", "--output", str(output)]
    run = _ran("benchmarks.compilers.tpu_memory", *arguments)
    assert run.returncode == 0, run.stderr
    tables = json.loads(output.read_text())["tables"]
    assert set(tables) == {"sgd", "adam"}
    for rows in tables.values():
        _check_rows(rows, seeds=2, stdout=run.stdout)
        assert rows["none"]["share_of_steps_clipped"] == [0.0, 0.0]
        assert {"clip_by_leaf_norm(1.0)", "delayed"} < set(rows)


def _reproduced(name, tmp_path):
    output = tmp_path / "figures.json"
    run = _ran("benchmarks.reproduce", name, "--quick", "--output", str(output))
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


@pytest.mark.slow
def test_the_price_of_clipping_each_example(tmp_path):
    output = tmp_path / "figures.json"
    run = _ran("benchmarks.per_example", "--quick", "--output", str(output))
    assert run.returncode == 0, run.stderr
    results = json.loads(output.read_text())
    assert set(results) == {"machine", "settings", "reached", *MODELS}
    for name in MODELS:
        cheap, every_way = results[name][:2]
        assert _names(cheap) == list(per_example.CHEAP)
        peers = [per_example.PRIVACY] if "jax_privacy" in results["machine"] else []
        assert _names(every_way) == [
            *per_example.CHEAP,
            per_example.IN_PARTS,
            per_example.TWICE,
            per_example.EACH,
            *peers,
        ]
        for table in results[name]:
            assert table["title"] in run.stdout
            medians = {row["name"]: row["median_s"] for row in table["rows"]}
            for row in table["rows"]:
                assert math.isclose(row["ratio"], row["median_s"] / medians[table["baseline"]])
        measured = per_example.OURS, per_example.IN_PARTS, per_example.TWICE, *peers
        for row in every_way["rows"]:
            assert row["temp_bytes"] > 0
            # A way that gives other gradients ends the run.
            assert (row["difference"] is not None) == (row["name"] in measured)
    assert len(results["reached"]) == 12
    for goal in results["reached"]:
        assert goal["verdict"] in run.stdout
        assert (goal["ratio"] is None) == goal["verdict"].startswith("not measured: ")
