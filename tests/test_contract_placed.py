"""Where a state lies, however it was made: like the parameters, from first to last."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_contract_sharded import assert_same_sharding, params_and_sequence, placed

import clipax

METHODS = sorted(trees.public_factories())
methods = pytest.mark.parametrize("name", METHODS)
some_methods = pytest.mark.parametrize("name", trees.mostly_slow(METHODS))
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def shapes_of(tree: Any, memory: str | None = None) -> Any:
    def shape_of(leaf: Any) -> Any:
        sharding = leaf.sharding if memory is None else leaf.sharding.with_memory_kind(memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape_of, tree)


def assert_one_trace(method: Any, state: Any, kind: AxisType) -> None:
    """Three steps from this state are traced once, and a scan takes it as it is."""
    params, sequence = params_and_sequence()
    params, sequence = placed(params, kind), [placed(updates, kind) for updates in sequence]
    traces = []

    @trees.quick_jit
    def update(updates: Any, state: Any, params: Any) -> Any:
        traces.append(1)
        return method.update(updates, state, params)[1]

    new_state = state
    for updates in sequence:
        new_state = update(updates, new_state, params)
    assert len(traces) == 1
    trees.assert_same_type(new_state, state)
    assert_same_sharding(new_state, state)
    trees.quick_jit(
        lambda state: jax.lax.scan(
            lambda state, _: (method.update(sequence[0], state, params)[1], None),
            state,
            length=2,
        )
    )(state)


@some_methods
@kinds
def test_a_state_from_shapes_lies_where_one_from_arrays_does(name: str, kind: AxisType) -> None:
    method, params = trees.build(name), placed(params_and_sequence()[0], kind)
    state = method.init(params)
    from_shapes = method.init(shapes_of(params))
    trees.assert_same_type(from_shapes, state)
    assert_same_sharding(from_shapes, state)


@pytest.mark.slow
@methods
@kinds
def test_a_state_from_shapes_is_traced_once(name: str, kind: AxisType) -> None:
    method, params = trees.build(name), placed(params_and_sequence()[0], kind)
    assert_one_trace(method, method.init(shapes_of(params)), kind)


@pytest.mark.slow
@methods
@kinds
def test_a_state_made_in_jit_is_traced_once(name: str, kind: AxisType) -> None:
    method, params = trees.build(name), placed(params_and_sequence()[0], kind)
    made = trees.quick_jit(method.init)(params)
    trees.assert_same_type(made, method.init(params))
    if kind is AxisType.Explicit:
        assert_one_trace(method, made, kind)


def host_memory() -> str | None:
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    usual = jax.devices()[0].default_memory().kind
    return next((kind for kind in ("pinned_host",) if kind in kinds and kind != usual), None)


@pytest.mark.skipif(host_memory() is None, reason="this JAX has one kind of memory on a CPU")
@methods
def test_parameters_in_host_memory_have_a_state_on_the_device(name: str) -> None:
    if name in BESIDE_PARAMETERS:
        pytest.skip("it keeps what lies beside each parameter, wherever that is")
    method, params = trees.build(name), placed(params_and_sequence()[0], AxisType.Auto)
    state = method.init(params)
    hosted = jax.device_put(
        params, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(host_memory()), params)
    )
    from_host = method.init(hosted)
    trees.assert_same_type(from_host, state)
    assert_same_sharding(from_host, state)


# Their memory has the shape of the parameters.
BESIDE_PARAMETERS = {"acclip", "clip21", "scale_by_stable_adam", "spam_clip", "u_clip"}


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(
    "bound",
    [optax.linear_schedule(2.0, 1.0, 10), {"embedding": lambda count: 1.0 + count}],
    ids=["one", "prefix"],
)
def test_the_counter_of_a_schedule_lies_on_the_mesh(kind: AxisType, bound: Any) -> None:
    params, sequence = params_and_sequence()
    if isinstance(bound, dict):
        bound = {**dict.fromkeys(params, 1.0), **bound}
    for build in (clipax.clip_by_leaf_norm, clipax.clip_by_unit_norm, clipax.clip_by_value):
        method = build(bound)
        assert_one_trace(method, method.init(placed(params, kind)), kind)
    del sequence


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(
    "norm",
    [
        clipax.global_norm,
        clipax.leaf_norm,
        clipax.unit_norm,
        functools.partial(
            clipax.leaf_norm, stack_axis=lambda path, leaf: 0 if leaf.ndim else None
        ),
    ],
    ids=["global", "leaf", "unit", "stack"],
)
def test_a_rule_of_optax_over_any_norm_is_traced_once(kind: AxisType, norm: Any) -> None:
    rule = optax.chain(optax.ema(0.5), optax.scale(1.5))
    method = clipax.clip_by(norm, rule)
    params = placed(params_and_sequence()[0], kind)
    assert_one_trace(method, method.init(params), kind)
    assert_one_trace(method, method.init(shapes_of(params)), kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "coefficient",
    [clipax.coefficients.tanh, clipax.coefficients.square_root, clipax.coefficients.rational],
)
def test_smooth_clips_keep_explicit_shards(coefficient: Any) -> None:
    params, sequence = params_and_sequence()
    for method in (
        clipax.smooth_clip_by_value(0.5, coefficient),
        clipax.smooth_clip_by_global_norm(0.5, coefficient),
    ):
        expected, _ = method.update(sequence[0], method.init(params))
        updates = placed(sequence[0], AxisType.Explicit)
        for update in (method.update, trees.quick_jit(method.update)):
            clipped, _ = update(updates, method.init(placed(params, AxisType.Explicit)))
            trees.assert_close(clipped, expected, rtol=1e-5)
            assert_same_sharding(clipped, updates)


@pytest.mark.slow
def test_uneven_sizes_do_not_matter() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    leaf = jax.device_put(np.ones((8, 3), np.float32), NamedSharding(mesh, PartitionSpec("x")))
    for name in METHODS:
        method = trees.build(name)
        clipped, _ = trees.quick_jit(method.update)(leaf, method.init(leaf), leaf)
        assert_same_sharding(clipped, leaf)
