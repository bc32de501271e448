"""SPAM's clipping, against NumPy and worked cases."""

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

run, rows = sequences.stepped, sequences.vectors


# The rule in NumPy float64, with the mean of squares itself, and the steps of the paper's code:
# `t` counts from 1, and its reset comes before the clip of the same step.


class Reference:
    def __init__(self, ratio: Any, decay: float, warmup: int, reset: int | None = None):
        self.ratio, self.decay, self.warmup, self.reset = ratio, decay, warmup, reset
        self.v: dict[str, np.ndarray] = {}
        self.t = 0

    def step(self, updates: dict[str, np.ndarray]) -> Any:
        zeros = {name: np.zeros(leaf.shape) for name, leaf in updates.items()}
        v, t = self.v or zeros, self.t + 1
        since = t if self.reset is None else t % self.reset
        if since == 0:
            v = zeros
        is_on = t >= self.warmup and since >= self.warmup
        clipped, learned, norms, factors = {}, {}, {}, {}
        for name, leaf in updates.items():
            wide = leaf.astype(np.result_type(leaf.dtype, np.float64))
            ratio = self.ratio(name, self.t) if callable(self.ratio) else self.ratio
            squares = np.abs(wide) ** 2
            can = (v[name] > 0) & is_on
            with np.errstate(all="ignore"):
                bounded = wide / np.abs(wide) * np.sqrt(ratio * v[name])
                clipped[name] = np.where(can & (squares > ratio * v[name]), bounded, wide)
                learned[name] = (
                    self.decay * v[name] + (1 - self.decay) * np.abs(clipped[name]) ** 2
                )
                norms[name] = np.max(np.sqrt(np.where(can, squares / v[name], 0 * squares)))
                factors[name] = np.where(norms[name] ** 2 > ratio, np.sqrt(ratio) / norms[name], 1)
        if sequences.is_finite_step(updates):
            self.v, self.t = learned, t
        rms = {name: np.sqrt(x) for name, x in (self.v or zeros).items()}
        return clipped, rms, self.t if self.reset is None else self.t % self.reset, norms, factors


def assert_equals_numpy(method: Any, reference: Reference, seed: int = 0) -> None:
    sequence = sequences.long_entries(seed)
    clipped, states = sequences.scanned(method, sequence)
    expected, rms, count, norms, factors = sequences.followed(reference.step, sequence)
    np.testing.assert_array_equal(states.step_count, count)
    for name, leaf in sequence.items():
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-5)
        assert (clipped[name] == leaf)[expected[name] == leaf].all()
        np.testing.assert_allclose(states.rms[name], rms[name], rtol=1e-5)
        np.testing.assert_allclose(states.clip.norm[name], norms[name], rtol=1e-5)
        known = ~np.isnan(norms[name])
        got = states.clip.coefficient[name]
        np.testing.assert_allclose(got[known], factors[name][known], rtol=1e-5)
        assert np.isnan(got[~known]).all()
    shares = np.stack(jax.tree.leaves(factors)) < 1
    assert 0.005 < shares.mean() < 0.95, "the sequence tries only one side"


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(
    ("ratio", "decay", "warmup", "reset"),
    [
        (5000.0, 0.999, 20, None),
        (5000.0, 0.999, 20, 97),
        (40.0, 0.9, 1, None),
        (12.0, 0.95, 7, 50),
        (4.0, 0.0, 2, None),
    ],
)
def test_equals_numpy_over_a_long_run(
    ratio: float, decay: float, warmup: int, reset: int | None
) -> None:
    method = clipax.spam_clip(ratio, decay=decay, warmup_steps=warmup, reset_every=reset)
    for seed in (0, 1):
        assert_equals_numpy(method, Reference(ratio, decay, warmup, reset), seed)


def test_equals_numpy_with_a_ratio_for_each_leaf_and_a_schedule() -> None:
    ratio = {
        "grid": lambda count: 10.0 + 0.25 * jnp.asarray(count, jnp.float32),
        "phase": 30,
        "scale": math.inf,
    }

    def now(name: str, step: int) -> float:
        return 10.0 + 0.25 * step if name == "grid" else ratio[name]

    method = clipax.spam_clip(ratio, decay=0.9, warmup_steps=5)
    assert_equals_numpy(method, Reference(now, 0.9, 5))


def test_the_defaults_are_those_of_the_docstring() -> None:
    sequence = sequences.long_entries()
    explicit = clipax.spam_clip(5000.0, decay=0.999, warmup_steps=20, reset_every=None)
    trees.assert_bitwise(
        sequences.scanned(clipax.spam_clip(), sequence), sequences.scanned(explicit, sequence)
    )


# Worked by hand.


def test_worked_by_hand() -> None:
    """After three steps of 1, v = 1 - 0.9^3 = 0.271, and the bound is sqrt(100 * 0.271)."""
    method = clipax.spam_clip(100.0, decay=0.9, warmup_steps=3)
    steps = [jnp.array([1.0, -0.1])] * 3 + [jnp.array([100.0, -10.0])]
    outputs, state = run(method, steps)
    np.testing.assert_allclose(outputs[-1], [5.20576603, -0.52057660], rtol=1e-6)
    np.testing.assert_allclose(state.clip.norm, 100 / math.sqrt(0.271), rtol=1e-6)
    assert state.clip.max_norm == 10
    np.testing.assert_allclose(state.clip.coefficient, 0.0520576603, rtol=1e-6)
    # v = 0.9 * 0.271 + 0.1 * 27.1: the history learns what came out.
    np.testing.assert_allclose(state.rms[0], math.sqrt(2.9539), rtol=1e-6)


def test_a_complex_entry_is_clipped_by_its_modulus() -> None:
    method = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    outputs, state = run(method, [jnp.array([2.0j, 2.0]), jnp.array([3 + 4j, -1.5])])
    # The roots of the means are 1, and the bounds 2.
    np.testing.assert_allclose(outputs[-1], [1.2 + 1.6j, -1.5], rtol=1e-6)
    assert state.rms.dtype == np.float32


def test_the_reset_starts_again_and_clips_nothing_for_a_while() -> None:
    method = clipax.spam_clip(4.0, decay=0.5, warmup_steps=2, reset_every=4)
    outputs, state = run(method, rows(2, 2, 2, 90, 90, 90, 1e6, 90, 90, 90))
    bounded = [
        bool(clipped[0] < entry)
        for clipped, entry in zip(outputs, [2, 2, 2, 90, 90, 90, 1e6], strict=False)
    ]
    # Steps 2, 3, 6, 7 and 10 can be clipped: the history starts again at 4 and at 8.
    assert bounded == [False, False, False, False, False, False, True]
    assert [float(clipped[0]) for clipped in outputs[-3:]] == [90, 90, 90]
    assert state.step_count == 2
    np.testing.assert_allclose(state.rms, 90 * math.sqrt(0.875), rtol=1e-6)


@pytest.mark.parametrize(
    ("warmup_steps", "reset_every", "clipped_steps"),
    [
        (1, None, range(2, 61)),  # the first has no history
        (2, None, range(2, 61)),
        (20, None, range(20, 61)),
        (20, 25, [*range(20, 25), *range(45, 50)]),
        (1, 2, range(3, 61, 2)),
        (3, 4, range(3, 61, 4)),
        (5, 30, [*range(5, 30), *range(35, 60)]),
    ],
)
def test_it_starts_and_resets_at_the_steps_of_the_papers_code(
    warmup_steps: int, reset_every: int | None, clipped_steps: Any
) -> None:
    """Every step's entry is far above all before it, and is clipped where any would be."""
    method = clipax.spam_clip(2.0, decay=0.5, warmup_steps=warmup_steps, reset_every=reset_every)
    entries = 4.0 ** np.arange(60)
    clipped, states = sequences.scanned(method, entries.astype(np.float32)[:, None])
    assert list(np.flatnonzero(clipped[:, 0] < entries) + 1) == list(clipped_steps)
    count = np.arange(1, 61)
    np.testing.assert_array_equal(
        states.step_count, count if reset_every is None else count % reset_every
    )


def test_metrics_say_what_was_clipped() -> None:
    method = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    usual = {"a": jnp.array([2.0, 2.0]), "b": jnp.array(2.0)}
    spike = {"a": jnp.array([2.0, 8.0]), "b": jnp.array(2.0)}
    _, state = run(method, [usual, spike])
    values = clipax.metrics(state, per_leaf=True)
    expected = {"norm/a": 8, "norm/b": 2, "max_norm": 2, "coefficient": 0.25, "clip_fraction": 0.5}
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6)


# What goes wrong elsewhere.


def test_a_late_entry_is_not_held_at_zero() -> None:
    """Without history the rule's bound is zero: such an entry would never wake."""
    entries = np.zeros(60)
    entries[40:] = 1.0
    v, naive = 0.0, []
    for entry in entries:
        clipped = math.sqrt(5000 * v) if len(naive) >= 20 and entry**2 > 5000 * v else entry
        v = 0.999 * v + 0.001 * clipped**2
        naive.append(clipped)
    assert not any(naive)
    outputs, _ = run(clipax.spam_clip(), rows(*entries))
    np.testing.assert_array_equal(np.concatenate(outputs), entries)


def test_a_small_history_is_outgrown() -> None:
    """After a whisper the entry is held down, but for less than sixty steps."""
    outputs, _ = run(clipax.spam_clip(), rows(*[1e-12] * 30, *[1.0] * 60))
    sizes = np.concatenate(outputs)
    assert sizes[30] < 1e-9
    assert sizes[-1] == 1


def test_a_spike_is_really_clipped() -> None:
    """Not on a copy, which leaves the spike as it was."""
    outputs, _ = run(clipax.spam_clip(), rows(*[1.0] * 100, 1e4))
    expected = math.sqrt(5000 * (1 - 0.999**100))
    np.testing.assert_allclose(outputs[-1], [expected], rtol=1e-5)


def test_edge_squares_below_the_range_are_learned_as_zero() -> None:
    """An entry near 1e-25 has no history, and so no bound."""
    outputs, state = run(clipax.spam_clip(4.0, warmup_steps=1), rows(*[1e-25] * 9, 1.0))
    trees.assert_bitwise(outputs[-1], jnp.ones(1))
    assert state.clip.norm == 0


MOST = 2.0**63


@pytest.mark.parametrize(
    ("ratio", "decay", "entries", "last"),
    [
        (4.0, 0.75, (1e17, 1e30), 1e17),
        (1e10, 0.999, (1e18, 5e18), 5e18),
        (1e10, 0.999, (1e19, 1e22), MOST),
        (5000.0, 0.999, (1e19, 1e25), MOST),
        (1e12, 0.9, (1e14, 1e30), MOST),
        (4.0, 0.0, (1.5e19, 1e30), MOST),
        (4.0, 0.75, (1e30, 1e30), MOST),
        (4.0, 0.75, (1e30, 1e18), 1e18),
    ],
)
def test_edge_the_largest_bound(ratio: Any, decay: Any, entries: Any, last: float) -> None:
    outputs, state = run(clipax.spam_clip(ratio, decay=decay, warmup_steps=1), rows(*entries))
    np.testing.assert_allclose(outputs, [[entries[0]], [last]], rtol=1e-6)
    first = min(entries[0], MOST) ** 2 * (1 - decay)
    np.testing.assert_allclose(
        state.rms, [math.sqrt(decay * first + (1 - decay) * last**2)], rtol=1e-5
    )


def test_an_infinite_entry_without_a_history_is_loud() -> None:
    method = clipax.spam_clip(9.0, decay=0.75, warmup_steps=1)
    updates = jnp.array([jnp.inf, 1.0])
    clipped, state = method.update(updates, method.init(jnp.zeros(2)))
    np.testing.assert_array_equal(clipped, [np.nan, 1.0])
    trees.assert_bitwise(state.rms, jnp.zeros(2))


def test_edge_the_first_entry_beyond_the_range_is_learned_as_the_largest_square() -> None:
    """The root of the mean stays finite, bounds what follows, and forgets."""
    most = MOST
    method = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    outputs, state = run(method, rows(-1e30, 3e38))
    np.testing.assert_allclose(outputs, [[-1e30], [most]], rtol=1e-6)
    np.testing.assert_allclose(state.rms, [most * math.sqrt(0.75 * 0.25 + 0.25)], rtol=1e-6)
    outputs, state = run(method, rows(1e30, *[1.0] * 400))
    assert outputs[-1] == 1
    np.testing.assert_allclose(state.rms, 1, rtol=1e-5)


def test_a_leap_to_the_end_of_the_range() -> None:
    """One factor from 1e30 to 1e-15 would lose digits."""
    method = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    outputs, state = run(method, rows(2e-15, -1e30))
    np.testing.assert_allclose(outputs[-1], [-2e-15], rtol=1e-5)
    assert state.clip.norm == np.finfo(np.float32).max
    assert state.clip.coefficient < 1e-30


@pytest.mark.parametrize("decay", [0.75, 0.9])
def test_a_spike_whose_history_looks_like_a_first_entry_is_clipped(decay: float) -> None:
    """The mean that learned its bound is just what the spike would leave after zeros."""
    ratio = 9.0
    usual = math.sqrt(1 - decay)
    spike = usual * math.sqrt(decay / (1 - decay) + ratio)
    outputs, _ = run(clipax.spam_clip(ratio, decay=decay, warmup_steps=1), rows(1.0, spike))
    np.testing.assert_allclose(outputs[-1], [3 * usual], rtol=1e-5)


def test_before_adam_a_spike_costs_little() -> None:
    """One spike in the second moment stalls Adam for long after it; clipped, far less."""
    gradients = np.where(np.arange(200) == 100, 1e4, 1.0)

    def moved_after_the_spike(*clips: Any) -> float:
        optimizer = optax.chain(*clips, optax.scale_by_adam())
        with jax.numpy_dtype_promotion("standard"):
            steps, _ = run(optimizer, rows(*gradients))
        return float(jnp.sum(jnp.stack(steps[110:])))

    assert moved_after_the_spike() < 5
    assert moved_after_the_spike(clipax.spam_clip()) > 45


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_updates_have_a_wide_history(dtype: str) -> None:
    steps = [jnp.asarray(x, dtype) for x in ([[1.0, -0.1]] * 3 + [[100.0, -10.0]])]
    sequences.assert_has_a_wide_history(clipax.spam_clip(100.0, decay=0.9, warmup_steps=3), steps)


def test_all_shards_know_of_a_bad_one() -> None:
    method = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1, axis_name="shards")
    whole = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    steps = rows([2, 2, 2, 2], [2, 2, np.nan, 90], [2, 8, 2, 2], [1, 1, 1, 1])
    for clipped, state, expected, whole_state in sequences.in_two_shards(method, whole, steps):
        np.testing.assert_array_equal(clipped.ravel(), expected)
        np.testing.assert_array_equal(state.rms.ravel(), whole_state.rms)
        np.testing.assert_array_equal(state.clip.norm, [whole_state.clip.norm] * 2)
        np.testing.assert_array_equal(state.step_count, [whole_state.step_count] * 2)
    assert whole_state.step_count == 3


def test_all_devices_know_of_a_bad_step() -> None:
    sequences.assert_all_devices_know_of_a_bad_step(
        clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    )


def test_a_frozen_leaf_counts_as_zero() -> None:
    method = clipax.spam_clip(4.0, decay=0.25, warmup_steps=1)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = method.update(params, method.init(params))
    clipped, new_state = method.update({"a": jnp.ones(2), "b": None}, state)
    assert clipped["b"] is None
    trees.assert_same_type(new_state, state)
    np.testing.assert_allclose(new_state.rms["b"], state.rms["b"] / 2, rtol=1e-6)


# Every row of the table of edge cases.


def test_edge_warm_up_and_the_steps_after_a_reset() -> None:
    entries = [1.0, 1e6, -3.0, 1e-6, 1e9, 7.0]
    outputs, state = run(clipax.spam_clip(2.0, warmup_steps=7), rows(*entries))
    trees.assert_bitwise(outputs, rows(*entries))
    trees.assert_bitwise(state.clip[:3], (jnp.array(0.0), jnp.sqrt(2.0), jnp.array(1.0)))
    method = clipax.spam_clip(2.0, warmup_steps=2, reset_every=3)
    # Of these, only steps 2, 5 and 8 can be clipped.
    entries = [1.0, 0.0, 1e6, 1e7, 1e-6, 1e9, 7.0, 0.0, 3.0]
    outputs, _ = run(method, rows(*entries))
    trees.assert_bitwise(outputs, rows(*entries))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_edge_at_or_under_the_bound(dtype: str) -> None:
    # The root of the mean is 1, the bound 2.
    method = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    updates = jnp.asarray([2.0, -2.0, 1 / 3, 1e-4, 0.0, -0.0], dtype)
    outputs, state = run(method, [jnp.full(6, 2, dtype), updates])
    trees.assert_bitwise(outputs[-1], updates)
    assert state.clip.coefficient == 1


def test_edge_zero_is_learned() -> None:
    method = clipax.spam_clip(4.0, decay=0.25, warmup_steps=1)
    outputs, state = run(method, rows(2.0, 0.0))
    trees.assert_bitwise(outputs[-1], jnp.zeros(1))
    np.testing.assert_allclose(state.rms, math.sqrt(0.25 * 3), rtol=1e-6)


def test_edge_the_first_entry_that_is_not_zero_passes() -> None:
    outputs, state = run(clipax.spam_clip(warmup_steps=3), rows(*[[0.0, 1.0]] * 9, [1e9, 1.0]))
    trees.assert_bitwise(outputs[-1], jnp.array([1e9, 1.0]))
    assert state.rms[0] > 1e7
    assert state.clip.coefficient == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_edge_bad_entries_are_loud_and_never_learned(value: float) -> None:
    method = clipax.spam_clip(
        lambda count: jnp.where(count < 100, 4.0, 9.0), decay=0.75, warmup_steps=2, reset_every=5
    )
    state = method.init({"a": jnp.zeros(2), "b": jnp.zeros(1)})
    for step in range(9):
        good = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
        bad = {"a": jnp.array([value, 90.0]), "b": jnp.array([3.0])}
        clipped, after = method.update(bad, state)
        trees.assert_bitwise((after.rms, after.step_count), (state.rms, state.step_count))
        trees.assert_bitwise(after.clip.threshold, state.clip.threshold)
        assert not np.isfinite(after.clip.norm["a"])
        is_on = step + 1 in (2, 3, 4, 7, 8, 9)
        np.testing.assert_array_equal(clipped["a"][0], np.nan if is_on else value)
        # The entry beside it is clipped as ever, and the other leaf unharmed.
        without, _ = method.update({**bad, "a": jnp.array([0.0, 90.0])}, state)
        trees.assert_close(clipped["a"][1], without["a"][1], rtol=1e-6)
        assert (clipped["a"][1] < 90) == is_on
        trees.assert_bitwise(clipped["b"], good["b"])
        _, state = method.update(good, state)
    assert state.step_count == 4


def test_edge_leaves_that_are_not_measured() -> None:
    others = sequences.unmeasured()
    method = clipax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    state = method.init({"float": jnp.zeros(1), **others})
    for updates in rows(2.0, 8.0):
        clipped, state = method.update({"float": updates, **others}, state)
    trees.assert_bitwise(clipped["float"], jnp.array([2.0]))
    sequences.assert_untouched(clipped, others)
    assert len(jax.tree.leaves(state.rms)) == len(jax.tree.leaves(state.clip.norm)) == 1


# Every bad argument.


@pytest.mark.parametrize("bad", [0, -1, -math.inf, *refusals.NO_NUMBERS])
def test_bad_ratios_are_refused(bad: Any) -> None:
    with refusals.refused("square_ratio must be a number > 0, got ", bad):
        clipax.spam_clip(bad)
    with pytest.raises(ValueError, match=r"^square_ratio\['w'\] must be a number > 0, got "):
        clipax.spam_clip({"w": bad})


@pytest.mark.parametrize("bad", [1, 1.5, -0.1, math.inf, *refusals.NO_NUMBERS])
def test_bad_decays_are_refused(bad: Any) -> None:
    with refusals.refused("decay must be a number in [0, 1), got ", bad):
        clipax.spam_clip(decay=bad)
    with pytest.raises(ValueError, match=r"^decay must be one number, got an array of shape"):
        clipax.spam_clip(decay=np.array([0.5, 0.5]))


@pytest.mark.parametrize("name", ["warmup_steps", "reset_every"])
@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "20", math.nan])
def test_bad_step_counts_are_refused(name: str, bad: Any) -> None:
    with refusals.refused(f"{name} must be an integer >= 1, got ", bad):
        clipax.spam_clip(**{name: bad})
    with pytest.raises(ValueError, match=f"^{name} must be known while tracing"):
        clipax.spam_clip(**{name: jnp.array(30)})
    with pytest.raises(ValueError, match=r"^warmup_steps must be an integer >= 1, got None"):
        clipax.spam_clip(warmup_steps=None)


@pytest.mark.parametrize("reset_every", [1, 19, 20])
def test_a_reset_within_the_warm_up_is_refused(reset_every: int) -> None:
    with pytest.raises(ValueError, match=r"^reset_every must be > warmup_steps") as caught:
        clipax.spam_clip(reset_every=reset_every)
    assert f"got {reset_every} and warmup_steps=20" in str(caught.value)


@pytest.mark.parametrize("bad", [{"v": 9.0}, [9.0, 9.0]])
def test_a_prefix_that_does_not_fit_is_refused(bad: Any) -> None:
    method, params = clipax.spam_clip(bad), {"w": jnp.ones(2)}
    refusals.assert_prefix_must_fit("square_ratio", bad, method, clipax.spam_clip(), params)


@refusals.other_structures
def test_another_structure_than_at_init_is_refused(updates: Any) -> None:
    refusals.assert_structure_must_fit(clipax.spam_clip(), updates)
