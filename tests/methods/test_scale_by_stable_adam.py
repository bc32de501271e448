"""StableAdamW's step, against NumPy and worked cases; and the bound on Adam's own step."""

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


# The rule in NumPy float64, with the mean of squares itself and the paper's own form.


def debiased(b: float, t: int) -> float:
    return (b**t - b) / (b**t - 1)


class Reference:
    def __init__(self, b1: float, b2: float, eps: float):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.state: dict[str, Any] = {}
        self.count = 0

    def step(self, updates: dict[str, np.ndarray]) -> Any:
        # The mean, that of squares, and the size of what the mean is of: it may have cancelled.
        start = {name: (np.zeros(leaf.shape),) * 3 for name, leaf in updates.items()}
        before, after, t = self.state or start, {}, self.count + 1
        b1, b2 = debiased(self.b1, t), debiased(self.b2, t)
        out, sizes, norms = {}, {}, {}
        for name, leaf in updates.items():
            m, v, size = before[name]
            wide = leaf.astype(np.result_type(leaf.dtype, np.float64))
            with np.errstate(all="ignore"):
                m = b1 * m + (1 - b1) * wide
                v = b2 * v + (1 - b2) * np.abs(wide) ** 2
                size = b1 * size + (1 - b1) * np.abs(wide)
                rms = np.sqrt(np.mean(np.abs(wide) ** 2 / np.maximum(v, self.eps**2)))
                scale = (np.sqrt(v) + self.eps) * max(1, rms)
                is_good = np.isfinite(leaf).all()
                out[name] = m / scale if is_good else np.full(leaf.shape, np.nan)
                sizes[name] = size / scale
            norms[name], after[name] = rms if is_good else np.nan, (m, v, size)
        if sequences.is_finite_step(updates):
            self.state, self.count = after, t
        kept = self.state or start
        mu, nu, kept_sizes = ({name: kept[name][row] for name in kept} for row in range(3))
        return out, sizes, mu, kept_sizes, nu, norms, self.count


def assert_near(got: np.ndarray, expected: np.ndarray, size: np.ndarray) -> None:
    """As near as float32 is to a sum of terms of this size."""
    is_known = ~np.isnan(expected)
    assert np.isnan(got[~is_known]).all()
    right = expected[is_known]
    error = np.abs(got[is_known] - right)
    bound = 1e-6 * size[is_known] + 1e-5 * np.abs(right) + 1e-30
    assert (error <= bound).all(), np.max(error / bound)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    ("b1", "b2", "eps"),
    [(0.9, 0.99, 1e-6), (0.9, 0.999, 1e-8), (0.0, 0.95, 1e-3), (0.5, 0.0, 1e-6)],
)
def test_equals_numpy_over_a_long_run(b1: float, b2: float, eps: float) -> None:
    for seed in (0, 1):
        sequence = sequences.long_entries(seed)
        clipped, states = sequences.scanned(clipax.scale_by_stable_adam(b1, b2, eps), sequence)
        expected = sequences.followed(Reference(b1, b2, eps).step, sequence)
        out, sizes, mu, kept_sizes, nu, norms, count = expected
        np.testing.assert_array_equal(states.step_count, count)
        for name in sequence:
            assert_near(clipped[name], out[name], sizes[name])
            assert_near(states.mu[name], mu[name], kept_sizes[name])
            np.testing.assert_allclose(states.nu[name], nu[name], rtol=1e-5)
            np.testing.assert_allclose(states.clip.norm[name], norms[name], rtol=1e-5)
            factors = 1 / np.maximum(norms[name], 1)
            np.testing.assert_allclose(states.clip.coefficient[name], factors, rtol=1e-5)
            assert (states.clip.max_norm[name] == 1).all()
        shares = np.stack([norms[name] for name in sequence]) > 1
        assert b2 == 0 or 0.05 < shares.mean() < 0.95, "the sequence tries only one side"


def test_the_defaults_are_those_of_the_signature() -> None:
    sequence = sequences.long_entries()
    explicit = clipax.scale_by_stable_adam(0.9, 0.99, 1e-6)
    trees.assert_bitwise(
        sequences.scanned(clipax.scale_by_stable_adam(), sequence),
        sequences.scanned(explicit, sequence),
    )


def test_unclipped_it_is_the_adam_of_optax() -> None:
    """A shrinking gradient is never larger than its own second moment."""
    rng = np.random.default_rng(0)
    steps = rows(*(np.sign(rng.normal(size=(30, 5))) * 0.9 ** np.arange(30)[:, None]))
    outputs, state = run(clipax.scale_by_stable_adam(0.9, 0.999, 1e-8), steps)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = run(optax.scale_by_adam(0.9, 0.999, 1e-8), steps)
    for one, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=5e-5, atol=1e-7)  # optax is that far off
    assert state.clip.coefficient == 1


# Worked by hand.


def test_worked_by_hand() -> None:
    """mu = (2 + 2 * 5) / 3 = 4, nu = (3 * 2^2 + 4 * 5^2) / 7 = 16, rms = 5 / 4."""
    outputs, state = run(clipax.scale_by_stable_adam(0.5, 0.75, 1e-12), rows(2.0, 5.0))
    np.testing.assert_allclose(np.concatenate(outputs), [1.0, 0.8], rtol=1e-6)
    np.testing.assert_allclose([state.mu[0], state.nu[0]], [4, 16], rtol=1e-6)
    np.testing.assert_allclose([state.clip.norm, state.clip.coefficient], [1.25, 0.8], rtol=1e-6)
    assert (state.clip.max_norm, state.step_count) == (1, 2)


def test_a_leaf_is_scaled_as_one_and_by_itself() -> None:
    method = clipax.scale_by_stable_adam(0.0, 0.75, 1e-12)
    first = {"a": jnp.array([2.0, 2.0]), "b": jnp.array([1.0])}
    second = {"a": jnp.array([5.0, 0.0]), "b": jnp.array([1.0])}
    outputs, state = run(method, [first, second])
    # In "a", nu is 16 and 12 / 7, so that rms = sqrt(25 / 16 / 2) < 1: nothing is scaled.
    np.testing.assert_allclose(outputs[1]["a"], [1.25, 0.0], rtol=1e-6)
    np.testing.assert_allclose(outputs[1]["b"], [1.0], rtol=1e-6)
    np.testing.assert_allclose(state.clip.norm["a"], 5 / 4 / math.sqrt(2), rtol=1e-6)
    second = {"a": jnp.array([5.0, 5.0]), "b": jnp.array([1.0])}
    outputs, state = run(method, [first, second])
    np.testing.assert_allclose(outputs[1]["a"], [1.0, 1.0], rtol=1e-6)
    values = clipax.metrics(state)
    for name, value in {"norm": 1.25, "coefficient": 0.8, "clip_fraction": 0.5}.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6)


def test_a_complex_entry_has_a_modulus_and_a_phase() -> None:
    method = clipax.scale_by_stable_adam(0.5, 0.75, 1e-12)
    outputs, state = run(method, [jnp.array([1.2 + 1.6j]), jnp.array([3 + 4j])])
    np.testing.assert_allclose(outputs[1], [0.8 * (0.6 + 0.8j)], rtol=1e-6)
    assert (state.mu.dtype, state.nu.dtype) == (np.complex64, np.float32)


# What goes wrong elsewhere, and what the paper is after.


def test_the_second_moment_is_the_new_one() -> None:
    """Held against the last one, which starts at zero, the first step would be lost."""
    g, eps = 0.5, 1e-6
    stale = math.sqrt(g**2 / max(0.0, eps**2))
    assert g / (g + eps) / max(1, stale) < 1e-5
    outputs, state = run(clipax.scale_by_stable_adam(), rows(g))
    np.testing.assert_allclose(outputs[0], [1.0], rtol=1e-5)
    np.testing.assert_allclose(state.clip.norm, 1.0, rtol=1e-6)


def test_a_second_moment_that_is_out_of_date_makes_no_long_step() -> None:
    """Where the gradient grows after a quiet time, Adam leaps, and this does not."""
    steps = rows(*[1e-4] * 300, 1.0)
    with jax.numpy_dtype_promotion("standard"):
        adam, _ = run(optax.scale_by_adam(0.9, 0.999), steps)
    stable, _ = run(clipax.scale_by_stable_adam(0.9, 0.999), steps)
    assert adam[-1][0] > 1.5
    assert stable[-1][0] < 0.15


def test_edge_squares_below_the_range_count_as_zero() -> None:
    """As in `optax.scale_by_adam`, where `eps` alone divides such entries."""
    outputs, state = run(clipax.scale_by_stable_adam(eps=1e-3), rows(*[[1e-25, 1.0]] * 3))
    np.testing.assert_allclose(outputs[-1], [1e-22, 1 / 1.001], rtol=1e-5)
    assert state.nu[0] == 0
    outputs, state = run(clipax.scale_by_stable_adam(eps=1e-30), rows(*[[1e-25]] * 3))
    np.testing.assert_allclose(outputs[-1], [1e5], rtol=1e-5)
    assert (state.clip.norm, state.clip.coefficient) == (0, 1)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_edge_entries_whose_squares_are_beyond_the_range(dtype: str) -> None:
    """Such an entry counts as the largest one in range, and is forgotten in time."""
    most = 2.0**63
    method = clipax.scale_by_stable_adam()
    steps = [jnp.asarray(x, dtype) for x in ([3e38, 1.0], [-3e38, 1.0], *[[1.0, 1.0]] * 1200)]
    outputs, state = run(method, steps)
    same, _ = run(method, [jnp.clip(x.real, -most, most).astype(dtype) for x in steps])
    trees.assert_bitwise(outputs, same)
    assert np.isfinite(outputs).all()
    assert 0 < abs(outputs[-1][0]) < 1e-15
    np.testing.assert_allclose(np.abs(outputs[0]), [1, 1], rtol=1e-5)
    assert state.step_count == len(steps)


def test_many_steps_keep_the_weights_of_the_paper() -> None:
    """Where the power of b2 is near one, as early in a slow mean, and where it is zero."""
    for b2 in (0.99, 0.9999, 0.999999):
        _, state = run(clipax.scale_by_stable_adam(0.9, b2), rows(1.0, 3.0, 2.0))
        v = 0.0
        for t, entry in enumerate((1.0, 3.0, 2.0), start=1):
            v = debiased(b2, t) * v + (1 - debiased(b2, t)) * entry**2
        np.testing.assert_allclose(state.nu, [v], rtol=1e-6)
    method = clipax.scale_by_stable_adam(0.9, 0.75, 1e-12)
    late = method.init(jnp.ones(1))._replace(step_count=jnp.array(2**24 + 5))
    _, state = method.update(jnp.ones(1), late)
    np.testing.assert_allclose(state.nu, [0.25], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_updates_have_a_wide_history(dtype: str) -> None:
    steps = [jnp.asarray(x, dtype) for x in np.random.default_rng(0).normal(size=(30, 3))]
    sequences.assert_has_a_wide_history(clipax.scale_by_stable_adam(), steps)


def test_all_shards_know_of_each_other() -> None:
    method, whole = clipax.scale_by_stable_adam(axis_name="shards"), clipax.scale_by_stable_adam()
    steps = rows([2, 2, 2, 2], [2, 2, np.nan, 90], [2, 80, 2, -2], [1, 1, 1, 1])
    for clipped, state, expected, whole_state in sequences.in_two_shards(method, whole, steps):
        np.testing.assert_allclose(clipped.ravel(), expected, rtol=1e-6)
        np.testing.assert_allclose(state.mu.ravel(), whole_state.mu, rtol=1e-6)
        np.testing.assert_allclose(state.clip.norm, [whole_state.clip.norm] * 2, rtol=1e-6)
        np.testing.assert_array_equal(state.step_count, [whole_state.step_count] * 2)
    assert whole_state.step_count == 3


def test_all_devices_know_of_a_bad_step() -> None:
    sequences.assert_all_devices_know_of_a_bad_step(clipax.scale_by_stable_adam())


# In a chain.


def test_the_chain_of_the_docstring() -> None:
    """The step is shortened as in the paper, the decay of the weights is not."""
    lr, decay, eps = 1e-2, 0.1, 1e-6
    optimizer = optax.chain(
        clipax.scale_by_stable_adam(0.9, 0.99, eps),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(lr),
    )
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(50, 4)) * np.where(np.arange(50) % 17 == 16, 100, 1)[:, None]
    params = jnp.ones(4)
    state, p, reference, clipped = optimizer.init(params), np.ones(4), Reference(0.9, 0.99, eps), 0

    @jax.jit
    def step(updates: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in np.float32(gradients):
        params, state = step(gradient, state, params)
        out, *_, norms, _ = reference.step({"w": gradient})
        p = p - lr * out["w"] - lr * decay * p
        clipped += norms["w"] > 1
    np.testing.assert_allclose(params, p, rtol=1e-5)
    assert clipped > 3


class AdamThenBound:
    """Adam of optax, and then each leaf's step bounded by its root mean square."""

    def __init__(self, max_rms: float, lr: float):
        self.max_rms, self.lr = max_rms, lr
        self.m: Any = None

    def step(self, updates: dict[str, np.ndarray]) -> Any:
        if self.m is None:
            self.m = {name: np.zeros(leaf.shape) for name, leaf in updates.items()}
            self.v, self.size, self.t = dict(self.m), dict(self.m), 0
        self.t += 1
        out, sizes, norms = {}, {}, {}
        for name, leaf in updates.items():
            g = leaf.astype(np.float64)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.size[name] = 0.9 * self.size[name] + 0.1 * np.abs(g)
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            scale = np.sqrt(self.v[name] / (1 - 0.999**self.t)) + 1e-8
            scale = scale * (1 - 0.9**self.t)
            norms[name] = np.sqrt(np.mean((self.m[name] / scale) ** 2))
            factor = self.lr * min(1, self.max_rms / norms[name]) if norms[name] else 0.0
            out[name] = -factor * self.m[name] / scale
            sizes[name] = factor * self.size[name] / scale
        return out, sizes, norms


@pytest.mark.parametrize("max_rms", [1.0, 0.3])
def test_the_recipe_for_the_step_of_adam(max_rms: float) -> None:
    """`clip_by_block_rms` after `optax.scale_by_adam`, over a long run with spikes."""
    lr = 1e-3
    optimizer = optax.chain(
        optax.scale_by_adam(), clipax.clip_by_block_rms(max_rms), optax.scale(-lr)
    )
    entries = sequences.long_entries()
    sequence = {
        name: np.nan_to_num(entries[name], posinf=1, neginf=1) for name in ("grid", "scale")
    }
    with jax.numpy_dtype_promotion("standard"):
        got, states = sequences.scanned(optimizer, sequence)
    out, sizes, norms = sequences.followed(AdamThenBound(max_rms, lr).step, sequence)
    for name in sequence:
        # Adam itself, in float32, is a little off: its own powers of 0.999 are.
        error = np.abs(got[name] - out[name])
        assert (error <= 5e-5 * (sizes[name] + np.abs(out[name]))).all()
        np.testing.assert_allclose(states[1].norm[name], norms[name], rtol=5e-5)
    shares = np.stack([norms[name] for name in sequence]) > max_rms
    assert 0.005 < shares.mean() < 0.95, "the sequence tries only one side"


def test_how_the_recipe_differs() -> None:
    """The ratio to the gradient sees a spike in full, and forgets it while momentum holds it."""
    steps = rows(*[0.01] * 200, 1.0, *[0.01] * 3)
    _, states = sequences.scanned(clipax.scale_by_stable_adam(0.9, 0.999), np.stack(steps))
    recipe = optax.chain(optax.scale_by_adam(0.9, 0.999), clipax.clip_by_block_rms(1.0))
    with jax.numpy_dtype_promotion("standard"):
        _, chained = sequences.scanned(recipe, np.stack(steps))
    by_gradient, by_step = states.clip.norm[200:], chained[1].norm[200:]
    assert by_gradient[0] > 10
    assert 1 < by_step[0] < 2
    assert (by_gradient[1:] < 0.2).all()
    assert (by_step[1:] > 1).all()


# Every row of the table of edge cases.


def test_edge_the_first_step() -> None:
    outputs, _ = run(clipax.scale_by_stable_adam(), rows([3.0, -7e8, 0.25, 0.0]))
    np.testing.assert_allclose(outputs[0], [1, -1, 1, 0], rtol=1e-5)


def test_edge_adams_step() -> None:
    steps = rows([3.0, -4.0], [1.0, 0.5])
    outputs, state = run(clipax.scale_by_stable_adam(), steps)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = run(optax.scale_by_adam(0.9, 0.99, 1e-6), steps)
    np.testing.assert_allclose(outputs[1], expected[1], rtol=1e-5)
    assert state.clip.coefficient == 1
    assert state.clip.norm < 1


def test_edge_zero_so_far() -> None:
    outputs, state = run(clipax.scale_by_stable_adam(), rows(*[[0.0, -0.0]] * 3))
    assert not any(np.any(clipped) for clipped in outputs)
    assert (state.clip.norm, state.clip.coefficient) == (0, 1)


def test_edge_gradients_far_below_eps() -> None:
    outputs, _ = run(clipax.scale_by_stable_adam(), rows(*[[1e-12, -1e-12]] * 20))
    np.testing.assert_allclose(outputs[-1], [1e-6, -1e-6], rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_edge_bad_entries_are_loud_and_never_learned(value: float) -> None:
    method = clipax.scale_by_stable_adam()
    state = method.init({"a": jnp.zeros(2), "b": jnp.zeros(1)})
    update = jax.jit(method.update)
    good = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    for step in range(4):
        clipped, after = update({**good, "a": jnp.array([value, 2.0])}, state)
        expected, next_state = update(good, state)
        trees.assert_bitwise(after[1:], state[1:])
        assert np.isnan(clipped["a"]).all()
        assert np.isnan([after.clip.norm["a"], after.clip.coefficient["a"]]).all()
        trees.assert_bitwise(clipped["b"], expected["b"])
        trees.assert_bitwise(after.clip.norm["b"], next_state.clip.norm["b"])
        assert state.step_count == step
        state = next_state


def test_edge_leaves_that_are_not_measured() -> None:
    method = clipax.scale_by_stable_adam()
    clipped, state = sequences.beside_unmeasured(method, jnp.array([-2.0]))
    np.testing.assert_allclose(clipped, [-1], rtol=1e-6)
    assert [len(jax.tree.leaves(tree)) for tree in state[1:]] == [1, 1, 1]


def test_edge_a_frozen_leaf_counts_as_zero() -> None:
    method = clipax.scale_by_stable_adam(0.5, 0.75)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = method.update(params, method.init(params))
    clipped, new_state = method.update({"a": jnp.ones(2), "b": None}, state)
    assert clipped["b"] is None
    trees.assert_same_type(new_state, state)
    np.testing.assert_allclose(new_state.mu["b"], [1 / 3] * 2, rtol=1e-6)


# Every bad argument.


@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("bad", [1, 1.5, -0.1, math.inf, *refusals.NO_NUMBERS])
def test_bad_decays_are_refused(name: str, bad: Any) -> None:
    with refusals.refused(f"{name} must be a number in [0, 1), got ", bad):
        clipax.scale_by_stable_adam(**{name: bad})
    with pytest.raises(ValueError, match=f"^{name} must be one number, got an array of shape"):
        clipax.scale_by_stable_adam(**{name: np.array([0.5, 0.5])})


@pytest.mark.parametrize("bad", [0, -1e-9, math.inf, *refusals.NO_NUMBERS])
def test_bad_eps_are_refused(bad: Any) -> None:
    with refusals.refused("eps must be a finite number > 0, got ", bad):
        clipax.scale_by_stable_adam(eps=bad)
    with pytest.raises(ValueError, match=r"^eps must be one number, got an array of shape"):
        clipax.scale_by_stable_adam(eps=np.array([0.5, 0.5]))


@refusals.other_structures
def test_another_structure_than_at_init_is_refused(updates: Any) -> None:
    refusals.assert_structure_must_fit(clipax.scale_by_stable_adam(), updates)
