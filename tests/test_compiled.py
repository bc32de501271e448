"""What the compiler made of a step: read from the optimized program."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import clipax
from clipax import norms

# What the compiler makes of the same program is better since; the program is the same.
OLD_XLA = pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="XLA before jax 0.10 keeps squares and collectives of leaves apart on a CPU",
)
SHAPE = (64, 96)
TYPE = r"f32\[64,96\]"


def compiled(optimizer: Any, updates: Any, params: Any) -> str:
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        return jax.jit(optimizer.update).lower(updates, state, params).compile().as_text()


def operations(program: str, operation: str) -> int:
    """How often an operation makes an array in the shape of the updates."""
    return len(re.findall(rf"= {TYPE}\S* {operation}\(", program))


@OLD_XLA
@pytest.mark.parametrize(
    "method",
    [
        clipax.clip_by_global_norm(0.1),
        clipax.clip_by_leaf_norm(0.1),
        clipax.clip_by_block_rms(0.1),
    ],
)
@pytest.mark.parametrize("optimizer", [optax.identity(), optax.sgd(0.5)])
def test_two_multiplies_an_update_and_no_division_or_select(method: Any, optimizer: Any) -> None:
    updates = {"w": jnp.ones(SHAPE)}
    program = compiled(optax.chain(method, optimizer), updates, updates)
    alone = compiled(optimizer, updates, updates)
    for operation in ("divide", "select"):
        assert operations(program, operation) == 0
    # The coefficient is a product, since one float cannot hold that of the largest norms.
    assert multiplies_of_outputs(program) == multiplies_of_outputs(alone) + 2


def multiplies_of_outputs(program: str) -> int:
    """The multiplies that make updates; norms out of range have others, in a branch."""
    bodies = re.split(r"\n(?=%|ENTRY)", program)
    makers = [body for body in bodies if re.search(rf"ROOT \S+ = {TYPE}", body)]
    return sum(operations(body, "multiply") for body in makers)


def test_adam_gains_multiplies_and_nothing_else() -> None:
    updates = {"w": jnp.ones(SHAPE)}
    with_clip = compiled(
        optax.chain(clipax.clip_by_global_norm(0.1), optax.adam(0.1)), updates, updates
    )
    alone = compiled(optax.adam(0.1), updates, updates)
    for operation in ("divide", "select"):
        assert operations(with_clip, operation) == operations(alone, operation)


EIGHTH = 0.13

# Its float32 copy would be shared by the norm and the scaling.
HALF = pytest.param(jnp.bfloat16, marks=OLD_XLA)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("dtype", [jnp.float32, HALF])
@pytest.mark.parametrize(
    "make",
    [
        clipax.clip_by_global_norm,
        clipax.clip_by_leaf_norm,
        clipax.clip_by_block_rms,
        pytest.param(clipax.clip_by_value, marks=OLD_XLA),
    ],
)
def test_no_copy_of_the_updates_is_made(make: Any, dtype: Any) -> None:
    # Alike, for such leaves could share what only a branch needs.
    updates = {name: jnp.ones((512, 600), dtype) for name in "abcd"}
    clip = make(0.1)
    # The first step of a maximum leaves an eighth of the entries in float32.
    most = EIGHTH * 4 / jnp.dtype(dtype).itemsize if make is clipax.clip_by_value else 0.01
    assert share_of_temporaries(clip, updates) < most
    if dtype == jnp.float32:
        # Adam of bfloat16 has a copy of whatever is scaled before it.
        assert share_of_temporaries(optax.chain(clip, optax.adam(0.1)), updates) < most


@OLD_XLA
@pytest.mark.parametrize("ord", [1, float("inf")])
def test_what_is_computed_is_reduced_in_one_read(ord: float) -> None:
    def measure(x: Any, y: Any) -> Any:
        return norms.leaf_norm(jnp.where(y > 0, x * x / jnp.maximum(y, 1e-3), 0), ord)

    updates = jnp.ones((512, 600))
    made = jax.jit(measure).lower(updates, updates).compile()
    assert made.memory_analysis().temp_size_in_bytes / updates.nbytes < EIGHTH


@pytest.mark.slow_but(2)
@OLD_XLA
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        (clipax.acclip(), optax.sgd(0.1)),
        (clipax.scale_by_stable_adam(), optax.scale(0.1)),
        (clipax.spam_clip(), optax.adam(0.1)),
        (clipax.stable_spam(), optax.adam(0.1)),
    ],
)
def test_a_memory_of_each_entry_is_learned_in_place(method: Any, optimizer: Any) -> None:
    updates = {name: jnp.ones((512, 600)) for name in "abcd"}
    assert share_of_temporaries(optax.chain(method, optimizer), updates) < EIGHTH


@pytest.mark.slow_but(3)
@OLD_XLA
@pytest.mark.parametrize(
    "method",
    [
        clipax.observe(clipax.clip_by_global_norm(0.1)),
        clipax.observe(clipax.clip_by_value(0.1)),
        clipax.clip_by_value(0.1, -0.2),
        clipax.clip_by_unit_norm(0.1),
        clipax.adaptive_grad_clip(0.1),
        clipax.clippy(),
    ],
)
def test_what_is_only_recorded_is_not_kept(method: Any) -> None:
    updates = {name: jnp.ones((512, 600)) for name in "abcd"}
    assert share_of_temporaries(optax.chain(method, optax.adam(0.1)), updates) < EIGHTH


@OLD_XLA
def test_smooth_clips_of_entries_keep_one_copy() -> None:
    updates = {name: jnp.ones((512, 600)) for name in "abcd"}
    optimizer = optax.chain(clipax.smooth_clip_by_value(0.1), optax.adam(0.1))
    assert share_of_temporaries(optimizer, updates) < 1 + EIGHTH


@OLD_XLA
def test_what_is_clipped_with_a_carry_is_kept_once() -> None:
    updates = {name: jnp.ones((512, 600)) for name in "abcd"}
    optimizer = optax.chain(clipax.u_clip(clipax.clip_by_global_norm(0.1)), optax.adam(0.1))
    assert share_of_temporaries(optimizer, updates) < 1.6


@OLD_XLA
def test_a_running_estimate_is_moved_in_place() -> None:
    """Its differences from the updates are kept once, and nothing else but an eighth of them."""
    updates = {name: jnp.ones((512, 600)) for name in "abcd"}
    optimizer = optax.chain(clipax.clip21(clipax.clip_by_global_norm(0.1)), optax.adam(0.1))

    def step(params: Any, state: Any, updates: Any) -> Any:
        updates, state = optimizer.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
            updates, optimizer.init(updates), updates
        )
    tree = sum(leaf.nbytes for leaf in updates.values())
    assert lowered.compile().memory_analysis().temp_size_in_bytes / tree < 1 + EIGHTH


def test_leaves_that_are_read_again_share_a_kernel() -> None:
    """A scale that is sliced out of a stack, at a place of its own, makes a kernel of its own."""
    updates = {name: jnp.ones((512, 600)) for name in "abcd"}
    assert " slice(" not in compiled(clipax.clip_by_global_norm(0.1), updates, updates)


def share_of_temporaries(optimizer: Any, updates: Any) -> float:
    """The memory of a step, next to that of the updates."""
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(updates)
        lowered = jax.jit(optimizer.update).lower(updates, state, updates)
    tree = sum(leaf.nbytes for leaf in updates.values())
    return lowered.compile().memory_analysis().temp_size_in_bytes / tree


@pytest.mark.slow
@OLD_XLA
@pytest.mark.parametrize(
    "method", [clipax.clip_by_global_norm(0.1), clipax.clip_by_leaf_norm(0.1)]
)
def test_collectives_do_not_grow_with_the_number_of_leaves(method: Any) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))

    def collectives(count: int) -> int:
        updates = {
            str(index): jax.device_put(jnp.ones((8, 4 + index)), sharding)
            for index in range(count)
        }
        return len(
            re.findall(
                r"= \S+ all-reduce(?:-start)?\(|\) all-reduce(?:-start)?\(",
                compiled(method, updates, updates),
            )
        )

    few, many = collectives(2), collectives(24)
    assert few == many
    assert many <= 3  # one, the same again out of range, and whether that is so


def test_the_clip_of_many_leaves_compiles_to_less_than_optax_makes_of_it() -> None:
    # A count of instructions, since times on a shared machine prove nothing; the benchmark
    # has the times.
    updates = [jnp.ones((16,), jnp.bfloat16)] * 200

    def size(optimizer: Any) -> int:
        return compiled(optimizer, updates, updates).count(" = ")

    assert size(clipax.clip_by_global_norm(1.0)) < size(optax.clip_by_global_norm(1.0))


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    "method",
    [clipax.clip_by(clipax.leaf_norm, optax.ema(0.9)), clipax.stable_spam()],
)
def test_bounds_of_many_leaves_are_not_read_at_places_of_one_array(method: Any) -> None:
    number = 36
    updates = {str(name): jnp.ones((8, 8)) for name in range(number)}
    program = compiled(method, updates, updates)
    # Parts of the bounds, and not each of them: as many as the root of their number, at most
    # twice in a method.
    assert len(re.findall(r" (?:dynamic-)?slice\(", program)) <= 2 * number**0.5
