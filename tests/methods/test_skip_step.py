"""`skip_step`: which steps it leaves out, against NumPy, and that these leave no trace."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refusals
import sequences
import trees
from skipping import (
    GRADS,
    assert_bitwise,
    is_spike,
    losses_of_a_run,
    naive_rule,
    once,
    promotes,
    run_losses,
    skipped_at,
    unkeyed,
)

import clipax

# Against NumPy.


class Rules(NamedTuple):
    skip_above: float | None = None
    z_max: float | None = None
    loss_z_max: float | None = None
    window_size: int = 128
    warmup_steps: int | None = None


def oracle(norms: np.ndarray, losses: np.ndarray, rules: Rules) -> tuple[np.ndarray, Any]:
    """Which steps are skipped, and what the windows hold at the end."""
    first = rules.window_size // 2 if rules.warmup_steps is None else rules.warmup_steps
    watched = {"norm": (norms, rules.z_max), "loss": (losses, rules.loss_z_max)}
    watched = {name: pair for name, pair in watched.items() if pair[1] is not None}
    past: dict[str, list[float]] = {name: [] for name in watched}
    skipped = np.zeros(len(norms), bool)
    for step, norm in enumerate(norms):
        values = {name: float(series[step]) for name, (series, _) in watched.items()}
        if not np.isfinite([norm, *values.values()]).all():
            skipped[step] = True
            continue
        skipped[step] = rules.skip_above is not None and norm > rules.skip_above
        for name, value in values.items():
            window = past[name][-rules.window_size :]
            if len(past[name]) + 1 >= max(3, first):
                skipped[step] |= is_spike(value, window, watched[name][1])
            past[name].append(value)
    return skipped, {name: window[-rules.window_size :] for name, window in past.items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(skip_above=3.0),
        Rules(z_max=6.0),
        Rules(loss_z_max=6.0),
        Rules(None, 6.0, 6.0),
        Rules(20.0, 2.5, None, window_size=20),
        Rules(None, 3.0, 2.0, window_size=50, warmup_steps=10),
        Rules(4.0, 1.5, 3.0, window_size=8, warmup_steps=100),
        Rules(None, 2.0, 4.0, window_size=2),
        Rules(None, 1.5, None, window_size=33, warmup_steps=1),
    ],
)
def test_equals_numpy_over_a_long_run(rules: Rules, seed: int) -> None:
    sequence, losses = sequences.long_run(seed), losses_of_a_run()
    norms, _ = sequences.long_norms(sequence)
    skipped, windows = oracle(norms, losses, rules)
    count_up = optax.scale_by_schedule(lambda count: 1.0 + jnp.asarray(count, jnp.float32))
    method = clipax.skip_step(count_up, **rules._asdict())
    out, states = run_losses(method, sequence, losses if rules.loss_z_max else None)
    np.testing.assert_array_equal(states.is_skipped, skipped)
    assert 5 <= skipped.sum() < 200
    # Not only for NaN, if there is any rule.
    is_finite = np.isfinite(norms) & (np.isfinite(losses) | (rules.loss_z_max is None))
    assert bool((skipped & is_finite).any()) == (rules != Rules())
    np.testing.assert_allclose(states.norm, norms, rtol=1e-6)
    np.testing.assert_array_equal(states.skipped_count, np.cumsum(skipped))
    steps = np.arange(len(skipped))
    last_taken = np.maximum.accumulate(np.where(skipped, -1, steps))
    np.testing.assert_array_equal(states.consecutive_count, steps - last_taken)
    factors = 1.0 + np.cumsum(~skipped) - ~skipped
    np.testing.assert_array_equal(states.inner_state.count, np.cumsum(~skipped))
    for name, leaf in sequence.items():
        expected = np.where(skipped[:, None], 0.0, leaf * factors[:, None])
        np.testing.assert_allclose(out[name], expected, rtol=1e-6)
    for name, ring in (("norm", states.norm_window), ("loss", states.loss_window)):
        if name in windows:
            kept = np.sort(ring.values[-1][: len(windows[name])])
            np.testing.assert_allclose(kept, np.sort(windows[name]), rtol=1e-6)
        else:
            assert ring == optax.EmptyState()


def test_a_worked_case() -> None:
    rules = {"z_max": 3.0, "window_size": 6}
    assert skipped_at(sequences.FEW_NORMS, **rules) == [6]
    assert naive_rule(sequences.FEW_NORMS, 3.0, 6) == [6]


def test_worked_by_hand() -> None:
    """1, 2, 3 have mean 2 and deviation 1: with z_max 2, the limit is 4."""
    rules = {"z_max": 2.0, "warmup_steps": 4}
    assert skipped_at([1.0, 2.0, 3.0, 3.99], **rules) == []
    assert skipped_at([1.0, 2.0, 3.0, 4.01], **rules) == [3]
    assert skipped_at([1.0, 2.0, 3.0, 0.0], **rules) == []
    # 5, -1, 2 have mean 2 and deviation 3: the limit is 8.
    by_loss = {"loss_z_max": 2.0, "warmup_steps": 4}
    assert skipped_at(np.ones(4), [5.0, -1.0, 2.0, 7.99], **by_loss) == []
    assert skipped_at(np.ones(4), [5.0, -1.0, 2.0, 8.01], **by_loss) == [3]


def test_the_warm_up_counts_the_value_at_hand() -> None:
    jump = [1.0, 1.1, 0.9, 1.0, 50.0, 1.0]
    assert skipped_at(jump, z_max=6.0, warmup_steps=5) == [4]
    assert skipped_at(jump, z_max=6.0, warmup_steps=6) == []
    # None is half the window.
    assert skipped_at(jump, z_max=6.0, window_size=10) == [4]
    assert skipped_at(jump, z_max=6.0, window_size=12) == []


# Skipped steps leave no trace.


def optimizers() -> dict[str, Callable[[], Any]]:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-2, 20, 140)
    masked = optax.masked(optax.add_decayed_weights(1e-2), {"a": True, "b": False})
    return {
        "adam": lambda: optax.adam(schedule),
        "adamw": lambda: optax.adamw(schedule, weight_decay=0.1),
        "clip and adam": lambda: optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        "momentum": lambda: optax.sgd(schedule, momentum=0.9, nesterov=True),
        "masked": lambda: optax.chain(masked, optax.sgd(1e-2, momentum=0.5)),
        "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
        "multi steps": lambda: optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(),
        "noise": lambda: optax.chain(
            optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(1e-2)
        ),
        "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=schedule),
    }


every_optimizer = pytest.mark.parametrize("name", sorted(optimizers()))
PARAMS = {"a": jnp.array([[1.0, -2.0], [0.5, -0.0]]), "b": jnp.array([0.1, -0.2])}


def gradients(step: int) -> Any:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), PARAMS)


@pytest.mark.slow
@promotes
@every_optimizer
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_that_are_taken_are_those_of_the_inner_one(name: str, compiled: bool) -> None:
    """Compiled, two programs may fuse a product and a sum differently, and so round."""
    alone = optimizers()[name]()
    guarded = clipax.skip_step(optimizers()[name](), 1e6, z_max=6.0, loss_z_max=6.0)
    with_jit = jax.jit if compiled else lambda function: function
    update, guarded_update = with_jit(alone.update), with_jit(guarded.update)
    state, guarded_state = alone.init(PARAMS), guarded.init(PARAMS)
    for step in range(6 if compiled else 3):
        updates, state = update(gradients(step), state, PARAMS)
        loss = jnp.array(1.0 + step)
        out, guarded_state = guarded_update(gradients(step), guarded_state, PARAMS, loss=loss)
        results = unkeyed((out, guarded_state.inner_state)), unkeyed((updates, state))
        if compiled:
            trees.assert_close(*results)
        else:
            trees.assert_bitwise(*results)


@pytest.mark.slow_but(18)
@promotes
@every_optimizer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e4])
def test_a_skipped_step_changes_nothing(name: str, bad: float) -> None:
    guarded = clipax.skip_step(optimizers()[name](), 1e3)
    step = jax.jit(guarded.update, donate_argnums=1)
    _, state = step(gradients(0), guarded.init(PARAMS), PARAMS)
    before = jax.tree.map(np.asarray, unkeyed(state))
    updates = {**gradients(1), "b": jnp.array([bad, 1.0])}
    out, state = step(updates, state, PARAMS)
    trees.assert_bitwise(optax.apply_updates(PARAMS, out), PARAMS)
    trees.assert_bitwise(unkeyed(state.inner_state), before.inner_state)
    assert (state.is_skipped, state.skipped_count, state.consecutive_count) == (True, 1, 1)
    np.testing.assert_equal(np.isnan(state.norm), np.isnan(bad))


def batches() -> list[Any]:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 2))
    inputs = rng.normal(size=(130, 16, 4))
    return [
        (jnp.asarray(x, jnp.float32), jnp.asarray(np.tanh(x @ weights), jnp.float32))
        for x in inputs
    ]


def train(optimizer: Any, *runs: list[Any]) -> list[tuple[Any, Any]]:
    """Trains a small network on each run of batches, with everything in one compiled step."""
    rng = np.random.default_rng(1)
    start = {"a": rng.normal(size=(4, 8)) / 2, "b": rng.normal(size=(8, 2)) / 3}

    def loss_of(params: Any, batch: Any) -> Any:
        inputs, targets = batch
        return jnp.mean(jnp.square(jnp.tanh(inputs @ params["a"]) @ params["b"] - targets))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(grads, state, params, loss=loss)
        return optax.apply_updates(params, updates), state, loss

    ends = []
    for data in runs:
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
        losses, state = [], optimizer.init(params)
        for batch in data:
            params, state, loss = step(params, state, batch)
            losses.append(float(loss))
        assert losses[-1] < losses[1]
        ends.append((params, state))
    return ends


@pytest.mark.slow
@promotes
@every_optimizer
@pytest.mark.parametrize(
    ("rules", "scaled"),
    [
        ({"skip_above": 100.0}, [2, 70, 71, 72, 90]),
        ({"z_max": 6.0, "loss_z_max": 6.0}, [75, 100]),
    ],
)
def test_a_training_is_that_without_its_bad_batches(
    name: str, rules: dict[str, float], scaled: list[int]
) -> None:
    optimizer = clipax.skip_step(optimizers()[name](), **rules)
    data, poisoned = batches(), [0, 5, 6, 50, 101]
    for step in (*poisoned, *scaled):
        inputs, targets = data[step]
        nan_inputs = inputs.at[3, 1].set(jnp.nan)
        data[step] = (nan_inputs, targets) if step in poisoned else (inputs, 1e4 * targets)
    good = [batch for step, batch in enumerate(data) if step not in {*poisoned, *scaled}]
    (params, state), (good_params, good_state) = train(optimizer, data, good)
    assert_bitwise(params, good_params)
    assert_bitwise(state.inner_state, good_state.inner_state)
    assert (state.skipped_count, good_state.skipped_count) == (len(data) - len(good), 0)


@promotes
def test_unguarded_training_dies_of_one_such_batch() -> None:
    data = batches()[:8]
    data[2] = (data[2][0].at[0, 0].set(jnp.nan), data[2][1])
    with pytest.raises(AssertionError, match="nan"):
        train(optax.with_extra_args_support(optax.adam(1e-2)), data)


# Every row of the table of edge cases.


def test_edge_not_skipped() -> None:
    leaves = {**sequences.unmeasured(), "x": GRADS["w"], "python": jnp.array(7)}
    out, _ = once(clipax.skip_step(optax.identity()), {**leaves, "python": 7})
    for name in leaves:
        trees.assert_bitwise(out[name], leaves[name])


@pytest.mark.slow_but(4)
@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float32", "complex64", "float8_e4m3fn", "int32", "uint8", "bool"],
)
def test_edge_skipped_is_the_neutral_addend(dtype: str) -> None:
    params = jnp.asarray([-0.0, 0.0, 1.0, 0.1, 7.0], dtype)
    leaves = {"x": params, "bad": jnp.array(np.nan)}
    out, _ = once(clipax.skip_step(optax.identity()), leaves)
    assert out["x"].dtype == params.dtype
    assert not bool(jnp.any(out["x"] != jnp.zeros((), dtype)))
    trees.assert_bitwise(optax.apply_updates({"x": params}, {"x": out["x"]})["x"], params)


def test_edge_plain_zero_would_change_a_parameter() -> None:
    params = jnp.array([-0.0])
    by_zero = optax.apply_updates(params, jnp.zeros(1))
    assert np.signbit(params[0])
    assert not np.signbit(by_zero[0])
    out, _ = once(clipax.skip_step(optax.sgd(1.0)), jnp.array([np.nan]))
    assert np.signbit(optax.apply_updates(params, out)[0])


def test_edge_skipped_leaves_that_are_not_measured() -> None:
    leaves = {**sequences.unmeasured(), "x": jnp.array(np.inf)}
    out, _ = once(clipax.skip_step(optax.identity()), leaves)
    trees.assert_bitwise(out["integer"], jnp.zeros(2, jnp.int32))
    trees.assert_bitwise(out["bool"], jnp.zeros(2, bool))
    assert int(out["python"]) == 0
    assert out["none"] is None
    assert out["masked"] == optax.MaskedNode()
    assert out["float0"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_edge_not_finite_however_many_in_a_row(bad: float) -> None:
    norms = [1.0, *[bad] * 300, 1.0]
    everything = {"skip_above": 9.0, "z_max": 6.0, "loss_z_max": 6.0, "warmup_steps": 3}
    assert skipped_at(norms) == list(range(1, 301))
    assert skipped_at(norms, np.ones(302), **everything) == list(range(1, 301))
    assert skipped_at(np.ones(302), norms, **everything) == list(range(1, 301))


def test_edge_a_loss_that_is_not_watched_may_be_nan() -> None:
    assert skipped_at(np.ones(3), [1.0, np.nan, np.inf], z_max=6.0) == []


@pytest.mark.parametrize("norm", [0.0, 1e-30, 25.0, 1e30])
def test_edge_the_first_is_taken(norm: float) -> None:
    assert skipped_at([norm] * 3, z_max=6.0, warmup_steps=1) == []
    assert skipped_at([norm] * 3, [norm] * 3, z_max=1e-3, loss_z_max=1e-3) == []
    assert skipped_at([norm], skip_above=30.0) == ([0] if norm > 30 else [])


@pytest.mark.parametrize("level", [0.1, 1.0, 1e-20, 1e20, -3.0])
def test_edge_above_equal_values(level: float) -> None:
    """Rounding is no spike; anything more is."""
    constant = [level] * 10
    rules = {"z_max": 6.0, "loss_z_max": 6.0, "warmup_steps": 5}

    def is_skipped(value: float) -> bool:
        skipped = skipped_at(np.abs([*constant, level]), [*constant, value], **rules)
        assert set(skipped) <= {10}
        return bool(skipped)

    assert not is_skipped(level)
    assert not is_skipped(float(np.nextafter(np.float32(level), np.float32(np.inf))))
    assert not is_skipped(level + 3e-6 * abs(level))
    assert is_skipped(level + 1e-5 * abs(level))
    noise = np.nextafter(np.float32(abs(level)), np.float32(np.inf))
    assert naive_rule([*np.abs(constant), noise], 6.0, 10) == [10]


def test_edge_above_a_window_of_zeros() -> None:
    assert skipped_at([0.0, 0.0, 0.0, 1e-6, 1e-6], z_max=6.0, window_size=6) == [3]


def test_edge_below_the_mean_is_taken() -> None:
    assert skipped_at([5.0, 5.1, 4.9, 0.0], z_max=0.5, warmup_steps=4) == []
    losses = [5.0, 5.1, 4.9, -1e6]
    assert skipped_at(np.ones(4), losses, loss_z_max=0.5, warmup_steps=4) == []


def test_edge_a_bound_that_turns_out_nan() -> None:
    def late(count: Any) -> Any:
        return jnp.where(count == 1, jnp.nan, 10.0)

    assert skipped_at([1.0, 1.0, 1.0], skip_above=late) == [1]


# Every bad argument.


@pytest.mark.parametrize("name", ["skip_above", "z_max", "loss_z_max"])
@pytest.mark.parametrize("bad", [0, -1.0, -math.inf, *refusals.NO_NUMBERS])
def test_bad_bounds_are_refused(name: str, bad: Any) -> None:
    if bad is None:
        return  # which leaves the rule out
    with refusals.refused(f"{name} must be a number > 0, got ", bad):
        clipax.skip_step(optax.sgd(1.0), **{name: bad})


def test_bounds_that_are_no_scalar_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^skip_above must be one number, array or schedule"):
        clipax.skip_step(optax.sgd(1.0), {"w": 1.0})
    for name in ("skip_above", "z_max", "loss_z_max"):
        with pytest.raises(ValueError, match=rf"^{name} must be one number, got an array"):
            clipax.skip_step(optax.sgd(1.0), **{name: jnp.ones(2)})


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "8", None, jnp.array(4)])
def test_bad_lengths_are_refused(bad: Any) -> None:
    for name in ("window_size", "warmup_steps"):
        if (name, bad) == ("warmup_steps", None):
            continue
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            clipax.skip_step(optax.sgd(1.0), **{name: bad})


def test_a_window_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^window_size must be an integer >= 2, got 1\.$"):
        clipax.skip_step(optax.sgd(1.0), window_size=1)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    method = clipax.skip_step(optax.sgd(1.0), loss_z_max=6.0)
    with pytest.raises(ValueError, match=r"^loss must be one real number, got"):
        once(method, GRADS, loss=jnp.ones(2))
