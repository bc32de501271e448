"""Streams of extreme but finite updates: no history breaks on them, and each gets over them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax
from clipax.methods.acclip import AcclipState

# The step from which on half of every usual update passes, with the default arguments, as each
# docstring says it; n is the number of steps before.
RECOVERY = {
    "acclip": "850",
    "adagc": "300",
    "autoclip": "900",
    "clip21": "n + 1",
    "clip_by": "7",
    "clip_by_mean_std": "5",
    "clip_by_quantile": "201",
    "scale_by_stable_adam": "17,500",
    "skip_step": "5",
    "spam_clip": "100",
    "stable_spam": "325",
    "u_clip": "10,000",
    "zclip": "210",
}

# Factories whose defaults have no history, or that need one.
BUILT: dict[str, Callable[..., Any]] = {
    "clip21": lambda: clipax.clip21(clipax.clip_by_global_norm(1.0)),
    "clip_by": lambda: clipax.clip_by(clipax.global_norm, optax.ema(0.9)),
    "skip_step": lambda: clipax.skip_step(optax.identity(), z_max=6.0),
    "u_clip": lambda: clipax.u_clip(clipax.clip_by_global_norm(2.0)),
}

VARIANTS: dict[str, tuple[Callable[..., Any], int]] = {
    "adagc, raw": (lambda: clipax.adagc(raw_history=True), 300),
    "adagc, one step of warm-up": (lambda: clipax.adagc(1.5, warmup_steps=1, decay=0.5), 201),
    "autoclip, past": (lambda: clipax.autoclip(0.9, 50, count_current=False, warmup_steps=9), 7),
    "clip_by, without debiasing": (
        lambda: clipax.clip_by(clipax.leaf_norm, optax.ema(0.99, debias=False)),
        69,
    ),
    "clip_by_mean_std, low": (lambda: clipax.clip_by_mean_std(0.01), 66),
    "clip_by_quantile, slow": (lambda: clipax.clip_by_quantile(0.5, learning_rate=1e-4), 201),
    "clip_by_quantile, low": (lambda: clipax.clip_by_quantile(0.05, learning_rate=0.05), 401),
    "clip_by_quantile, high": (lambda: clipax.clip_by_quantile(0.9), 201),
    "skip_step, narrow": (lambda: clipax.skip_step(optax.identity(), z_max=1e-9), 129),
    "spam_clip, reset": (lambda: clipax.spam_clip(100.0, reset_every=50), 50),
    "stable_spam, no norms": (lambda: clipax.stable_spam(normalize=False), 693),
    "stable_spam, long": (lambda: clipax.stable_spam(decay_square=0.95), 2 * 325),
    "u_clip of adagc": (lambda: clipax.u_clip(clipax.adagc(warmup_max_norm=2.0)), 10_300),
    "u_clip of a quantile": (lambda: clipax.u_clip(clipax.clip_by_quantile()), 10_201),
    "u_clip of values": (lambda: clipax.u_clip(clipax.clip_by_value(2.0)), 10_000),
    "clip21 of a quantile": (lambda: clipax.clip21(clipax.clip_by_quantile()), 401),
    "zclip, mean": (lambda: clipax.zclip(spike_bound=clipax.thresholds.mean_bound), 210),
    "zclip, limit": (lambda: clipax.zclip(spike_bound=clipax.thresholds.limit_bound), 210),
    "zclip, raw": (lambda: clipax.zclip(raw_history=True, max_norm=None), 210),
    "zclip, no spikes": (lambda: clipax.zclip(learn_from_spikes=False), 210),
    "zclip, narrow": (lambda: clipax.zclip(0.01, spike_bound=clipax.thresholds.mean_bound), 225),
    "zclip, one step of warm-up": (lambda: clipax.zclip(warmup_steps=1), 210),
}

LEAST, LARGEST = 1.2e-38, 1e38
PREFIX = 150


def streams(longest: int = PREFIX) -> dict[str, np.ndarray]:
    """What may come before the usual updates, in one leaf of one entry."""
    rng = np.random.default_rng(0)
    scatter = rng.lognormal(size=PREFIX)
    level = np.ones(longest)
    return {
        "nothing": np.zeros(0),
        "zeros": 0 * level,
        "zeros, then tiny": np.array([0, 0, 1e-30]),
        "two tiny": np.array([1e-8, 1e-20]),
        "one of the least": np.array([LEAST]),
        "the least": LEAST * level,
        "tiny": 1e-36 * level,
        "small": 0.01 * level,
        "tiny, scattered": 1e-20 * scatter,
        "small, scattered": 0.01 * scatter,
        "usual, then tiny": np.concatenate([np.ones(20), np.full(PREFIX - 20, 1e-30)]),
        "falling": np.geomspace(1, LEAST, PREFIX),
        "falling far": np.geomspace(LARGEST, LEAST, 40),
        "rising far": np.geomspace(LEAST, LARGEST, 40),
        "alternating": np.tile([LEAST, LARGEST], 40),
        "alternating with zero": np.tile([0, LARGEST], 40),
        "alternating signs": np.tile([LARGEST, -LARGEST], 40),
        "alternating with usual": np.tile([1, 1e-30], 40),
        "one of the largest": np.array([LARGEST]),
        "two large": np.array([1e19, 1e37]),
        "the largest": LARGEST * level,
        "ten million": 9e6 * level,
        "a jump": np.concatenate([np.ones(PREFIX - 1), [LARGEST]]),
        "a jump from tiny": np.concatenate([np.full(PREFIX - 1, 1e-20), [LARGEST]]),
        "a thousand": np.concatenate([np.ones(PREFIX - 1), [1e3]]),
        "opposite": -LARGEST * level,
        "opposite, falling": -np.geomspace(LARGEST, 1, 40),
        "opposite and small": -1e3 * level,
    }


@dataclasses.dataclass
class Run:
    """A stream, and then usual updates."""

    name: str
    before: int
    outputs: np.ndarray
    """What came out of each step, of the prefix too."""
    is_sound: np.ndarray
    """Whether the state was free of NaN and inf after each step."""

    def recovered_at(self) -> int:
        """From which usual step on half of each passes."""
        held = np.flatnonzero(~(self.outputs[self.before :] >= 0.5 * (1 - 1e-4)))
        return int(held[-1]) + 2 if len(held) else 1


def runs(method: Any, count: int, longest: int = PREFIX, leaves: Any = None) -> list[Run]:
    """Runs a method on all streams at once: each on the last of the steps, with `count` usual."""
    given = streams(longest)
    total = longest + count
    rows = np.ones((len(given), total), np.float32)
    starts = []
    for row, prefix in zip(rows, given.values(), strict=True):
        starts.append(longest - len(prefix))
        row[starts[-1] : longest] = prefix
    grow = leaves or (lambda x: x)
    every = trees.quick_jit(jax.vmap(functools.partial(run, method, grow)))
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        outputs, is_sound = every(jnp.asarray(rows), jnp.asarray(starts, jnp.int32))
    return [
        Run(name, longest - start, np.asarray(row)[start:], np.asarray(sound)[start:])
        for name, start, row, sound in zip(given, starts, outputs, is_sound, strict=True)
    ]


def run(method: Any, leaves: Any, row: jax.Array, start: jax.Array) -> Any:
    def step(state: Any, at: Any) -> Any:
        value, index = at
        updates = leaves(value[None])
        clipped, learned = method.update(updates, state, jax.tree.map(jnp.ones_like, updates))
        is_on = index >= start
        state = jax.tree.map(lambda new, old: jnp.where(is_on, new, old), learned, state)
        return state, (jax.tree.leaves(clipped)[0][0], is_sound(state))

    first = method.init(leaves(row[:1]))
    return jax.lax.scan(step, first, (row, jnp.arange(row.shape[0], dtype=jnp.int32)))[1]


def is_sound(state: Any) -> jax.Array:
    """Whether no number is NaN, nor infinite unless it says that nothing bounds.

    ACClip's record is relative to bounds, and infinite where such a bound is zero.
    """
    is_relative = isinstance(state, AcclipState)
    answers = [jnp.bool_(True)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, np.inexact):
            names = {getattr(key, "name", None) for key in path}
            may_be_inf = "max_norm" in names or (is_relative and "norm" in names)
            answers.append(jnp.all(~jnp.isnan(leaf) if may_be_inf else jnp.isfinite(leaf)))
    return jnp.all(jnp.stack(answers))


def build(name: str) -> Any:
    return BUILT[name]() if name in BUILT else trees.build(name)


def steps(text: str, before: int) -> int:
    return before + 1 if text == "n + 1" else int(text.replace(",", ""))


def longest(name: str) -> int:
    # As long as the windows of the defaults, and some more.
    return 1010 if name == "autoclip" else PREFIX


def assert_survived(run: Run) -> None:
    assert np.isfinite(run.outputs).all(), run.name
    assert run.is_sound.all(), run.name


EACH = trees.mostly_slow(RECOVERY, ("adagc", "clip_by_quantile", "stable_spam", "u_clip"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_half_of_a_usual_norm_passes_within_the_steps_of_the_docstring(name: str) -> None:
    text, before = RECOVERY[name], longest(name)
    for one in runs(build(name), steps(text, before) + 50, before):
        assert_survived(one)
        assert one.recovered_at() <= steps(text, one.before), one.name


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_half_of_a_usual_norm_passes_under_other_arguments_too(name: str) -> None:
    method, most = VARIANTS[name]
    for one in runs(method(), most + 50):
        assert_survived(one)
        assert one.recovered_at() <= most, one.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in RECOVERY
        if "norm" in inspect.signature(getattr(clipax, name)).parameters and name != "clip_by"
    ],
)
def test_a_leaf_with_a_history_of_its_own_recovers_by_itself(name: str) -> None:
    method = trees.public_factories()[name](norm=clipax.leaf_norm)

    def beside_a_usual_one(x: jax.Array) -> Any:
        return {"a": x, "b": jnp.array([0.6, 0.8])}

    most = steps(RECOVERY[name], 0)
    for one in runs(method, most + 50, longest(name), beside_a_usual_one):
        assert_survived(one)
        assert one.recovered_at() <= most, one.name


@pytest.mark.parametrize("name", RECOVERY)
def test_the_docstring_states_the_steps(name: str) -> None:
    text = " ".join((inspect.getdoc(getattr(clipax, name)) or "").split())
    assert f"half of a usual norm passes within {RECOVERY[name]} steps" in text


@pytest.mark.parametrize(
    "name", trees.mostly_slow(sorted(set(trees.public_factories()) - set(RECOVERY)))
)
def test_what_has_no_history_is_not_moved_by_a_stream(name: str) -> None:
    """Every public transformation is here or in the table."""
    for one in runs(build(name), 3):
        assert_survived(one)
        np.testing.assert_array_equal(one.outputs[one.before :], one.outputs[-1])
