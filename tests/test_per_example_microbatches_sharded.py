"""Microbatches of a sharded batch, in which each device works on examples of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax

DEVICES, EXAMPLES, SIZE, USERS = 8, 32, 16, 3
P = PartitionSpec
MOVES = ("all-gather(", "all-to-all(", "collective-permute(")
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one bound": ({}, {}),
    "nothing kept": ({"memory": "twice"}, {}),
    "a mask": ({"mean": False}, {"mask": np.arange(EXAMPLES) % 3 > 0}),
    "users": ({"num_users": USERS}, {"user_ids": np.arange(EXAMPLES) % (USERS + 1) - 1}),
}


def loss_fn(params: Any, x: jax.Array, key: jax.Array) -> Any:
    hidden = jnp.tanh(x @ params["in"]) + 0.1 * jax.random.normal(key, (16,))[None]
    return zoo.mean_square(hidden @ params["out"]), hidden[0]


def arguments(shape: tuple[int, ...] = (), kind: AxisType = AxisType.Auto) -> Any:
    """Parameters, examples of different sizes and a key; on a mesh if it has a shape."""
    source = zoo.Source(7)
    params = {"in": source.weight(16, 16), "out": source.weight(16, 4)}
    rows = jnp.arange(1.0, EXAMPLES + 1).reshape(-1, 1, 1) * source.weight(EXAMPLES, 64, 16)
    keys = jax.random.split(jax.random.key(0), EXAMPLES)
    if not shape:
        return params, rows, keys
    axes = ("data", "more")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(shape))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(axes))
    return jax.device_put(params, whole), *jax.device_put((rows, keys), split)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((DEVICES,), AxisType.Auto),
        ((DEVICES,), AxisType.Explicit),
        ((4, 2), AxisType.Auto),
    ],
)
@pytest.mark.parametrize("name", trees.mostly_slow(OPTIONS, ["one bound"]))
def test_each_device_works_on_its_own_examples(
    shape: tuple[int, ...], kind: AxisType, name: str
) -> None:
    options, at_call = OPTIONS[name]
    options = {"batch_argnums": (1, 2), "has_aux": True, **options}
    grad_fn = clipax.clipped_grad(loss_fn, 0.1, microbatch_size=SIZE, **options)
    alone = jax.jit(grad_fn).lower(*arguments(), **at_call).compile()
    spread = jax.jit(grad_fn).lower(*arguments(shape, kind), **at_call).compile()
    moves = [line for line in spread.as_text().splitlines() if any(map(line.count, MOVES))]
    # Branches are for norms that lost their digits, which are found again one after the other.
    assert not [line for line in moves if "/cond/" not in line]
    # The sum of a device and that over devices take as long as on one.
    assert flops(spread) < 1.5 * flops(alone) / DEVICES
    wanted = clipax.clipped_grad(loss_fn, 0.1, **options)(*arguments(), **at_call)
    zoo.assert_near(spread(*arguments(shape, kind), **at_call), wanted)


def flops(compiled: Any) -> float:
    """What one device computes."""
    return float(compiled.cost_analysis()["flops"])
