"""AdaGC against its paper in NumPy, the dead leaf, and at its edges."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import sequences
import trees

import clipax


def oracle(
    norms: dict[str, np.ndarray],
    ratio: float = 1.05,
    decay: float = 0.98,
    cap: float = 1.0,
    warmup: int = 100,
    raw: bool = False,
    ignore_zeros: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Bounds and averages of every step; a bound is NaN where there is none."""
    count = len(next(iter(norms.values())))
    average: dict[str, float | None] = dict.fromkeys(norms)
    bounds = {name: np.full(count, np.nan) for name in norms}
    averages = {name: np.zeros(count) for name in norms}
    good_steps = 0
    for t in range(count):
        total = np.sqrt(sum(norm[t] ** 2 for norm in norms.values()))
        h = min(1.0, cap / total) if total > 0 else 1.0
        for name in norms:
            norm, known = norms[name][t], average[name]
            alone = good_steps >= warmup and known is not None
            if np.isfinite(norm) and (alone or np.isfinite(total)):
                bounds[name][t] = ratio * known if alone else norm * h
                value = norm if raw else min(norm, bounds[name][t])
                if norm == 0 and ignore_zeros:
                    pass
                elif known is None:
                    average[name] = value
                elif alone:
                    average[name] = decay * known + (1 - decay) * value
                else:
                    average[name] = min(known, value)
            averages[name][t] = average[name] or 0.0
        good_steps += np.isfinite(total)
    return bounds, averages


SETTINGS: list[dict[str, Any]] = [
    {},
    {"raw": True},
    {"warmup": 1},
    {"warmup": 30, "ratio": 1.5, "decay": 0.9, "cap": 5.0},
    {"warmup": 8, "ratio": 3.0, "raw": True, "cap": np.inf},
    {"decay": 0.0, "warmup": 3},
]


def build(setting: dict[str, Any], **more: Any) -> Any:
    names = {"warmup": "warmup_steps", "cap": "warmup_max_norm", "raw": "raw_history"}
    return clipax.adagc(**{names.get(key, key): v for key, v in setting.items()}, **more)


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", trees.mostly_slow([0, 1, 2], [0]))
def test_equals_the_oracle(setting: dict[str, Any], seed: int) -> None:
    sequence = sequences.long_run(seed, spread=0.1)
    _, norms = sequences.long_norms(sequence)
    bounds, averages = oracle(norms, **setting)
    method = build(setting)
    _, states = sequences.scanned(method, sequence)
    for name in norms:
        np.testing.assert_allclose(
            states.threshold.average[name], averages[name], rtol=1e-5, atol=1e-30
        )
    # In a bad step of the warm-up every leaf is NaN, not by its own norm alone.
    clipped, _ = sequences.scanned(method, sequence)
    bad = {name: np.isnan(bound) for name, bound in bounds.items()}
    for name, leaf in sequence.items():
        factor = sequences.hard(norms[name], np.where(bad[name], np.nan, bounds[name]))
        factor[bad[name]] = np.nan
        np.testing.assert_allclose(clipped[name], leaf * factor[:, None], rtol=2e-5)
        assert 0.001 < np.mean(factor < 1) < 0.999 or setting.get("cap") == np.inf


def run(method: Any, **norms: list[float]) -> tuple[dict[str, np.ndarray], Any]:
    sequence = {name: np.array(values, np.float32)[:, None] for name, values in norms.items()}
    clipped, states = sequences.scanned(method, sequence)
    return {name: leaf[:, 0] for name, leaf in clipped.items()}, states


def test_by_hand() -> None:
    # Warm-up: 5 is scaled to 1, split 3 : 4. Then the bound is 1.5 times the average.
    method = clipax.adagc(1.5, decay=0.5, warmup_steps=1)
    clipped, states = run(method, w=[3, 0.3, 9.0], b=[4, 4.0, 1.0])
    np.testing.assert_allclose(clipped["w"], [0.6, 0.3, 0.675], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8, 1.2, 1.0], rtol=1e-6)
    averages = states.threshold.average
    np.testing.assert_allclose(averages["w"], [0.6, 0.45, 0.5625], rtol=1e-6)
    np.testing.assert_allclose(averages["b"], [0.8, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(states.threshold.step_count, [1, 2, 3])


def test_the_papers_average_of_the_worked_case() -> None:
    norms = {"a": np.array([1.0, 0.5, 1.0, 1.0]), "b": np.array([0.0, 1.0, 0.5, 0.5])}
    _, naive = oracle(norms, warmup=2, ignore_zeros=False)
    np.testing.assert_allclose(naive["a"][:2], [1.0, 0.4472136], rtol=1e-6)
    np.testing.assert_array_equal(naive["b"], 0)  # dead for ever
    _, states = run(clipax.adagc(warmup_steps=2), a=list(norms["a"]), b=list(norms["b"]))
    np.testing.assert_allclose(states.threshold.average["a"], naive["a"], rtol=1e-6)
    assert (states.threshold.average["b"][1:] > 0.3).all()


def test_a_leaf_that_was_zero_in_warm_up_is_not_dead() -> None:
    quiet, loud = [0.0] * 3 + [2.0] * 500, [1.0] * 503
    bounds, _ = oracle(
        {"q": np.array(quiet), "l": np.array(loud)}, warmup=5, cap=100.0, ignore_zeros=False
    )
    np.testing.assert_array_equal(bounds["q"][5:], 0)
    clipped, _ = run(clipax.adagc(warmup_steps=5, warmup_max_norm=100.0), q=quiet, l=loud)
    np.testing.assert_array_equal(clipped["q"], quiet)


def test_long_rests_do_not_kill_a_leaf() -> None:
    norms = [1.0] * 5 + [0.0] * 3000 + [1.0] * 2
    naive = oracle({"a": np.array(norms)}, warmup=5, ignore_zeros=False)[0]["a"]
    assert naive[-1] < 1e-20
    clipped, _ = run(clipax.adagc(warmup_steps=5), a=norms)
    np.testing.assert_array_equal(clipped["a"][-2:], 1.0)


@pytest.mark.parametrize(
    ("spread", "raw", "lowest", "highest"),
    [(0.5, False, 0.75, 0.9), (0.5, True, 0.3, 0.5), (0.02, False, 0.0, 0.03)],
)
def test_clipped_norms_pull_the_average_down(
    spread: float, raw: bool, lowest: float, highest: float
) -> None:
    norms = np.random.default_rng(6).lognormal(sigma=spread, size=6000)
    method = clipax.adagc(warmup_max_norm=np.inf, raw_history=raw)
    _, states = run(method, a=list(norms))
    settled = slice(1000, None)
    assert lowest <= np.mean(states.coefficient["a"][settled] < 1) <= highest
    median = np.median(states.threshold.average["a"][settled])
    assert (median < 0.7) == (spread == 0.5 and not raw)


def test_stacked_layers_have_averages_of_their_own() -> None:
    rng = np.random.default_rng(7)
    layers = rng.normal(size=(150, 3, 4)).astype(np.float32) * np.array([[1], [10], [0.1]])
    layers[120, 1] *= 50
    stacked = {"layers": layers.astype(np.float32)}
    apart = {f"layer{row}": np.ascontiguousarray(stacked["layers"][:, row]) for row in range(3)}
    together, states = sequences.scanned(clipax.adagc(stack_axis=0), stacked)
    alone, _ = sequences.scanned(clipax.adagc(), apart)
    for row in range(3):
        np.testing.assert_allclose(
            together["layers"][:, row], alone[f"layer{row}"], rtol=1e-5, atol=1e-7
        )
    assert states.threshold.average["layers"].shape == (150, 3, 1)


def test_a_mask_leaves_leaves_out_of_everything() -> None:
    method = clipax.adagc(warmup_steps=1, mask={"w": True, "b": False})
    clipped, states = run(method, w=[2.0, 9.0], b=[100.0, 100.0])
    np.testing.assert_allclose(clipped["w"], [1.0, 1.05], rtol=1e-6)
    np.testing.assert_array_equal(clipped["b"], 100.0)
    assert states.norm["b"] is None


def test_edge_under_the_bounds_it_is_the_identity() -> None:
    rng = np.random.default_rng(8)
    sequence = {"w": rng.normal(size=(20, 7)).astype(np.float32)}
    sequence["w"][1:] = sequence["w"][:1] * np.linspace(1, 0.5, 19)[:, None]
    clipped, states = sequences.scanned(
        clipax.adagc(2.0, warmup_max_norm=100.0, warmup_steps=5), sequence
    )
    np.testing.assert_array_equal(clipped["w"], sequence["w"])
    np.testing.assert_array_equal(states.coefficient["w"], 1.0)


def test_edge_zero_leaves_the_average() -> None:
    clipped, states = run(clipax.adagc(warmup_steps=2), a=[0.5, 0.0, 0.5, 0.0, 0.5])
    np.testing.assert_array_equal(clipped["a"], [0.5, 0.0, 0.5, 0.0, 0.5])
    np.testing.assert_allclose(states.threshold.average["a"], 0.5, rtol=1e-6)


def test_edge_the_first_norm_after_warm_up_is_bounded_as_in_it() -> None:
    clipped, _ = run(clipax.adagc(warmup_steps=2), a=[0.6, 0.6, 0.6, 0.6], b=[0.0, 0.0, 0.8, 4.0])
    np.testing.assert_allclose(clipped["b"], [0, 0, 0.8, 1.05 * 0.8], rtol=1e-6)


def test_edge_an_average_far_below_its_norms_is_forgotten() -> None:
    count = 300
    a, b = np.full(count, 3.0), np.full(count, 0.5)
    a[:2], a[9], a[11] = 1e-3, 0.0, np.nan
    setting = {"warmup": 2, "cap": 2.0}
    bounds, averages = oracle({"a": a, "b": b}, **setting)
    clipped, states = run(build(setting), a=list(a), b=list(b))
    # The 200th such norm is the one at 203: a zero and a NaN are none, and end no row.
    kept = np.arange(count) != 11
    kept[203:] = False
    np.testing.assert_allclose(clipped["a"][kept], np.minimum(a, bounds["a"])[kept], rtol=1e-4)
    assert averages["a"][203] < 2e-3
    np.testing.assert_array_equal(states.threshold.average["a"][203], 0)
    # The next is bounded by the global norm, and its own average starts from there.
    np.testing.assert_allclose(clipped["a"][204], 3 * 2 / np.hypot(3, 0.5), rtol=1e-6)
    np.testing.assert_array_equal(states.threshold.average["a"][204], clipped["a"][204])
    np.testing.assert_array_equal(clipped["b"][205:], 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_edge_after_warm_up_a_bad_leaf_harms_no_other(value: float) -> None:
    method = clipax.adagc(warmup_steps=1, warmup_max_norm=100.0)
    clipped, states = run(method, a=[1.0, value, 1.0, 5.0], b=[1.0, 5.0, 1.0, 1.0])
    assert np.isnan(clipped["a"][1])
    np.testing.assert_allclose(clipped["b"][1], 1.05, rtol=1e-6)
    np.testing.assert_allclose(states.threshold.average["a"][:3], 1.0, rtol=1e-6)
    np.testing.assert_allclose(clipped["a"][3], 1.05, rtol=1e-6)
    assert states.threshold.average["b"][1] > 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_edge_in_warm_up_a_bad_leaf_is_a_bad_step(value: float) -> None:
    clipped, states = run(clipax.adagc(warmup_steps=2), a=[0.5, value, 0.5], b=[0.5, 0.1, 0.5])
    assert np.isnan(clipped["a"][1])
    assert np.isnan(clipped["b"][1]) if np.isnan(value) else clipped["b"][1] == 0
    np.testing.assert_array_equal(states.threshold.step_count, [1, 1, 2])
    np.testing.assert_allclose(states.threshold.average["b"], 0.5, rtol=1e-6)


def test_edge_only_what_is_no_norm_so_far() -> None:
    clipped, states = run(clipax.adagc(warmup_steps=1), a=[np.nan, np.inf, np.nan, 4.0])
    np.testing.assert_array_equal(states.threshold.step_count, [0, 0, 0, 1])
    np.testing.assert_allclose(clipped["a"][3], 1.0, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_norms_of_any_size(size: float) -> None:
    usual, _ = run(clipax.adagc(warmup_steps=2), a=[3, 4, 0.5, 2], b=[4, 3, 0.7, 9])
    method = clipax.adagc(warmup_steps=2, warmup_max_norm=size)
    scaled, _ = run(
        method,
        a=[3 * size, 4 * size, 0.5 * size, 2 * size],
        b=[4 * size, 3 * size, 0.7 * size, 9 * size],
    )
    np.testing.assert_allclose(scaled["a"] / size, usual["a"], rtol=1e-5)
    np.testing.assert_allclose(scaled["b"] / size, usual["b"], rtol=1e-5)


NUMBERS = [*refusals.NO_NUMBERS, jnp.ones(2)]


@pytest.mark.parametrize("bad", [0, -1.0, np.inf, *NUMBERS])
def test_bad_ratios_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="ratio must be"):
        clipax.adagc(bad)


@pytest.mark.parametrize("bad", [0, -1.0, *NUMBERS])
def test_bad_bounds_of_the_warm_up_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="warmup_max_norm must be"):
        clipax.adagc(warmup_max_norm=bad)


@pytest.mark.parametrize("bad", [1, -0.1, *NUMBERS])
def test_bad_decays_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="decay must be"):
        clipax.adagc(decay=bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "5"])
def test_bad_warm_ups_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="warmup_steps must be an integer >= 1, got"):
        clipax.adagc(warmup_steps=bad)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="raw_history must be True or False"):
        clipax.adagc(raw_history="raw")
    with pytest.raises(ValueError, match="stack_axis must be an integer"):
        clipax.adagc(stack_axis=1.5)
    with pytest.raises(ValueError, match="has no axis 3"):
        clipax.adagc(stack_axis=3).init(jnp.ones((2, 2)))
