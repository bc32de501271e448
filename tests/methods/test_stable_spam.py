"""Stable-SPAM's clip of entries and its norms, against NumPy and worked cases."""

import itertools
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


class Oracle:
    """The paper's formulas in float64, with sums and their bias corrections kept apart."""

    def __init__(self, bound: float, norm: float, square: float, eps: float, halves: str):
        self.decays, self.eps, self.halves = (bound, norm, square), eps, halves
        self.sums, self.count = [0.0, 0.0, 0.0], 0

    def corrected(self) -> list[float]:
        pairs = zip(self.sums, self.decays, strict=True)
        return [total / (1 - decay**self.count) for total, decay in pairs]

    def step(self, updates: np.ndarray, *, learns: bool) -> tuple[np.ndarray, float, float]:
        kept, count = list(self.sums), self.count
        bound_decay, norm_decay, square_decay = self.decays
        largest, updates = np.abs(updates).max(), updates.copy()
        if largest == 0:
            return updates, largest, self.corrected()[0] if self.count else 0.0
        self.count += 1
        self.sums[0] = bound_decay * self.sums[0] + (1 - bound_decay) * largest
        bound = self.corrected()[0]
        if "clip" in self.halves:
            spikes = np.abs(updates) > bound
            updates[spikes] = updates[spikes] / largest * bound
        norm = np.sqrt(np.sum(np.abs(updates) ** 2))
        self.sums[1] = norm_decay * self.sums[1] + (1 - norm_decay) * norm
        self.sums[2] = square_decay * self.sums[2] + (1 - square_decay) * norm**2
        _, mean, square = self.corrected()
        if "normalize" in self.halves:
            updates = updates / norm * mean / (np.sqrt(square) + self.eps)
        if not learns:
            self.sums, self.count = kept, count
        return updates, largest, bound


def long_run(seed: int) -> dict[str, np.ndarray]:
    """Besides the spikes and NaNs of all, a leaf that is zero while the other goes on."""
    sequence = sequences.long_run(seed)
    sequence["b"][20:35] = 0.0
    return {**sequence, "late": np.where(np.arange(400)[:, None] < 50, 0, 3 * sequence["w"])}


SETTINGS = [
    (0.999, 0.7, 0.9, 1e-8, "clip normalize"),
    (0.999, 0.7, 0.9, 1e-8, "clip"),
    (0.999, 0.7, 0.9, 1e-8, "normalize"),
    (0.9, 0.5, 0.99, 0.1, "clip normalize"),
    (0.5, 0.0, 0.25, 0, "clip normalize"),
]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1], [0]))
def test_equals_numpy_over_a_long_run(setting: Any, seed: int) -> None:
    *numbers, halves = setting
    sequence = long_run(seed)
    *decays, eps = numbers
    method = clipax.stable_spam(
        *decays, eps=eps, clip_entries="clip" in halves, normalize="normalize" in halves
    )
    got, states = sequences.scanned(method, sequence)
    oracles = {name: Oracle(*numbers, halves) for name in sequence}
    clipped_steps = 0
    for step in range(sequences.LONG_COUNT):
        learns = all(np.isfinite(leaf[step]).all() for leaf in sequence.values())
        for name, leaf in sequence.items():
            if not np.isfinite(leaf[step]).all():
                assert np.isnan(got[name][step]).any()
                continue
            wide = leaf[step].astype(np.float64)
            expected, largest, bound = oracles[name].step(wide, learns=learns)
            np.testing.assert_allclose(got[name][step], expected, rtol=1e-5)
            np.testing.assert_allclose(states.clip.norm[name][step], largest, rtol=1e-6)
            if "clip" in halves:
                np.testing.assert_allclose(states.clip.max_norm[name][step], bound, rtol=1e-5)
                factor = bound / largest if largest > bound else 1.0
                got_factor = states.clip.coefficient[name][step]
                np.testing.assert_allclose(got_factor, factor, rtol=1e-5)
                clipped_steps += factor < 0.9
            else:
                assert states.clip.max_norm[name][step] == math.inf
                assert states.clip.coefficient[name][step] == 1
    assert ("clip" in halves) == (50 < clipped_steps < 1000)


def test_worked_by_hand() -> None:
    method = clipax.stable_spam(0.5, normalize=False)
    state = method.init(jnp.zeros(3))
    # Averages of 1, of (1 + 2 * 10) / 3 and of (1 + 2 * 10 + 4 * 4) / 7.
    for updates, bound, expected in [
        ([1.0, 0.5, 0.0], 1.0, [1.0, 0.5, 0.0]),
        ([10.0, -7.1, 6.9], 7.0, [7.0, -4.97, 6.9]),
        ([4.0, -4.0, 0.1], 37 / 7, [4.0, -4.0, 0.1]),
    ]:
        clipped, state = method.update(jnp.array(updates), state)
        np.testing.assert_allclose(clipped, expected, rtol=1e-6)
        np.testing.assert_allclose(state.clip.max_norm, bound, rtol=1e-6)
    method = clipax.stable_spam(clip_entries=False, eps=0.0)
    state = method.init(jnp.zeros(2))
    # Norms 5 and 10: means (.21 * 5 + .3 * 10) / .51 over roots of (.09 * 25 + .1 * 100) / .19.
    for updates, length in [
        ([3.0, 4.0], 1.0),
        ([6.0, 8.0], (4.05 / 0.51) / math.sqrt(12.25 / 0.19)),
    ]:
        clipped, state = method.update(jnp.array(updates), state)
        np.testing.assert_allclose(clipped, np.array([0.6, 0.8]) * length, rtol=1e-6)


def test_the_norm_of_what_comes_out_is_about_one() -> None:
    def norms(sequence: np.ndarray) -> np.ndarray:
        clipped, _ = sequences.scanned(clipax.stable_spam(clip_entries=False), sequence)
        return sequences.p_norm(clipped).ravel()

    steady = norms(np.random.default_rng(0).normal(size=(200, 40)).astype(np.float32))
    assert (steady > 0.9).all()
    assert (steady < 1.1).all()
    risen = norms(np.repeat(np.float32([1, 1e4]), 20)[:, None])
    assert 1.2 < risen.max() < 1.41
    spiked = norms(np.float32([1] * 20 + [1e4] + [1] * 20)[:, None])
    assert (spiked[21:] < 1).all()
    assert spiked[30] < 0.1
    for leaf in sequences.spiky({"w": (5, 6), "phase": (3, 2)}).values():
        assert norms(leaf).max() < 1.41


def test_the_size_of_the_gradients_is_forgotten() -> None:
    sequence = sequences.long_run()
    one, _ = sequences.scanned(clipax.stable_spam(eps=0), sequence)
    same, _ = sequences.scanned(
        clipax.stable_spam(eps=0), {k: 64 * v for k, v in sequence.items()}
    )
    trees.assert_close(same, one, rtol=1e-5)


def test_steps_of_plain_descent_no_longer_shrink() -> None:
    """What makes it no clip: at the minimum of a parabola, the steps stay as long."""

    def descend(method: Any) -> float:
        def step(carry: Any, _: Any) -> Any:
            x, state = carry
            updates, state = method.update(2 * x, state)
            return (x - 0.1 * updates, state), x

        start = jnp.array([3.0, -2.0])
        _, path = jax.lax.scan(step, (start, method.init(start)), length=300)
        return float(jnp.linalg.norm(path[-50:], axis=1).max())

    assert descend(clipax.stable_spam(normalize=False)) < 1e-6
    assert descend(clipax.stable_spam()) > 0.02


def test_a_spike_is_really_clipped() -> None:
    """A rule that scales a copy of the entries would let it through."""
    ones = jnp.ones(4)
    method = clipax.stable_spam(normalize=False)
    state = method.init(ones)
    for _ in range(100):
        _, state = method.update(ones, state)
    clipped, state = method.update(ones.at[2].set(-1e4), state)
    bound = 1 + (1e4 - 1) * 0.001 / (1 - 0.999**101)
    np.testing.assert_allclose(state.clip.max_norm, bound, rtol=1e-5)
    np.testing.assert_allclose(clipped, [1, 1, -bound, 1], rtol=1e-5)


@pytest.mark.parametrize("reset", [50, 1000])
def test_resetting_the_moments_of_adam_does_not_lift_the_bound(reset: int) -> None:
    """Where both share a counter, a reset takes the bias correction of the bound with it."""
    optimizer = optax.chain(clipax.stable_spam(normalize=False), optax.adam(1e-3))
    ones = jnp.ones(4)

    def step(state: Any, _: Any) -> Any:
        return optimizer.update(ones, state)[1], None

    with jax.numpy_dtype_promotion("standard"):
        state, _ = jax.lax.scan(step, optimizer.init(ones), length=reset)
        state = (state[0], optimizer.init(ones)[1])
        spike = ones.at[0].set(20.0)
        _, (after, _) = optimizer.update(spike, state)
    assert after.clip.coefficient < 0.1

    total = 0.0
    for _ in range(reset):
        total = 0.999 * total + 0.001 * 1.0
    naive = (0.999 * total + 0.001 * 20.0) / (1 - 0.999**1)
    assert naive > 20.0


def test_a_leaf_that_was_zero_for_long_is_not_held_near_zero() -> None:
    method = clipax.stable_spam(normalize=False)
    zeros, updates = jnp.zeros(2), jnp.array([3.0, -4.0])

    def step(state: Any, _: Any) -> Any:
        return method.update(zeros, state)[1], None

    state, _ = jax.lax.scan(step, method.init(zeros), length=500)
    trees.assert_bitwise(method.update(updates, state)[0], updates)
    # The rule that learns from zeros clips the first gradient 400-fold.
    naive = 0.001 * 4.0 / (1 - 0.999**501)
    assert naive < 4 / 300


def test_a_constant_bound_stays_to_the_last_bit() -> None:
    updates = np.tile(np.float32([0.3, -0.1, 0.3]), (400, 1))
    clipped, states = sequences.scanned(clipax.stable_spam(normalize=False), updates)
    assert clipped.tobytes() == updates.tobytes()
    assert (states.clip.max_norm == np.float32(0.3)).all()


def test_the_bias_correction_keeps_its_digits() -> None:
    """In float32, `1 - 0.999**t` has lost four of its seven digits."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(size=20).astype(np.float32)
    _, states = sequences.scanned(clipax.stable_spam(), sizes[:, None])
    total, naive = 0.0, np.float32(0)
    errors = []
    for step, size in enumerate(sizes, 1):
        total = 0.999 * total + 0.001 * float(size)
        naive = np.float32(0.999) * naive + (np.float32(1) - np.float32(0.999)) * size
        exact = total / (1 - 0.999**step)
        np.testing.assert_allclose(states.clip.max_norm[step - 1], exact, rtol=1e-6)
        correction = np.float32(1) - np.float32(0.999) ** np.float32(step)
        errors.append(abs(float(naive / correction) / exact - 1))
    assert max(errors) > 3e-6


def test_decays_are_traced_under_inject_hyperparams() -> None:
    sequence = sequences.long_run()
    expected, _ = sequences.scanned(clipax.stable_spam(0.9, 0.5), sequence)
    with jax.numpy_dtype_promotion("standard"):
        injected = optax.inject_hyperparams(clipax.stable_spam)(0.9, 0.5)
        got, _ = sequences.scanned(injected, sequence)
    trees.assert_close(got, expected, rtol=1e-4)


# To the bit, bfloat16 agrees only where XLA optimizes, which it does in the slow group.
@pytest.mark.parametrize("dtype", trees.mostly_slow(["float16", "bfloat16"], ["float16"]))
def test_narrow_leaves_are_rounded_once(dtype: str) -> None:
    rows = sequences.long_run()["w"][50:80].astype(dtype)
    got, narrow = sequences.scanned(clipax.stable_spam(), rows)
    expected, wide = sequences.scanned(clipax.stable_spam(), rows.astype(np.float32))
    trees.assert_bitwise(got, jnp.asarray(expected, dtype))
    trees.assert_bitwise(narrow, wide)


def test_axis_name_gives_the_norms_of_whole_leaves() -> None:
    rows = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    method, whole = clipax.stable_spam(0.5, axis_name="shard"), clipax.stable_spam(0.5)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), method.init(rows[0]))
    state = whole.init(rows)
    mapped = jax.vmap(method.update, axis_name="shard")
    for updates in (rows, rows.at[1, 1].set(40.0), rows.at[0, 0].set(jnp.nan), rows):
        clipped, states = mapped(updates, states)
        expected, state = whole.update(updates, state)
        trees.assert_close(clipped, expected, rtol=1e-6)
        for one, other in itertools.zip_longest(jax.tree.leaves(states), jax.tree.leaves(state)):
            np.testing.assert_allclose(one[0], other, rtol=1e-6)
            np.testing.assert_array_equal(one[0], one[1])


# Every row of the table of edge cases.


@pytest.mark.parametrize("size", [1e-20, 0.3, 1e20])
def test_edge_the_first_step(size: float) -> None:
    updates = size * jnp.array([3.0, -4.0, 0.0])
    method = clipax.stable_spam(normalize=False)
    clipped, state = method.update(updates, method.init(updates))
    trees.assert_bitwise(clipped, updates)
    assert state.clip.coefficient == 1
    method = clipax.stable_spam(eps=1e-8)
    clipped, _ = method.update(updates, method.init(updates))
    length = 5 * size / (5 * size + 1e-8)
    np.testing.assert_allclose(clipped, length * np.array([0.6, -0.8, 0.0]), rtol=1e-6)


def test_edge_an_entry_just_above_the_bound_ends_below_one_just_under_it() -> None:
    """The rule is not monotone: each entry above is scaled by what the spike needs."""
    method = clipax.stable_spam(0.5, normalize=False)
    _, state = method.update(jnp.ones(3), method.init(jnp.ones(3)))
    clipped, state = method.update(jnp.array([10.0, 7.1, 6.9]), state)
    assert clipped[1] < clipped[2]
    np.testing.assert_allclose(clipped, [7.0, 4.97, 6.9], rtol=1e-6)
    # As a clip of each entry to the bound would not do.
    assert (np.diff(np.minimum([10.0, 7.1, 6.9], 7.0)) <= 0).all()


def test_edge_a_zero_leaf_stays_zero_and_teaches_nothing() -> None:
    method = clipax.stable_spam()
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    _, state = method.update(updates, method.init(updates))
    idle = {**updates, "b": jnp.zeros(1)}
    clipped, after = method.update(idle, state)
    trees.assert_bitwise(clipped["b"], jnp.zeros(1))
    # The next step of that leaf is what it would have been; the other leaf has gone on.
    later, _ = method.update({**updates, "b": jnp.array([7.0])}, after)
    sooner, _ = method.update({**updates, "b": jnp.array([7.0])}, state)
    trees.assert_bitwise(later["b"], sooner["b"])
    counts = [leaf for leaf in jax.tree.leaves(after) if leaf.dtype == jnp.int32]
    assert [count.tolist() for count in counts] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("size", [1e3, 3e6])
def test_after_a_spike_the_norms_follow_the_paper(size: float) -> None:
    norms = np.array([1.0] * 20 + [size] + [1.0] * 300)
    out, _ = sequences.run_norms(clipax.stable_spam(clip_entries=False), norms)
    oracle = Oracle(0.999, 0.7, 0.9, 1e-8, "normalize")
    expected = [oracle.step(np.array([norm]), learns=True)[0][0] for norm in norms]
    np.testing.assert_allclose(out, expected, rtol=1e-4)
    assert out[60] < 0.1


@pytest.mark.parametrize("size", [1e8, 1e20, 1e38])
def test_edge_after_a_spike_of_a_hundred_million_norms(size: float) -> None:
    norms = np.array([1.0] * 20 + [size] + [1.0] * 100)
    out, states = sequences.run_norms(clipax.stable_spam(clip_entries=False), norms)
    assert out[45] < 1e-3
    np.testing.assert_allclose(out[75:], 1.0, rtol=1e-5)
    (moments,) = states.moments
    assert moments.norm_count[-1] < 80


def test_edge_zero_in_every_step_so_far() -> None:
    method = clipax.stable_spam()
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    state = method.init(updates)
    for _ in range(5):
        _, state = method.update(updates, state)
    clipped, _ = method.update({**updates, "b": jnp.array([0.3, 0.4])}, state)
    np.testing.assert_allclose(clipped["b"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_edge_norms_whose_squares_are_no_float32(size: float) -> None:
    rng = np.random.default_rng(0)
    sequence = (size * rng.lognormal(size=(50, 1)) * rng.normal(size=(50, 3))).astype(np.float32)
    got, _ = sequences.scanned(clipax.stable_spam(), sequence)
    oracle = Oracle(0.999, 0.7, 0.9, 1e-8, "clip normalize")
    expected = [oracle.step(row.astype(np.float64), learns=True)[0] for row in sequence]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    with np.errstate(over="ignore", under="ignore"):
        squares = np.square(np.linalg.norm(sequence.astype(np.float64), axis=1).astype(np.float32))
    assert np.isinf(squares).any() or (squares < np.finfo(np.float32).tiny).any()


def test_edge_finite_entries_whose_norm_overflows() -> None:
    method = clipax.stable_spam(clip_entries=False)
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(2)}
    _, state = method.update(updates, method.init(updates))
    clipped, after = method.update({**updates, "w": jnp.full(2, 3e38)}, state)
    assert np.isnan(clipped["w"]).all()
    assert np.isfinite(clipped["b"]).all()
    trees.assert_bitwise(after.moments, state.moments)


@pytest.mark.slow_but(9)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("halves", [(True, True), (True, False), (False, True)])
def test_edge_a_bad_entry_teaches_no_leaf(halves: Any, steps: int, value: float) -> None:
    clip_entries, normalize = halves
    method = clipax.stable_spam(clip_entries=clip_entries, normalize=normalize)
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0, 2.0])}
    state = method.init(updates)
    for _ in range(steps):
        _, state = method.update(updates, state)
    bad = {**updates, "w": updates["w"].at[0].set(value)}
    clipped, after = method.update(bad, state)
    assert np.isnan(clipped["w"]).all() or not normalize
    assert not np.isfinite(clipped["w"][0])
    assert np.isfinite(clipped["b"]).all()
    assert (clipped["b"] != 0).all()
    trees.assert_bitwise(after.clip.threshold, state.clip.threshold)
    trees.assert_bitwise(after.moments, state.moments)
    again, _ = method.update(updates, after)
    trees.assert_bitwise(again, method.update(updates, state)[0])


def test_edge_leaves_that_are_not_measured() -> None:
    method, params = clipax.stable_spam(), {"float0": jnp.arange(2)}
    clipped, state = sequences.beside_unmeasured(method, jnp.array([3.0, 4.0]), params)
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)
    assert jax.tree.leaves(state.clip.norm) == [4]


# Every bad argument.


@pytest.mark.parametrize("name", ["decay_bound", "decay_norm", "decay_square"])
@pytest.mark.parametrize("bad", [1, 1.0, -0.1, math.inf, *refusals.NO_NUMBERS])
def test_bad_decays_are_refused(name: str, bad: Any) -> None:
    with refusals.refused(f"{name} must be a number in [0, 1), got ", bad):
        clipax.stable_spam(**{name: bad})


@pytest.mark.parametrize("bad", [-1, -1e-9, *refusals.NO_NUMBERS])
def test_a_bad_eps_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^eps must be a number >= 0, got "):
        clipax.stable_spam(eps=bad)


@pytest.mark.parametrize("name", ["decay_bound", "decay_norm", "decay_square", "eps"])
def test_numbers_that_are_no_scalars_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be one number, got an array of shape"):
        clipax.stable_spam(**{name: jnp.full(2, 0.5)})


@pytest.mark.parametrize("name", ["clip_entries", "normalize"])
@pytest.mark.parametrize("bad", [0, 1.0, None, "yes"])
def test_bad_flags_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be True or False, got "):
        clipax.stable_spam(**{name: bad})
