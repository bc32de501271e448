"""`skip_step`: what other implementations get wrong, and inside and round other things."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, PartitionSpec
from skipping import GRADS, assert_bitwise, naive_rule, once, promotes, run_losses, skipped_at

import clipax

# What other implementations get wrong; each naive rule is shown to fail.


def usual_norms(count: int = 300) -> np.ndarray:
    return np.random.default_rng(2).lognormal(sigma=0.2, size=count).astype(np.float32)


def test_one_nan_does_not_stop_the_training_for_a_window() -> None:
    norms = usual_norms()
    norms[100] = np.nan
    assert naive_rule(norms) == list(range(100, 229))
    assert skipped_at(norms, z_max=6.0) == [100]
    assert skipped_at(usual_norms(), norms, loss_z_max=6.0) == [100]
    # And the windows are those of a run without it.
    with_it, without = (
        run_losses(clipax.skip_step(optax.sgd(1.0), z_max=6.0), series[:, None])[1].norm_window
        for series in (norms, np.delete(norms, 100))
    )
    last_of_each = (jax.tree.map(lambda leaf: leaf[-1], window) for window in (with_it, without))
    trees.assert_bitwise(*last_of_each)


def test_a_step_that_is_not_finite_enters_no_window_at_all() -> None:
    method = clipax.skip_step(optax.sgd(1.0), lambda count: 10.0, z_max=6.0, loss_z_max=6.0)
    _, state = once(method, jnp.ones(2), loss=1.0)
    for updates, loss in ((jnp.ones(2), np.nan), (jnp.array([1.0, np.inf]), 1.0)):
        _, after = method.update(updates, state, loss=loss)
        trees.assert_bitwise(after[4:], state[4:])
        assert bool(after.is_skipped)


def test_a_product_with_zero_does_not_freeze() -> None:
    grad, moment, factor = np.float32(np.nan), np.float32(1.0), np.float32(0.0)
    assert np.isnan(moment + factor * (grad - moment))
    guarded = clipax.skip_step(optax.trace(0.9))
    out, state = once(guarded, jnp.array([np.nan, 1.0]))
    leaves = jax.tree.leaves((out, state.inner_state))
    assert not any(bool(jnp.isnan(leaf).any()) for leaf in leaves)


def test_spikes_are_seen_before_the_clip() -> None:
    norms = usual_norms()
    norms[[150, 200]] *= 1e3
    assert naive_rule(np.minimum(norms, 0.5)) == []
    column, clip = norms[:, None], clipax.clip_by_global_norm(0.5)
    inside = clipax.skip_step(optax.chain(clip, optax.sgd(1.0)), z_max=6.0)
    behind = optax.chain(clip, clipax.skip_step(optax.sgd(1.0), z_max=6.0))
    assert np.flatnonzero(run_losses(inside, column)[1].is_skipped).tolist() == [150, 200]
    assert not run_losses(behind, column)[1][1].is_skipped.any()


def test_a_loss_that_is_missing_is_no_silent_fallback() -> None:
    method = clipax.skip_step(optax.sgd(1.0), loss_z_max=6.0)
    for extra in ({}, {"loss": None}, {"value": 1.0}):
        with pytest.raises(ValueError, match=r"^loss_z_max needs the loss .*loss=loss\)\.$"):
            once(method, GRADS, **extra)


def test_large_first_norms_do_not_stop_the_training_for_ever() -> None:
    """AXLearn's mean starts at one and learns from steps alone that were taken."""
    norms = 25.0 * usual_norms()
    mean, naive = 1.0, []
    for step, norm in enumerate(norms):
        if norm >= 20 * mean:
            naive.append(step)
            continue
        decay = 0.99 * (1 - 0.99**step) / (1 - 0.99 ** (step + 1))
        mean = decay * mean + (1 - decay) * norm
    assert norms[0] > 20
    assert naive[0] == 0
    stuck = [1000.0] * 300
    assert all(norm >= 20 * 1.0 for norm in stuck)
    for series in (norms, stuck, [1e6, *usual_norms()]):
        for rules in ({"z_max": 6.0}, {"z_max": 6.0, "warmup_steps": 1}):
            assert skipped_at(series, **rules) == []


@pytest.mark.slow
@pytest.mark.parametrize("z_max", [0.5, 3.0, 6.0, 10.0])
@pytest.mark.parametrize("window_size", [4, 16, 128])
@pytest.mark.parametrize("level", [1.01, 2.0, 1e6])
def test_a_new_level_becomes_the_usual_one(z_max: float, window_size: int, level: float) -> None:
    """Nothing is skipped for ever, from a history without any spread."""
    norms = [1.0] * (2 * window_size) + [level] * (3 * window_size)
    skipped = skipped_at(norms, z_max=z_max, window_size=window_size)
    assert skipped[0] == 2 * window_size
    # A share `p` of the window at the new level lies `sqrt((1 - p) / p)` deviations below it.
    assert len(skipped) <= math.ceil(window_size / (1 + z_max**2)) + 2
    assert skipped_at(np.ones(len(norms)), norms, loss_z_max=z_max, window_size=window_size)


def test_it_does_not_give_up_as_apply_if_finite_does() -> None:
    bad = np.full((6, 2), np.nan, np.float32)
    given_up = optax.apply_if_finite(optax.sgd(1.0), 3)
    assert np.isnan(run_losses(given_up, bad)[0]).any()
    for guarded in (optax.sgd(1.0), optax.apply_if_finite(optax.sgd(1.0), 3)):
        out, states = run_losses(clipax.skip_step(guarded), bad)
        assert not np.isnan(out).any()
        assert states.consecutive_count.tolist() == [1, 2, 3, 4, 5, 6]


def test_one_past_value_judges_nothing() -> None:
    """A window under six would begin at the second step, whose past has no deviation."""
    rising = [1.0, 1.1, 1.2, 1.3, 1.4]
    assert naive_rule(rising, 6.0, 4)[0] == 1
    assert skipped_at(rising, z_max=6.0, window_size=4) == []
    assert skipped_at(rising, z_max=6.0, warmup_steps=1) == []


# Inside and round other things.


def test_schedules_count_every_step_with_a_finite_norm() -> None:
    """Skipped ones too: a bound that grows from zero must not stay there."""

    def growing(count: Any) -> Any:
        return 0.5 * jnp.asarray(count, jnp.float32)

    assert skipped_at([1.0, np.nan, 1.0, 1.0, 1.0, 2.2], skip_above=growing) == [0, 1, 2, 5]


def test_bounds_may_be_arrays() -> None:
    column = np.array([1.0, 2.0, 1.0, 4.0], np.float32)[:, None]
    for bound in (3.0, 3, jnp.array(3.0), np.array(3.0), lambda count: 3.0):
        _, states = run_losses(clipax.skip_step(optax.sgd(1.0), bound), column)
        assert states.is_skipped.tolist() == [False, False, False, True]
    for bound in (3.0, 3, jnp.array(3.0), np.array(3.0)):
        method = clipax.skip_step(optax.sgd(1.0), z_max=bound, warmup_steps=4)
        assert run_losses(method, column)[1].is_skipped.tolist() == [False, False, False, True]
    assert skipped_at([1.0, np.nan, 1e30], skip_above=math.inf) == [1]
    infinite = {"z_max": math.inf, "loss_z_max": math.inf, "window_size": 2}
    assert skipped_at([1.0, 1.0, 1.0, 9e9], [1.0, 1.0, 1.0, 9e9], **infinite) == []


@promotes
def test_hyperparameters_can_be_injected() -> None:
    static = ("window_size", "warmup_steps")
    make = optax.inject_hyperparams(clipax.skip_step, static_args=static)
    injected = make(
        optax.sgd(1.0), skip_above=lambda count: 2.5 + count, z_max=3.0, warmup_steps=4
    )
    norms = np.array([1.0, 2.0, 3.0, 5.1, 3.0, 9.0], np.float32)[:, None]
    _, states = run_losses(injected, norms)
    assert states.inner_state.is_skipped.tolist() == [False, False, False, True, False, True]


def test_extra_arguments_reach_the_inner_one() -> None:
    seen = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra, params=params)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    once(clipax.skip_step(inner, loss_z_max=6.0), GRADS, GRADS, loss=1.5, value=2.5)
    assert seen == {"loss": 1.5, "value": 2.5, "params": GRADS}


@promotes
def test_round_multi_steps_a_bad_gradient_is_left_out_of_the_sum() -> None:
    good = [jnp.array([1.0]), jnp.array([3.0]), jnp.array([5.0]), jnp.array([7.0])]
    sequence = [good[0], jnp.array([np.nan]), *good[1:]]

    def last_updates(method: Any, sequence: list[Any]) -> list[float]:
        return run_losses(method, np.stack(sequence))[0][:, 0].tolist()

    accumulated = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    assert last_updates(clipax.skip_step(accumulated), sequence) == [0, 0, -2, 0, -6]
    inside = optax.MultiSteps(clipax.skip_step(optax.sgd(1.0)), 2).gradient_transformation()
    assert last_updates(inside, good) == [0, -2, 0, -6]
    # Where the sum is bad, it is skipped as a whole, and optax carries the NaN on.
    assert last_updates(inside, sequence + good) == [0] * 9


@promotes
def test_a_large_sum_inside_multi_steps_is_skipped_once() -> None:
    method = optax.MultiSteps(clipax.skip_step(optax.sgd(1.0), 4.0), 2).gradient_transformation()
    sequence = np.array([1.0, 3.0, 5.0, 7.0, 1.0, 1.0], np.float32)[:, None]
    out, states = run_losses(method, sequence)
    np.testing.assert_array_equal(out[:, 0], [0, -2, 0, 0, 0, -1])
    assert states.inner_opt_state.skipped_count.tolist() == [0, 0, 0, 1, 1, 1]


class OddState(NamedTuple):
    """Leaves of every kind that a state may hold."""

    bool: Any
    float0: Any
    integer: Any
    key: Any
    none: Any
    scalar: Any


def test_a_state_with_leaves_of_every_kind_is_frozen() -> None:
    def init(params: Any) -> OddState:
        float0 = np.zeros((2,), jax.dtypes.float0)
        key, integer = jax.random.key(0), jnp.array([1, 2_000_000_001])
        return OddState(jnp.array(True), float0, integer, key, None, 3)

    def update(updates: Any, state: OddState, params: Any = None) -> Any:
        key = jax.random.split(state.key)[0]
        moved = ~state.bool, state.float0, state.integer + 1, key, None, state.scalar + 1
        return updates, OddState(*moved)

    guarded = clipax.skip_step(optax.GradientTransformation(init, update))
    start = guarded.init(GRADS)
    _, moved = guarded.update(GRADS, start)
    assert_bitwise(moved.inner_state, update(GRADS, init(GRADS))[1]._replace(scalar=jnp.array(4)))
    _, kept = guarded.update({"w": jnp.array([np.nan, 1.0])}, start)
    assert_bitwise(kept.inner_state, init(GRADS)._replace(scalar=jnp.array(3)))


def test_a_nan_in_one_shard_is_skipped_in_all() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    updates = {"sharded": jnp.ones(16).at[5].set(jnp.nan), "whole": jnp.ones(3)}
    specs = {"sharded": PartitionSpec("x"), "whole": PartitionSpec()}
    axes = {"sharded": "x", "whole": ()}
    for axis_name, options in ((None, {}), (axes, {"check_vma": False})):
        guarded = clipax.skip_step(optax.sgd(1.0), z_max=6.0, axis_name=axis_name)

        def step(updates: Any, guarded: Any = guarded) -> Any:
            out, state = guarded.update(updates, guarded.init(updates))
            return out, state.skipped_count

        out_specs = (specs, PartitionSpec())
        program = jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=out_specs, **options)
        )
        for finite in (False, True):
            given = jax.tree.map(jnp.nan_to_num, updates) if finite else updates
            out, skipped = program(given)
            assert int(skipped) == (not finite)
            expected = jax.tree.map(lambda leaf, c=-1.0 if finite else -0.0: c * leaf, given)
            trees.assert_close(out, jax.tree.map(jnp.nan_to_num, expected), rtol=0)


@promotes
def test_explicit_sharding_is_kept() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    method = clipax.skip_step(optax.sgd(1e-2, momentum=0.9), 1e3, z_max=6.0, loss_z_max=6.0)
    state, step = method.init(params), jax.jit(method.update)
    for bad in (1.0, np.nan):
        out, new_state = step(params * bad, state, params, loss=1.0)
        assert out.sharding.is_equivalent_to(sharding, 1)
        for one, other in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        state = new_state
    assert int(state.skipped_count) == 1


@pytest.mark.parametrize(("dtype", "size"), [("float16", 300.0), ("float32", 1e20)])
def test_a_norm_whose_squares_overflow_is_finite(dtype: str, size: float) -> None:
    updates = jnp.full((4,), size, dtype)
    out, state = once(clipax.skip_step(optax.identity()), updates)
    trees.assert_bitwise(out, updates)
    assert not bool(state.is_skipped)


def test_double_precision_is_kept() -> None:
    with trees.double_precision(True):
        updates = jnp.array([1.0, 2.0], jnp.float64)
        method = clipax.skip_step(optax.identity(), z_max=6.0, loss_z_max=6.0)
        out, state = once(method, updates, loss=jnp.array(1.0, jnp.float32))
        trees.assert_bitwise(out, updates)
        trees.assert_same_type(state, method.init(updates))
        assert state.norm_window.values.dtype == jnp.float64


def test_losses_may_be_of_any_real_kind() -> None:
    method = clipax.skip_step(optax.sgd(1.0), loss_z_max=6.0)
    for loss in (1, 1.0, np.float64(1.0), jnp.array(1.0, jnp.bfloat16), jnp.array(1)):
        _, state = once(method, GRADS, loss=loss)
        assert float(state.loss_window.values[0]) == 1
        trees.assert_same_type(state, method.init(GRADS))
