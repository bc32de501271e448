"""Parameters inside of branches, of which each example chooses one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from per_example_programs import X, normal

import clipax
from clipax._core import _compat

Params = dict[str, jax.Array]
# One row for each example: the branch, and a number that is negative for some.
CHOICES = jnp.asarray([[0, 2], [1, -1], [2, 3], [5, -2]])


def experts(params: Params, example: Any) -> jax.Array:
    x, (which, _) = example
    branches = [lambda x: x @ params["w"], lambda x: jnp.tanh(x @ params["v"]), jnp.sin]
    return zoo.mean_square(jnp.tanh(lax.switch(which, branches, x)))


def one_weight(params: Params, example: Any) -> jax.Array:
    x, (_, size) = example
    x = lax.cond(
        size > 0, lambda x: jnp.tanh(x @ params["w"]), lambda x: 2 * (x @ params["w"].T), x
    )
    return zoo.mean_square(x @ params["w"])


def of_all(params: Params, example: Any) -> jax.Array:
    """The predicate is the same for all examples."""
    is_first = params["b"][0] > 0
    x = lax.cond(
        is_first, lambda x: jnp.tanh(x @ params["w"]), lambda x: x @ params["v"], example[0]
    )
    return zoo.mean_square(x)


def guarded(params: Params, example: Any) -> jax.Array:
    """Some examples choose a branch because they would be NaN in the other."""
    x, (_, size) = example
    root = jnp.sqrt(size.astype(x.dtype))

    def chosen() -> Any:
        return jnp.log(root) * jnp.tanh((root * x) @ params["w"])

    return zoo.mean_square(lax.cond(size > 0, chosen, lambda: x @ params["v"]))


def divided(params: Params, example: Any) -> jax.Array:
    x, (_, size) = example
    by = jnp.exp(size.astype(x.dtype))
    return zoo.mean_square(
        lax.cond(size > 0, lambda: x @ (params["w"] / by), lambda: x @ (by * params["w"]))
    )


def look_ups(params: Params, example: Any) -> jax.Array:
    x, (which, size) = example

    def rows() -> Any:
        return params["table"][jnp.stack([which, which + 1, which])]

    return zoo.mean_square(jnp.tanh(x + lax.cond(size > 0, rows, lambda: params["table"][2:5])))


def in_steps(params: Params, example: Any) -> jax.Array:
    x, _ = example

    def step(state: jax.Array, row: jax.Array) -> Any:

        def grown(state: jax.Array) -> Any:
            return jnp.tanh(row + state @ params["w"])

        return lax.cond(row[0] > 0, grown, lambda state: state @ params["v"], state), None

    return zoo.mean_square(lax.scan(step, jnp.ones(16, x.dtype), x)[0])


def layers(params: Params, example: Any) -> jax.Array:
    """Whether a layer is left out depends on the layer alone, or on the example too."""
    x, (_, size) = example

    def layer(x: jax.Array, each: Any) -> Any:
        index, w = each
        x = lax.cond(index != 1, lambda x: x + jnp.tanh(x @ w), lambda x: x, x)
        return lax.cond(index < size, lambda x: x + jnp.sin(x @ w), lambda x: x, x), None

    return zoo.mean_square(
        lax.scan(layer, x, (jnp.arange(3, dtype=jnp.int32), params["stack"]))[0]
    )


def steps_inside(params: Params, example: Any) -> jax.Array:
    x, (_, size) = example

    def layer(x: jax.Array, w: jax.Array) -> Any:
        return (jnp.tanh(x @ w + x @ params["w"]), None)

    def many(x: jax.Array) -> Any:
        return lax.scan(layer, x, params["stack"])[0]

    return zoo.mean_square(lax.cond(size > 0, many, lambda x: x @ params["w"], x))


def nested(params: Params, example: Any) -> jax.Array:
    x, (which, size) = example

    def inner(x: jax.Array) -> Any:
        return lax.cond(size > 2, lambda x: x @ params["w"], lambda x: x @ params["v"], x)

    return zoo.mean_square(jnp.tanh(lax.cond(which < 3, inner, lambda x: -(x @ params["w"]), x)))


def penalty(params: Params, example: Any) -> jax.Array:
    x, (_, size) = example

    def decay() -> Any:
        return 0.1 * jnp.sum(params["w"] ** 2) + jnp.sum(params["b"])

    return zoo.mean_square(x @ params["w"] + params["b"][None]) + lax.cond(
        size > 0, decay, lambda: jnp.zeros((), x.dtype)
    )


def by_platform(params: Params, example: Any) -> jax.Array:

    def product(x: jax.Array) -> Any:
        return jnp.tanh(x @ params["w"])

    return zoo.mean_square(lax.platform_dependent(example[0], cpu=product, default=product))


CASES: dict[str, Callable[..., jax.Array]] = {
    "experts": experts,
    "recomputed": jax.checkpoint(experts),
    "one weight": one_weight,
    "one predicate": of_all,
    "guarded": guarded,
    "divided": divided,
    "look-ups": look_ups,
    "in steps": in_steps,
    "layers": layers,
    "steps inside": steps_inside,
    "nested": nested,
    "a penalty": penalty,
    "by platform": by_platform,
}
COMMON = {"experts", "guarded"}
PARAMS = {
    "w": normal(16, 16),
    "v": normal(16, 16, seed=1),
    "b": normal(16, seed=2),
    "table": normal(12, 16, seed=3),
    "stack": normal(3, 16, 16, seed=4),
}


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("name", trees.mostly_slow(CASES, COMMON))
@pytest.mark.parametrize("memory", ["kept", "twice"])
def test_gradients_inside_of_branches_equal_those_made_one_by_one(name: str, memory: Any) -> None:
    with trees.double_precision(True):
        params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (PARAMS, 0.2 * X))
        oracle.assert_leaves_the_same(CASES[name], params, (x, CHOICES), memory=memory)


WITH_FACTORS = ["experts", "one predicate", "in steps", "layers", "nested"]


@pytest.mark.parametrize("name", WITH_FACTORS)
def test_branches_have_factors(name: str) -> None:
    text = zoo.explanation(CASES[name], PARAMS, (X, CHOICES))
    lines = [line for line in zoo.lines_of_leaves(text) if line.split()[0] in ("w", "v", "stack")]
    assert all(zoo.GRAM in line or zoo.ZERO in line for line in lines), text


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("name", ["experts", "one predicate", "nested"])
def test_branches_take_the_memory_of_the_gradient_of_the_batch(name: str) -> None:
    loss_fn = CASES[name]

    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda params: jax.vmap(loss_fn, (None, 0))(params, batch).mean())(params)

    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    w = shaped(128, 128)
    params = {"w": w, "v": w, "b": shaped(16)}
    batch = shaped(16, 2, 128), jax.ShapeDtypeStruct((16, 2), jnp.int32)
    found, wanted = (
        jax.jit(each).lower(params, batch).compile().memory_analysis().temp_size_in_bytes
        for each in (clipax.clipped_grad(loss_fn, 1.0), plain)
    )
    assert found < wanted + 4 * 128 * 128 * 16 / 2


def test_a_branch_that_all_examples_share_stays_a_branch() -> None:
    clip = clipax.clipped_grad(of_all, 1.0)
    assert jax.make_jaxpr(clip)(PARAMS, (X, CHOICES)).pretty_print().count(" cond[") >= 2
    assert np.isfinite(clip(PARAMS, (X, CHOICES))[1].norms).all()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["kept", "twice"])
def test_each_device_can_choose_branches_for_its_examples(memory: Any) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def step(params: Params, batch: Any) -> Any:
        params = jax.tree.map(lambda leaf: _compat.varying_over(leaf, ("data",)), params)
        clip = clipax.clipped_grad(experts, oracle.BOUND, mean=False, memory=memory)
        grads, info = clip(params, batch)
        return lax.psum(grads, "data"), info.norms

    specs = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
    found = trees.quick_jit(mapped)(PARAMS, (X, CHOICES))
    clip = clipax.clipped_grad(experts, oracle.BOUND, mean=False)
    grads, info = trees.quick_jit(clip)(PARAMS, (X, CHOICES))
    zoo.assert_near(found, (grads, info.norms))
