"""ZClip against its paper's code in NumPy, its traps and its edges."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees
from sequences import FEW_NORMS, run_norms

import clipax

SHRINK = {
    "reciprocal": lambda z, mean, std, z_max: mean + z_max * std / (z / z_max),
    "mean": lambda z, mean, std, z_max: mean,
    "limit": lambda z, mean, std, z_max: mean + z_max * std,
}
BOUNDS = {
    "reciprocal": clipax.thresholds.reciprocal_bound,
    "mean": clipax.thresholds.mean_bound,
    "limit": clipax.thresholds.limit_bound,
}


def oracle(
    norms: np.ndarray,
    z_max: float = 2.5,
    decay: float = 0.97,
    warmup: int = 25,
    cap: float = 1.0,
    mode: str = "reciprocal",
    factor: float = 1.0,
    raw: bool = False,
    skip: bool = False,
    min_std: float = 1e-3,
    eps: float = 1e-6,
) -> np.ndarray:
    """The largest norm that each step lets through; NaN where the norm is none."""
    start: list[float] = []
    mean = variance = 0.0
    bounds = []
    for norm in norms:
        if not np.isfinite(norm):
            bounds.append(np.nan)
            continue
        if len(start) < warmup:
            start.append(norm)
            mean, variance = np.mean(start), np.var(start)
            bounds.append(cap)
            continue
        std = np.sqrt(variance)
        z = (norm - mean) / (std + eps)
        limit = mean + z_max * (std if mode == "limit" else std + eps)
        is_spike, value = norm > limit, norm
        bounds.append(min(limit, cap))
        if is_spike:
            shrunk = factor * SHRINK[mode](z, mean, std, z_max)
            bounds[-1] = min(shrunk, cap)
            if not raw and std > min_std * mean:
                value = min(shrunk, norm)
        if is_spike and skip and std > min_std * mean:
            continue
        mean = decay * mean + (1 - decay) * value
        variance = decay * variance + (1 - decay) * (value - mean) ** 2
    return np.array(bounds)


def learned(states: Any) -> Any:
    """The statistics after each step, under a cap or not."""
    return jax.tree.leaves(states.threshold, is_leaf=lambda node: hasattr(node, "std"))[0]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"cap": np.inf},
    {"cap": np.inf, "mode": "mean"},
    {"cap": np.inf, "mode": "limit", "decay": 0.9},
    {"cap": 2.0, "z_max": 1.5, "warmup": 5, "decay": 0.99},
    {"cap": np.inf, "raw": True},
    {"cap": np.inf, "skip": True, "z_max": 4.0},
    {"cap": np.inf, "factor": 1.3},
    {"cap": np.inf, "warmup": 1},
    {"cap": np.inf, "warmup": 100, "decay": 0.0},
]


def build(setting: dict[str, Any], **more: Any) -> Any:
    names = {"warmup": "warmup_steps", "cap": "max_norm", "raw": "raw_history"}
    given = {names.get(key, key): value for key, value in setting.items()}
    if given.pop("skip", False):
        given["learn_from_spikes"] = False
    if "mode" in given:
        given["spike_bound"] = BOUNDS[given.pop("mode")]
    return clipax.zclip(**given, **more)


@pytest.mark.slow_but(5)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1], [0]))
def test_equals_the_oracle_globally(setting: dict[str, Any], seed: int) -> None:
    sequences.assert_follows(build, oracle, setting, seed)


@pytest.mark.parametrize("setting", trees.mostly_slow(SETTINGS, SETTINGS[:2]))
def test_equals_the_oracle_leaf_by_leaf(setting: dict[str, Any]) -> None:
    sequences.assert_follows_leaf_by_leaf(build, oracle, setting)


def test_by_hand_without_a_cap() -> None:
    _, states = run_norms(clipax.zclip(warmup_steps=5, max_norm=None), FEW_NORMS)
    factors = np.ones(10)
    factors[6] = 0.2060625
    np.testing.assert_allclose(states.coefficient, factors, rtol=1e-6)
    np.testing.assert_allclose(states.max_norm[6], 1.0303127, rtol=1e-6)
    rule = learned(states)
    np.testing.assert_allclose(rule.mean[-1], 1.00055997, rtol=1e-6)
    np.testing.assert_allclose(rule.std[-1] ** 2, 0.02235821, rtol=1e-5)


def test_by_hand_with_the_usual_cap() -> None:
    clipped, _ = run_norms(clipax.zclip(warmup_steps=5), FEW_NORMS)
    np.testing.assert_allclose(clipped, np.minimum(FEW_NORMS, 1.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("bound", "factor"),
    [(clipax.thresholds.mean_bound, 0.2), (clipax.thresholds.limit_bound, 0.26964189)],
)
def test_by_hand_the_other_bounds(bound: Any, factor: float) -> None:
    method = clipax.zclip(warmup_steps=5, max_norm=None, spike_bound=bound)
    _, states = run_norms(method, FEW_NORMS)
    np.testing.assert_allclose(states.coefficient[6], factor, rtol=1e-6)


@pytest.mark.parametrize(("bound", "is_clipped"), [("limit", True), ("reciprocal", False)])
@pytest.mark.parametrize("size", [1e-7, 1e-5])
def test_eps_decides_what_a_spike_is_unless_the_limit_bounds_it(
    bound: str, is_clipped: bool, size: float
) -> None:
    """A spike is above mean + 2 * std by less than eps adds, where norms are as small."""
    norms = size * np.array([1.0, 3.0, 4.1])
    method = clipax.zclip(2.0, warmup_steps=2, max_norm=None, spike_bound=BOUNDS[bound], eps=size)
    _, states = run_norms(method, norms)
    assert (states.coefficient[2] < 1) == is_clipped
    expected = oracle(norms, 2.0, warmup=2, cap=np.inf, mode=bound, eps=size)
    np.testing.assert_allclose(states.max_norm[2], expected[2], rtol=1e-5)


@pytest.mark.slow_but(5)
@pytest.mark.parametrize("mode", SHRINK)
@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_the_shortest_warm_ups_equal_the_oracle(mode: str, warmup: int) -> None:
    norms = np.random.default_rng(warmup).lognormal(sigma=0.5, size=60)
    method = build({"mode": mode, "warmup": warmup, "cap": np.inf})
    _, states = run_norms(method, norms)
    expected = oracle(norms, mode=mode, warmup=warmup, cap=np.inf)
    np.testing.assert_allclose(states.max_norm, expected, rtol=1e-5)


def test_a_warm_up_without_spread_locks_the_naive_rule_and_not_this_one() -> None:
    norms = np.array([1.0] * 25 + [2.0] * 200)
    naive = oracle(norms, cap=np.inf, min_std=-1.0)
    np.testing.assert_allclose(naive[25:] / norms[25:], 0.5, rtol=1e-3)
    clipped, _ = run_norms(clipax.zclip(max_norm=None), norms)
    # Only the first ones shrink, before the history knows the new level.
    np.testing.assert_allclose(clipped[25], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(clipped[65:], 2.0)


@pytest.mark.parametrize("mode", ["reciprocal", "mean"])
@pytest.mark.parametrize("skip", [False, True])
def test_edge_the_200th_spike_in_a_row_is_learned_raw(mode: str, skip: bool) -> None:
    start = np.random.default_rng(3).lognormal(sigma=0.8, size=25)
    norms = np.concatenate([start, np.full(230, 1e5)])
    setting = {"cap": np.inf, "mode": mode, "skip": skip, "min_std": 0.0}
    _, states = run_norms(build(setting), norms)
    # Until then, the bounds are the paper's.
    np.testing.assert_allclose(states.max_norm[:225], oracle(norms, **setting)[:225], rtol=1e-4)
    assert states.max_norm[224] < 50
    mean = learned(states).mean[223]
    np.testing.assert_allclose(learned(states).mean[224], 0.97 * mean + 0.03 * 1e5, rtol=1e-5)
    assert (states.coefficient[234:] >= 0.5).all()
    norms[100] = start.mean()
    _, states = run_norms(build(setting), norms[:230])
    np.testing.assert_allclose(states.max_norm, oracle(norms[:230], **setting), rtol=1e-4)


@pytest.mark.parametrize("level", [1.01, 1.5, 5.0, 100.0, 1e6])
@pytest.mark.parametrize(
    "bound", [clipax.thresholds.reciprocal_bound, clipax.thresholds.limit_bound]
)
def test_no_level_locks_it_after_norms_without_spread(level: float, bound: Any) -> None:
    norms = np.array([1.0] * 25 + [level] * 600)
    clipped, _ = run_norms(clipax.zclip(max_norm=None, spike_bound=bound), norms)
    assert clipped[-1] == np.float32(level)


def test_a_spread_that_shrinks_to_nothing_does_not_lock_the_mean_bound() -> None:
    norms = np.array([1.0, 1.02] * 13 + [2.0] * 4000)
    for method, last in (
        (clipax.zclip(max_norm=None, spike_bound=clipax.thresholds.mean_bound), 1.05),
        (
            clipax.zclip(
                max_norm=None, spike_bound=clipax.thresholds.mean_bound, raw_history=True
            ),
            2.0,
        ),
    ):
        clipped, _ = run_norms(method, norms)
        assert clipped[-1] > last - 1e-6
    naive = oracle(norms, cap=np.inf, mode="mean", min_std=-1.0)
    assert naive[-1] < 1.02


def test_one_bad_norm_poisons_the_naive_average_and_not_this_one() -> None:
    naive_mean = 0.97 * 1.0 + 0.03 * np.nan
    assert np.isnan(naive_mean)
    method = clipax.zclip(warmup_steps=5, max_norm=None)
    with_bad = [*FEW_NORMS[:3], np.nan, *FEW_NORMS[3:8], np.inf, *FEW_NORMS[8:]]
    clipped, states = run_norms(method, with_bad)
    without, others = run_norms(method, FEW_NORMS)
    np.testing.assert_array_equal(np.delete(clipped, [3, 9]), without)
    np.testing.assert_array_equal(learned(states).std[-1], learned(others).std[-1])


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e4, 1e18, 1e30])
def test_the_spread_of_norms_of_any_size(size: float) -> None:
    norms = np.float32(size) * np.array(FEW_NORMS * 8)
    # The naive second moment less the square of the first goes negative, or out of range.
    with np.errstate(over="ignore", under="ignore"):
        squares = np.float32(0.97) ** np.arange(80, dtype=np.float32) * norms.astype(np.float32)
        assert size not in (1e-20, 1e30) or not np.all((squares**2 > 1e-38) & (squares**2 < 1e38))
    method = clipax.zclip(warmup_steps=5, max_norm=None, eps=size * 1e-6)
    _, states = run_norms(method, norms)
    usual, expected = run_norms(clipax.zclip(warmup_steps=5, max_norm=None), FEW_NORMS * 8)
    np.testing.assert_allclose(states.coefficient, expected.coefficient, rtol=1e-5)
    assert usual[6] < 2


def test_the_variance_never_goes_negative() -> None:
    rng = np.random.default_rng(0)
    norms = (1000.0 + 0.001 * rng.normal(size=300)).astype(np.float32)
    first = second = np.float32(0)
    naive = []
    for count, norm in enumerate(norms):
        weight = np.float32(max(1 / (count + 1), 0.03))
        first += weight * (norm - first)
        second += weight * (norm * norm - second)
        naive.append(second - first * first)
    assert min(naive) < 0
    _, states = run_norms(clipax.zclip(max_norm=None), norms)
    assert np.all(learned(states).std[1:] >= 0)
    assert np.all(np.isfinite(states.max_norm[25:]))
    np.testing.assert_allclose(learned(states).mean[-1], 1000.0, rtol=1e-6)


def test_a_factor_never_teaches_a_norm_larger_than_it_was() -> None:
    method = clipax.zclip(warmup_steps=5, max_norm=None, factor=1e3)
    _, states = run_norms(method, FEW_NORMS)
    assert states.max_norm[6] > 1000
    assert learned(states).mean[6] < 0.97 * 1.01 + 0.03 * 5.01


def test_edge_warm_up_is_bounded_by_the_cap_alone() -> None:
    norms = [1, 50, 2, 3, 4]
    clipped, _ = run_norms(clipax.zclip(warmup_steps=5, max_norm=10.0), norms)
    np.testing.assert_allclose(clipped, [1, 10, 2, 3, 4], rtol=1e-6)
    _, states = run_norms(clipax.zclip(warmup_steps=5, max_norm=10.0), norms)
    np.testing.assert_allclose(learned(states).mean[-1], np.mean(norms), rtol=1e-6)
    np.testing.assert_allclose(learned(states).std[-1], np.std(norms), rtol=1e-6)


def test_edge_no_spike_is_the_identity() -> None:
    rng = np.random.default_rng(1)
    sequence = rng.normal(size=(60, 50)).astype(np.float32)
    clipped, states = sequences.scanned(clipax.zclip(9.0, max_norm=None), sequence)
    np.testing.assert_array_equal(clipped, sequence)
    assert np.isfinite(states.max_norm[25:]).all()


def test_edge_a_spike_after_norms_without_spread() -> None:
    clipped, states = run_norms(clipax.zclip(max_norm=None), [2.0] * 30 + [100.0, 2.0, 2.0])
    np.testing.assert_allclose(clipped[30], 2.0, rtol=1e-4)
    np.testing.assert_allclose(learned(states).mean[30], 0.97 * 2 + 0.03 * 100, rtol=1e-5)
    np.testing.assert_array_equal(clipped[31:], 2.0)


def test_edge_zeros_enter_the_history() -> None:
    clipped, states = run_norms(clipax.zclip(warmup_steps=2, max_norm=None), [1.0, 3.0, 0.0])
    assert clipped[2] == 0
    np.testing.assert_allclose(learned(states).mean[2], 0.97 * 2, rtol=1e-6)


def test_edge_only_what_is_no_norm_so_far() -> None:
    clipped, states = run_norms(clipax.zclip(warmup_steps=2), [np.nan, np.inf, 5.0])
    np.testing.assert_allclose(clipped[2], 1.0, rtol=1e-6)
    assert learned(states).norm_count[-1] == 1


def test_clips_few_of_scattered_norms() -> None:
    norms = np.random.default_rng(4).lognormal(sigma=0.5, size=4000)
    _, states = run_norms(clipax.zclip(max_norm=None), norms)
    assert 0.03 < np.mean(states.coefficient < 1) < 0.08


def test_a_cap_may_be_scheduled_and_may_be_infinite() -> None:
    method = clipax.zclip(max_norm=lambda count: 4.0 - count.astype(jnp.float32))
    clipped, _ = run_norms(method, [9, 9, 9])
    np.testing.assert_allclose(clipped, [4, 3, 2], rtol=1e-6)


NUMBERS = [*refusals.NO_NUMBERS, np.ones(2)]


@pytest.mark.parametrize("name", ["z_max", "factor", "eps"])
@pytest.mark.parametrize("bad", [0, -1.0, np.inf, *NUMBERS])
def test_bad_positive_numbers_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        clipax.zclip(**{name: bad})


@pytest.mark.parametrize("name", ["decay", "min_std"])
@pytest.mark.parametrize("bad", [1, 1.0, -0.1, *NUMBERS])
def test_bad_decays_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        clipax.zclip(**{name: bad})


@pytest.mark.parametrize("bad", [0, -3, 2.5, True, None, "5"])
def test_bad_warm_ups_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="warmup_steps must be an integer >= 1, got"):
        clipax.zclip(warmup_steps=bad)


@pytest.mark.parametrize("bad", [0, -1.0, np.nan, True, "1"])
def test_bad_caps_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be a number > 0"):
        clipax.zclip(max_norm=bad)


@pytest.mark.parametrize("name", ["raw_history", "learn_from_spikes"])
def test_bad_flags_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 1"):
        clipax.zclip(**{name: 1})


@pytest.mark.parametrize("bad", ["mean", None, 1.0])
def test_bad_spike_bounds_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="spike_bound must be a function"):
        clipax.zclip(spike_bound=bad)


def test_without_a_past_the_mean_is_the_last_norm() -> None:
    method = clipax.zclip(decay=0.0, warmup_steps=1, max_norm=None)
    clipped, states = run_norms(method, [1, 1e8, 1, 1, 1])
    np.testing.assert_array_equal(clipped, [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(learned(states).mean[:, 0], [1, 1e8, 1, 1, 1])
