"""AutoClip against NumPy's quantile of the growing history, and at its edges."""

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


def oracle(
    norms: np.ndarray,
    q: float = 0.1,
    window: int = 1000,
    current: bool = True,
    least: int = 1,
    cap: float = np.inf,
) -> np.ndarray:
    """The bound of every step; NaN where the norm is none."""
    history: list[float] = []
    bounds = []
    for norm in norms:
        past = history[-window:]
        if np.isfinite(norm):
            history.append(norm)
        known = history[-window:] if current else past
        bound = np.quantile(known, q) if len(known) >= least else np.inf
        bounds.append(min(bound, cap) if np.isfinite(norm) else np.nan)
    return np.array(bounds)


SETTINGS = [
    {},
    {"q": 0.9},
    {"q": 0.5, "window": 7},
    {"q": 0.25, "window": 64, "current": False},
    {"q": 0.95, "window": 30, "current": False, "least": 30, "cap": 2.5},
    {"q": 0.1, "cap": 0.6},
    {"q": 0.333, "window": 1, "current": False},
]


def build(setting: dict[str, Any], **more: Any) -> Any:
    names = {"q": "quantile", "window": "window_size", "current": "count_current"}
    names |= {"least": "warmup_steps", "cap": "max_norm"}
    return clipax.autoclip(**{names[key]: value for key, value in setting.items()}, **more)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1], [0]))
def test_equals_the_oracle_globally(setting: dict[str, Any], seed: int) -> None:
    sequences.assert_follows(build, oracle, setting, seed)


@pytest.mark.parametrize("setting", trees.mostly_slow(SETTINGS, SETTINGS[:2]))
def test_equals_the_oracle_leaf_by_leaf(setting: dict[str, Any]) -> None:
    sequences.assert_follows_leaf_by_leaf(build, oracle, setting)


def test_by_hand_at_the_median() -> None:
    _, states = run_norms(clipax.autoclip(0.5), FEW_NORMS)
    np.testing.assert_allclose(states.max_norm[:5], [1, 1.1, 1, 1.05, 1], rtol=1e-6)


def test_by_hand_as_trellis() -> None:
    method = clipax.autoclip(0.5, 3, count_current=False, warmup_steps=3, max_norm=2.5)
    clipped, states = run_norms(method, [1, 2, 3, np.nan, 4, 0.5])
    finite = [0, 1, 2, 4, 5]
    np.testing.assert_allclose(states.max_norm[finite], [2.5, 2.5, 2.5, 2, 2.5], rtol=1e-6)
    np.testing.assert_allclose(clipped[finite], [1, 2, 2.5, 2, 0.5], rtol=1e-6)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_clips_the_share_that_lies_above_the_quantile(q: float) -> None:
    norms = np.random.default_rng(3).lognormal(size=2000)
    _, states = run_norms(clipax.autoclip(q, 500), norms)
    np.testing.assert_allclose(np.mean(states.coefficient < 1), 1 - q, atol=0.03)


def test_edge_the_first_norms_are_bounded_by_the_cap_alone() -> None:
    clipped, states = run_norms(clipax.autoclip(0.5, warmup_steps=3, max_norm=4.0), [9, 1, 8, 8])
    np.testing.assert_allclose(clipped, [4, 1, 4, 4], rtol=1e-6)
    clipped, states = run_norms(clipax.autoclip(0.5, warmup_steps=3), [9, 1, 8, 8])
    np.testing.assert_allclose(clipped, [9, 1, 8, 8], rtol=1e-6)
    np.testing.assert_array_equal(states.max_norm[:2], np.inf)


def test_edge_equal_norms_are_the_identity() -> None:
    updates = jnp.array([0.3, -0.7, 0.1])
    for q in (0.1, 0.5, 0.9):
        clipped, states = sequences.scanned(clipax.autoclip(q, 5), jnp.stack([updates] * 12))
        np.testing.assert_array_equal(clipped, np.stack([updates] * 12))
        np.testing.assert_array_equal(states.coefficient, 1.0)


def test_edge_zeros_enter_the_history() -> None:
    clipped, states = run_norms(clipax.autoclip(0.5, 4), [0, 0, 0, 2, 2, 2])
    np.testing.assert_allclose(states.max_norm, [0, 0, 0, 0, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(clipped, [0, 0, 0, 0, 1, 2], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_edge_what_is_no_norm_stays_out_of_the_history(value: float) -> None:
    clipped, _ = run_norms(clipax.autoclip(0.5), [1, 2, value, 3, 4])
    without, _ = run_norms(clipax.autoclip(0.5), [1, 2, 3, 4])
    np.testing.assert_array_equal(clipped[[0, 1, 3, 4]], without)
    assert np.isnan(clipped[2])


def test_the_naive_history_is_poisoned() -> None:
    naive = [np.quantile([1, 2, np.nan, 3][: n + 1], 0.5) for n in range(4)]
    assert np.isnan(naive[3])
    assert np.isfinite(run_norms(clipax.autoclip(0.5), [1, 2, np.nan, 3])[1].max_norm[3])


def test_edge_only_what_is_no_norm_so_far() -> None:
    nothing = np.full(3, np.nan)
    _, states = run_norms(clipax.autoclip(max_norm=2.0), [*nothing, 1.0])
    np.testing.assert_array_equal(states.max_norm[3], 1.0)
    past_only = clipax.autoclip(count_current=False, max_norm=2.0)
    clipped, states = run_norms(past_only, [*nothing, 5.0])
    np.testing.assert_allclose(clipped[3], 2.0, rtol=1e-6)
    clipped, _ = run_norms(clipax.autoclip(count_current=False), [*nothing, 5.0])
    assert clipped[3] == 5.0


def test_a_cap_may_be_scheduled() -> None:
    method = clipax.autoclip(0.9, max_norm=lambda count: 4.0 - count.astype(float))
    clipped, _ = run_norms(method, [9, 9, 9])
    np.testing.assert_allclose(clipped, [4, 3, 2], rtol=1e-6)


def test_metrics_give_the_window() -> None:
    method = clipax.autoclip(0.9)
    state = method.init(jnp.zeros(1))
    for norm in FEW_NORMS:
        _, state = method.update(jnp.array([norm]), state)
    metrics = clipax.metrics(state)
    for key, q in (("norm_q50", 0.5), ("norm_q90", 0.9), ("max_norm", 0.9)):
        np.testing.assert_allclose(metrics[key], np.quantile(FEW_NORMS, q), rtol=1e-6)


def test_the_window_is_sorted_once_for_all_leaves() -> None:
    sequence = sequences.at(sequences.long_run(), 0) | {"c": jnp.ones(3), "d": jnp.ones(())}
    method = clipax.autoclip(norm=clipax.leaf_norm)
    jaxpr = str(jax.make_jaxpr(method.update)(sequence, method.init(sequence)))
    assert jaxpr.count("= sort[") == 1


@pytest.mark.parametrize("bad", [0, 1, 0.0, 1.0, -0.1, 10, *refusals.NO_NUMBERS])
def test_bad_quantiles_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="quantile must be"):
        clipax.autoclip(bad)


@pytest.mark.parametrize("name", ["window_size", "warmup_steps"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, 10.0, True, None, "5"])
def test_bad_lengths_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got"):
        clipax.autoclip(**{name: bad})


@pytest.mark.parametrize("bad", [0, -1.0, np.nan, True, "1"])
def test_bad_caps_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be a number > 0"):
        clipax.autoclip(max_norm=bad)


@pytest.mark.parametrize("bad", [1, None, "yes"])
def test_bad_flags_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="count_current must be True or False"):
        clipax.autoclip(count_current=bad)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("size", [5000, 100_000])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99, 0.999])
def test_ranks_in_long_windows_are_exact(size: int, q: float) -> None:
    rng = np.random.default_rng(9)
    norms = np.exp(0.1 * rng.normal(size=size)).astype(np.float32)
    norms[rng.permutation(size)[: size // 100]] *= 1000
    method = clipax.autoclip(q, size)
    state = method.init(jnp.zeros(1))
    (window,) = state.threshold
    filled = window._replace(
        values=jnp.asarray(norms)[None], value_count=window.value_count + size
    )
    _, state = method.update(jnp.array([norms[0]]), state._replace(threshold=(filled,)))
    expected = np.quantile(norms.astype(np.float64), q)
    np.testing.assert_allclose(state.max_norm, expected, rtol=2e-6)


@pytest.mark.parametrize("bad", [None, 2.0, "leaf"])
def test_bad_norms_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="norm must be a function, got"):
        clipax.autoclip(norm=bad)


def test_an_infinite_first_norm_is_not_held_against_nothing() -> None:
    method = clipax.autoclip()
    updates = jnp.array([jnp.inf, 1.0])
    clipped, state = method.update(updates, method.init(updates))
    np.testing.assert_array_equal(clipped, updates)
    assert np.isinf(state.max_norm)
