"""What every method keeps in JAX's modes: its results, and NaN-free steps of finite updates."""

import functools
import inspect
import logging
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax

# Every method as the other contracts build it, and in the forms that have programs of their own.
METHODS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(trees.build, name) for name in sorted(trees.public_factories())},
    "acclip, squares": lambda: clipax.acclip(ord=2.0),
    "autoclip, leaves": lambda: clipax.autoclip(0.5, 3, norm=clipax.leaf_norm),
    "clip_by, normalized": lambda: clipax.clip_by(
        clipax.leaf_norm, 0.1, clipax.coefficients.normalized
    ),
    "clip_by, rational": lambda: clipax.clip_by(
        clipax.unit_norm, 0.1, clipax.coefficients.rational
    ),
    "clip_by, relative": lambda: clipax.clip_by(
        clipax.leaf_norm, clipax.thresholds.relative_to_params(0.01)
    ),
    "clip_by, third powers": lambda: clipax.clip_by(
        functools.partial(clipax.global_norm, ord=3), 0.1, clipax.coefficients.tanh
    ),
    "clip_by_mean_std, soon": lambda: clipax.clip_by_mean_std(window_size=2),
    "clip_by_spectral_norm, iterations": lambda: clipax.clip_by_spectral_norm(0.1, iterations=8),
    "clip_by_spectral_norm, soft iterations": lambda: clipax.clip_by_spectral_norm(
        0.1, clipax.coefficients.square_root, iterations=8
    ),
    "clip_by_value, both sides": lambda: clipax.clip_by_value(0.1, -0.2),
    "skip_step, windows": lambda: clipax.skip_step(optax.scale(-0.1), z_max=2.0, window_size=3),
    "spam_clip, soon": lambda: clipax.spam_clip(2.0, warmup_steps=1, reset_every=2),
    "u_clip, bounded": lambda: clipax.u_clip(clipax.clip_by_value(0.1), max_carry=1.0),
    "zclip, soon": lambda: clipax.zclip(warmup_steps=1),
}
MODES: dict[str, Callable[[], Any]] = {
    "checking_leaks": jax.checking_leaks,
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": jax.disable_jit,
    "enable_checks": lambda: jax.enable_checks(True),
    "enable_x64": lambda: trees.double_precision(True),
}
# What these find is in the program, whatever the numbers.
OF_PROGRAMS = {"checking_leaks", "enable_checks"}
# Of a compiled step, NaN is only seen in what comes out of it.
EAGER = {"debug_nans", "disable_jit"}
# Of updates with a norm that is a float, the last at the end of its range.
SIZES = {
    "usual": [1.0, 2.0, 0.5, 30.0],
    "zeros": [0.0, 0.0, 1.0, 0.0],
    "tiny": [1e-30, 1e-42, 1e-20, 0.0],
    "huge": [1e20, 1e36, 1.0, 1e37],
}
SHAPES = {"bias": (3,), "kernel": (4, 3), "scale": ()}


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def run(method: Any, sizes: list[float], *, jitted: bool) -> Any:
    params, updates = jax.tree.map(jnp.asarray, (tree(0), tree(1)))
    update = trees.quick_jit(method.update) if jitted else method.update
    state, outputs = method.init(params), []
    for size in sizes:
        scaled = jax.tree.map(lambda leaf, size=size: leaf * jnp.float32(size), updates)
        clipped, state = update(scaled, state, params)
        outputs.append(clipped)
    return jax.tree.map(np.asarray, (outputs, state, clipax.metrics(state, per_leaf=True)))


@functools.cache
def expected(name: str, sizes: str) -> Any:
    return run(METHODS[name](), SIZES[sizes], jitted=False)


def assert_keeps(name: str, mode: str, *, jitted: bool) -> None:
    for sizes in ["usual"] if mode in OF_PROGRAMS else SIZES:
        right = expected(name, sizes)
        with MODES[mode]():
            got = run(METHODS[name](), SIZES[sizes], jitted=jitted)
        assert jax.tree.structure(got) == jax.tree.structure(right)
        # Iterations for a smooth factor lose digits where values are far above the bound.
        near = 1e-4 if name.endswith("soft iterations") else 1e-5
        for one, other in zip(*map(jax.tree.leaves, (got, right)), strict=True):
            size = np.abs(other[np.isfinite(other)]).max(initial=0)
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=near * size)


def test_results_are_the_same_where_nans_raise() -> None:
    assert_keeps("zclip, soon", "debug_nans", jitted=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_results_are_the_same_in_every_mode(name: str, mode: str) -> None:
    assert_keeps(name, mode, jitted=mode not in EAGER)


# Promotion is strict in all tests. What Optax and users write may promote even so.

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": optax.cosine_decay_schedule(1.0, 10),
    "exponential": optax.exponential_decay(1.0, 3, 0.5),
    "joined": optax.join_schedules([optax.constant_schedule(0.5), lambda n: 0.1 * n], [2]),
    "linear": optax.linear_schedule(1.0, 0.1, 5),
    "of integers": lambda count: 1 + count,
    "powers": lambda count: 0.9**count,
    "quotient": lambda count: 1.0 / (1 + count),
}
RULES = {
    "ema": optax.chain(optax.ema(0.9), optax.scale(1.5)),
    "scale_by_schedule": optax.scale_by_schedule(optax.linear_schedule(1.0, 0.1, 5)),
    "trace": optax.trace(0.5),
}
BOUNDS = [
    (name, key)
    for name, factory in sorted(trees.public_factories().items())
    for key, each in inspect.signature(factory).parameters.items()
    if optax.Schedule in typing.get_args(each.annotation)
]


def assert_promotes(build: Callable[[], Any]) -> None:
    strict = run(build(), [1.0, 2.0, 3.0], jitted=True)
    with jax.numpy_dtype_promotion("standard"):
        standard = run(build(), [1.0, 2.0, 3.0], jitted=True)
    trees.assert_bitwise(strict, standard)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_may_promote(schedule: str) -> None:
    assert_promotes(lambda: clipax.clip_by_leaf_norm(SCHEDULES[schedule]))


@pytest.mark.parametrize("rule", RULES)
def test_rules_may_promote(rule: str) -> None:
    assert_promotes(lambda: clipax.clip_by(clipax.leaf_norm, RULES[rule]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), BOUNDS)
@pytest.mark.parametrize("schedule", ["linear", "quotient"])
def test_schedules_may_promote_in_every_method(name: str, key: str, schedule: str) -> None:
    factory = trees.public_factories()[name]
    given = trees.required(factory, trees.ACTIVE)
    assert_promotes(lambda: factory(**given | {key: SCHEDULES[schedule]}))


# A new function each time, as a loop over settings or a notebook's cell makes it.

FUNCTIONS: dict[str, Callable[[], Any]] = {
    "clip_by": lambda: clipax.clip_by(
        lambda updates: clipax.global_norm(updates),
        lambda count: jnp.float32(0.1),
        lambda norm, max_norm: clipax.coefficients.hard(norm, max_norm),
    ),
    "clip_by, a rule": lambda: clipax.clip_by(
        lambda updates: clipax.leaf_norm(updates), optax.stateless(lambda norm, _: norm / 2)
    ),
    "clip_by_leaf_norm": lambda: clipax.clip_by_leaf_norm(0.1, mask=lambda path, leaf: True),
    "clip_by_spectral_norm": lambda: clipax.clip_by_spectral_norm(
        lambda count: jnp.float32(0.1),
        lambda norm, max_norm: clipax.coefficients.hard(norm, max_norm),
        mask=lambda path, leaf: True,
    ),
    "clip_by_spectral_norm, iterations": lambda: clipax.clip_by_spectral_norm(
        lambda count: jnp.float32(0.1),
        iterations=2,
        unit_axis=lambda path, leaf: -1 if leaf.ndim else None,
    ),
    "clip_by_unit_norm": lambda: clipax.clip_by_unit_norm(
        0.1, unit_axis=lambda path, leaf: -1 if leaf.ndim else None
    ),
    "measure": lambda: clipax.measure(lambda updates: clipax.global_norm(updates)),
    "skip_step": lambda: clipax.skip_step(optax.stateless(lambda updates, _: updates), 1.0),
    "smooth_clip_by_value": lambda: clipax.smooth_clip_by_value(
        0.1, lambda norm, max_norm: clipax.coefficients.tanh(norm, max_norm)
    ),
    "zclip": lambda: clipax.zclip(spike_bound=lambda z, mean, std, z_max: mean),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_new_functions_compile_nothing_anew(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def step() -> None:
        run(FUNCTIONS[name](), [1.0], jitted=False)

    step()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        step()
        seen = [record.getMessage() for record in caplog.records]
        jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert len(caplog.records) > len(seen), "compilations are not seen"
    assert not [message for message in seen if message.startswith("Compiling")]
