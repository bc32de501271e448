"""Recording norms without clipping, against NumPy and worked cases."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees

import clipax

GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0, 0.0]])}
QUANTILES = {"norm_q50": 0.5, "norm_q90": 0.9, "norm_q99": 0.99}


def run(method: Any, norms: list[float]) -> tuple[list[Any], Any]:
    """One step for each norm; also what `metrics` says after each."""
    state, seen = method.init(jnp.zeros(1)), []
    for norm in norms:
        updates = jnp.array([norm])
        recorded, state = method.update(updates, state)
        trees.assert_bitwise(recorded, updates)
        seen.append(clipax.metrics(state))
    return seen, state


def largest(leaf: np.ndarray) -> np.ndarray:
    return sequences.p_norm(leaf, math.inf).reshape(-1)


def flat_norm(leaf: np.ndarray) -> np.ndarray:
    return sequences.p_norm(leaf).reshape(-1)


def rms(leaf: np.ndarray) -> np.ndarray:
    return flat_norm(leaf) / math.sqrt(leaf[0].size)


def total(sequence: Any) -> Any:
    return np.sqrt(sum(flat_norm(leaf) ** 2 for leaf in jax.tree.leaves(sequence)))


NORMS = {
    "global_norm": (clipax.global_norm, total),
    "leaf_norm": (clipax.leaf_norm, lambda tree: jax.tree.map(flat_norm, tree)),
    "block_rms": (clipax.norms.block_rms, lambda tree: jax.tree.map(rms, tree)),
    "a user's": (
        lambda updates: jax.tree.map(lambda x: jnp.max(jnp.abs(x)), updates),
        lambda tree: jax.tree.map(largest, tree),
    ),
}


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    ("name", "window_size", "bad_steps"),
    [
        ("global_norm", 7, [0, 3, 4, 50]),
        ("global_norm", 1000, []),
        ("leaf_norm", 10, [0, 3, 4, 50]),
        ("block_rms", 1, [5]),
        ("a user's", 8, []),
    ],
)
def test_equals_numpy_over_a_spiky_sequence(
    name: str, window_size: int, bad_steps: list[int]
) -> None:
    """The quantiles are those of the last finite norms, and of several leaves the largest."""
    norm, oracle = NORMS[name]
    sequence = sequences.spiky()
    sequence["dense"]["kernel"][bad_steps, 1] = np.nan
    method = clipax.measure(norm, window_size=window_size)

    def read(state: Any) -> Any:
        return state.norm, clipax.metrics(state)

    recorded, (norms, metrics) = sequences.scanned(method, sequence, read=read)
    trees.assert_bitwise(recorded, sequence)
    expected = oracle(sequence)
    trees.assert_close(norms, sequences.by_path(expected))
    for key, q in QUANTILES.items():
        for step in range(1, sequences.COUNT):  # at 0 there may be no finite norm yet
            pasts = [leaf[: step + 1] for leaf in jax.tree.leaves(expected)]
            windows = [past[np.isfinite(past)][-window_size:] for past in pasts]
            quantile = max(np.quantile(window, q) for window in windows)
            # The place between two norms is a float32 too, and spikes lie far from the rest.
            np.testing.assert_allclose(metrics[key][step], quantile, rtol=5e-5)


def test_worked_by_hand() -> None:
    seen, state = run(clipax.measure(window_size=3), [1.0, 2.0, 4.0, 8.0])
    assert [float(metrics["norm"]) for metrics in seen] == [1, 2, 4, 8]
    assert [float(metrics["norm_q50"]) for metrics in seen] == [1, 1.5, 2, 4]
    np.testing.assert_allclose([metrics["norm_q90"] for metrics in seen], [1, 1.9, 3.6, 7.2])
    assert state[1:3] == (math.inf, 1.0)


def test_a_bound_at_a_quantile_would_have_clipped_that_share_of_the_steps() -> None:
    """What it is for: measure first, then clip one step in ten."""
    sequence = sequences.spiky(seed=5)
    _, metrics = sequences.scanned(clipax.measure(), sequence, read=clipax.metrics)
    bound = float(metrics["norm_q90"][-1])
    clip = clipax.clip_by_global_norm(bound)
    _, state = sequences.scanned(clip, sequence)
    assert np.mean(state.coefficient < 1) == 0.1


def test_a_known_norm_is_taken_and_the_updates_are_not_reduced() -> None:
    method = clipax.measure(clipax.leaf_norm, window_size=4)
    state = method.init(GRADS)
    known = {"w": jnp.array(7.0), "b": jnp.array(9.0)}
    recorded, new_state = method.update(GRADS, state, norm=known)
    trees.assert_bitwise(recorded, GRADS)
    trees.assert_bitwise(new_state.norm, known)

    def reductions(**extra: Any) -> str:
        return str(jax.make_jaxpr(lambda: method.update(GRADS, state, **extra))())

    assert "reduce_sum" in reductions()
    assert "reduce_sum" not in reductions(norm=known)


# Every row of the table of edge cases.


@pytest.mark.parametrize("value", [1.0, -0.0, 3.4e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_edge_any_updates_pass_as_they_were(dtype: str, value: float) -> None:
    updates = {**sequences.unmeasured(), "float": jnp.array([value, 1e-4, 0.0]).astype(dtype)}
    method = clipax.measure(clipax.leaf_norm, window_size=2)
    recorded, state = method.update(updates, method.init(updates))
    trees.assert_bitwise(recorded["float"], updates["float"])
    sequences.assert_untouched(recorded, sequences.unmeasured())
    assert list(jax.tree.leaves(state.coefficient)) == [1]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_edge_a_norm_that_is_not_finite(value: float) -> None:
    method = clipax.measure(window_size=3)
    seen, state = run(method, [1.0, 2.0, value])
    np.testing.assert_equal(float(state.norm), value)
    trees.assert_bitwise(state.threshold, run(method, [1.0, 2.0])[1].threshold)
    assert float(seen[-1]["norm_q50"]) == 1.5
    # And the next one enters as if that had not been.
    trees.assert_bitwise(run(method, [1.0, 2.0, value, 4.0])[1], run(method, [1.0, 2.0, 4.0])[1])


def test_edge_one_leafs_nan_keeps_no_other_leaf_from_its_window() -> None:
    method = clipax.measure(clipax.leaf_norm, window_size=3)
    updates = {**GRADS, "w": jnp.array([np.nan, 1.0])}
    _, state = method.update(updates, method.init(updates))
    assert float(clipax.metrics(state, per_leaf=True)["norm/b"]) == 12
    (window,) = state.threshold
    assert sorted(window.value_count.tolist()) == [0, 1]
    assert float(window.values.max()) == 12


@pytest.mark.parametrize("value", [2.0, math.inf, math.nan])
def test_the_bound_is_inf_from_the_first_step_on(value: float) -> None:
    _, state = run(clipax.measure(window_size=3), [value])
    assert np.isposinf(state.max_norm)
    assert state.coefficient == 1


def test_a_window_without_a_norm_bounds_nothing() -> None:
    method = clipax.measure(window_size=3)
    metrics = clipax.metrics(method.init(GRADS))
    assert all(np.isposinf(metrics[key]) for key in QUANTILES)


# Every bad argument.


@pytest.mark.parametrize(
    "bad", [0, -1, 1.5, 2.0, True, np.True_, None, "10", [3], math.inf, math.nan]
)
def test_bad_window_sizes_are_refused(bad: Any) -> None:
    with refusals.refused("window_size must be an integer >= 1, got ", bad):
        clipax.measure(window_size=bad)


@pytest.mark.parametrize("size", [1, np.int32(5)])
def test_integers_of_any_kind_are_window_sizes(size: Any) -> None:
    _, state = run(clipax.measure(window_size=size), [2.0])
    assert state.threshold[0].values.shape == (1, size)


def test_a_window_size_that_is_traced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^window_size must be known while tracing, got "):
        jax.jit(lambda size: run(clipax.measure(window_size=size), [1.0])[1])(3)


def test_the_quantiles_are_those_that_are_asked_for() -> None:
    norms = np.random.default_rng(0).lognormal(size=40).astype(np.float32)
    for norm in (clipax.global_norm, clipax.leaf_norm):
        method = clipax.measure(norm, window_size=30, quantiles=(0.25, 0.999, 0.07))
        _, states = sequences.run_norms(method, norms)
        values = clipax.metrics(jax.tree.map(lambda leaf: leaf[-1], states))
        found = {key: value for key, value in values.items() if key.startswith("norm_q")}
        assert set(found) == {"norm_q25", "norm_q99.9", "norm_q7"}
        for key, q in (("norm_q25", 0.25), ("norm_q99.9", 0.999), ("norm_q7", 0.07)):
            np.testing.assert_allclose(found[key], np.quantile(norms[-30:], q), rtol=1e-5)


def test_the_usual_quantiles_leave_the_state_as_it_was() -> None:
    usual = clipax.measure(quantiles=[0.5, 0.9, 0.99]).init(GRADS)
    assert jax.tree.structure(usual) == jax.tree.structure(clipax.measure().init(GRADS))
    none = clipax.metrics(clipax.measure(quantiles=()).init(GRADS))
    assert not any(key.startswith("norm_q") for key in none)


@pytest.mark.parametrize("bad", [0.5, "0.5", None, [0.0], [1.0], [True], ["a"], [math.nan]])
def test_bad_quantiles_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^quantiles(\[0\])? must be "):
        clipax.measure(quantiles=bad)
