"""Mean and standard deviations over a window against NumPy, and at the edges."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees
from sequences import FEW_NORMS, run_norms

import clipax


def oracle(
    norms: np.ndarray, z_max: float = 3.0, window: int = 128, least: int | None = None
) -> np.ndarray:
    """The bound of every step; NaN where the norm is none."""
    least = max(2, window // 2) if least is None else least
    history: list[float] = []
    bounds = []
    for norm in norms:
        past = np.array(history[-window:])
        bound = np.inf
        if len(past) >= least:
            bound = past.mean() + z_max * max(past.std(), 1e-6 * past.mean())
        bounds.append(bound if np.isfinite(norm) else np.nan)
        if np.isfinite(norm):
            history.append(norm)
    return np.array(bounds)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"z_max": 1.0, "window": 16},
    {"z_max": 0.1, "window": 5, "least": 5},
    {"z_max": 6.0, "window": 64, "least": 10},
    {"z_max": 2.0, "window": 2},
    {"z_max": 2.0, "window": 3},
]


def build(setting: dict[str, Any], **more: Any) -> Any:
    names = {"window": "window_size", "least": "warmup_steps"}
    return clipax.clip_by_mean_std(
        **{names.get(key, key): value for key, value in setting.items()}, **more
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1], [0]))
def test_equals_the_oracle_globally(setting: dict[str, Any], seed: int) -> None:
    sequences.assert_follows(build, oracle, setting, seed)


@pytest.mark.parametrize("setting", trees.mostly_slow(SETTINGS, SETTINGS[:2]))
def test_equals_the_oracle_leaf_by_leaf(setting: dict[str, Any]) -> None:
    sequences.assert_follows_leaf_by_leaf(build, oracle, setting)


def test_by_hand() -> None:
    _, states = run_norms(clipax.clip_by_mean_std(3.0, 4), FEW_NORMS)
    expected = [np.inf, np.inf, 1.4, 1.4899, 1.4687, 1.4743, 1.2854, 7.2005]
    np.testing.assert_allclose(states.max_norm[:8], expected, rtol=5e-5)
    np.testing.assert_allclose(states.coefficient[6], 1.2854 / 5, rtol=5e-5)


@pytest.mark.parametrize("size", [1e-25, 1e-6, 1e6, 1e30])
def test_norms_of_any_size(size: float) -> None:
    with np.errstate(over="ignore", under="ignore"):
        naive = np.mean(np.square(np.float32(size) * np.array(FEW_NORMS, np.float32)))
    assert size not in (1e-25, 1e30) or naive in (0, np.inf)
    method = clipax.clip_by_mean_std(3.0, 4)
    _, states = run_norms(method, np.float32(size) * np.array(FEW_NORMS))
    _, usual = run_norms(method, FEW_NORMS)
    np.testing.assert_allclose(states.coefficient, usual.coefficient, rtol=1e-5)


def test_the_variance_never_goes_negative() -> None:
    norms = (1000 + 1e-3 * np.random.default_rng(0).normal(size=60)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(norms, 8)
    assert np.min(np.mean(windows**2, axis=1) - np.mean(windows, axis=1) ** 2) < 0
    _, states = run_norms(clipax.clip_by_mean_std(1.0, 8), norms)
    np.testing.assert_allclose(states.max_norm[4:], oracle(norms, 1.0, 8)[4:], rtol=1e-6)


def test_a_new_level_is_usual_within_a_window() -> None:
    clipped, _ = run_norms(clipax.clip_by_mean_std(3.0, 16), [1.0] * 20 + [10.0] * 20)
    assert clipped[20] < 1.001
    np.testing.assert_array_equal(clipped[25:], 10.0)


def test_edge_the_first_norms_are_bounded_by_the_cap_alone() -> None:
    clipped, states = run_norms(clipax.clip_by_mean_std(3.0, 6, max_norm=2.0), [9, 1, 9, 1])
    np.testing.assert_allclose(clipped, [2, 1, 2, 1], rtol=1e-6)
    _, states = run_norms(clipax.clip_by_mean_std(3.0, 6), [9, 1, 9, 1])
    np.testing.assert_array_equal(states.max_norm, [np.inf] * 3 + [states.max_norm[3]])


def test_edge_equal_norms_are_the_identity() -> None:
    updates = np.stack([np.array([0.3, -0.7, 0.1], np.float32)] * 12)
    clipped, states = sequences.scanned(clipax.clip_by_mean_std(3.0, 4), updates)
    np.testing.assert_array_equal(clipped, updates)
    assert np.isfinite(states.max_norm[3:]).all()


def test_edge_the_first_after_zeros() -> None:
    clipped, states = run_norms(clipax.clip_by_mean_std(3.0, 4), [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(clipped[:4], 0)
    np.testing.assert_allclose(clipped[4], 1.0, rtol=1e-6)
    assert states.max_norm[4] > 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_edge_what_is_no_norm_stays_out_of_the_history(value: float) -> None:
    method = clipax.clip_by_mean_std(1.0, 4)
    with_bad = [*FEW_NORMS[:4], value, *FEW_NORMS[4:]]
    clipped, _ = run_norms(method, with_bad)
    without, _ = run_norms(method, FEW_NORMS)
    np.testing.assert_array_equal(np.delete(clipped, 4), without)
    # The naive window has no mean while the bad one is in it.
    assert not np.isfinite(np.mean(with_bad[2:6]))


def test_edge_only_what_is_no_norm_so_far() -> None:
    nothing = [np.nan, np.inf, -np.inf]
    clipped, _ = run_norms(clipax.clip_by_mean_std(3.0, 2), [*nothing, 7.0])
    assert clipped[3] == 7
    clipped, _ = run_norms(clipax.clip_by_mean_std(3.0, 2, max_norm=2.0), [*nothing, 7.0])
    np.testing.assert_allclose(clipped[3], 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("window", "first"), [(1, 2), (2, 2), (3, 2), (4, 2), (5, 2), (6, 3), (9, 4), (16, 8)]
)
def test_the_default_warm_up_is_half_a_window_and_no_less_than_two_norms(
    window: int, first: int
) -> None:
    _, states = run_norms(clipax.clip_by_mean_std(3.0, window), np.ones(12))
    np.testing.assert_array_equal(np.isfinite(states.max_norm), np.arange(12) >= first)


def test_a_warm_up_of_one_norm_is_one() -> None:
    _, states = run_norms(clipax.clip_by_mean_std(3.0, 2, warmup_steps=1), np.ones(4))
    np.testing.assert_array_equal(np.isfinite(states.max_norm), np.arange(4) >= 1)


@pytest.mark.parametrize("bad", [0, -1.0, np.inf, jnp.ones(2), *refusals.NO_NUMBERS])
def test_bad_k_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="z_max must be"):
        clipax.clip_by_mean_std(bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "5"])
@pytest.mark.parametrize("name", ["window_size", "warmup_steps"])
def test_bad_lengths_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got"):
        clipax.clip_by_mean_std(**{name: bad})


@pytest.mark.parametrize("bad", [0, -1.0, np.nan, True, "1"])
def test_bad_caps_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be a number > 0"):
        clipax.clip_by_mean_std(max_norm=bad)


def test_a_spike_of_the_largest_floats_leaves_a_bound() -> None:
    norms = [1.0, 1.1, 1e38, 1.0, 1.1, 1.0]
    for run in (run_norms, run_norms_eagerly):
        clipped = run(clipax.clip_by_mean_std(3.0, 6, warmup_steps=1), norms)[0]
        np.testing.assert_array_equal(clipped[3:], np.float32(norms[3:]))


def run_norms_eagerly(method: Any, norms: list[float]) -> tuple[np.ndarray, Any]:
    state, clipped = method.init(jnp.zeros(1)), []
    for norm in norms:
        update, state = method.update(jnp.array([norm]), state)
        clipped.append(update[0])
    return np.array(clipped), state
