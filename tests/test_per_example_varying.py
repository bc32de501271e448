"""Parameters whose types say that they vary over a mesh axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from per_example_programs import IMAGES, TOKENS, X, conv, dense, normal, scanned

import clipax


def varying(tree: Any) -> Any:
    if hasattr(lax, "pcast"):
        return lax.pcast(tree, ("data",), to="varying")
    return lax.pvary(tree, ("data",))  # jax < 0.8.3


def recurrent(w: jax.Array, x: jax.Array) -> jax.Array:
    start = varying(jnp.zeros(16)) if "data" in _axes() else jnp.zeros(16)
    state = lax.scan(lambda state, row: (jnp.tanh(state @ w + row), None), start, x)[0]
    return zoo.mean_square(state)


def _axes() -> Any:
    return jax.sharding.get_abstract_mesh().manual_axes


VARYING: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], jax.Array]] = {
    "dense": (dense(lambda w: 0.5 * w), (16, 16), X),
    "vectors": (lambda w, x: zoo.mean_square(jnp.tanh(x[0] @ w)), (16, 16), X),
    "look-up": (lambda w, t: zoo.mean_square(jnp.tanh(w[t])), (12, 16), TOKENS),
    "look-up of one": (lambda w, t: zoo.mean_square(jnp.tanh(w[t[0]])), (12, 16), TOKENS),
    "look-up and back": (lambda w, t: zoo.mean_square(jnp.tanh(w[t] @ w.T)), (12, 16), TOKENS),
    "dynamic slice": (
        lambda w, t: zoo.mean_square(lax.dynamic_index_in_dim(w, t[0])),
        (12, 16),
        TOKENS,
    ),
    "recurrent": (recurrent, (16, 16), X),
    "layers": (scanned, (2, 16, 16), X),
    "convolution": (conv, (3, 3, 8, 12), IMAGES),
    "part": (dense(lambda w: jnp.pad(w[1], ((0, 0), (1, 2)))), (2, 16, 16), X),
    "entry by entry": (lambda w, x: zoo.mean_square(jnp.tanh(x * w[None])), (16,), X),
    "unused": (lambda w, x: zoo.mean_square(x), (4, 4), X),
}
DECAY: dict[str, Callable[[jax.Array], jax.Array]] = {
    "alone": lambda w: jnp.zeros(()),
    "with decay": lambda w: 0.1 * jnp.sum(w**2),
}


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("look-up", "alone"),
        ("dense", "with decay"),
        ("recurrent", "with decay"),
        ("convolution", "with decay"),
        ("unused", "alone"),
        *(
            pytest.param(name, decay, marks=pytest.mark.slow)
            for name in VARYING
            for decay in DECAY
        ),
    ],
)
def test_varying_parameters_give_the_same_on_each_device(name: str, decay: str) -> None:
    loss_of_example, shape, batch = VARYING[name]
    params = {"w": normal(*shape) / 4}
    batch = jnp.concatenate([batch, -batch, batch[::-1], batch])  # two on each device

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return loss_of_example(params["w"], example) + DECAY[decay](params["w"])

    def on_a_device(params: Any, batch: Any) -> Any:
        params = varying(params)
        norms, grads = oracle.clip_leaf_by_leaf(loss_fn, params, batch)
        separate = clipax.per_example_norms(loss_fn, per_leaf=True)(params, batch)
        return norms, separate, jax.tree.map(lambda leaf: lax.psum(leaf, "data"), grads)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(whole, spread), out_specs=(spread, spread, whole)
    )
    norms, separate, grads = trees.quick_jit(sharded)(params, batch)
    wanted = oracle.clipped_leaf_by_leaf(loss_fn, params, batch)
    zoo.assert_near((norms, grads), wanted)
    zoo.assert_near(separate, wanted[0])
