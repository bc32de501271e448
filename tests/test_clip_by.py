"""`clip_by`, for people who build a rule of their own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax


def test_a_method_in_one_line_from_the_parts_of_optax() -> None:
    rule = optax.chain(optax.ema(0.5, debias=False), optax.scale(1.5))
    clip = clipax.clip_by(clipax.global_norm, rule)
    state = clip.init(jnp.zeros(2))
    average = 0.0
    for step, size in enumerate([1.0, 1.0, 8.0, 1.0, np.nan, 1.0, np.inf, 1.0]):
        with jax.numpy_dtype_promotion("standard"):
            clipped, state = jax.jit(clip.update)(jnp.array([0.6, 0.8]) * size, state)
        if np.isfinite(size):
            average = 0.5 * average + 0.5 * size
            np.testing.assert_allclose(state.max_norm, 1.5 * average, rtol=1e-5)
            norm = float(clipax.global_norm(clipped))
            np.testing.assert_allclose(
                norm, min(size, 1.5 * average), rtol=1e-5, err_msg=str(step)
            )
        else:
            assert bool(jnp.isnan(clipped).all())
            np.testing.assert_allclose(state.max_norm, 1.5 * average, rtol=1e-5)


def test_a_norm_and_a_coefficient_of_ones_own() -> None:
    def largest_row(updates: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.abs(leaf).sum(axis=-1, keepdims=True), updates)

    clip = clipax.clip_by(largest_row, 2.0, lambda norm, bound: bound / (bound + norm))
    updates = {"w": jnp.array([[1.0, 1.0], [0.0, 6.0]])}
    clipped, state = clip.update(updates, clip.init(updates))
    trees.assert_close(clipped, {"w": np.array([[0.5, 0.5], [0.0, 1.5]], np.float32)})
    trees.assert_close(state.coefficient, {"w": np.array([[0.5], [0.25]], np.float32)})


def test_the_state_says_what_happened() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    clip = clipax.clip_by_global_norm(1.0)
    _, state = clip.update(updates, clip.init(updates))
    assert isinstance(state, clipax.states.ClipState)
    assert (float(state.norm), float(state.max_norm)) == (5, 1)
    np.testing.assert_allclose(state.coefficient, 0.2)
    for name in ("norm", "max_norm", "coefficient"):
        assert optax.tree.get((state, optax.EmptyState()), name) is getattr(state, name)


def test_a_known_norm_is_taken_and_not_measured() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    clip = clipax.clip_by_global_norm(1.0)
    clipped, state = clip.update(updates, clip.init(updates), norm=10.0)
    trees.assert_close(clipped, {"w": np.array([0.3, 0.4], np.float32)})
    assert float(state.norm) == 10
    program = jax.make_jaxpr(clip.update)(updates, clip.init(updates), norm=jnp.float32(10))
    assert "reduce_sum" not in str(program)
    assert "reduce_sum" in str(jax.make_jaxpr(clip.update)(updates, clip.init(updates)))


def test_a_known_norm_is_for_global_norms_alone() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    both = optax.chain(clipax.clip_by_global_norm(1.0), clipax.clip_by_leaf_norm(1.0))
    _, (of_tree, of_leaf) = both.update(updates, both.init(updates), norm=10.0)
    assert float(of_tree.norm) == 10
    np.testing.assert_allclose(of_leaf.norm["w"], 0.5, rtol=1e-6)


def test_known_norms_of_leaves_are_taken_by_path() -> None:
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    for clip in (clipax.clip_by_leaf_norm(1.0), clipax.adagc()):
        _, state = clip.update(updates, clip.init(updates), norm={"w": 10.0, "b": 0.5})
        trees.assert_close(state.norm, {"w": 10.0, "b": 0.5})


def test_a_known_norm_needs_no_state() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    of_tree, of_leaf = clipax.clip_by_global_norm(1.0), clipax.clip_by_leaf_norm(1.0)
    assert float(of_tree.update(updates, None, norm=10.0)[1].norm) == 10
    np.testing.assert_allclose(of_leaf.update(updates, None, norm=10.0)[1].norm["w"], 5.0)
    assert float(of_leaf.update(updates, None, norm={"w": 10.0})[1].norm["w"]) == 10


def test_any_norm_can_have_any_history() -> None:
    updates = [{"w": jnp.array([3.0, size]), "b": jnp.array([size])} for size in (4.0, 5.0, 90.0)]
    rules = (
        (clipax.autoclip, clipax.thresholds.window_quantile),
        (clipax.clip_by_quantile, clipax.thresholds.quantile_tracker),
        (clipax.clip_by_mean_std, clipax.thresholds.mean_and_deviation),
        (functools.partial(clipax.zclip, max_norm=None), clipax.thresholds.z_score),
    )
    for method, threshold in rules:
        for norm in (clipax.global_norm, clipax.leaf_norm, clipax.norms.block_rms):
            one, other = method(norm=norm), clipax.clip_by(norm, threshold())
            one_state, other_state = one.init(updates[0]), other.init(updates[0])
            for each in updates:
                got, one_state = one.update(each, one_state)
                wanted, other_state = other.update(each, other_state)
                trees.assert_bitwise((got, one_state), (wanted, other_state))


def test_a_known_norm_of_the_wrong_structure_is_named() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    clip = clipax.clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match="norm"):
        clip.update(updates, clip.init(updates), norm={"w": 1.0})
    with pytest.raises(ValueError, match="norm"):
        clip.update(updates, clip.init(updates), norm=jnp.ones(2))


def test_a_frozen_leaf_keeps_the_structure_of_the_state() -> None:
    params = {"w": jnp.ones(2), "frozen": jnp.ones(3)}
    updates = {"w": jnp.array([3.0, 4.0]), "frozen": None}
    for name in sorted(trees.public_factories()):
        method = trees.build(name)
        state = method.init(params)
        clipped, new_state = method.update(updates, state, params)
        assert clipped["frozen"] is None
        trees.assert_same_type(new_state, state)


def test_updates_that_init_did_not_see_are_named() -> None:
    clip = clipax.clip_by_leaf_norm(1.0)
    with pytest.raises(
        ValueError, match="updates since `init` must have the structure that `init` saw"
    ):
        clip.update({"v": jnp.ones(2)}, clip.init({"w": jnp.ones(2)}))


def test_parameters_of_another_structure_hurt_only_those_who_need_them() -> None:
    updates, params = {"w": jnp.array([3.0, 4.0])}, [jnp.ones(2)]
    clip = clipax.clip_by_global_norm(1.0)
    clip.update(updates, clip.init(updates), params)
    relative = clipax.adaptive_grad_clip(0.1)
    with pytest.raises(ValueError, match="params with the structure of the updates"):
        relative.update(updates, relative.init(updates), params)


def test_a_schedule_counts_the_steps() -> None:
    clip = clipax.clip_by_global_norm(lambda count: 10 - 5 * count)
    updates, bounds = {"w": jnp.array([30.0, 40.0])}, []
    state = clip.init(updates)
    for _ in range(4):
        clipped, state = jax.jit(clip.update)(updates, state)
        bounds.append(float(clipax.global_norm(clipped)))
    # The last is negative in the schedule: it does not turn the updates round.
    np.testing.assert_allclose(bounds, [10, 5, 0, 0], rtol=1e-6)


def test_differentiable_in_the_bound() -> None:
    def clipped_norm(max_norm: Any) -> Any:
        clip = clipax.clip_by_global_norm(max_norm)
        updates = jnp.array([3.0, 4.0])
        return clipax.global_norm(clip.update(updates, clip.init(updates))[0])

    np.testing.assert_allclose(jax.grad(clipped_norm)(1.0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(clipped_norm)(10.0), 0.0)


def on_mesh(tree: Any, kind: AxisType, spec: PartitionSpec) -> Any:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    return jax.device_put(tree, NamedSharding(mesh, spec))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_histories_have_one_structure_however_norms_are_sharded(kind: AxisType) -> None:
    params = {"a": jnp.ones((8, 2)), "b": jnp.ones((8, 2)), "c": jnp.ones(3)}
    method = clipax.zclip(
        norm=functools.partial(clipax.leaf_norm, stack_axis={"a": 0, "b": 0, "c": None})
    )
    alone = method.init(params)
    spread = {
        "a": on_mesh(params["a"], kind, PartitionSpec("x")),
        "b": on_mesh(params["b"], kind, PartitionSpec()),
        "c": on_mesh(params["c"], kind, PartitionSpec()),
    }
    trees.assert_same_type(method.init(spread), alone)
    _, state = jax.jit(method.update)(spread, method.init(spread), spread)
    _, expected = method.update(params, alone, params)
    trees.assert_close(state, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rules_of_optax_start_on_a_mesh(kind: AxisType) -> None:
    params = on_mesh(jnp.arange(8.0), kind, PartitionSpec("x"))
    rule = optax.chain(optax.ema(0.9, debias=False), optax.scale(1.5))
    method = clipax.clip_by(clipax.global_norm, rule)
    clipped, state = jax.jit(method.update)(params, method.init(params))
    alone, expected = method.update(np.arange(8.0, dtype=np.float32), method.init(jnp.ones(8)))
    trees.assert_close((clipped, state), (alone, expected), rtol=1e-5)


def test_a_norm_of_ones_own_needs_no_axis_name() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec, updates = PartitionSpec("x"), jnp.arange(16.0)
    method = clipax.clip_by(jnp.abs, 4.0)
    mapped = jax.shard_map(
        lambda u, state: method.update(u, state)[0],
        mesh=mesh,
        in_specs=(spec, jax.tree.map(lambda _: spec, method.init(updates))),
        out_specs=spec,
    )
    np.testing.assert_array_equal(mapped(updates, method.init(updates)), np.minimum(updates, 4))
