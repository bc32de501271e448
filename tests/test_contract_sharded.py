"""What every method keeps on many devices: found by its annotation, as in `test_contract`."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax

METHODS = sorted(trees.public_factories())
methods = pytest.mark.parametrize("name", METHODS)
SHAPES = {
    "embedding": (16, 5),
    "kernel": (6, 16),
    "attention": (8, 4, 6),
    "bias": (8,),
    "odd": (3,),
    "scale": (),
    "empty": (0, 4),
}
if jax.__version_info__ < (0, 9):
    # Where it is explicit how arrays are sharded, this JAX cannot return one without entries.
    del SHAPES["empty"]
# Fully sharded, by its inputs, by its outputs, along two axes, and whole.
SPECS = {
    "embedding": PartitionSpec(("x", "y"), None),
    "kernel": PartitionSpec(None, "x"),
    "attention": PartitionSpec("x", "y", None),
    "bias": PartitionSpec("y"),
    "odd": PartitionSpec(None),
    "scale": PartitionSpec(),
    "empty": PartitionSpec("x", None),
}
SPECS = {key: SPECS[key] for key in SHAPES}
# Singular values of a part say nothing of the whole, and the method says so.
NEEDS_WHOLE_LEAVES = {"clip_by_spectral_norm"}
# Up to which axis a leaf is summed; the others count units.
BY_UNIT = {"adaptive_grad_clip": 1, "clip_by_unit_norm": -1}


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def placed(tree: Any, kind: AxisType, specs: Any = SPECS) -> Any:
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh_of(kind), spec), specs)
    return jax.device_put(tree, shardings)


@functools.cache
def params_and_sequence() -> tuple[Any, list[Any]]:
    generator = np.random.default_rng(0)

    def tree(size: float) -> Any:
        return {
            key: np.asarray(size * generator.normal(size=shape), np.float32)
            for key, shape in SHAPES.items()
        }

    return tree(1.0), [tree(size) for size in (1.0, 100.0, 0.5)]


@functools.cache
def unsharded(name: str) -> tuple[list[Any], Any]:
    params, sequence = params_and_sequence()
    method = trees.build(name)
    return run(trees.quick_jit(method.update), method.init(params), sequence, params)


def run(update: Callable[..., Any], state: Any, sequence: Any, params: Any) -> Any:
    outputs = []
    for updates in sequence:
        clipped, state = update(updates, state, params)
        outputs.append(clipped)
    return outputs, state


def assert_unsharded(name: str, outputs: list[Any], state: Any) -> None:
    trees.assert_close((outputs, state), unsharded(name), rtol=1e-5, atol=1e-6)


def assert_same_sharding(one: Any, other: Any) -> None:
    def is_same(a: Any, b: Any) -> bool:
        # The partitioner makes a constant of what has no entries.
        return a.size == 0 or a.sharding.is_equivalent_to(b.sharding, a.ndim)

    same = jax.tree.map(is_same, one, other)
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize(
    "name", trees.mostly_slow(METHODS, ("adagc", "clip_by_unit_norm", "clip_by_value", "u_clip"))
)
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_sharded_arrays(name: str, kind: AxisType) -> None:
    params, sequence = params_and_sequence()
    params, sequence = placed(params, kind), [placed(updates, kind) for updates in sequence]
    method = trees.build(name)
    state = method.init(params)
    outputs, new_state = run(trees.quick_jit(method.update), state, sequence, params)
    assert_unsharded(name, outputs, new_state)
    assert_same_sharding(new_state, state)
    assert_same_sharding(outputs, sequence)


@pytest.mark.slow
@methods
def test_shards_that_do_not_divide(name: str) -> None:
    method, mesh = trees.build(name), mesh_of(AxisType.Auto)
    whole, uneven = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("x",)))
    params, *sequence = jax.device_put(
        (params_and_sequence()[0], *params_and_sequence()[1]), whole
    )

    # Whole at both ends, for JAX has no name for uneven shards there.
    @functools.partial(trees.quick_jit, out_shardings=whole)
    def update(updates: Any, state: Any, params: Any) -> Any:
        sharded = {
            key: jax.lax.with_sharding_constraint(leaf, uneven) if leaf.ndim else leaf
            for key, leaf in updates.items()
        }
        return method.update(sharded, state, params)

    state = jax.device_put(method.init(params), whole)
    assert_unsharded(name, *run(update, state, sequence, params))


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="no unreduced arrays before jax 0.9")
@methods
def test_unreduced_updates(name: str) -> None:
    """As the gradients of whole parameters on sharded batches are, before they are summed."""
    method, mesh = trees.build(name), mesh_of(AxisType.Explicit)
    spec = functools.partial(PartitionSpec, None, None)
    batch = jax.device_put(
        np.asarray(params_and_sequence()[0]["embedding"]), NamedSharding(mesh, PartitionSpec("x"))
    )

    def outcome(params_spec: PartitionSpec, gradient_spec: PartitionSpec) -> Any:
        params = jax.device_put({"w": jnp.ones((5, 5))}, NamedSharding(mesh, params_spec))

        @trees.quick_jit
        def update(batch: Any, state: Any, params: Any) -> Any:
            sharding = NamedSharding(mesh, gradient_spec)
            gradient = jnp.einsum("bi,bj->ij", batch, batch, out_sharding=sharding)
            return method.update({"w": gradient}, state, params)

        with jax.set_mesh(mesh):
            return update(batch, method.init(params), params)

    expected = outcome(spec(), spec())
    unreduced = outcome(spec(reduced={"x"}), spec(unreduced={"x"}))
    trees.assert_close(unreduced, expected, rtol=1e-5)
    assert_same_sharding(unreduced, expected)


def manual_specs(tree: Any, axes: Any = ("x", "y")) -> Any:
    """How each leaf of a placed tree is sharded over some axes."""

    def kept(part: Any) -> Any:
        names = part if isinstance(part, tuple) else (part,)
        return tuple(axis for axis in names if axis in axes) or None

    return jax.tree.map(lambda leaf: PartitionSpec(*map(kept, leaf.sharding.spec)), tree)


def in_shard_map(method: Any, axes: Any = ("x", "y"), **options: Any) -> Any:
    """Runs with a state that was made outside, as programs do."""
    params, sequence = params_and_sequence()
    # Where all is explicit, types tell how the state is sharded.
    known = placed(params, AxisType.Explicit)
    specs, state_specs = manual_specs(known, axes), manual_specs(method.init(known), axes)
    step = jax.shard_map(
        method.update,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(specs, state_specs, specs),
        out_specs=(specs, state_specs),
        axis_names=set(axes),
        **options,
    )
    params, *sequence = (placed(tree, AxisType.Auto) for tree in (params, *sequence))
    return run(trees.quick_jit(step), method.init(params), sequence, params)


@pytest.mark.slow
@methods
@pytest.mark.parametrize("axes", [("x", "y"), ("x",)], ids=["all", "some"])
def test_shard_map_is_told_by_types(name: str, axes: Any) -> None:
    if name in NEEDS_WHOLE_LEAVES:
        with pytest.raises(ValueError, match="may be sharded"):
            in_shard_map(trees.build(name), axes)
        return
    assert_unsharded(name, *in_shard_map(trees.build(name), axes))


@pytest.mark.slow
@methods
def test_shard_map_makes_its_own_state(name: str) -> None:
    """Each leaf is sharded along what its norm sums; of units, nothing tells that."""
    params, sequence = params_and_sequence()
    specs = {**SPECS, "kernel": PartitionSpec(None), "attention": PartitionSpec("x")}
    method = trees.build(name)

    @functools.partial(
        jax.shard_map, mesh=mesh_of(AxisType.Auto), in_specs=([specs] * 3, specs), out_specs=specs
    )
    def last(sequence: Any, params: Any) -> Any:
        return run(method.update, method.init(params), sequence, params)[0][-1]

    if name in {*NEEDS_WHOLE_LEAVES, *BY_UNIT}:
        with pytest.raises(ValueError, match=r"may be sharded|varies over"):
            trees.quick_jit(last)(sequence, params)
        return
    expected = unsharded(name)[0][-1]
    trees.assert_close(trees.quick_jit(last)(sequence, params), expected, rtol=1e-5, atol=1e-6)


def build_with_names(name: str, axis_name: Any) -> Any:
    """The method, and the one inside it, told which axes shard the leaves."""
    factory, inner = trees.public_factories()[name], clipax.clip_by_global_norm
    values = {**trees.ACTIVE, "inner": inner(0.5, axis_name=axis_name)}
    return factory(**trees.required(factory, values), axis_name=axis_name)


def axes_that_shard(name: str, specs: Any) -> Any:
    """The mesh axes that shard what each norm sums: not those that shard its units."""

    def names(spec: PartitionSpec) -> tuple[str, ...]:
        summed = spec[: BY_UNIT[name]] if name in BY_UNIT and len(spec) > 1 else spec
        parts = (part if isinstance(part, tuple) else (part,) for part in summed if part)
        return tuple(itertools.chain(*parts))

    return jax.tree.map(names, specs)


@pytest.mark.slow
@methods
def test_shard_map_without_types_is_told_by_names(name: str) -> None:
    names = axes_that_shard(name, SPECS)
    if name in NEEDS_WHOLE_LEAVES:
        with pytest.raises(ValueError, match="may be sharded"):
            in_shard_map(build_with_names(name, names), check_vma=False)
        return
    assert_unsharded(name, *in_shard_map(build_with_names(name, names), check_vma=False))


@methods
def test_shard_map_without_types_and_names_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"Pass axis_name="):
        in_shard_map(trees.build(name), check_vma=False)


@pytest.mark.slow
@methods
@pytest.mark.parametrize("mapping", [jax.vmap, jax.pmap])
def test_mapped_axes_are_told_by_names(name: str, mapping: Any) -> None:
    split_along = {**dict.fromkeys(SHAPES), "embedding": 0, "kernel": 1, "bias": 0}
    if name in NEEDS_WHOLE_LEAVES:
        split_along = {**split_along, "embedding": None, "kernel": None}
    specs = {
        key: PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "i")
        for key, axis in split_along.items()
    }
    method = build_with_names(name, axes_that_shard(name, specs))

    def stacked(tree: Any) -> Any:
        return {
            key: np.stack([leaf] * 8 if axis is None else np.split(leaf, 8, axis))
            for key, leaf in tree.items()
            for axis in [split_along[key]]
        }

    params, *sequence = map(stacked, (params_and_sequence()[0], *params_and_sequence()[1]))
    state = mapping(method.init, axis_name="i")(params)
    update = mapping(method.update, axis_name="i")
    outputs, _ = run(
        trees.quick_jit(update) if mapping is jax.vmap else update, state, sequence, params
    )
    for clipped, expected in zip(outputs, unsharded(name)[0], strict=True):
        trees.assert_close(
            clipped, stacked(jax.tree.map(np.asarray, expected)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
@methods
def test_a_whole_model_on_each_device_is_no_shard(name: str) -> None:
    """Types say that the leaves of an ensemble vary, and `axis_name=()` that none is a shard."""
    members, mesh = 2, jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))

    def stacked(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: np.stack([leaf, 3 * leaf[::-1] if leaf.ndim else leaf]), tree
        )

    def member(tree: Any, place: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[place], tree)

    def step(*args: Any) -> Any:
        outputs = method.update(*(member(tree, 0) for tree in args))
        return jax.tree.map(lambda leaf: leaf[None], outputs)

    method = build_with_names(name, ())
    params, *sequence = map(stacked, (params_and_sequence()[0], *params_and_sequence()[1]))
    states = [method.init(member(params, place)) for place in range(members)]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    spec = PartitionSpec("i")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    outputs, last = run(trees.quick_jit(mapped), state, sequence, params)
    alone = trees.quick_jit(trees.build(name).update)
    for place in range(members):
        own = [member(updates, place) for updates in sequence]
        expected = run(alone, states[place], own, member(params, place))
        found = jax.tree.map(lambda leaf, place=place: leaf[place], (outputs, last))
        trees.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="XLA before jax 0.10 keeps collectives of leaves apart on a CPU",
)
@methods
def test_collectives_do_not_grow_with_the_number_of_leaves(name: str) -> None:
    sharding = NamedSharding(mesh_of(AxisType.Auto), PartitionSpec("x", "y"))

    def all_reduces(count: int) -> int:
        tree = [
            jax.ShapeDtypeStruct((8, 4 + 2 * row), jnp.float32, sharding=sharding)
            for row in range(count)
        ]
        # By default, each matrix has a condition, and what it needs to know in it.
        options = {"exact_norm": True} if name == "clip_by_spectral_norm" else {}
        method = trees.build(name, **options)
        state = jax.eval_shape(method.init, tree)
        program = jax.jit(method.update).lower(tree, state, tree).compile().as_text()
        return len(re.findall(r" all-reduce(?:-start)?\(", program))

    assert all_reduces(6) == all_reduces(12)
