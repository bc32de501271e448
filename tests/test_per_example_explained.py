"""What `explain_clipped_grad` says would help leaves that are made for each example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import per_example_zoo as zoo
import pytest
from jax import lax

Params = dict[str, jax.Array]
WIDTH = 32


def dense(weight: Callable[[Params], jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, x: zoo.mean_square(jnp.tanh(x @ weight(params)))


def normalized(params: Params) -> jax.Array:
    lengths = jnp.linalg.norm(params["w"], axis=0, keepdims=True)
    return params["w"] / lengths * params["b"][None]


def mutable(params: Params, x: jax.Array) -> jax.Array:
    ref = jax.new_ref(jnp.zeros(()))
    ref[...] = dense(lambda p: p["w"])(params, x)
    return ref[...]


def two_scans(params: Params, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> Any:
        return jnp.tanh(x @ w), None

    x = lax.scan(layer, x, params["stack"])[0]
    return zoo.mean_square(lax.scan(layer, x, params["stack"][:2])[0])


# With the part of the reason that names the cause.
HELPED: dict[str, tuple[Callable[..., jax.Array], str]] = {
    "masked": (
        dense(lambda p: jnp.where(jnp.tri(WIDTH, dtype=bool), p["w"], 0.0)),
        "it comes from select_n",
    ),
    "squared": (dense(lambda p: jnp.square(p["w"])), "it comes from mul"),
    "normalized": (dense(normalized), "it comes from mul. Do that"),
    "summed up": (dense(lambda p: jnp.cumsum(p["w"], 0)), "it comes from cumsum"),
    "in two scans": (two_scans, "products that do not compare"),
    "mutable": (mutable, "it comes from a program with mutable arrays. Use others"),
}
FINE: dict[str, Callable[..., jax.Array]] = {
    "dense": dense(lambda p: p["w"]),
    "biases": lambda p, x: zoo.mean_square(jnp.tanh(x @ p["w"] + p["b"][None])),
    "scales": lambda p, x: zoo.mean_square(jnp.tanh(x * p["b"][None]) @ p["w"]),
    "long": lambda p, x: dense(lambda p: p["w"])(p, jnp.tile(x, (WIDTH, 1))),
}


def said(loss_fn: Callable[..., jax.Array]) -> list[str]:
    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    square = shaped(WIDTH, WIDTH)
    params = {"w": square, "b": shaped(WIDTH), "stack": shaped(3, WIDTH, WIDTH)}
    lines = zoo.explanation(loss_fn, params, shaped(8, 2, WIDTH)).splitlines()
    return [line for line in lines if line.startswith("No factors for ")]


NO_MUTABLE_ARRAYS = pytest.mark.skipif(
    not hasattr(jax, "new_ref"), reason="this version of JAX has no mutable arrays"
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=NO_MUTABLE_ARRAYS if name == "mutable" else ()) for name in HELPED],
)
def test_a_leaf_without_its_factors_has_a_reason_with_what_would_help(name: str) -> None:
    loss_fn, reason = HELPED[name]
    (line,) = said(loss_fn)
    leaf = "stack" if name == "in two scans" else "w"
    assert line.startswith(f"No factors for {leaf} (")
    assert reason in line
    assert "Do that to activations instead" in line or " Use " in line


@pytest.mark.parametrize("name", FINE)
def test_nothing_is_said_where_factors_are_used_or_not_smaller(name: str) -> None:
    assert not said(FINE[name])
