"""`skip_step`: which steps it leaves out, against NumPy, and that these leave no trace."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sequences
import trees
from jax.sharding import AxisType, PartitionSpec

import clipax

GRADS = {"w": jnp.array([3.0, 4.0])}


def run_losses(method: Any, sequence: Any, losses: Any = None) -> tuple[Any, Any]:
    """What comes out of every step, and the states, with the losses if there are any."""
    extra = {} if losses is None else {"loss": jnp.asarray(losses, jnp.float32)}
    state = method.init(sequences.at(sequence, 0))
    return jax.tree.map(np.asarray, compiled_run(method)(state, (sequence, extra)))


@functools.cache
def compiled_run(method: Any) -> Callable[..., Any]:
    def step(state: Any, now: Any) -> Any:
        updates, extra = now
        out, state = method.update(updates, state, None, **extra)
        return state, (out, state)

    return jax.jit(lambda state, xs: jax.lax.scan(step, state, xs)[1])


@functools.cache
def guarded_sgd(**rules: Any) -> Any:
    return clipax.skip_step(optax.sgd(1.0), **rules)


def skipped_at(norms: Any, losses: Any = None, **rules: Any) -> list[int]:
    """The steps that are skipped, counted from zero."""
    column = np.asarray(norms, np.float32)[:, None]
    _, states = run_losses(guarded_sgd(**rules), column, losses)
    return np.flatnonzero(states.is_skipped).tolist()


def is_spike(value: float, past: Any, z_max: float, floor: float = 1e-6) -> bool:
    """OLMo-core's comparison, with a least deviation; 0 is theirs."""
    with np.errstate(all="ignore"):
        mean, std = np.mean(past), np.std(past, ddof=1) if len(past) > 1 else np.nan
    # Written so that NaN skips, as there.
    return not value - mean <= z_max * np.fmax(std, floor * abs(mean))


def naive_rule(norms: Any, z_max: float = 6.0, window_size: int = 128) -> list[int]:
    """OLMo-core's rule to the letter, for norms alone: everything enters the window."""
    skipped = []
    for step, norm in enumerate(norms):
        past = norms[max(0, step - window_size) : step]
        if step + 1 >= max(2, window_size // 2) and is_spike(norm, past, z_max, floor=0.0):
            skipped.append(step)
    return skipped


# Against NumPy.


class Rules(NamedTuple):
    max_norm: float | None = None
    z_max: float | None = None
    loss_z_max: float | None = None
    window_size: int = 128
    warmup_steps: int | None = None


def losses_of_a_run() -> np.ndarray:
    """Falling losses with noise, spikes, a plateau and a NaN."""
    rng = np.random.default_rng(5)
    count = sequences.LONG_COUNT
    losses = 4.0 * np.exp(-np.arange(count) / 80) - 0.5 + 0.1 * rng.normal(size=count)
    losses[[70, 140, 141, 305]] += 30.0
    losses[170:215] = losses[170]
    losses[230] = np.nan
    losses[235] = np.inf
    return losses.astype(np.float32)


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
        skipped[step] = rules.max_norm is not None and norm > rules.max_norm
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
        Rules(max_norm=3.0),
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


@pytest.fixture
def _optax_promotes() -> Any:
    with jax.numpy_dtype_promotion("standard"):
        yield


every_optimizer = pytest.mark.parametrize("name", sorted(optimizers()))
promotes = pytest.mark.usefixtures("_optax_promotes")
PARAMS = {"a": jnp.array([[1.0, -2.0], [0.5, -0.0]]), "b": jnp.array([0.1, -0.2])}


def unkeyed(tree: Any) -> Any:
    """Keys as integers, which NumPy can compare."""

    def convert(leaf: Any) -> Any:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(convert, tree)


def assert_bitwise(one: Any, other: Any) -> None:
    trees.assert_bitwise(unkeyed(one), unkeyed(other))


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
        ({"max_norm": 100.0}, [2, 70, 71, 72, 90]),
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


def once(method: Any, updates: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    return method.update(updates, method.init(updates), params, **extra)


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
    everything = {"max_norm": 9.0, "z_max": 6.0, "loss_z_max": 6.0, "warmup_steps": 3}
    assert skipped_at(norms) == list(range(1, 301))
    assert skipped_at(norms, np.ones(302), **everything) == list(range(1, 301))
    assert skipped_at(np.ones(302), norms, **everything) == list(range(1, 301))


def test_edge_a_loss_that_is_not_watched_may_be_nan() -> None:
    assert skipped_at(np.ones(3), [1.0, np.nan, np.inf], z_max=6.0) == []


@pytest.mark.parametrize("norm", [0.0, 1e-30, 25.0, 1e30])
def test_edge_the_first_is_taken(norm: float) -> None:
    assert skipped_at([norm] * 3, z_max=6.0, warmup_steps=1) == []
    assert skipped_at([norm] * 3, [norm] * 3, z_max=1e-3, loss_z_max=1e-3) == []
    assert skipped_at([norm], max_norm=30.0) == ([0] if norm > 30 else [])


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

    assert skipped_at([1.0, 1.0, 1.0], max_norm=late) == [1]


# Chosen ranges of steps.


@pytest.mark.parametrize(
    ("ranges", "skipped"),
    [
        ((), []),
        (((0, 1),), [0]),
        (((2, 4),), [2, 3]),
        (((1, 2), (4, 6)), [1, 4, 5]),
        ([[4, 6], [1, 2]], [1, 4, 5]),
        (((1, 4), (2, 5), (3, 4)), [1, 2, 3, 4]),
        (((0, 2), (2, 4)), [0, 1, 2, 3]),
        (((5, 2**40),), [5, 6, 7]),
        (((2**31 - 1, 2**31), (2**40, 2**41)), []),
        (((np.int64(6), np.uint8(8)),), [6, 7]),
        (np.array([[6, 8]]), [6, 7]),
    ],
)
def test_chosen_ranges_of_steps_are_skipped(ranges: Any, skipped: list[int]) -> None:
    column = np.ones((8, 1), np.float32)
    out, states = run_losses(clipax.skip_step(optax.sgd(1.0), skip_ranges=ranges), column)
    assert np.flatnonzero(states.is_skipped).tolist() == skipped
    assert np.flatnonzero(out[:, 0] == 0).tolist() == skipped
    np.testing.assert_array_equal(states.norm, 1.0)
    counts = states.taken_count + states.skipped_count
    np.testing.assert_array_equal(counts, np.arange(8) + 1)
    np.testing.assert_array_equal(states.step_count, counts)
    assert states.step_count.dtype == np.int32


def test_edge_a_chosen_range_is_as_if_its_steps_had_not_been() -> None:
    """No window learns them, and the schedule does not count them."""
    rules = {
        "max_norm": lambda count: 30.0 - 0.1 * jnp.asarray(count, jnp.float32),
        "z_max": 3.0,
        "loss_z_max": 3.0,
        "window_size": 12,
    }
    sequence, losses = sequences.long_run(3), losses_of_a_run()
    rows = np.arange(sequences.LONG_COUNT)
    is_chosen = ((rows >= 60) & (rows < 75)) | ((rows >= 138) & (rows < 143)) | (rows == 230)
    ranges = ((60, 75), (138, 143), (230, 231))
    chosen = clipax.skip_step(optax.sgd(1.0, momentum=0.9), skip_ranges=ranges, **rules)
    plain = clipax.skip_step(optax.sgd(1.0, momentum=0.9), **rules)
    out, states = run_losses(chosen, sequence, losses)
    kept = {name: leaf[~is_chosen] for name, leaf in sequence.items()}
    kept_out, kept_states = run_losses(plain, kept, losses[~is_chosen])
    trees.assert_bitwise({name: leaf[~is_chosen] for name, leaf in out.items()}, kept_out)
    assert 10 < kept_states.is_skipped.sum() < 200
    last, last_kept = (jax.tree.map(lambda leaf: leaf[-1], s) for s in (states, kept_states))
    skipped = last_kept.skipped_count + is_chosen.sum(dtype=np.int32)
    trees.assert_bitwise(last, last_kept._replace(skipped_count=skipped))
    assert bool(states.is_skipped[is_chosen].all())
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(leaf[is_chosen], 0)
    assert last.step_count == sequences.LONG_COUNT


def test_edge_chosen_steps_neither_count_as_steps_in_a_row_nor_end_the_row() -> None:
    column = np.array([1, np.nan, 1, np.nan, np.nan, 1, 1], np.float32)[:, None]
    method = clipax.skip_step(optax.sgd(1.0), skip_ranges=((2, 4), (6, 7)))
    _, states = run_losses(method, column)
    assert states.is_skipped.tolist() == [False, True, True, True, True, False, True]
    assert states.consecutive_count.tolist() == [0, 1, 1, 1, 2, 0, 0]
    assert states.skipped_count.tolist() == [0, 1, 2, 3, 4, 4, 5]


def test_a_run_is_taken_up_again_with_other_ranges() -> None:
    """The state that was saved says which step is next, and is none of the ranges' business."""
    column = np.array([1, 1, np.nan, 1, 1, 1, 1, 1], np.float32)[:, None]

    def step(state: Any, updates: Any, method: Any) -> Any:
        _, state = method.update(updates, state)
        return state

    plain = clipax.skip_step(optax.sgd(1.0), z_max=6.0)
    other = clipax.skip_step(optax.sgd(1.0), z_max=6.0, skip_ranges=((0, 2), (4, 6)))
    state = plain.init(column[0])
    trees.assert_same_type(state, other.init(column[0]))
    skipped = []
    for row, updates in enumerate(column):
        state = step(state, updates, plain if row < 4 else other)
        skipped.append(bool(state.is_skipped))
    assert np.flatnonzero(skipped).tolist() == [2, 4, 5]


@promotes
def test_chosen_ranges_in_the_wrappers_of_optax() -> None:
    """Outside of `MultiSteps` a step is one gradient, inside it is a sum of them."""
    column = np.arange(1, 9, dtype=np.float32)[:, None]
    outside = clipax.skip_step(optax.MultiSteps(optax.sgd(1.0), 2), skip_ranges=((1, 3),))
    assert run_losses(outside, column)[0][:, 0].tolist() == [0, 0, 0, -2.5, 0, -5.5, 0, -7.5]
    inner = clipax.skip_step(optax.sgd(1.0), skip_ranges=((1, 3),))
    inside = optax.MultiSteps(inner, 2)
    through = optax.GradientTransformationExtraArgs(inside.init, inside.update)
    assert run_losses(through, column)[0][:, 0].tolist() == [0, -1.5, 0, 0, 0, 0, 0, -7.5]
    injected = optax.inject_hyperparams(clipax.skip_step)(
        optax.sgd(1.0), 6.5, skip_ranges=((1, 3),)
    )
    out = run_losses(injected, column)[0][:, 0].tolist()
    assert out == [-1, 0, 0, -4, -5, -6, 0, 0]


@promotes
def test_the_count_of_steps_leaves_optax_its_own_name() -> None:
    method = clipax.skip_step(optax.adam(1e-3), 1.0, skip_ranges=((0, 2),))
    _, state = once(method, GRADS)
    assert int(optax.tree.get(state, "taken_count")) == 0
    assert int(optax.tree.get(state, "skipped_count")) == 1
    assert int(optax.tree.get(state, "count")) == 0


NO_RANGES = [
    *(None, 3, 2.5, "1-2", (1, 2), [(1,)], ((1, 2, 3),), ((1, 1),), ((2, 1),), ((-1, 2),)),
    *(((1.0, 2.0),), ((False, True),), ((1, None),), ("12",), (range(1, 2),), ((0, 1), (3, 2))),
    *(({1, 2},), np.ones((2, 2)), np.array([1, 2]), np.ones((1, 3), int)),
]


@pytest.mark.parametrize("bad", NO_RANGES, ids=repr)
def test_bad_ranges_are_refused(bad: Any) -> None:
    wanted = r"^skip_ranges must be pairs \(start, stop\) of integers with 0 <= start < stop, as "
    with pytest.raises(ValueError, match=wanted) as caught:
        clipax.skip_step(optax.sgd(1.0), skip_ranges=bad)
    assert repr(bad) in str(caught.value)


def test_traced_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^skip_ranges must be known while tracing, got"):
        clipax.skip_step(optax.sgd(1.0), skip_ranges=jnp.array([[1, 2]]))


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

    assert skipped_at([1.0, np.nan, 1.0, 1.0, 1.0, 2.2], max_norm=growing) == [0, 1, 2, 5]


def test_bounds_may_be_arrays() -> None:
    column = np.array([1.0, 2.0, 1.0, 4.0], np.float32)[:, None]
    for bound in (3.0, 3, jnp.array(3.0), np.array(3.0), lambda count: 3.0):
        _, states = run_losses(clipax.skip_step(optax.sgd(1.0), bound), column)
        assert states.is_skipped.tolist() == [False, False, False, True]
    for bound in (3.0, 3, jnp.array(3.0), np.array(3.0)):
        method = clipax.skip_step(optax.sgd(1.0), z_max=bound, warmup_steps=4)
        assert run_losses(method, column)[1].is_skipped.tolist() == [False, False, False, True]
    assert skipped_at([1.0, np.nan, 1e30], max_norm=math.inf) == [1]
    infinite = {"z_max": math.inf, "loss_z_max": math.inf, "window_size": 2}
    assert skipped_at([1.0, 1.0, 1.0, 9e9], [1.0, 1.0, 1.0, 9e9], **infinite) == []


@promotes
def test_hyperparameters_can_be_injected() -> None:
    static = ("window_size", "warmup_steps")
    make = optax.inject_hyperparams(clipax.skip_step, static_args=static)
    injected = make(optax.sgd(1.0), max_norm=lambda count: 2.5 + count, z_max=3.0, warmup_steps=4)
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


# Every bad argument.


@pytest.mark.parametrize("name", ["max_norm", "z_max", "loss_z_max"])
@pytest.mark.parametrize("bad", [0, -1.0, -math.inf, *sequences.NO_NUMBERS])
def test_bad_bounds_are_refused(name: str, bad: Any) -> None:
    if bad is None:
        return  # which leaves the rule out
    with pytest.raises(ValueError, match=rf"^{name} must be a number > 0, got ") as caught:
        clipax.skip_step(optax.sgd(1.0), **{name: bad})
    assert repr(bad) in str(caught.value)


def test_bounds_that_are_no_scalar_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_norm must be one number, array or schedule"):
        clipax.skip_step(optax.sgd(1.0), {"w": 1.0})
    for name in ("max_norm", "z_max", "loss_z_max"):
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
