"""Low-rank factors that are merged into a weight before it is used."""

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


def merged(weight: Callable[[Params], jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, x: zoo.mean_square(jnp.tanh(x @ weight(params)))


def layers(params: Params, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, each: Params) -> Any:
        return jnp.tanh(x @ (params["w"] + each["a"] @ each["b"])), None

    return zoo.mean_square(lax.scan(layer, x, {"a": params["as"], "b": params["bs"]})[0])


def frozen_layers(params: Params, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, each: Params) -> Any:
        return jnp.tanh(x @ (each["w"] + 0.5 * (each["a"] @ each["b"]))), None

    frozen = lax.stop_gradient(params["ws"])
    return zoo.mean_square(
        lax.scan(layer, x, {"w": frozen, "a": params["as"], "b": params["bs"]})[0]
    )


def recurrent(params: Params, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, row: jax.Array) -> Any:
        return jnp.tanh(row + h @ (params["a"] @ params["b"])), None

    return zoo.mean_square(lax.scan(step, jnp.ones(16, x.dtype), x)[0])


def loop(params: Params, x: jax.Array) -> jax.Array:
    for a, b in zip(params["as"], params["bs"], strict=True):
        x = jnp.tanh(x @ (params["w"] + a @ b))
    return zoo.mean_square(x)


def heads(params: Params, x: jax.Array) -> jax.Array:
    weights = jnp.einsum("hir,hro->hio", params["as"], params["bs"])
    return zoo.mean_square(jnp.tanh(jnp.einsum("ti,hio->hto", x, weights)))


ALL = {
    "a": normal(16, 2),
    "b": normal(2, 16, seed=1),
    "w": normal(16, 16, seed=2),
    "as": normal(3, 16, 2, seed=3),
    "bs": normal(3, 2, 16, seed=4),
    "c": normal(2, 2, seed=5),
    "ws": normal(3, 16, 16, seed=6),
    "g": normal(16, seed=7),
    "d": normal(2, seed=8),
}
CASES: dict[str, Callable[..., jax.Array]] = {
    "merged": merged(lambda p: p["w"] + p["a"] @ p["b"]),
    "scaled": merged(lambda p: p["w"] - 0.5 * (p["a"] @ p["b"])),
    "alone": merged(lambda p: p["a"] @ p["b"]),
    "transposed": merged(lambda p: (p["a"] @ p["b"] + p["w"]).T),
    "of three": merged(lambda p: p["w"] + p["a"] @ p["c"] @ p["b"]),
    "a square": merged(lambda p: p["a"] @ p["a"].T),
    "used twice": lambda p, x: merged(lambda p: p["a"] @ p["b"])(p, x @ (p["a"] @ p["b"])),
    "recomputed": jax.checkpoint(merged(lambda p: p["w"] + p["a"] @ p["b"])),
    "with a penalty": lambda p, x: (
        merged(lambda p: p["w"] + p["a"] @ p["b"])(p, x) + 0.1 * jnp.sum(p["a"] ** 2)
    ),
    "scaled by the example": lambda p, x: zoo.mean_square(
        jnp.tanh(x @ (x[0, 0] * (p["a"] @ p["b"]) + p["w"]))
    ),
    "layers": layers,
    "frozen layers": frozen_layers,
    "recurrent": recurrent,
    "loop": loop,
    "heads": heads,
    "in scaled columns": merged(lambda p: p["w"] + (p["a"] @ p["b"]) * p["g"][None]),
    # Random factors that are frozen, between scales that are learned.
    "between scales": merged(
        lambda p: p["w"] + (lax.stop_gradient(p["a"]) * p["d"][None]) @ p["b"] * p["g"][None]
    ),
    "in scaled rows and columns, a square": merged(
        lambda p: p["g"][:, None] * (p["a"] @ p["a"].T) * p["g"][None]
    ),
    "in another shape": merged(lambda p: (p["a"] @ p["b"]).reshape(2, 8, 16).reshape(16, 16)),
    "a part": merged(lambda p: p["w"][:, :9] + (p["a"] @ p["b"])[:, :9]),
}
COMMON = {"merged", "layers", "heads"}


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("name", trees.mostly_slow(CASES, COMMON))
@pytest.mark.parametrize("memory", ["kept", "twice"])
def test_gradients_of_factors_equal_those_made_one_by_one(name: str, memory: Any) -> None:
    with trees.double_precision(True):
        params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (ALL, X))
        oracle.assert_leaves_the_same(CASES[name], params, batch, memory=memory)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(
    "name",
    [
        *("merged", "scaled", "loop", "layers", "frozen layers"),
        *("in scaled columns", "between scales"),
    ],
)
def test_no_weight_is_made_for_the_gradients_of_its_factors(name: str, rank: int) -> None:
    params = {"as": jnp.zeros((1, 128, rank)), "bs": jnp.zeros((1, rank, 128))}
    params |= {"a": params["as"][0], "b": params["bs"][0], "w": jnp.zeros((128, 128))}
    params |= {"ws": params["w"][None], "g": jnp.zeros(128), "d": jnp.zeros(rank)}
    batch = jnp.zeros((16, 2, 128))
    clip = clipax.clipped_grad(CASES[name], 1.0)
    compiled = jax.jit(clip).lower(params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["w"].nbytes * len(batch) / 2
