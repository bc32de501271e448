"""The geometric tracker against NumPy, where it settles, and at its edges."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees
from sequences import run_norms

import clipax


def oracle(norms: np.ndarray, q: float = 0.5, rate: float = 0.2) -> np.ndarray:
    """The bound of every step; NaN where the norm is none."""
    bound, bounds = np.inf, []
    for norm in norms:
        bounds.append(bound if np.isfinite(norm) else np.nan)
        if np.isfinite(norm) and norm > 0:
            bound = norm if bound == np.inf else bound * np.exp(-rate * ((norm <= bound) - q))
    return np.array(bounds)


SETTINGS = [{}, {"q": 0.9}, {"q": 0.1, "rate": 0.05}, {"q": 0.75, "rate": 0.01}]


def build(setting: dict[str, Any], **more: Any) -> Any:
    names = {"q": "quantile", "rate": "learning_rate"}
    return clipax.clip_by_quantile(**{names[key]: value for key, value in setting.items()}, **more)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1], [0]))
def test_equals_the_oracle_globally(setting: dict[str, Any], seed: int) -> None:
    sequences.assert_follows(build, oracle, setting, seed)


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_oracle_leaf_by_leaf(setting: dict[str, Any]) -> None:
    sequences.assert_follows_leaf_by_leaf(build, oracle, setting)


def test_by_hand() -> None:
    _, states = run_norms(clipax.clip_by_quantile(0.5, learning_rate=np.log(4)), [1, 9, 9, 9, 1])
    np.testing.assert_allclose(states.max_norm, [np.inf, 1, 2, 4, 8], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.2, 0.05])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_settles_where_the_share_lies_under_it(q: float, rate: float) -> None:
    norms = np.random.default_rng(5).lognormal(sigma=0.5, size=8000)
    _, states = run_norms(clipax.clip_by_quantile(q, learning_rate=rate), norms)
    settled = slice(2000, None)
    np.testing.assert_allclose(np.mean(states.coefficient[settled] < 1), 1 - q, atol=0.01)
    np.testing.assert_allclose(
        np.median(states.max_norm[settled]), np.quantile(norms, q), rtol=0.1
    )


def test_follows_a_new_level_up_and_down() -> None:
    clipped, states = run_norms(
        clipax.clip_by_quantile(0.5), [1.0] * 20 + [1000.0] * 100 + [1.0] * 100
    )
    assert clipped[119] > 800
    assert states.max_norm[-1] < 1.3


def test_edge_the_first_norm_passes_or_is_capped() -> None:
    clipped, _ = run_norms(clipax.clip_by_quantile(), [7.0])
    assert clipped[0] == 7
    clipped, _ = run_norms(clipax.clip_by_quantile(max_norm=2.0), [7.0, 7.0])
    np.testing.assert_allclose(clipped, [2, 2], rtol=1e-6)


def test_edge_at_the_bound_is_the_identity() -> None:
    updates = np.stack([np.array([0.3, -0.7, 0.1], np.float32)] * 2)
    clipped, _ = sequences.scanned(clipax.clip_by_quantile(0.9), updates)
    np.testing.assert_array_equal(clipped, updates)


def test_edge_zeros_do_not_lock_the_bound_at_zero() -> None:
    naive = jnp.array(1.0)
    for _ in range(2000):
        naive *= np.exp(-0.1)
    assert naive * np.exp(0.2) == naive  # a bound that no norm can lift again
    clipped, states = run_norms(clipax.clip_by_quantile(), [1.0] + [0.0] * 2000 + [1.0])
    assert clipped[-1] == 1
    np.testing.assert_array_equal(clipped[1:-1], 0)
    np.testing.assert_array_equal(states.max_norm[1:], 1)


@pytest.mark.parametrize(("q", "patience"), [(0.9, 200), (0.5, 200), (0.1, 200), (0.05, 400)])
def test_edge_after_many_norms_far_above_it_the_estimate_is_the_last(
    q: float, patience: int
) -> None:
    method = clipax.clip_by_quantile(q, learning_rate=0.02)
    # Zeros do not count, and end no row.
    norms = np.full(patience + 4, 1e4)
    norms[0], norms[5], norms[-2:] = 1.0, 0.0, 7.0
    _, states = run_norms(method, norms)
    paper = oracle(norms, q, 0.02)
    np.testing.assert_allclose(states.max_norm[:-2], paper[:-2], rtol=1e-4)
    assert paper[-2] < 50
    assert states.max_norm[-2] == 1e4
    norms[10] = 1.0
    _, states = run_norms(method, norms)
    np.testing.assert_allclose(states.max_norm, oracle(norms, q, 0.02), rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_edge_what_is_no_norm_stays_out(value: float) -> None:
    clipped, _ = run_norms(clipax.clip_by_quantile(), [1, 3, value, 2, 5])
    without, _ = run_norms(clipax.clip_by_quantile(), [1, 3, 2, 5])
    np.testing.assert_array_equal(np.delete(clipped, 2), without)


def test_edge_only_what_is_no_norm_so_far() -> None:
    clipped, _ = run_norms(clipax.clip_by_quantile(), [np.nan, np.inf, 4.0])
    assert clipped[2] == 4


def test_the_largest_norms_do_not_overflow_the_bound() -> None:
    _, states = run_norms(clipax.clip_by_quantile(0.9, learning_rate=5.0), [3e38, 3e38, 3.3e38, 1])
    assert np.isfinite(states.max_norm[1:]).all()


@pytest.mark.parametrize("bad", [0, 1, -0.5, 90, jnp.ones(2) / 2, *refusals.NO_NUMBERS])
def test_bad_quantiles_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="quantile must be"):
        clipax.clip_by_quantile(bad)


@pytest.mark.parametrize("bad", [0, -1.0, np.inf, *refusals.NO_NUMBERS])
def test_bad_rates_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="learning_rate must be"):
        clipax.clip_by_quantile(learning_rate=bad)


@pytest.mark.parametrize("bad", [0, -1.0, np.nan, True, "1"])
def test_bad_caps_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be a number > 0"):
        clipax.clip_by_quantile(max_norm=bad)
