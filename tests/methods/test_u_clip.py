"""U-Clip, against NumPy and worked cases."""

import math
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


def oracle(flat: np.ndarray, clip: Any, max_carry: float) -> tuple[np.ndarray, np.ndarray]:
    """`u = clip(g + carry)`, `carry = g + carry - u`; a step with a NaN is not carried."""
    carry, outputs, carries = np.zeros(flat.shape[1]), [], []
    for row in flat.astype(np.float64):
        total = row + carry
        with np.errstate(invalid="ignore"):
            clipped = clip(total) if clip is by_value or np.isfinite(row).all() else total * np.nan
        if np.isfinite(row).all():
            carry = total - clipped
            norm = np.sqrt(np.sum(carry**2))
            carry = carry * (max_carry / norm if norm > max_carry else 1.0)
        outputs.append(clipped)
        carries.append(carry)
    return np.array(outputs), np.array(carries)


def flatten(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name]) for name in sorted(tree)], axis=1)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("max_carry", [None, 3, 40.0])
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1], [0]))
def test_equals_numpy_over_a_long_run(clip: str, max_carry: float | None, seed: int) -> None:
    inner, formula = CLIPS[clip]
    sequence = sequences.long_run(seed)
    method = clipax.u_clip(inner, max_carry=max_carry)
    got, states = sequences.scanned(method, sequence)
    outputs, carries = oracle(flatten(sequence), formula, max_carry or math.inf)
    # The carry is a sum of all that came in: what it loses to rounding goes with its size.
    size = np.abs(carries).max()
    np.testing.assert_allclose(flatten(states.carry), carries, rtol=1e-5, atol=2e-6 * size)
    np.testing.assert_allclose(flatten(got), outputs, rtol=1e-5, atol=4e-6 * size)
    norms = np.sqrt(np.sum(carries**2, axis=1))
    np.testing.assert_allclose(states.carry_norm, norms, rtol=1e-5, atol=2e-6 * size)
    assert 0.3 < np.mean(norms > 0.1) < 1


def test_worked_by_hand() -> None:
    method = clipax.u_clip(BY_NORM)
    state = method.init(jnp.zeros(2))
    expected = [
        # u, clipped, carry
        ([3.0, 4.0], [0.6, 0.8], [2.4, 3.2]),
        ([0.0, 0.0], [0.6, 0.8], [1.8, 2.4]),
        ([-1.8, 0.1], [0.0, 1.0], [0.0, 1.5]),
        ([0.3, -1.1], [0.3, 0.4], [0.0, 0.0]),
    ]
    for updates, clipped, carry in expected:
        got, state = method.update(jnp.array(updates), state)
        trees.assert_close((got, state.carry), (np.array(clipped), np.array(carry)), 1e-6, 1e-6)
        np.testing.assert_allclose(state.carry_norm, np.hypot(*carry), atol=1e-6)


@pytest.mark.parametrize("clip", CLIPS)
def test_what_came_out_is_what_went_in_less_the_carry(clip: str) -> None:
    inner, _ = CLIPS[clip]
    flat = np.random.default_rng(0).standard_t(2, (400, 3)).astype(np.float32)
    got, states = sequences.scanned(clipax.u_clip(inner), flat)
    bias = np.cumsum(got.astype(np.float64) - flat.astype(np.float64), axis=0)
    np.testing.assert_allclose(bias, -states.carry, atol=1e-5 * np.abs(states.carry).max())
    plain, _ = sequences.scanned(inner, flat)
    lost = np.abs(np.sum(plain - flat, axis=0)).max()
    assert np.abs(bias[-1]).max() < 0.2 * lost


def test_descent_that_a_plain_clip_leaves_biased() -> None:
    """Elesedy and Hutter: with the carry, clipped steps are unbiased on average.

    The mean of (x - a)^2 / 2 over nine samples a = 0 and one a = 10 is least at x = 1; a
    clip at 1 balances 0.9 x against 0.1, at x = 1 / 9.
    """
    samples = jnp.tile(jnp.zeros(10).at[3].set(10.0), 1000)

    def descend(method: Any) -> float:
        def step(carry: Any, sample: Any) -> Any:
            x, state = carry
            updates, state = method.update(x - sample, state)
            return (x - 0.01 * updates, state), x

        start = jnp.zeros(())
        _, path = jax.lax.scan(step, (start, method.init(start)), samples)
        return float(path[-1000:].mean())

    assert abs(descend(BY_NORM) - 1 / 9) < 0.01
    assert abs(descend(clipax.u_clip(BY_NORM)) - 1) < 0.01


def test_the_carry_is_wide() -> None:
    """A carry in bfloat16 would lose what a large one is joined by."""
    method = clipax.u_clip(BY_NORM)
    state = method.init(jnp.zeros(1, jnp.bfloat16))
    narrow = jnp.zeros(1, jnp.bfloat16)
    for size in [1000.0] + [1.5] * 20:
        updates = jnp.asarray([size], jnp.bfloat16)
        total = narrow + updates
        narrow = total - jnp.ones(1, jnp.bfloat16)
        clipped, state = method.update(updates, state)
        assert clipped.dtype == jnp.bfloat16
    assert state.carry.dtype == jnp.float32
    assert float(state.carry[0]) == 1000 + 30 - 21
    assert float(narrow[0]) == 1000


def test_an_inner_clip_with_a_history_learns_from_the_updates_with_the_carry() -> None:
    inner = clipax.clip_by(clipax.global_norm, optax.ema(0.5, debias=False))
    method = clipax.u_clip(inner)
    state, alone, carry = method.init(jnp.zeros(1)), inner.init(jnp.zeros(1)), jnp.zeros(1)
    for size in (1.0, 5.0, 0.5, 2.0, 9.0):
        updates = jnp.array([size])
        clipped, state = method.update(updates, state)
        expected, alone = inner.update(updates + carry, alone)
        carry = updates + carry - expected
        trees.assert_bitwise(clipped, expected)
        trees.assert_bitwise(state.carry, carry)
        trees.assert_bitwise(state.inner_state, alone)


def test_a_known_norm_of_the_updates_is_not_that_of_the_sum() -> None:
    method = clipax.u_clip(BY_NORM)
    state = method.init(jnp.zeros(2))
    _, state = method.update(jnp.array([9.0, 12.0]), state)
    updates = jnp.array([0.3, 0.4])
    clipped, after = method.update(updates, state, norm=jnp.array(0.5))
    trees.assert_bitwise((clipped, after), method.update(updates, state))
    np.testing.assert_allclose(after.inner_state.norm, 14.5, rtol=1e-6)
    # With that norm, the clip would let the whole carry through.
    naive, _ = BY_NORM.update(updates + state.carry, state.inner_state, norm=jnp.array(0.5))
    assert np.linalg.norm(naive) > 14


def test_other_extra_arguments_reach_the_inner_clip() -> None:
    def update_fn(
        updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any
    ) -> Any:
        return jax.tree.map(lambda leaf: leaf * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    method = clipax.u_clip(inner)
    clipped, state = method.update(jnp.ones(2), method.init(jnp.ones(2)), value=jnp.array(0.25))
    trees.assert_bitwise((clipped, state.carry), (jnp.full(2, 0.25), jnp.full(2, 0.75)))


def test_metrics_read_the_inner_clip() -> None:
    method = clipax.u_clip(BY_NORM)
    _, state = method.update(jnp.array([3.0, 4.0]), method.init(jnp.zeros(2)))
    metrics = clipax.metrics(state)
    np.testing.assert_allclose((metrics["norm"], metrics["coefficient"]), (5, 0.2), rtol=1e-6)


def test_complex_leaves_are_carried_with_their_phase() -> None:
    method = clipax.u_clip(clipax.clip_by_value(2.5))
    clipped, state = method.update(jnp.array([3 + 4j]), method.init(jnp.zeros(1, "complex64")))
    trees.assert_close((clipped, state.carry), (np.array([1.5 + 2j]), np.array([1.5 + 2j])))
    clipped, state = method.update(jnp.zeros(1, "complex64"), state)
    trees.assert_close((clipped, state.carry), (np.array([1.5 + 2j]), np.array([0j])), atol=1e-6)


def test_axis_name_gives_the_norm_of_the_whole_carry() -> None:
    inner = clipax.clip_by_global_norm(1.0, axis_name="shard")
    method = clipax.u_clip(inner, max_carry=2.0, axis_name="shard")
    whole = clipax.u_clip(BY_NORM, max_carry=2.0)
    updates = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), method.init(updates[0]))
    state = whole.init(updates)
    for size in (1.0, np.nan, 0.25):
        mapped = jax.vmap(method.update, axis_name="shard")
        clipped, states = mapped(size * updates, states)
        expected, state = whole.update(size * updates, state)
        trees.assert_close((clipped, states.carry), (expected, state.carry), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(states.carry_norm, [state.carry_norm] * 2, rtol=1e-6)


# Every row of the table of edge cases.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_edge_nothing_carried_and_nothing_clipped(dtype: str) -> None:
    method = clipax.u_clip(clipax.clip_by_global_norm(1e30))
    updates = jnp.asarray([0.0, -0.0, 1e-4, 6e4, -7.5], dtype)
    state = method.init(updates)
    for _ in range(3):
        clipped, state = method.update(updates, state)
        trees.assert_bitwise(clipped, updates)
        assert state.carry_norm == 0


def test_edge_zero_updates_pay_out_the_carry() -> None:
    method = clipax.u_clip(BY_NORM)
    _, state = method.update(jnp.array([-2.5]), method.init(jnp.zeros(1)))
    paid = []
    for _ in range(4):
        clipped, state = method.update(jnp.zeros(1), state)
        paid.append(float(clipped[0]))
    assert paid == [-1.0, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("max_carry", [None, 5.0, jnp.array(5.0), math.inf])
def test_edge_longer_than_the_bound_in_every_step(max_carry: Any) -> None:
    method = clipax.u_clip(BY_NORM, max_carry=max_carry)
    sequence = np.tile(np.float32([3.0]), (10, 1))
    clipped, states = sequences.scanned(method, sequence)
    growing = 2.0 * np.arange(1, 11)
    limit = math.inf if max_carry is None else float(max_carry)
    assert (clipped == 1).all()
    np.testing.assert_allclose(states.carry_norm, np.minimum(growing, limit), rtol=1e-6)
    np.testing.assert_allclose(states.carry[:, 0], np.minimum(growing, limit), rtol=1e-6)


@pytest.mark.parametrize("size", [1e5, -1e19, 1e37])
@pytest.mark.parametrize("clip", CLIPS)
def test_edge_no_carry_lasts_longer_than_ten_thousand_steps(clip: str, size: float) -> None:
    inner, _ = CLIPS[clip]
    method = clipax.u_clip(inner)
    for updates in (jnp.array([size, 0.0]), jnp.array([1j * size, size / 3 + 1j * size])):
        state = method.init(updates)
        for _ in range(3):
            clipped, state = method.update(updates, state)
        trees.assert_close(state.carry, 10_000 * clipped, rtol=1e-6)
        np.testing.assert_allclose(state.carry_norm, np.linalg.norm(state.carry), rtol=1e-6)


def test_edge_under_an_infinite_bound_the_whole_carry_stays() -> None:
    method = clipax.u_clip(clipax.clip_by_value(1.0), max_carry=math.inf)
    _, state = method.update(jnp.array([2.0**40]), method.init(jnp.zeros(1)))
    trees.assert_bitwise(state.carry, jnp.array([2.0**40]))


def test_edge_what_is_clipped_to_zero_is_carried_whole() -> None:
    method = clipax.u_clip(clipax.clip_by_value(lambda count: jnp.where(count < 2, 0.0, 4.0)))
    state = method.init(jnp.zeros(1))
    for updates, clipped, carry in ((3e9, 0, 3e9), (3e9, 0, 6e9), (1.0, 4, 4e4)):
        got, state = method.update(jnp.array([updates]), state)
        np.testing.assert_allclose((got[0], state.carry[0]), (clipped, carry), rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_edge_a_sum_that_overflows_is_the_largest_float(dtype: str, sign: float) -> None:
    method = clipax.u_clip(clipax.clip_by_global_norm(1e38), max_carry=math.inf)
    state = method.init(jnp.zeros(1, dtype))
    for _ in range(4):
        clipped, state = method.update(jnp.array([sign * 3e38], dtype), state)
        np.testing.assert_allclose(clipped, [sign * 1e38], rtol=1e-6)
        assert np.isfinite(state.carry).all()
        assert np.isfinite(state.carry_norm)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_carry", [None, 1.0])
@pytest.mark.parametrize("kind", ["norm", "value", "schedule", "history"])
def test_edge_a_bad_entry_leaves_the_state(kind: str, max_carry: Any, value: float) -> None:
    inner = {
        "norm": BY_NORM,
        "value": clipax.clip_by_value(0.5),
        "schedule": clipax.clip_by_global_norm(lambda count: 1.0 + count.astype("float32")),
        "history": clipax.clip_by(clipax.leaf_norm, optax.ema(0.5, debias=False)),
    }[kind]
    method = clipax.u_clip(inner, max_carry=max_carry)
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    _, state = method.update(updates, method.init(updates))
    _, state = method.update(jax.tree.map(lambda leaf: 3 * leaf, updates), state)
    bad = {**updates, "w": jnp.array([value, 4.0])}
    clipped, after = method.update(bad, state)
    trees.assert_bitwise(after, state)
    totals = jax.tree.map(jnp.add, bad, state.carry)
    expected, _ = inner.update(totals, state.inner_state)
    trees.assert_close(clipped, expected)
    assert not np.isfinite(clipped["w"][0]) or kind == "value"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_edge_the_rounding_to_a_narrow_dtype_is_not_carried(dtype: str) -> None:
    method = clipax.u_clip(clipax.clip_by_value(0.1))
    updates = jnp.asarray([1.0], dtype)
    clipped, state = method.update(updates, method.init(updates))
    trees.assert_bitwise(clipped, jnp.asarray([0.1], dtype))
    trees.assert_bitwise(state.carry, jnp.float32([1.0]) - jnp.float32([0.1]))


def test_edge_leaves_that_are_not_measured() -> None:
    method, params = clipax.u_clip(BY_NORM), {"float0": jnp.arange(2)}
    clipped, state = sequences.beside_unmeasured(method, jnp.array([3.0, 4.0]), params)
    trees.assert_close(clipped, np.array([0.6, 0.8]), rtol=1e-6)
    assert len(jax.tree.leaves(state.carry)) == 1


# Every bad argument.


@pytest.mark.parametrize("bad", [None, 1.0, "clip", clipax.global_norm, (), jnp.ones(2)])
def test_an_inner_that_is_no_transformation_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^inner must be an optax.GradientTransformation, got "):
        clipax.u_clip(bad)


@pytest.mark.parametrize("bad", [0, -1.0, *(x for x in refusals.NO_NUMBERS if x is not None)])
def test_bad_bounds_on_the_carry_are_refused(bad: Any) -> None:
    with refusals.refused("max_carry must be a number > 0, got ", bad):
        clipax.u_clip(BY_NORM, max_carry=bad)


def test_a_bound_on_the_carry_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_carry must be one number, got an array of shape"):
        clipax.u_clip(BY_NORM, max_carry=jnp.ones(2))


@refusals.other_structures
def test_another_structure_than_at_init_is_refused(updates: Any) -> None:
    refusals.assert_structure_must_fit(clipax.u_clip(BY_NORM), updates)
