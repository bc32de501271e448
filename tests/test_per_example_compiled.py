"""Compiled steps: in place, with sharded batches, in the memory of one gradient, explained."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from per_example_cases import PAIRS, every_way, total

import clipax
from benchmarks.compilers import hlo


def test_a_training_step_can_donate_its_parameters() -> None:
    grad_fn = clipax.clipped_grad(total, 1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(w: jax.Array, batch: jax.Array) -> Any:
        grads, info = grad_fn(w, batch)
        return w - grads, info.losses

    w = jnp.ones(2)
    w, losses = step(w, PAIRS)
    assert losses.tolist() == [7.0, 0.5]
    w, losses = step(w, PAIRS)
    zoo.assert_near(losses, np.array([3 * 0.7 + 4 * 0.35, 0.5 * 0.35]))


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_gives_the_same_result(kind: AxisType) -> None:
    loss_fn, params, batch = every_way()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    grad_fn = trees.quick_jit(clipax.clipped_grad(loss_fn, 0.1))
    grads, info = grad_fn(params, batch)
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.device_put(params, whole), jax.device_put(batch, by_example)
    compiled = grad_fn.lower(*args).compile()
    sharded, of_sharded = compiled(*args)
    zoo.assert_near(sharded, grads)
    zoo.assert_near(of_sharded._replace(is_counted=None), info._replace(is_counted=None))
    # The examples stay where they are, but for a rare branch.
    assert of_sharded.norms.sharding.is_equivalent_to(by_example, 1)
    kinds = [operation.kind for operation in hlo.computations(compiled.as_text())["ENTRY"]]
    assert "all-reduce" in kinds
    assert not [kind for kind in kinds if kind.startswith("all-gather")]


@pytest.mark.slow
@pytest.mark.parametrize("is_eager", [True, False])
def test_explicit_mesh_axes_can_shard_examples_and_parameters(
    is_eager: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def loss_fn(params: Any, example: Any, key: jax.Array, scale: float) -> Any:
        hidden = jnp.tanh(example @ params["in"]) + 0.1 * jax.random.normal(key, (16,))
        return scale * jnp.mean(jnp.square(hidden @ params["out"])), hidden

    source = zoo.Source(7)
    params = {"in": source.weight(8, 16), "out": source.weight(16, 4)}
    args = (params, source.weight(16, 8), jax.random.split(jax.random.key(0), 16), 2.0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    places = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model")}
    laid = jax.tree.map(lambda leaf, spec: put(mesh, leaf, spec), params, places)
    rows = PartitionSpec("data")
    of_mesh = (laid, put(mesh, args[1], rows), put(mesh, args[2], rows), 2.0)
    bounds = {"in": 0.1, "out": 0.05}
    options: Any = {"batch_argnums": (1, 2), "has_aux": True}
    for more in ({}, {"microbatch_size": 4}):
        grad_fn = clipax.clipped_grad(loss_fn, bounds, **options, **more)
        run = grad_fn if is_eager else jax.jit(grad_fn)
        grads, info = run(*args)
        sharded, of_sharded = run(*of_mesh)
        zoo.assert_near(sharded, grads)
        zoo.assert_near(of_sharded._replace(is_counted=None), info._replace(is_counted=None))
        assert all(lie_alike(sharded[name], laid[name]) for name in laid)
        assert lie_alike(of_sharded.norms["in"], of_mesh[2])
        assert lie_alike(of_sharded.aux, of_mesh[1])
    clipax.explain_clipped_grad(loss_fn, *args, **options)
    clipax.explain_clipped_grad(loss_fn, *of_mesh, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    norm_fn = clipax.per_example_norms(loss_fn, **options)
    norms = (norm_fn if is_eager else jax.jit(norm_fn))(*of_mesh)
    zoo.assert_near(norms, norm_fn(*args))
    assert lie_alike(norms, of_mesh[2])


def lie_alike(one: jax.Array, other: jax.Array) -> bool:
    return one.sharding.is_equivalent_to(other.sharding, one.ndim)


def put(mesh: Any, value: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.device_put(value, NamedSharding(mesh, spec))


@pytest.mark.slow
def test_the_memory_is_that_of_one_gradient() -> None:
    sizes, examples = (256, 512, 512, 10), 64

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        for kernel, bias in params:
            x = jnp.tanh(x @ kernel + bias)
        return zoo.cross_entropy(x, label)

    def plain_way(params: Any, batch: Any) -> Any:
        each = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        norms = jax.vmap(clipax.global_norm)(each)
        weights = clipax.coefficients.hard(norms, jnp.ones_like(norms)) / examples
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), each)

    def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    layers = itertools.pairwise(sizes)
    args = (
        [(shaped(rows, columns), shaped(columns)) for rows, columns in layers],
        (shaped(examples, sizes[0]), shaped(examples, dtype=jnp.int32)),
    )

    def memory(function: Any) -> int:
        compiled = jax.jit(function).lower(*args).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    assert memory(clipax.clipped_grad(loss_fn, 1.0)) < memory(plain_way) / 20


def test_explain_prints_each_leaf_from_shapes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    loss_fn, params, batch = every_way()
    clipax.explain_clipped_grad(loss_fn, params, batch)
    text = capsys.readouterr().out
    clipax.explain_clipped_grad(loss_fn, *jax.eval_shape(lambda *args: args, params, batch))
    assert capsys.readouterr().out == text
    assert text.split()[:2] == ["leaf", "shape"]
    lines = zoo.lines_of_leaves(text)
    wanted = {
        "each": zoo.EACH,
        "gram": zoo.GRAM,
        "outer": zoo.OUTER,
        "table": zoo.GRAM,
        "unused": zoo.ZERO,
    }
    assert [line.split()[0] for line in lines] == list(wanted)
    for line, (name, way) in zip(lines, wanted.items(), strict=True):
        assert f"{params[name].shape} " in line
        assert f" {way} " in line
        assert line.endswith("%")


@pytest.mark.parametrize("memory", ["kept", "twice"])
def test_what_alike_leaves_need_is_traced_once(memory: Any) -> None:
    params, batch = [jnp.ones((8, 8))] * 5, jnp.ones((4, 3, 8))

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        for w in params:
            x = jnp.tanh(x @ w)
        return zoo.mean_square(x)

    clip = clipax.clipped_grad(loss_fn, 1.0, memory=memory)
    found: dict[str, list[Any]] = {}
    for equation in jax.make_jaxpr(clip)(params, batch).jaxpr.eqns:
        if "name" in equation.params and "jaxpr" in equation.params:
            found.setdefault(equation.params["name"], []).append(equation.params["jaxpr"])
    for name in ("norms_of", "weighted_sum") if memory == "kept" else ("_norm_of_one",):
        assert len(found[name]) == 5
        assert len({id(program) for program in found[name]}) == 1
