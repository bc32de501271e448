"""What the TPU compiler makes of a step with each method, for chips that are not here."""

import functools
from typing import Any

import accelerators
import every_method
import hlo
import jax
import numpy as np
import optax
import pytest
import trees
from jax import export
from jax.sharding import Mesh

import clipax

pytestmark = [pytest.mark.tpu, accelerators.needs("tpu", "libtpu")]
METHODS = sorted(trees.public_factories())
every_chip = pytest.mark.parametrize("chip", accelerators.TPUS)

# All-reduces that a step gains by a method, if they are more than two.
MANY_ALL_REDUCES = {"observe": 7, "u_clip": 4}
# Its products with a sharded matrix have all-reduces of their own.
FOR_EACH_MATRIX = {"clip_by_spectral_norm": 8}
# What reads matrices for a reduction, and why.
READS = {
    "adaptive_grad_clip": "the parameters, which no product makes in this step",
    "clip_by_spectral_norm": "the vectors of its iteration, as large as a small matrix",
    **dict.fromkeys(
        ("acclip", "clip", "clip_by_value", "smooth_clip_by_value", "spam_clip"),
        "the gradients for their largest entry, which only the state tells",
    ),
}


@functools.cache
def program(name: str, chip: str, count: int, *widths: int) -> str:
    method = optax.identity() if name == "adam alone" else trees.build(name)
    devices = accelerators.chips(chip)[:count]
    return step_with(method, devices, accelerators.layers(*widths)).as_text()


def step_with(method: Any, devices: Any, params: Any) -> jax.stages.Compiled:
    return accelerators.compiled_step(optax.chain(method, optax.adam(1e-3)), devices, params)


def all_reduces_gained(name: str, chip: str, depth: int) -> int:
    """By a method, on a slice, with two leaves a layer. Some shards do not divide."""
    widths = [(40, 136, 7)[layer % 3] for layer in range(depth + 1)]
    counts = [
        hlo.all_reduces(program(each, chip, accelerators.SLICE, *widths))
        for each in (name, "adam alone")
    ]
    return counts[0] - counts[1]


# -- Every method, on every chip -----------------------------------------------------------------

# Matrices in sizes that nothing else in the step has.
WIDTHS = (256, 390, 131, 640)
MATRICES = {rows * columns for rows, columns in zip(WIDTHS, WIDTHS[1:], strict=False)}


@every_chip
@pytest.mark.parametrize("name", METHODS)
def test_one_chip_reads_no_gradient_again(name: str, chip: str) -> None:
    text = program(name, chip, 1, *WIDTHS)
    assert hlo.all_reduces(text) == 0
    passes = hlo.passes_for_a_reduction(text, MATRICES)
    assert not passes or name in READS


@every_chip
@pytest.mark.parametrize("name", METHODS)
def test_a_slice_reduces_once_or_twice_more(name: str, chip: str) -> None:
    most = MANY_ALL_REDUCES.get(name, 2) + 3 * FOR_EACH_MATRIX.get(name, 0)
    assert all_reduces_gained(name, chip, depth=3) <= most
