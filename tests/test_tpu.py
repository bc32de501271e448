"""What the TPU compiler makes of a step with each method, for chips that are not here."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import every_method
import jax
import optax
import pytest
import trees
from compilers import needs

import clipax
from benchmarks import pod
from benchmarks.compilers import accelerators, hlo

pytestmark = [pytest.mark.tpu, needs("tpu")]
METHODS = sorted(trees.public_factories())
every_chip = pytest.mark.parametrize("chip", accelerators.TPUS)
# One method of each kind for every generation, the others for a small chip and for the newest.
each_method = pytest.mark.parametrize(
    ("name", "chip"),
    [
        (name, chip)
        for chip in accelerators.TPUS
        for name in METHODS
        if name in trees.ONE_OF_EACH_KIND or chip in ("v5e", "tpu7x")
    ],
)

ADAM = "adam alone"
# All-reduces that a method adds to a step, where they may be more than two.
MANY_ALL_REDUCES = {"observe": 7, "u_clip": 4}
# Where every product with a sharded matrix has all-reduces of its own: ten to decompose it, and up
# to seven to decide whether to.
FOR_EACH_MATRIX = {"clip_by_spectral_norm": 17}
# What reads an array of a gradient's size only to reduce it, and which.
READS_AGAIN = {
    "adaptive_grad_clip": "the parameters, which nothing makes in this step",
    "clip_by_spectral_norm": "the gradients, in every iteration",
    "measure": "one gradient on v6e and tpu7x, whose product is fused with Adam instead",
    "observe": "the updates that it compares, which are made with the first norm",
    "scale_by_stable_adam": "the gradients after its bound on entries",
    "stable_spam": "the gradients after its bound on entries",
    "u_clip": "what it cut off and carries on",
    **dict.fromkeys(
        ("acclip", "clip", "clip_by_value", "smooth_clip_by_value", "spam_clip"),
        "the gradients, for the largest entry that the state records",
    ),
}
# Odd ones, and some that four chips do not divide.
SMALL = (40, 136, 7)
# Their products are numbers of elements that no other array of the step has.
WIDTHS = (256, 390, 131, 640)


def step_with(method: Any, devices: Any, widths: Any, batch: int = 64) -> Any:
    optimizer = optax.chain(method, optax.adam(1e-3))
    return accelerators.compiled_step(optimizer, devices, accelerators.layers(*widths), batch)


def method_named(name: str) -> Any:
    return optax.identity() if name == ADAM else trees.build(name)


@functools.cache
def all_reduces_of(name: str, chip: str, depth: int) -> int:
    """On a slice, with two leaves a layer."""
    widths = [SMALL[layer % len(SMALL)] for layer in range(depth + 1)]
    step = step_with(method_named(name), accelerators.chips(chip), widths)
    return hlo.all_reduces(step.as_text())


def passes(method: Any, chip: str) -> list[str]:
    """Reads of the matrices' gradients for a reduction, in a step on one chip."""
    text = step_with(method, accelerators.chips(chip)[:1], WIDTHS).as_text()
    matrices = {rows * columns for rows, columns in itertools.pairwise(WIDTHS)}
    return hlo.passes_for_a_reduction(text, matrices)


@each_method
def test_one_chip_compiles_it_without_another_pass(name: str, chip: str) -> None:
    found = passes(trees.build(name), chip)
    assert not found or name in READS_AGAIN


@every_chip
def test_a_norm_that_cannot_be_fused_is_another_pass(chip: str) -> None:
    barrier = optax.stateless(lambda updates, params: jax.lax.optimization_barrier(updates))
    found = passes(optax.chain(barrier, clipax.clip_by_global_norm(1.0)), chip)
    assert len(found) == len(WIDTHS) - 1


def all_reduces_added(name: str, chip: str, depth: int) -> int:
    return all_reduces_of(name, chip, depth) - all_reduces_of(ADAM, chip, depth)


@each_method
def test_a_slice_compiles_it_with_few_all_reduces(name: str, chip: str) -> None:
    few = all_reduces_added(name, chip, depth=3)
    assert few <= MANY_ALL_REDUCES.get(name, 2) + 3 * FOR_EACH_MATRIX.get(name, 0)
    # To compile 24 leaves for a slice takes four times as long: every method for one
    # generation, and the global norm for all.
    if chip == "v5e" or name == "clip_by_global_norm":
        many = all_reduces_added(name, chip, depth=12)
        assert many <= few + 9 * FOR_EACH_MATRIX.get(name, 0)


def temporary_bytes(method: Any, chip: str, depth: int, batch: int) -> int:
    step = step_with(method, accelerators.chips(chip)[:1], [4096] * (depth + 1), batch)
    return step.memory_analysis().temp_size_in_bytes


# Matrices of 64 MiB. Smaller ones may not leave the chip's own memory, which is not counted.
@every_chip
def test_a_global_norm_needs_the_memory_of_optax(chip: str) -> None:
    ours, theirs = (
        temporary_bytes(clip(1.0), chip, depth=2, batch=256)
        for clip in (clipax.clip_by_global_norm, optax.clip_by_global_norm)
    )
    assert ours <= 1.05 * theirs + 2**16


# Where the step alone needs little, so that it shows.
@pytest.mark.parametrize("chip", ["v4", "v5p"])
def test_leaf_norms_hold_one_gradient_at_a_time(chip: str) -> None:
    ours, alone = (
        temporary_bytes(method, chip, depth=4, batch=512)
        for method in (clipax.clip_by_leaf_norm(1.0), optax.identity())
    )
    assert ours - alone < 2 * 4 * 4096**2


@every_chip
def test_the_exported_artefact_compiles(chip: str) -> None:
    accelerators.compile_exported(every_method.exported(), accelerators.chips(chip)[:1])


def test_a_pod_trains_with_every_way_to_clip(tmp_path: Path) -> None:
    output = tmp_path / "pod.json"
    command = [sys.executable, "-m", "benchmarks.pod", "--quick", "--chips", "v5e"]
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [*command, "--output", output], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    made = json.loads(output.read_text())["chips"]["v5e"]["rows"]
    assert list(made) == list(pod.rows(pod.QUICK))
    alone = made[pod.ALONE]["collectives"]["all-reduce"]
    for name, row in made.items():
        assert f"\n{name}  " in run.stdout
        if "clipped_grad" not in name:
            # One for each mesh axis, for the gradients and for the parameters.
            axes = 4 if name == "adaptive_grad_clip" else 2
            assert row["collectives"]["all-reduce"] - alone <= axes
