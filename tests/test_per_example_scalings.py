"""Weights whose rows or columns are scaled before they are used."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from per_example_programs import X, normal

import clipax

Params = dict[str, jax.Array]


def dense(weight: Callable[[Params], jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, x: zoo.mean_square(jnp.tanh(x @ weight(params)))


def recurrent(params: Params, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, row: jax.Array) -> Any:
        return jnp.tanh(row + h @ (params["w"] * params["g"][None])), None

    return zoo.mean_square(lax.scan(step, jnp.ones(x.shape[1], x.dtype), x)[0])


def layers(params: Params, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, each: Params) -> Any:
        return jnp.tanh(x @ (each["w"] * each["g"][:, None])), None

    stack = {"w": params["stack"], "g": params["gs"]}
    return zoo.mean_square(lax.scan(layer, x, stack)[0])


def layers_twice(params: Params, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, each: Params) -> Any:
        return jnp.tanh(x @ (each["w"] * each["g"][:, None] * params["h"][None])), None

    stack = {"w": params["stack"] * params["g"][None, None], "g": params["gs"]}
    return zoo.mean_square(lax.scan(layer, x, stack)[0])


def look_ups(params: Params, x: jax.Array) -> jax.Array:
    tokens = jnp.asarray([3, 1, -2], jnp.int32) + jnp.int32(x[0, 0] > 0)
    return zoo.mean_square(jnp.tanh(x + (params["w"] * params["g"][None])[tokens]))


def heads(params: Params, x: jax.Array) -> jax.Array:
    weights = params["stack"] * params["gs"][:, :, None]
    return zoo.mean_square(jnp.tanh(jnp.einsum("ti,hio->hto", x, weights)))


CASES: dict[str, Callable[..., jax.Array]] = {
    "rows": dense(lambda p: p["w"] * p["g"][:, None]),
    "columns": dense(lambda p: p["w"] * p["g"][None]),
    "columns divided": dense(lambda p: p["w"] / jnp.exp(p["g"])[None]),
    "rows, transposed": dense(lambda p: (p["w"] * p["g"][:, None]).T),
    "rows twice": lambda p, x: dense(lambda p: p["w"] * p["g"][:, None])(
        p, x @ (p["w"] * p["g"][:, None])
    ),
    "by constants": dense(lambda p: p["w"] * jnp.arange(16, dtype=p["w"].dtype)[:, None]),
    "by the example": lambda p, x: dense(lambda p: p["w"] * x[1][:, None])(p, x),
    "divided by the example": lambda p, x: dense(lambda p: p["w"] / jnp.exp(x[1])[None])(p, x),
    "by a number": dense(lambda p: p["w"] * p["s"]),
    "rows, columns and rows": dense(
        lambda p: p["w"] * p["g"][:, None] * p["h"][None] * jnp.cos(p["g"])[:, None]
    ),
    "columns, transposed, columns": dense(
        lambda p: (p["w"] * p["g"][None]).T * p["h"][None] / jnp.exp(p["g"])[:, None]
    ),
    "columns of a stack, in layers": layers_twice,
    "by a row of one": dense(lambda p: p["w"] * p["g"][None, :1]),
    "rows and columns": dense(lambda p: p["w"] * p["g"][:, None] * p["h"][None]),
    "normalized": dense(
        lambda p: p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True) * p["g"][None]
    ),
    "recomputed": jax.checkpoint(dense(lambda p: p["w"] * p["g"][None])),
    "with a penalty": lambda p, x: (
        dense(lambda p: p["w"] * p["g"][None])(p, x)
        + 0.1 * (jnp.sum(p["w"] ** 2) + jnp.sum(p["g"] ** 2))
    ),
    "masked": dense(lambda p: p["w"] * jnp.tri(16, dtype=p["w"].dtype)),
    "recurrent": recurrent,
    "layers": layers,
    "look-ups": look_ups,
    "heads": heads,
}
IN_A_ROW = ["rows and columns", "rows, columns and rows", "columns, transposed, columns"]
COMMON = {"rows", "columns", "columns divided"}
PARAMS = {
    "w": normal(16, 16),
    "g": normal(16, seed=1),
    "h": normal(16, seed=2),
    "s": jnp.asarray(0.7),
    "stack": normal(3, 16, 16, seed=3),
    "gs": normal(3, 16, seed=4),
}


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("name", trees.mostly_slow(CASES, COMMON))
@pytest.mark.parametrize("memory", ["kept", "twice"])
def test_gradients_of_scaled_weights_equal_those_made_one_by_one(name: str, memory: Any) -> None:
    with trees.double_precision(True):
        params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (PARAMS, X))
        oracle.assert_leaves_the_same(CASES[name], params, batch, memory=memory)


@pytest.mark.parametrize(
    "name", ["rows", "columns", "columns divided", *IN_A_ROW, "by constants", "layers"]
)
def test_no_scaled_weight_is_made_for_each_example(name: str) -> None:
    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    width = 16 if name == "by constants" else 128
    params = dict.fromkeys(("g", "h"), shaped(128)) | {"w": shaped(width, 128)}
    params |= {"stack": shaped(1, 128, 128), "gs": shaped(1, 128)}
    batch = shaped(64, 1, width)
    compiled = jax.jit(clipax.clipped_grad(CASES[name], 1.0)).lower(params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * width * 128 * 64 / 2
