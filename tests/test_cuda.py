"""What XLA's CUDA compiler makes of a step with each method, for an H100 that is not here."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import every_method
import optax
import pytest
import trees
from compilers import needs

import clipax
from benchmarks.compilers import accelerators, hlo

pytestmark = [
    pytest.mark.cuda,
    needs("cuda"),
]
METHODS = sorted(trees.public_factories())
SMALL = (40, 136, 7)
# Their products are numbers of elements that no other array of the step has.
WIDTHS = (256, 390, 131, 640)


def step_with(method: Any, chips: int, widths: Any) -> Any:
    optimizer = optax.chain(method, optax.adam(1e-3))
    devices = accelerators.chips("h100")[:chips]
    return accelerators.compiled_step(optimizer, devices, accelerators.layers(*widths))


def all_reduces(method: Any, depth: int) -> int:
    """On four devices, with two leaves a layer."""
    widths = [SMALL[layer % len(SMALL)] for layer in range(depth + 1)]
    return hlo.all_reduces(step_with(method, accelerators.SLICE, widths).as_text())


def passes(method: Any) -> int:
    matrices = {rows * columns for rows, columns in itertools.pairwise(WIDTHS)}
    return len(hlo.passes_for_a_reduction(step_with(method, 1, WIDTHS).as_text(), matrices))


def kernels(method: Any, depth: int) -> int:
    return hlo.kernels(step_with(method, 1, [SMALL[0]] * (depth + 1)).as_text())


@functools.cache
def kernels_of_adam(depth: int) -> int:
    return kernels(optax.identity(), depth)


@pytest.mark.parametrize("name", METHODS)
def test_it_compiles_for_one_and_for_four(name: str) -> None:
    assert hlo.all_reduces(step_with(trees.build(name), 1, SMALL).as_text()) == 0
    assert all_reduces(trees.build(name), 3) > 0


@pytest.mark.parametrize(
    "method", [clipax.clip_by_global_norm(1.0), clipax.clip_by_leaf_norm(1.0)]
)
def test_all_reduces_do_not_grow_with_the_number_of_leaves(method: Any) -> None:
    assert all_reduces(method, 12) - all_reduces(method, 3) == (
        all_reduces(optax.identity(), 12) - all_reduces(optax.identity(), 3)
    )


# No kernel of a matrix product sums what it makes: the gradients are read once for a norm.
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (clipax.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)),
        (clipax.clip_by_leaf_norm(1.0), optax.clip_by_block_rms(1.0)),
        (clipax.clip_by_block_rms(1.0), optax.clip_by_block_rms(1.0)),
        (clipax.clip_by_unit_norm(1.0), optax.clip_by_block_rms(1.0)),
        (clipax.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01)),
    ],
)
def test_a_norm_reads_the_gradients_as_often_as_optax(ours: Any, theirs: Any) -> None:
    assert passes(ours) <= passes(theirs)


@pytest.mark.parametrize(
    "method",
    [
        clipax.clip_by_global_norm(1.0),
        clipax.clip_by_leaf_norm(1.0),
        clipax.clip_by_block_rms(1.0),
        clipax.clip_by_unit_norm(1.0),
        clipax.adaptive_grad_clip(0.01),
        clipax.clip_by_value(1.0),
    ],
)
def test_small_leaves_share_kernels(method: Any) -> None:
    few, many = (kernels(method, depth) - kernels_of_adam(depth) for depth in (8, 16))
    assert many - few <= 4


def test_a_global_norm_needs_the_memory_of_optax() -> None:
    ours, theirs = (
        step_with(clip(1.0), 1, [2048] * 4).memory_analysis().temp_size_in_bytes
        for clip in (clipax.clip_by_global_norm, optax.clip_by_global_norm)
    )
    assert ours <= 1.05 * theirs + 2**16


def test_the_benchmark_of_programs_runs(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    module = ("-m", "benchmarks.compilers.gpu_programs", "--quick", "--output", str(output))
    run = subprocess.run([sys.executable, *module], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for rows in json.loads(output.read_text())["tables"].values():
        assert rows["alone"]["reads"] == 0 < rows["clip_by_global_norm"]["reads"]
        assert all(row["kernels"] >= rows["alone"]["kernels"] > 0 for row in rows.values())


def test_the_exported_artefact_compiles() -> None:
    accelerators.compile_exported(every_method.exported(), accelerators.chips("h100")[:1])
