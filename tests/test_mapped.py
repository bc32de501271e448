"""Which mapped axes a norm sums over: a test for each row of the table in `_core/_mapped.py`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax

SHARDED, REPLICATED = np.arange(64, dtype=np.float32).reshape(8, 8), np.full(3, 40, np.float32)


def mapped(
    function: Any,
    in_axes: Any = ("x", "y"),
    out_specs: PartitionSpec | None = None,
    **options: Any,
) -> Any:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    specs = {"sharded": PartitionSpec(*in_axes), "replicated": PartitionSpec()}
    program = jax.shard_map(
        function, mesh=mesh, in_specs=(specs,), out_specs=out_specs or PartitionSpec(), **options
    )
    return jax.jit(program)({"sharded": SHARDED, "replicated": REPLICATED})


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_replicated_leaves_count_once(ord: float) -> None:
    expected = p_norm(np.concatenate([SHARDED.ravel(), REPLICATED]), ord)
    np.testing.assert_allclose(mapped(lambda u: clipax.global_norm(u, ord)), expected, rtol=2e-6)
    leaves = mapped(lambda u: clipax.leaf_norm(u, ord))
    np.testing.assert_allclose(leaves["sharded"], p_norm(SHARDED, ord), rtol=2e-6)
    np.testing.assert_allclose(leaves["replicated"], p_norm(REPLICATED, ord), rtol=2e-6)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("ord", [0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_nan_on_one_of_many_devices_is_seen(kind: AxisType, ord: float) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    spec = PartitionSpec("d")
    values = jax.device_put(np.arange(64.0, dtype=np.float32), NamedSharding(mesh, spec))
    bad = jnp.where(values == 5, jnp.nan, values)
    for norm in (clipax.global_norm, clipax.leaf_norm):
        assert np.isnan(jax.jit(lambda x, norm=norm: norm(x, ord))(bad))
        mapped = jax.shard_map(
            lambda x, norm=norm: norm(x, ord), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
        )
        assert np.isnan(jax.jit(mapped)(bad))
        np.testing.assert_allclose(jax.jit(mapped)(values), p_norm(values, ord), rtol=1e-5)


def test_a_mean_is_over_the_whole_leaf() -> None:
    rms, average = mapped(clipax.norms.block_rms), mapped(clipax.norms.average_norm)
    np.testing.assert_allclose(rms["sharded"], np.sqrt((SHARDED**2).mean()), rtol=2e-6)
    np.testing.assert_allclose(average["sharded"], np.sqrt((SHARDED**2).sum()) / 64, rtol=2e-6)
    np.testing.assert_allclose(rms["replicated"], 40, rtol=2e-6)


def test_a_program_without_types_needs_names() -> None:
    names = {"sharded": ("x", "y"), "replicated": ()}
    norm = mapped(lambda u: clipax.global_norm(u, axis_name=names), check_vma=False)
    expected = p_norm(np.concatenate([SHARDED.ravel(), REPLICATED]), 2)
    np.testing.assert_allclose(norm, expected, rtol=2e-6)
    with pytest.raises(ValueError, match="Pass axis_name="):
        mapped(clipax.global_norm, check_vma=False)


def test_names_add_nothing_to_types() -> None:
    norm = mapped(lambda u: clipax.global_norm(u, axis_name=("x", "y")))
    expected = p_norm(np.concatenate([SHARDED.ravel(), REPLICATED]), 2)
    np.testing.assert_allclose(norm, expected, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", [clipax.clip_by_global_norm, clipax.clip_by_leaf_norm])
def test_no_names_sum_over_no_axis(method: Any) -> None:
    """As the gradients of examples, each of which is clipped by itself."""
    examples = jnp.asarray(SHARDED + 1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def clipped(examples: Any) -> Any:
        return jax.vmap(lambda each: clipax.clip_tree(each, method(1.0, axis_name=()))[0])(
            examples
        )

    spec = PartitionSpec("x")
    mapped = jax.shard_map(clipped, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(np.linalg.norm(mapped(examples), axis=1), np.ones(8), rtol=2e-6)


@pytest.mark.parametrize("in_axes", [("y", None), (None, "y")], ids=["summed", "units"])
def test_units_of_a_leaf_that_varies_need_names(in_axes: Any) -> None:
    def units(names: Any) -> Any:
        return lambda u: clipax.unit_norm(u, unit_axis=1, axis_name=names)["sharded"]

    with pytest.raises(ValueError, match=r"only some of its axes are summed\. Pass axis_name="):
        mapped(units(None), in_axes=in_axes)
    names, out_specs = ("y", None) if in_axes[0] else ((), PartitionSpec(*in_axes))
    norms = mapped(units(names), in_axes=in_axes, out_specs=out_specs)
    np.testing.assert_allclose(norms, np.linalg.norm(SHARDED, axis=0, keepdims=True), rtol=2e-6)


@pytest.mark.parametrize("options", [{}, {"check_vma": False}])
def test_a_shard_with_one_long_axis_may_be_part_of_a_matrix(options: Any) -> None:
    def units(u: Any) -> Any:
        names = ("x", "y") if options else None
        column = u["sharded"].reshape(1, -1)
        return clipax.unit_norm(column, unit_axis=clipax.units.nfnets, axis_name=names)

    with pytest.raises(ValueError, match=r"shape \(1, 8\) of a shard does not show .* unit_axis="):
        mapped(units, **options)


def test_names_are_of_the_axes_that_shard_the_sum() -> None:
    names = {"sharded": "x", "replicated": ()}
    norms = mapped(
        lambda u: clipax.unit_norm(u, axis_name=names)["sharded"],
        out_specs=PartitionSpec(None, "y"),
    )
    np.testing.assert_allclose(norms, np.linalg.norm(SHARDED, axis=0, keepdims=True), rtol=2e-6)


def test_a_dead_unit_on_one_device_leaves_no_device_waiting() -> None:
    """Its norm is out of range there alone; elsewhere nothing is to be measured again."""

    def norms(u: Any) -> Any:
        dead = jnp.where(jax.lax.axis_index("x") == 0, 0.0, u["sharded"])
        names = {"units": (), "summed": ("x", "y")}
        return clipax.unit_norm({"units": dead, "summed": u["sharded"]}, axis_name=names)

    columns = jax.jit(lambda: mapped(norms, out_specs=PartitionSpec(("x", "y"))))()
    assert np.count_nonzero(np.asarray(columns["units"]) == 0) == 2 * 4
    assert np.isfinite(columns["summed"]).all()


@pytest.mark.parametrize("chosen", [{"axes": 0}, {"stack_axis": 0}])
def test_slices_of_a_leaf_that_varies_need_names(chosen: Any) -> None:
    with pytest.raises(ValueError, match="only some of its axes are summed"):
        mapped(lambda u: clipax.leaf_norm(u["sharded"], **chosen))


@pytest.mark.parametrize("norm", [clipax.global_norm, clipax.leaf_norm, clipax.unit_norm])
def test_a_name_adds_nothing_where_types_say_that_a_leaf_is_whole(norm: Any) -> None:
    norms = mapped(lambda u: norm({"w": u["replicated"][:, None]}, axis_name=("x", "y")))
    np.testing.assert_allclose(jax.tree.leaves(norms)[0], p_norm(REPLICATED, 2), rtol=2e-6)


@pytest.mark.parametrize("mapping", [jax.vmap, jax.pmap])
def test_vmap_and_pmap_need_names(mapping: Any) -> None:
    shards = jnp.asarray(SHARDED)
    with pytest.raises(ValueError, match=r"mapped over \('v',\) .* Pass axis_name="):
        mapping(clipax.global_norm, axis_name="v")(shards)
    norm = functools.partial(clipax.global_norm, axis_name="v")
    np.testing.assert_allclose(mapping(norm, axis_name="v")(shards), [p_norm(SHARDED, 2)] * 8)
    alone = mapping(functools.partial(clipax.global_norm, axis_name=()), axis_name="v")(shards)
    np.testing.assert_allclose(alone, np.linalg.norm(SHARDED, axis=1), rtol=2e-6)


@pytest.mark.parametrize("axis_name", ["nowhere", ("nowhere",), {"w": "nowhere"}])
def test_a_name_that_is_not_bound_is_refused(axis_name: Any) -> None:
    with pytest.raises(ValueError, match="axis_name 'nowhere' is not bound"):
        clipax.global_norm({"w": jnp.ones(2)}, axis_name=axis_name)


@pytest.mark.parametrize("axis_name", [("v", "v"), {"w": ("v", "u", "v")}])
def test_a_name_that_occurs_twice_is_refused(axis_name: Any) -> None:
    for make in (clipax.clip_by_global_norm, clipax.clip_by_leaf_norm):
        with pytest.raises(ValueError, match="axis_name must name 'v' once"):
            make(1.0, axis_name=axis_name)
    with pytest.raises(ValueError, match="axis_name must name 'v' once"):
        clipax.global_norm({"w": jnp.ones(2)}, axis_name=axis_name)


def p_norm(values: np.ndarray, ord: float) -> np.ndarray:
    return np.linalg.norm(np.asarray(values, np.float64).ravel(), ord)


def test_the_norms_of_a_state_say_which_axes_divide_the_units() -> None:
    method = clipax.clip_by_unit_norm(1.0, unit_axis=1)
    params = {"sharded": jnp.asarray(SHARDED), "replicated": jnp.asarray(REPLICATED)}
    whole, _ = method.update(params, method.init(params))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    specs = {"sharded": PartitionSpec("x", "y"), "replicated": PartitionSpec()}

    def spec_of_norm(norm: Any) -> PartitionSpec:
        return PartitionSpec(None, "y") if jnp.ndim(norm) == 2 else PartitionSpec()

    state = method.init(params)
    step = jax.shard_map(
        lambda u, s: method.update(u, s)[0],
        mesh=mesh,
        in_specs=(specs, jax.tree.map(spec_of_norm, state)),
        out_specs=specs,
    )
    trees.assert_close(jax.jit(step)(params, state), whole, rtol=1e-6)


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="no unreduced arrays before jax 0.9")
def test_an_unreduced_leaf_is_added_up_before_it_is_measured() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec("x")))
        unreduced = jax.jit(
            lambda x: jnp.einsum("ij->j", x, out_sharding=PartitionSpec(None, unreduced={"x"}))
        )(x)
        assert float(jax.jit(clipax.global_norm)(unreduced)) == 16


def test_names_that_are_not_bound_are_left_out_where_a_state_is_made() -> None:
    method = clipax.clip_by_global_norm(1.0, axis_name="x")
    assert float(method.init({"w": jnp.ones(2)}).norm) == 0
