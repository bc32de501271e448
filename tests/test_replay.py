"""Logged norms replayed, against the training runs that logged them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax

pytestmark = pytest.mark.usefixtures("_promotes")

STEPS = 120
PARAMS = {
    "dense": {"kernel": np.full((4, 3), 0.3, np.float32), "bias": np.zeros(3, np.float32)},
    "head": np.array([0.5, -0.2, 0.1], np.float32),
}


def batches(bad: tuple[int, ...] = ()) -> Any:
    """Inputs and targets of varied sizes, with spikes, a new level, zeros and, if asked, NaNs."""
    rng = np.random.default_rng(3)
    sizes = rng.lognormal(sigma=0.7, size=STEPS)
    sizes[[20, 47, 48, 90]] *= 60.0
    sizes[70:] *= 2.0
    inputs = rng.normal(size=(STEPS, 8, 4)) * sizes[:, None, None]
    targets = rng.normal(size=(STEPS, 8))
    inputs[[33, 91]] = 0.0
    inputs[list(bad)] = np.nan
    return inputs.astype(np.float32), targets.astype(np.float32)


def loss_of(params: Any, inputs: Any, targets: Any) -> jax.Array:
    hidden = jnp.tanh(inputs @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["head"] - targets))


def train(method: Any, data: Any) -> dict[str, np.ndarray]:
    """A training run, compiled step by step, and what it logged of each."""

    @jax.jit
    def step(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, inputs, targets)
        updates, state = method.update(grads, state, params, loss=loss)
        moved = jax.tree.map(
            lambda p, u: jnp.where(jnp.isfinite(u), p - 0.05 * u, p), params, updates
        )
        return moved, state, clipax.metrics(state, per_leaf=True) | {"loss": loss}

    params, rows = jax.tree.map(jnp.asarray, PARAMS), []
    state = method.init(params)
    for inputs, targets in zip(*data, strict=True):
        params, state, row = step(params, state, inputs, targets)
        rows.append(jax.device_get(row))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def of_leaves(log: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """What a run logged of each leaf under one name, by the leaf's path."""
    return {key[len(name) + 1 :]: log[key] for key in log if key.startswith(f"{name}/")}


def drawn_out(norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    return 1 / (1 + norm / max_norm)


LEAF_BY_LEAF: dict[str, Callable[[], Any]] = {
    "fixed": lambda: clipax.clip_by_leaf_norm({"dense": 0.4, "head": SCHEDULE}),
    "block rms": lambda: clipax.clip_by_block_rms(0.2),
    "average norm": lambda: clipax.clip_by_average_norm(0.05),
    "adagc": lambda: clipax.adagc(warmup_steps=20, decay=0.9),
    "adagc, raw": lambda: clipax.adagc(1.5, warmup_steps=20, raw_history=True),
    "zclip": lambda: clipax.zclip(1.5, warmup_steps=10, max_norm=None, norm=clipax.leaf_norm),
    "autoclip": lambda: clipax.autoclip(0.5, 20, norm=clipax.leaf_norm),
    "masked": lambda: clipax.adagc(warmup_steps=20, mask=lambda path, _: path != "head"),
}
SKIPPING: dict[str, Callable[[], Any]] = {
    "bound": lambda: clipax.skip_step(optax.scale(1.0), 2.0),
    "norms and losses": lambda: clipax.skip_step(
        optax.chain(clipax.zclip(warmup_steps=10), optax.scale_by_adam()),
        z_max=4.0,
        loss_z_max=4.0,
        window_size=20,
        skip_ranges=((60, 63),),
    ),
}


def at_most_doubling() -> optax.GradientTransformation:
    """A rule whose numbers are each rounded once, so that any program has the same."""

    def bound(norm: Any, last: Any, params: Any = None) -> Any:
        bound = jnp.maximum(0.97 * last, jnp.minimum(norm, 2 * last))
        return bound, bound

    return optax.GradientTransformation(lambda zero: zero + 0.1, bound)


SCHEDULE = optax.linear_schedule(3.0, 0.5, 80)
ONE_NORM: dict[str, Callable[[], Any]] = {
    "fixed": lambda: clipax.clip_by_global_norm(1.0),
    "scheduled": lambda: clipax.clip_by_global_norm(SCHEDULE),
    "smooth": lambda: clipax.smooth_clip_by_global_norm(1.0),
    "with a floor": lambda: clipax.delta_gclip(1.0, 0.1),
    "autoclip": lambda: clipax.autoclip(0.5, 40),
    "autoclip, past": lambda: clipax.autoclip(0.9, 20, count_current=False, warmup_steps=5),
    "clip_by_quantile": lambda: clipax.clip_by_quantile(0.6, max_norm=SCHEDULE),
    "clip_by_mean_std": lambda: clipax.clip_by_mean_std(1.0, 30),
    "zclip": lambda: clipax.zclip(1.5, warmup_steps=10, max_norm=None),
    "zclip, raw": lambda: clipax.zclip(1.5, raw_history=True),
    "own rule": lambda: clipax.clip_by(clipax.global_norm, at_most_doubling(), drawn_out),
    "injected": lambda: optax.inject_hyperparams(clipax.clip_by_global_norm)(max_norm=SCHEDULE),
    "recorder": lambda: clipax.measure(window_size=10),
    "observed, before Adam": lambda: optax.chain(
        clipax.observe(clipax.zclip(warmup_steps=10)), optax.scale_by_adam()
    ),
}


# To the bit, most agree only where XLA optimizes, which it does in the slow group.
@pytest.mark.parametrize("name", trees.mostly_slow(ONE_NORM, {"fixed", "autoclip"}))
def test_replay_equals_the_run_that_logged_the_norms_bit_for_bit(name: str) -> None:
    log = train(ONE_NORM[name](), batches(bad=(5, 40, 41)))
    steps = clipax.replay(ONE_NORM[name](), log["norm"])
    for field in ("norm", "max_norm", "coefficient"):
        np.testing.assert_array_equal(getattr(steps, field), log[field], err_msg=field)
    assert not bool(steps.is_skipped.any())
    shares = np.mean(~(log["coefficient"] >= 1))
    assert name == "recorder" or 0.05 < shares <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAF_BY_LEAF)
def test_replay_of_each_leaf_equals_the_run_bit_for_bit(name: str) -> None:
    log = train(LEAF_BY_LEAF[name](), batches(bad=(5, 40, 41)))
    norms = of_leaves(log, "norm")
    steps = clipax.replay(LEAF_BY_LEAF[name](), norms)
    assert set(norms) <= {"dense/bias", "dense/kernel", "head"}
    for field in ("norm", "max_norm", "coefficient"):
        logged = of_leaves(log, field)
        assert set(getattr(steps, field)) == set(logged)
        for path, series in getattr(steps, field).items():
            np.testing.assert_array_equal(series, logged[path], err_msg=f"{field}/{path}")
    shares = [np.mean(~(factors >= 1)) for factors in of_leaves(log, "coefficient").values()]
    assert 0.05 < max(shares) <= 1


def test_columns_are_the_leaves_in_the_order_of_the_parameters() -> None:
    build = LEAF_BY_LEAF["adagc"]
    norms = of_leaves(train(build(), batches()), "norm")
    in_columns = np.stack([norms[path] for path in norms], axis=1)
    by_path = clipax.replay(build(), norms)
    for params in (None, PARAMS):
        columns = clipax.replay(build(), in_columns, params=params)
        for field, series in zip(columns[:3], by_path[:3], strict=True):
            assert field.shape == (STEPS, 3)
            for column, path in enumerate(norms):
                np.testing.assert_array_equal(field[:, column], series[path])


def test_stacked_layers_and_units_have_series_of_arrays() -> None:
    rng = np.random.default_rng(4)
    for norm, shape in ((clipax.unit_norm, (1, 3)), (clipax.leaf_norm, ())):
        method = clipax.autoclip(0.5, 10, norm=norm)
        norms = {"w": rng.lognormal(size=(9, *shape)).astype(np.float32)}
        steps = clipax.replay(method, norms, params={"w": np.zeros((4, 3), np.float32)})
        for field in steps[:3]:
            assert field["w"].shape == (9, *shape)
        for row in range(9):
            median = np.median(norms["w"][: row + 1], axis=0)
            np.testing.assert_allclose(steps.max_norm["w"][row], median, rtol=1e-6)


def test_edge_a_bare_series_is_that_of_one_leaf() -> None:
    norms = [1.0, 3.0, 2.0]
    bare = clipax.replay(clipax.adagc(warmup_steps=1), norms)
    named = clipax.replay(clipax.adagc(warmup_steps=1), {"w": norms})
    np.testing.assert_array_equal(bare.max_norm, named.max_norm["w"])


@pytest.mark.parametrize("name", SKIPPING)
def test_replay_skips_the_steps_that_training_skipped(name: str) -> None:
    log = train(SKIPPING[name](), batches(bad=(5, 40, 41)))
    steps = clipax.replay(SKIPPING[name](), log["raw_norm"], log["loss"])
    np.testing.assert_array_equal(steps.norm, log["raw_norm"])
    np.testing.assert_array_equal(steps.is_skipped, log["is_skipped"] == 1)
    assert 5 <= steps.is_skipped.sum() < STEPS / 2
    np.testing.assert_array_equal(steps.coefficient[steps.is_skipped], 0)
    taken = ~np.asarray(steps.is_skipped)
    if "max_norm" in log:
        np.testing.assert_array_equal(steps.max_norm, log["max_norm"])
        np.testing.assert_array_equal(steps.coefficient[taken], log["coefficient"][taken])
    else:
        assert np.isposinf(steps.max_norm).all()
        assert (steps.coefficient[taken] == 1).all()


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"a": [1.0], "c": [1.0]}, r"^norms must have the paths \['a', 'b'\] .* got \['a', 'c'\]"),
        (np.ones((1, 3)), r"^norms must have the shape \[steps, 2\] .* got \(1, 3\)"),
        (np.ones(1), r"^norms must have the shape \[steps, 2\] .* got \(1,\)"),
    ],
)
def test_norms_must_be_those_of_the_leaves(norms: Any, message: str) -> None:
    params = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=message):
        clipax.replay(clipax.clip_by_leaf_norm(1.0), norms, params=params)


def test_skipping_round_norms_of_leaves_is_refused() -> None:
    method = clipax.skip_step(clipax.adagc())
    with pytest.raises(ValueError, match=r"^method must follow one set of norms, got skip_step"):
        clipax.replay(method, {"w": [1.0]})


def test_a_rule_that_sums_products_agrees_but_for_rounding() -> None:
    method = clipax.clip_by(clipax.global_norm, optax.ema(0.9))
    log = train(method, batches())
    np.testing.assert_allclose(
        clipax.replay(method, log["norm"]).max_norm, log["max_norm"], rtol=1e-6
    )


def test_edge_an_infinite_norm_has_the_coefficient_of_training() -> None:
    method = clipax.autoclip(0.5, 10)
    steps = clipax.replay(method, [1.0, np.inf, 2.0, np.nan, 1.5])
    np.testing.assert_array_equal(steps.coefficient[jnp.array([1, 3])], [0, np.nan])
    np.testing.assert_allclose(steps.max_norm, [1, 1, 1.5, 1.5, 1.5])


def test_edge_no_step_gives_empty_arrays() -> None:
    steps = clipax.replay(clipax.zclip(), np.zeros(0))
    assert {field.shape for field in steps} == {(0,)}


def test_edge_a_norm_of_zero_has_a_coefficient_of_one() -> None:
    assert clipax.replay(clipax.autoclip(), [1.0, 0.0]).coefficient[1] == 1


@pytest.mark.parametrize(
    "method",
    [
        clipax.clip_by_value(1.0),
        clipax.clip_by_value(1.0, -1.0),
        clipax.smooth_clip_by_value(1.0),
        clipax.clip_by_spectral_norm(1.0),
        clipax.spam_clip(),
        clipax.stable_spam(),
        clipax.acclip(),
        clipax.clippy(),
        clipax.u_clip(clipax.clip_by_global_norm(1.0)),
        clipax.clip21(clipax.clip_by_global_norm(1.0)),
        optax.apply_if_finite(clipax.clip_by_global_norm(1.0), 3),
    ],
)
def test_methods_that_need_the_gradients_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"^method must .* the gradients|^method must have one"):
        clipax.replay(method, [1.0, 2.0])


def needs_its_params() -> Any:
    """A rule that takes each parameter norm as the bound, and the norm as it is given."""

    def bound(norm: Any, state: Any, params: Any = None) -> Any:
        return params, state

    rule = optax.GradientTransformation(lambda _: optax.EmptyState(), bound)
    return clipax.clip_by(clipax.global_norm, rule)


def test_methods_that_need_the_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^method must follow its norms alone.* parameters"):
        clipax.replay(needs_its_params(), [1.0, 2.0])


@pytest.mark.parametrize(
    "method",
    [
        optax.sgd(1.0),
        optax.chain(clipax.clip_by_global_norm(1.0), clipax.zclip()),
    ],
)
def test_methods_without_one_clip_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"^method must have one clip whose norms were logged"):
        clipax.replay(method, [1.0, 2.0])


@pytest.mark.parametrize("bad", [None, 1.0, "zclip", optax.sgd])
def test_what_is_no_transformation_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^method must be an optax\.GradientTransformation"):
        clipax.replay(bad, [1.0])


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (1.0, r"^norms must be an array of numbers, one for each step, got 1\.0"),
        (["a"], r"^norms must be an array of numbers"),
        ([1 + 1j], r"^norms must be an array of numbers"),
        ([True], r"^norms must be an array of numbers"),
        ([1.0, -2.0], r"^norms must be >= 0, NaN or inf, got -2\.0 at step 1"),
        (np.ones((2, 3)), r"^norms must be an array of shape \[steps\], .* got \(2, 3\)"),
        (np.ones((2, 3, 1)), r"^norms must be an array \[steps\] or \[steps, leaves\]"),
        ({}, r"^norms must be an array \[steps\] or a dict of them, got an empty dict"),
        ({"a": [1.0]}, r"^norms must be an array of shape \[steps\], .* got \['a'\]"),
        ({"a": [1.0], "b": [1.0, 2.0]}, r"^norms must all have one number of steps"),
        ({"a": [1.0, -1.0]}, r"^norms\['a'\] must be >= 0, NaN or inf, got -1\.0 at step 1"),
    ],
)
def test_what_are_no_norms_is_refused(norms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.replay(clipax.clip_by_global_norm(1.0), norms)


@pytest.mark.parametrize("losses", [[1.0], [[1.0, 2.0]], ["a", "b"], 1.0])
def test_what_are_no_losses_is_refused(losses: Any) -> None:
    with pytest.raises(ValueError, match=r"^losses must "):
        clipax.replay(clipax.zclip(), [1.0, 2.0], losses)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_norms_of_any_dtype_are_replayed_in_float32(dtype: str) -> None:
    steps = clipax.replay(clipax.clip_by_global_norm(2.0), jnp.array([1, 4], dtype))
    assert steps.coefficient.dtype == np.float32
    np.testing.assert_array_equal(steps.coefficient, [1, 0.5])


def test_doubles_are_replayed_in_doubles_where_they_exist() -> None:
    norms = np.array([1.0, 3.0])
    assert clipax.replay(clipax.zclip(), norms).max_norm.dtype == np.float32
    with trees.double_precision(True):
        assert clipax.replay(clipax.zclip(), norms).max_norm.dtype == np.float64


def test_a_bound_can_be_swept_by_vmap() -> None:
    def share(bound: jax.Array) -> jax.Array:
        return clipax.replay(clipax.clip_by_global_norm(bound), [1.0, 2.0, 3.0]).coefficient

    np.testing.assert_allclose(
        jax.vmap(share)(jnp.array([1.5, 3.0]))[:, 1:], [[0.75, 0.5], [1, 1]]
    )


def test_the_shapes_of_parameters_take_no_memory() -> None:
    params = {"w": jax.ShapeDtypeStruct((10**6, 10**6), np.float32)}
    optimizer = optax.chain(clipax.clip_by_global_norm(1.0), optax.scale_by_adam())
    steps = clipax.replay(optimizer, [1.0, 2.0], params=params)
    np.testing.assert_array_equal(steps.coefficient, [1, 0.5])
