"""Reading what happened out of any optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax

PARAMS = {"enc": {"w": jnp.array([3.0, 4.0])}, "head": jnp.array([12.0])}
KEYS = {"norm", "clipped_norm", "max_norm", "coefficient", "clip_fraction"}


pytestmark = pytest.mark.usefixtures("_promotes")


def metrics_after(optimizer: Any, updates: Any = PARAMS, **options: Any) -> dict[str, float]:
    _, state = optimizer.update(updates, optimizer.init(PARAMS), PARAMS)
    eager = clipax.metrics(state, **options)
    jitted = jax.jit(lambda state: clipax.metrics(state, **options))(state)
    trees.assert_close(jitted, eager)
    return {name: float(value) for name, value in eager.items()}


def test_a_global_norm() -> None:
    values = metrics_after(clipax.clip_by_global_norm(6.5))
    expected = {"norm": 13, "clipped_norm": 6.5, "max_norm": 6.5, "coefficient": 0.5}
    assert values == pytest.approx(expected | {"clip_fraction": 1})


def test_several_norms_give_their_extremes_and_the_share_clipped() -> None:
    values = metrics_after(clipax.clip_by_leaf_norm({"enc": 10.0, "head": 6.0}))
    expected = {"norm": 12, "clipped_norm": 6, "max_norm": 10, "coefficient": 0.5}
    assert values == pytest.approx(expected | {"clip_fraction": 0.5})


def test_per_leaf_has_the_path_as_the_key() -> None:
    values = metrics_after(clipax.clip_by_leaf_norm(6.0), per_leaf=True)
    assert values["norm/enc/w"] == pytest.approx(5)
    assert values["clipped_norm/head"] == pytest.approx(6)
    assert values["coefficient/enc/w"] == 1
    assert values["max_norm/head"] == 6
    assert len(values) == len(KEYS) + 4 * 2


def test_per_leaf_of_unit_norms_is_the_worst_unit() -> None:
    clip = clipax.clip_by_unit_norm(2.0)
    kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
    _, state = clip.update(kernel, clip.init(kernel))
    values = clipax.metrics({"kernel": state}, per_leaf=True)
    assert float(values["kernel/norm"]) == pytest.approx(5)
    assert float(values["kernel/clip_fraction"]) == 0.5


@pytest.mark.parametrize(
    ("optimizer", "prefixes"),
    [
        (optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(0.1)), [""]),
        (optax.chain(optax.chain(clipax.clip(1.0)), optax.scale(1.0)), [""]),
        (optax.named_chain(("grads", clipax.clip(1.0)), ("adam", optax.adam(0.1))), ["grads/"]),
        (optax.masked(clipax.clip(1.0), {"enc": True, "head": False}), [""]),
        (optax.MultiSteps(clipax.clip(1.0), 1).gradient_transformation(), [""]),
        (optax.apply_if_finite(optax.chain(clipax.clip(1.0)), 2), [""]),
        (optax.inject_hyperparams(clipax.clip_by_global_norm)(max_norm=lambda count: 1.0), [""]),
        (
            optax.chain(clipax.clip(1.0), optax.adam(0.1), clipax.clip_by_block_rms(1.0)),
            ["0/", "1/"],
        ),
        (clipax.observe(clipax.clip(1.0)), [""]),
        (
            optax.partition(
                {"a": clipax.clip(1.0), "b": optax.chain(clipax.clip(1.0), clipax.clip(2.0))},
                {"enc": "a", "head": "b"},
            ),
            ["a/", "b/0/", "b/1/"],
        ),
        (
            optax.named_chain(
                (
                    "outer",
                    optax.named_chain(("before", clipax.clip(1.0)), ("after", clipax.clip(2.0))),
                )
            ),
            ["outer/before/", "outer/after/"],
        ),
    ],
)
def test_states_are_found_and_told_apart(optimizer: Any, prefixes: list[str]) -> None:
    values = metrics_after(optimizer)
    clipped = {name for name in values if not name.endswith(("norm_in", "norm_out", "cosine"))}
    assert clipped == {prefix + key for prefix in prefixes for key in KEYS}


def test_observe_and_clip_do_not_take_each_others_names() -> None:
    values = metrics_after(optax.chain(clipax.observe(clipax.clip_by_global_norm(1.0))))
    assert set(values) == KEYS | {"norm_in", "norm_out", "cosine"}


def test_a_skipped_step_is_told_beside_the_last_one_taken() -> None:
    optimizer = clipax.skip_step(
        optax.chain(clipax.observe(clipax.clip_by_global_norm(1.0)), optax.sgd(1.0)), 20.0
    )
    state = optimizer.init(PARAMS)
    rows = []
    for size in (1.0, 2.0, jnp.nan, 1.0):
        updates = jax.tree.map(lambda leaf, size=size: size * leaf, PARAMS)
        _, state = optimizer.update(updates, state, PARAMS)
        values = clipax.metrics(state)
        trees.assert_close(jax.jit(clipax.metrics)(state), values)
        rows.append({name: float(value) for name, value in values.items()})
    skip_keys = ("raw_norm", "is_skipped", "skipped", "consecutive_skipped")
    assert set(rows[0]) == KEYS | {"norm_in", "norm_out", "cosine", *skip_keys}
    expected = [(13, 0, 0, 0), (26, 1, 1, 1), (np.nan, 1, 2, 2), (13, 0, 2, 0)]
    for row, values in zip(rows, expected, strict=True):
        np.testing.assert_allclose([row[key] for key in skip_keys], values, rtol=1e-6)
        assert row["norm"] == row["norm_in"] == 13


def test_several_guards_and_names() -> None:
    inner = optax.named_chain(("grads", clipax.clip(1.0)), ("step", optax.sgd(1.0)))
    optimizer = optax.chain(clipax.skip_step(inner), clipax.skip_step(optax.identity()))
    values = metrics_after(optimizer)
    assert {"0/raw_norm", "1/raw_norm", "grads/norm", "grads/max_norm"} <= set(values)


def test_numbers_do_not_take_the_names_of_users() -> None:
    first = optax.named_chain(("0", clipax.clip(1.0)))
    optimizer = optax.chain(first, clipax.clip(2.0), clipax.clip(3.0))
    values = metrics_after(optimizer)
    assert {name.split("/")[0]: values[name] for name in values if name.endswith("max_norm")} == {
        "0": 1,
        "1": 2,
        "2": 3,
    }


def test_both_sides_of_an_asymmetric_value_clip() -> None:
    updates = jnp.array([3.0, -1.5])
    clip = clipax.clip_by_value(1.0, -2.0)
    values = clipax.metrics(clip.update(updates, clip.init(updates))[1])
    expected = {"norm": 3, "clipped_norm": 1.5, "max_norm": 2, "coefficient": 1 / 3}
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        expected | {"clip_fraction": 0.5}
    )


def test_no_state_gives_an_empty_dict() -> None:
    assert clipax.metrics(optax.adam(0.1).init(PARAMS)) == {}


def test_before_the_first_update() -> None:
    values = clipax.metrics(clipax.clip_by_leaf_norm(1.0).init(PARAMS))
    expected = {
        "norm": 0,
        "clipped_norm": 0,
        "max_norm": np.inf,
        "coefficient": 1,
        "clip_fraction": 0,
    }
    assert {name: float(value) for name, value in values.items()} == expected


def test_no_measured_leaf() -> None:
    clip = clipax.clip_by_leaf_norm(1.0)
    values = clipax.metrics(clip.update({"n": 1}, clip.init({"n": 1}))[1])
    assert float(values["norm"]) == 0
    assert float(values["clip_fraction"]) == 0


def test_nan_is_shown() -> None:
    values = metrics_after(
        clipax.clip_by_leaf_norm(1.0),
        {"enc": {"w": jnp.array([1.0, jnp.nan])}, "head": jnp.ones(1)},
    )
    assert np.isnan(values["norm"])
    assert np.isnan(values["coefficient"])
    assert values["clip_fraction"] == 0.5


def test_measure_gives_quantiles_of_its_window() -> None:
    recorder, norms = clipax.measure(window_size=50), np.random.default_rng(0).lognormal(size=120)
    state, step = recorder.init(jnp.zeros(1)), jax.jit(recorder.update)
    for count, norm in enumerate(norms, 1):
        _, state = step(jnp.array([norm], jnp.float32), state)
        if count in (1, 2, 49, 50, 51, 120):
            values, window = clipax.metrics(state), norms[max(0, count - 50) : count]
            for q in (50, 90, 99):
                expected = np.percentile(window, q)
                np.testing.assert_allclose(values[f"norm_q{q}"], expected, rtol=1e-6)


def test_optax_finds_the_fields_too() -> None:
    optimizer = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(0.1))
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS))
    assert float(optax.tree.get(state, "norm")) == 13
    both = optax.named_chain(("a", clipax.clip_by_global_norm(1.0)), ("b", clipax.clip(1.0)))
    _, state = both.update(PARAMS, both.init(PARAMS))
    assert float(optax.tree.get(state["a"], "norm")) == 13
