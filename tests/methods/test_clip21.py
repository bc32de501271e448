"""Clip21, against NumPy and worked cases."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refusals
import sequences
import trees

import clipax

BY_NORM = clipax.clip_by_global_norm(1.0)


def by_norm(flat: np.ndarray) -> np.ndarray:
    return flat * min(1.0, 1.0 / max(np.sqrt(np.sum(flat**2)), 1e-300))


def by_value(flat: np.ndarray) -> np.ndarray:
    return np.clip(flat, -0.5, 0.5)


CLIPS = {
    "norm": (clipax.clip_by_global_norm(1.0), by_norm),
    "value": (clipax.clip_by_value(0.5), by_value),
}


def oracle(flat: np.ndarray, clip: Any) -> tuple[np.ndarray, np.ndarray]:
    """`v = v + clip(g - v)`; a step with a NaN is not learned from."""
    v, outputs, estimates = np.zeros(flat.shape[1]), [], []
    for row in flat.astype(np.float64):
        is_finite = np.isfinite(row).all()
        with np.errstate(invalid="ignore"):
            move = clip(row - v) if is_finite or clip is by_value else row * np.nan
        outputs.append(v + move)
        v = outputs[-1] if is_finite else v
        estimates.append(v)
    return np.array(outputs), np.array(estimates)


def flatten(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name]) for name in sorted(tree)], axis=1)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1, 2], [0]))
def test_equals_numpy_over_a_long_run(clip: str, seed: int) -> None:
    inner, formula = CLIPS[clip]
    sequence = sequences.long_run(seed)
    got, states = sequences.scanned(clipax.clip21(inner), sequence)
    outputs, estimates = oracle(flatten(sequence), formula)
    np.testing.assert_allclose(flatten(got), outputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flatten(states.estimate), estimates, rtol=1e-5, atol=1e-6)


def test_worked_by_hand() -> None:
    method = clipax.clip21(BY_NORM)
    state = method.init(jnp.zeros(2))
    expected = [
        # u, v
        ([3.0, 4.0], [0.6, 0.8]),
        ([3.0, 4.0], [1.2, 1.6]),
        ([0.0, 0.0], [0.6, 0.8]),
        ([0.5, 0.1], [0.5, 0.1]),
    ]
    for updates, estimate in expected:
        got, state = method.update(jnp.array(updates), state)
        trees.assert_close((got, state.estimate), (np.array(estimate),) * 2, 1e-6)


def test_two_nodes_at_which_clipped_descent_stalls() -> None:
    """Khirirat et al.: clipped gradients of several nodes leave a bias, Clip21 does not.

    The mean of x^2 / 2 and (x - 10)^2 / 2 is least at x = 5. At x = 2 both gradients are
    longer than the bound, and clipped they cancel.
    """
    targets = jnp.array([0.0, 10.0])

    def descend(method: Any) -> float:
        def step(carry: Any, _: Any) -> Any:
            x, states = carry
            clipped, states = jax.vmap(method.update)(x - targets, states)
            return (x - 0.1 * clipped.mean(0), states), None

        states = jax.vmap(method.init)(targets)
        (x, _), _ = jax.lax.scan(step, (jnp.array(2.0), states), length=300)
        return float(x)

    assert descend(BY_NORM) == 2.0
    np.testing.assert_allclose(descend(clipax.clip21(BY_NORM)), 5.0, rtol=1e-6)


def test_one_spike_moves_the_estimate_by_the_bound_alone() -> None:
    steady = np.tile(np.float32([2.0, 0.0]), (20, 1))
    spiked = steady.copy()
    spiked[10] = 1e6
    clipped, _ = sequences.scanned(clipax.clip21(BY_NORM), spiked)
    np.testing.assert_array_equal(clipped[5:10], steady[5:10])
    assert np.linalg.norm(clipped[10] - steady[10]) < 1 + 1e-6
    np.testing.assert_array_equal(clipped[11:], steady[11:])


def test_what_is_not_clipped_arrives_exactly() -> None:
    """`v + (u - v)` is not `u` in floating point."""
    rng = np.random.default_rng(0)
    sequence = rng.normal(size=(50, 8)).astype(np.float32) * np.float32(0.1)
    clipped, _ = sequences.scanned(clipax.clip21(BY_NORM), sequence)
    assert clipped.tobytes() == sequence.tobytes()
    v, naive = np.zeros(8, np.float32), []
    for row in sequence:
        v = v + (row - v)
        naive.append(v)
    assert (np.array(naive) != sequence).any()


def test_a_far_spike_does_not_swallow_the_estimate() -> None:
    """Taking the residual off, `u - (d - clip(d))`, would lose the estimate in the spike."""
    method = clipax.clip21(BY_NORM)
    _, state = method.update(jnp.array([0.75]), method.init(jnp.zeros(1)))
    clipped, _ = method.update(jnp.array([1e9]), state)
    trees.assert_bitwise(clipped, jnp.array([1.75]))
    spike, move = np.float32(1e9), np.float32(1e9) - np.float32(0.75)
    assert abs(spike - (move - np.float32(1)) - 1.75) > 1


def test_an_inner_clip_with_a_history_learns_from_the_differences() -> None:
    inner = clipax.clip_by(clipax.global_norm, optax.ema(0.5, debias=False))
    method = clipax.clip21(inner)
    state, alone, v = method.init(jnp.zeros(1)), inner.init(jnp.zeros(1)), jnp.zeros(1)
    for size in (1.0, 5.0, 0.5, 2.0, 9.0):
        clipped, state = method.update(jnp.array([size]), state)
        move, alone = inner.update(jnp.array([size]) - v, alone)
        v = v + move
        trees.assert_close(clipped, v)
        trees.assert_close(state.inner_state, alone)


def test_a_known_norm_of_the_updates_is_not_that_of_the_difference() -> None:
    method = clipax.clip21(BY_NORM)
    _, state = method.update(jnp.array([0.6, 0.0]), method.init(jnp.zeros(2)))
    updates = jnp.array([3.6, 4.0])
    got = method.update(updates, state, norm=jnp.array(0.5))
    trees.assert_bitwise(got, method.update(updates, state))
    np.testing.assert_allclose(got[1].inner_state.norm, 5.0, rtol=1e-6)


def test_metrics_read_the_inner_clip() -> None:
    method = clipax.clip21(BY_NORM)
    _, state = method.update(jnp.array([3.0, 4.0]), method.init(jnp.zeros(2)))
    metrics = clipax.metrics(state)
    np.testing.assert_allclose((metrics["norm"], metrics["coefficient"]), (5, 0.2), rtol=1e-6)


def test_complex_leaves_keep_their_phase() -> None:
    method = clipax.clip21(clipax.clip_by_value(2.5))
    state = method.init(jnp.zeros(1, "complex64"))
    for expected in (1.5 + 2j, 3 + 4j, 3 + 4j):
        clipped, state = method.update(jnp.array([3 + 4j]), state)
        trees.assert_close(clipped, np.array([expected]))


def test_axis_name_sees_a_bad_entry_of_another_shard() -> None:
    inner = clipax.clip_by_value(0.5, axis_name="shard")
    method = clipax.clip21(inner, axis_name="shard")
    updates = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), method.init(updates[0]))
    mapped = jax.vmap(method.update, axis_name="shard")
    _, states = mapped(updates, states)
    trees.assert_bitwise(states.estimate, jnp.array([[0.5, -0.5], [0.5, 0.5]]))
    clipped, after = mapped(updates.at[0, 0].set(jnp.nan), states)
    trees.assert_bitwise(clipped[1], jnp.array([1.0, 0.5]))
    trees.assert_bitwise(after, states)


# Every row of the table of edge cases.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_edge_a_difference_within_the_bound(dtype: str) -> None:
    method = clipax.clip21(clipax.clip_by_global_norm(1e30))
    rows = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    state = method.init(jnp.zeros(6, dtype))
    for row in rows:
        updates = jnp.asarray(row, dtype).at[0].set(-0.0).at[1].set(0.0)
        clipped, state = method.update(updates, state)
        trees.assert_bitwise(clipped, updates)


def test_edge_zero_updates_lead_the_estimate_back() -> None:
    method = clipax.clip21(BY_NORM)
    state = method.init(jnp.zeros(1))
    for _ in range(3):
        _, state = method.update(jnp.array([2.5]), state)
    back = []
    for _ in range(4):
        clipped, state = method.update(jnp.zeros(1), state)
        back.append(float(clipped[0]))
    assert back == [1.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["norm", "value", "schedule", "history"])
def test_edge_a_bad_entry_leaves_the_state(kind: str, value: float) -> None:
    inner = {
        "norm": BY_NORM,
        "value": clipax.clip_by_value(0.5),
        "schedule": clipax.clip_by_global_norm(lambda count: 1.0 + count.astype("float32")),
        "history": clipax.clip_by(clipax.leaf_norm, optax.ema(0.5, debias=False)),
    }[kind]
    method = clipax.clip21(inner)
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    _, state = method.update(updates, method.init(updates))
    bad = {**updates, "w": jnp.array([value, 4.0])}
    clipped, after = method.update(bad, state)
    trees.assert_bitwise(after, state)
    moves, _ = inner.update(jax.tree.map(jnp.subtract, bad, state.estimate), state.inner_state)
    trees.assert_close(clipped, jax.tree.map(jnp.add, state.estimate, moves), rtol=1e-6)
    assert not np.isfinite(clipped["w"][0]) or kind == "value"


def test_edge_a_difference_that_overflows() -> None:
    method = clipax.clip21(clipax.clip_by_value(1e38))
    state = method.init(jnp.zeros(1))
    for _ in range(3):
        _, state = method.update(jnp.array([3e38]), state)
    clipped, after = method.update(jnp.array([-3e38]), state)
    np.testing.assert_allclose(clipped, [2e38], rtol=1e-6)
    trees.assert_bitwise(after, state)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_edge_a_difference_that_overflows_is_no_nan_under_a_norm(dtype: str) -> None:
    method = clipax.clip21(clipax.clip_by_global_norm(1e38))
    state = method.init(jnp.zeros(1, dtype))
    for _ in range(3):
        _, state = method.update(jnp.array([3e38], dtype), state)
    clipped, after = method.update(jnp.array([-3e38], dtype), state)
    np.testing.assert_allclose(clipped, [2e38], rtol=1e-6)
    trees.assert_bitwise(after, state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_edge_the_estimate_of_narrow_updates_is_wide(dtype: str) -> None:
    """In bfloat16, steps of 0.1 from 100 would lead nowhere."""
    method = clipax.clip21(clipax.clip_by_value(0.1))
    state = method.init(jnp.zeros(1, dtype))._replace(estimate=jnp.array([100.0]))
    narrow = jnp.asarray([100.0], dtype)
    for _ in range(50):
        clipped, state = method.update(jnp.asarray([120.0], dtype), state)
        narrow = narrow + jnp.asarray([0.1], dtype)
    np.testing.assert_allclose(state.estimate, [105.0], rtol=1e-5)
    trees.assert_bitwise(clipped, jnp.asarray(state.estimate, dtype))
    assert abs(float(narrow[0]) - 105) > 0.5


def test_edge_leaves_that_are_not_measured() -> None:
    method, params = clipax.clip21(BY_NORM), {"float0": jnp.arange(2)}
    clipped, state = sequences.beside_unmeasured(method, jnp.array([3.0, 4.0]), params)
    trees.assert_close(clipped, np.array([0.6, 0.8]), rtol=1e-6)
    assert len(jax.tree.leaves(state.estimate)) == 1


# Every bad argument.


@pytest.mark.parametrize("bad", [None, 1.0, "clip", clipax.global_norm, (), jnp.ones(2)])
def test_an_inner_that_is_no_transformation_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^inner must be an optax.GradientTransformation, got "):
        clipax.clip21(bad)


@refusals.other_structures
def test_another_structure_than_at_init_is_refused(updates: Any) -> None:
    refusals.assert_structure_must_fit(clipax.clip21(BY_NORM), updates)
