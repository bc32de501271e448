"""ACClip, against NumPy and worked cases."""

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


# The rule in NumPy float64, with the mean of powers itself.


class Reference:
    def __init__(self, decay: float, decay_bound: float, ord: float, eps: float):
        self.decay, self.decay_bound, self.ord, self.eps = decay, decay_bound, ord, eps
        self.state: dict[str, Any] = {}

    def step(self, updates: dict[str, np.ndarray]) -> Any:
        # Momentum, power, and the size of what the momentum is the sum of: it may have cancelled.
        start = {
            name: (np.zeros(leaf.shape), np.zeros(leaf.shape), np.zeros(leaf.shape))
            for name, leaf in updates.items()
        }
        before, after = self.state or start, {}
        out, norms, norm_sizes, factors = {}, {}, {}, {}
        for name, leaf in updates.items():
            m, power, size = before[name]
            wide = leaf.astype(np.result_type(leaf.dtype, np.float64))
            with np.errstate(all="ignore"):
                m = self.decay * m + (1 - self.decay) * wide
                power = (
                    self.decay_bound * power + (1 - self.decay_bound) * np.abs(wide) ** self.ord
                )
                size = self.decay * size + (1 - self.decay) * np.abs(wide)
                tau = power ** (1 / self.ord)
                factor = np.minimum(tau / (np.abs(m) + self.eps), 1)
                out[name] = np.where(np.isfinite(leaf), factor * m, leaf)
                norms[name] = np.max(np.where(m == 0, 0, (np.abs(m) + self.eps) / tau))
                norm_sizes[name] = np.max(np.where(m == 0, 0, (size + self.eps) / tau))
            factors[name] = np.min(np.where(m == 0, 1, factor))
            after[name] = m, power, size
        if sequences.is_finite_step(updates):
            self.state = after
        kept = self.state or start
        momentum = {name: kept[name][0] for name in kept}
        bounds = {name: power ** (1 / self.ord) for name, (_, power, _) in kept.items()}
        kept_size, size = ({name: tree[name][2] for name in kept} for tree in (kept, after))
        return out, size, momentum, kept_size, bounds, norms, norm_sizes, factors


def assert_near(got: np.ndarray, expected: np.ndarray, size: np.ndarray) -> None:
    """As near as float32 is to a sum of terms of this size."""
    is_finite = np.isfinite(expected)
    assert not np.isfinite(got[~is_finite]).any()
    right = expected[is_finite]
    error = np.abs(got[is_finite] - right)
    bound = 1e-6 * size[is_finite] + 1e-5 * np.abs(right) + 1e-30
    assert (error <= bound).all(), np.max(error / bound)


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(
    ("decay", "decay_bound", "ord", "eps"),
    [
        (0.9, 0.99, 1.0, 1e-5),
        (0.9, 0.99, 2.0, 1e-5),
        (0.5, 0.999, 1.5, 1e-8),
        (0.9, 0.9, 0.5, 1e-3),
        (0.0, 0.9, 3, 1e-5),
        (0.9, 0.0, 1.0, 1e-5),
    ],
)
def test_equals_numpy_over_a_long_run(
    decay: float, decay_bound: float, ord: float, eps: float
) -> None:
    method = clipax.acclip(decay, decay_bound=decay_bound, ord=ord, eps=eps)
    for seed in (0, 1):
        sequence = sequences.long_entries(seed)
        clipped, states = sequences.scanned(method, sequence)
        rule = Reference(decay, decay_bound, ord, eps)
        expected = sequences.followed(rule.step, sequence)
        out, size, momentum, kept_size, bounds, norms, norm_sizes, factors = expected
        for name in sequence:
            assert_near(clipped[name], out[name], size[name])
            assert_near(states.momentum[name], momentum[name], kept_size[name])
            roots = states.mean_power[name].astype(np.float64) ** (1 / ord)
            np.testing.assert_allclose(roots, bounds[name], rtol=1e-5)
            # A bound of zero gives the largest float for a norm.
            known = np.isfinite(norms[name])
            record = np.where(norms[name] == np.inf, np.finfo(np.float32).max, norms[name])
            for got, right in ((states.clip.norm, norms), (states.clip.coefficient, factors)):
                assert_near(got[name][known], right[name][known], norm_sizes[name][known])
            np.testing.assert_array_equal(states.clip.norm[name][~known], record[~known])
        shares = np.stack([factors[name] for name in sequence]) < 1
        assert shares.mean() > 0.02, "the sequence tries only one side"


def test_the_defaults_are_those_of_the_paper() -> None:
    sequence = sequences.long_entries()
    explicit = clipax.acclip(0.9, decay_bound=0.99, ord=1.0, eps=1e-5)
    trees.assert_bitwise(
        sequences.scanned(clipax.acclip(), sequence), sequences.scanned(explicit, sequence)
    )


# Worked by hand.


def test_worked_by_hand() -> None:
    method = clipax.acclip(0.5, decay_bound=0.75, eps=1e-12)
    outputs, state = run(method, [jnp.array([4.0, -8.0]), jnp.array([0.0, 8.0])])
    # The momenta are 2 and -4, the bounds 1 and 2; then 1 and 2, 0.75 and 3.5.
    trees.assert_bitwise(outputs, [jnp.array([1.0, -2.0]), jnp.array([0.75, 2.0])])
    trees.assert_bitwise(state.momentum, jnp.array([1.0, 2.0]))
    trees.assert_bitwise(state.mean_power, jnp.array([0.75, 3.5]))
    np.testing.assert_allclose(state.clip.norm, 4 / 3, rtol=1e-6)
    assert (state.clip.max_norm, state.clip.coefficient) == (1, 0.75)


def test_worked_by_hand_with_squares() -> None:
    method = clipax.acclip(0.0, decay_bound=0.75, ord=2.0, eps=1e-12)
    outputs, state = run(method, [jnp.array([2.0]), jnp.array([6.0])])
    # The means of squares are 1, then 0.75 + 9; the momentum is the gradient.
    np.testing.assert_allclose(outputs[0], [1.0], rtol=1e-6)
    np.testing.assert_allclose(outputs[1], [math.sqrt(9.75)], rtol=1e-6)
    np.testing.assert_allclose(state.mean_power, [9.75], rtol=1e-6)


def test_a_complex_entry_is_clipped_by_its_modulus() -> None:
    method = clipax.acclip(0.5, decay_bound=0.75, eps=1e-12)
    outputs, state = run(method, [jnp.array([3 + 4j, -2j])] * 2)
    # The moduli of the momentum are 1/2 and 3/4 of the gradient's, the bounds 1/4 and 7/16.
    np.testing.assert_allclose(outputs[0], [0.75 + 1j, -0.5j], rtol=1e-6)
    np.testing.assert_allclose(outputs[1], [(3 + 4j) * 7 / 16, -0.875j], rtol=1e-6)
    assert (state.momentum.dtype, state.mean_power.dtype) == (np.complex64, np.float32)


def test_metrics_say_what_was_clipped() -> None:
    method = clipax.acclip(0.5, decay_bound=0.0, eps=1e-12)
    first = {"a": jnp.array([8.0, 4.0]), "b": jnp.array(2.0)}
    _, state = run(method, [first, {"a": jnp.array([1.0, 8.0]), "b": jnp.array(2.0)}])
    # In "a", 2.5 is held against 1 and 5 against 8; in "b", 1.5 against 2.
    values = clipax.metrics(state, per_leaf=True)
    expected = {"norm/a": 2.5, "norm/b": 0.75, "max_norm": 1, "coefficient": 0.4}
    for name, value in {**expected, "clip_fraction": 0.5}.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6)


# What goes wrong elsewhere, and what the paper claims.


def test_the_order_is_one_unless_said_otherwise() -> None:
    """A port has 2, and then a spike lifts its own bound far more."""
    steps = rows(*[1.0] * 300, 1e3)
    m = tau_1 = tau_2 = 0.0
    for entry in [1.0] * 300 + [1e3]:
        m = 0.9 * m + 0.1 * entry
        tau_1, tau_2 = 0.99 * tau_1 + 0.01 * entry, 0.99 * tau_2 + 0.01 * entry**2
    assert math.sqrt(tau_2) > 8 * tau_1
    outputs, _ = run(clipax.acclip(), steps)
    np.testing.assert_allclose(outputs[-1], [m * tau_1 / (m + 1e-5)], rtol=1e-5)
    outputs, _ = run(clipax.acclip(ord=2), steps)
    np.testing.assert_allclose(outputs[-1], [min(m, math.sqrt(tau_2))], rtol=1e-5)


def test_the_first_steps_are_short() -> None:
    """Without bias correction the bound grows from nothing: a warm-up is built in."""
    outputs, _ = run(clipax.acclip(), rows(*[1.0] * 500))
    sizes = np.concatenate(outputs)
    np.testing.assert_allclose(sizes[:3], [0.01, 0.0199, 0.029701], rtol=2e-4)
    assert (np.diff(sizes) >= -1e-6).all()
    assert sizes[-1] > 0.99


@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1, 2], [0]))
def test_heavy_tailed_noise_is_survived(seed: int) -> None:
    """Descent on a parabola under noise of infinite variance: momentum alone is thrown off."""
    rng = np.random.default_rng(seed)
    noise = jnp.asarray(rng.standard_t(1.2, (1000, 8)), jnp.float32)

    def descend(momentum: Any) -> float:
        optimizer = optax.chain(momentum, optax.scale_by_learning_rate(0.02))

        def step(carry: Any, noise: Any) -> Any:
            x, state = carry
            updates, state = optimizer.update(x + noise, state)
            return (x + updates, state), jnp.linalg.norm(x + updates)

        start = jnp.full(8, 5.0)
        _, distances = jax.lax.scan(step, (start, optimizer.init(start)), noise)
        return float(jnp.max(distances[500:]))

    assert descend(optax.ema(0.9, debias=False)) > 12
    assert descend(clipax.acclip()) < 7
    assert descend(clipax.acclip(ord=0.5)) < 3.5


@pytest.mark.parametrize("size", [2.0**66, 2.0**-83])
def test_moduli_have_the_range_of_float32(size: float) -> None:
    """Near 1e20 and 1e-25, where the squares overflow and vanish."""
    steps = rows(*np.random.default_rng(0).normal(size=(40, 3)), [1e4, 3.0, -1e4])
    scaled = [size * updates for updates in steps]
    outputs, state = run(clipax.acclip(eps=2.0**-20), steps)
    wide, wide_state = run(clipax.acclip(eps=2.0**-20 * size), scaled)
    trees.assert_bitwise(wide, [size * clipped for clipped in outputs])
    trees.assert_bitwise(wide_state.clip[:3], state.clip[:3])


@pytest.mark.parametrize("ord", [2.0, 3.0])
def test_edge_powers_below_the_range_count_as_zero(ord: float) -> None:
    outputs, state = run(clipax.acclip(ord=ord, eps=1e-30), rows(*[[1e-25, 1.0]] * 3))
    assert (outputs[-1][0], state.mean_power[0]) == (0, 0)
    assert outputs[-1][1] > 0
    assert state.clip.coefficient == 0
    assert not np.isnan(state.clip.norm)


@pytest.mark.parametrize("ord", [2.0, 3.0])
def test_edge_powers_beyond_the_range_count_as_the_largest_float(ord: float) -> None:
    largest = float(np.finfo(np.float32).max)
    method = clipax.acclip(0.0, decay_bound=0.5, ord=ord)
    outputs, state = run(method, rows([1e30, 1.0]))
    np.testing.assert_allclose(outputs[0][0], (0.5 * largest) ** (1 / ord), rtol=1e-5)
    outputs, state = run(method, rows([1e30, 1.0], *[[1.0, 1.0]] * 200))
    np.testing.assert_allclose(outputs[-1], 1, rtol=2e-5)  # up to eps
    np.testing.assert_allclose(state.mean_power, 1, rtol=1e-5)


def test_a_mean_beyond_the_range_is_not_kept() -> None:
    """Two steps to and fro at the end of the range: their difference is no float32."""
    method = clipax.acclip(0.1)
    outputs, state = run(method, rows(3e38, -3e38, 1.0))
    assert not np.isfinite(outputs[1])
    assert np.isfinite(outputs[2])
    assert np.isfinite(state.momentum)


def test_the_order_may_be_traced() -> None:
    steps = rows(*np.random.default_rng(0).normal(size=(20, 3)))

    @jax.jit
    def last(ord: Any) -> Any:
        method = clipax.acclip(ord=ord)
        state = method.init(steps[0])
        for updates in steps:
            clipped, state = method.update(updates, state)
        return clipped

    for order in (1.0, 2.0, 0.7):
        expected = run(clipax.acclip(ord=order), steps)[0][-1]
        np.testing.assert_allclose(last(order), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_updates_have_a_wide_history(dtype: str) -> None:
    steps = [jnp.asarray(x, dtype) for x in np.random.default_rng(0).normal(size=(30, 3))]
    sequences.assert_has_a_wide_history(clipax.acclip(), steps)


def test_all_shards_know_of_a_bad_one() -> None:
    method, whole = clipax.acclip(axis_name="shards"), clipax.acclip()
    steps = rows([2, 2, 2, 2], [2, 2, np.nan, 90], [2, 8, 2, -2], [1, 1, 1, 1])
    for clipped, state, expected, whole_state in sequences.in_two_shards(method, whole, steps):
        np.testing.assert_array_equal(clipped.ravel(), expected)
        np.testing.assert_array_equal(state.momentum.ravel(), whole_state.momentum)
        np.testing.assert_array_equal(state.clip.norm, [whole_state.clip.norm] * 2)


def test_all_devices_know_of_a_bad_step() -> None:
    sequences.assert_all_devices_know_of_a_bad_step(clipax.acclip())


# Every row of the table of edge cases.


def test_edge_the_first_step() -> None:
    outputs, _ = run(clipax.acclip(eps=1e-12), [jnp.array([3.0, -7e8, 0.25])])
    np.testing.assert_allclose(outputs[0], [0.03, -7e6, 0.0025], rtol=1e-5)
    method = clipax.acclip(0.5, decay_bound=0.75, eps=1.0)
    outputs, _ = run(method, [jnp.array([4.0])])
    np.testing.assert_allclose(outputs[0], [2 * 1 / (2 + 1)], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_edge_momentum_under_the_bound(dtype: str) -> None:
    method = clipax.acclip(0.5, decay_bound=0.25, eps=0.125)
    outputs, state = run(method, [jnp.asarray(x, dtype) for x in ([4.0, -1.0], [2.0, 3.0])])
    # The bounds are 3 and 0.75, then 2.25 and 2.4375.
    trees.assert_bitwise(outputs[0], jnp.asarray([2.0, -0.5], dtype))
    trees.assert_bitwise(outputs[1], jnp.asarray([2.0, 1.25], dtype))
    assert state.clip.coefficient == 1


def test_edge_zero_so_far() -> None:
    outputs, state = run(clipax.acclip(), rows(*[[0.0, 1.0]] * 5))
    assert [float(clipped[0]) for clipped in outputs] == [0] * 5
    assert np.isfinite(state.clip.norm)
    assert state.clip.coefficient > 0
    outputs, state = run(clipax.acclip(), rows([0.0, -0.0]))
    assert (state.clip.norm, state.clip.coefficient) == (0, 1)


def test_edge_gradients_far_below_eps() -> None:
    outputs, _ = run(clipax.acclip(), rows(*[1e-9] * 400))
    np.testing.assert_allclose(outputs[-1], [1e-13], rtol=0.05)


# To the bit, most agree only where XLA optimizes, which it does in the slow group.
@pytest.mark.parametrize("ord", trees.mostly_slow([1.0, 2.0, 1.5], [1.5]))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_edge_bad_entries_are_loud_and_never_learned(value: float, ord: float) -> None:
    method = clipax.acclip(ord=ord)
    state = method.init({"a": jnp.zeros(2), "b": jnp.zeros(1)})
    update = jax.jit(method.update)
    good = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    for _ in range(4):
        clipped, after = update({**good, "a": jnp.array([value, 2.0])}, state)
        expected, next_state = update(good, state)
        trees.assert_bitwise(after[1:], state[1:])
        assert np.isnan(after.clip.norm["a"])
        assert not np.isfinite(clipped["a"][0])
        trees.assert_bitwise(clipped["a"][1], expected["a"][1])
        trees.assert_bitwise(clipped["b"], expected["b"])
        trees.assert_bitwise(after.clip.norm["b"], next_state.clip.norm["b"])
        state = next_state


def test_edge_leaves_that_are_not_measured() -> None:
    method = clipax.acclip(0.5, decay_bound=0.75)
    clipped, state = sequences.beside_unmeasured(method, jnp.ones(1))
    np.testing.assert_allclose(clipped, [0.25], rtol=1e-4)
    assert [len(jax.tree.leaves(tree)) for tree in state[1:]] == [1, 1]


def test_edge_a_frozen_leaf_counts_as_zero() -> None:
    method = clipax.acclip(0.5, decay_bound=0.75)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = method.update(params, method.init(params))
    clipped, new_state = method.update({"a": jnp.ones(2), "b": None}, state)
    assert clipped["b"] is None
    trees.assert_same_type(new_state, state)
    trees.assert_bitwise(new_state.momentum["b"], state.momentum["b"] / 2)


# Every bad argument.


@pytest.mark.parametrize("name", ["decay", "decay_bound"])
@pytest.mark.parametrize("bad", [1, 1.5, -0.1, math.inf, *refusals.NO_NUMBERS])
def test_bad_decays_are_refused(name: str, bad: Any) -> None:
    with refusals.refused(f"{name} must be a number in [0, 1), got ", bad):
        clipax.acclip(**{name: bad})
    with pytest.raises(ValueError, match=f"^{name} must be one number, got an array of shape"):
        clipax.acclip(**{name: np.array([0.5, 0.5])})


@pytest.mark.parametrize("name", ["ord", "eps"])
@pytest.mark.parametrize("bad", [0, -1e-9, math.inf, *refusals.NO_NUMBERS])
def test_bad_orders_and_eps_are_refused(name: str, bad: Any) -> None:
    with refusals.refused(f"{name} must be a finite number > 0, got ", bad):
        clipax.acclip(**{name: bad})
    with pytest.raises(ValueError, match=f"^{name} must be one number, got an array of shape"):
        clipax.acclip(**{name: np.array([0.5, 0.5])})


@refusals.other_structures
def test_another_structure_than_at_init_is_refused(updates: Any) -> None:
    refusals.assert_structure_must_fit(clipax.acclip(), updates)
