"""Derivatives of every method, by its arguments and by the updates, against differences."""

import functools
import inspect
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

METHODS = sorted(trees.public_factories())

# Arguments by name, with which methods act on the sequences below in a few steps, away from
# corners: numbers, where they are continuous, and what else must be short.
VALUES: dict[str, Any] = {
    "b1": 0.6,
    "b2": 0.7,
    "decay": 0.7,
    "decay_bound": 0.6,
    "decay_norm": 0.5,
    "decay_square": 0.8,
    "delta": 0.3,
    "eps": 0.05,
    "factor": 0.9,
    "inner": clipax.clip_by_global_norm(1.1),
    "learning_rate": 0.3,
    "loss_z_max": 1.5,
    "max_carry": 1.3,
    "max_norm": 1.1,
    "max_rms": 0.5,
    "max_value": 0.6,
    "min_std": 0.01,
    "min_value": -0.5,
    "norm": clipax.global_norm,
    "ord": 1.3,
    "quantile": 0.35,
    "ratio": 1.5,
    "square_ratio": 1.5,
    "threshold": 1.1,
    "warmup_max_norm": 1.1,
    "warmup_steps": 2,
    "window_size": 4,
    "z_max": 1.2,
}
# What differs from that, and what else is tried.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "acclip": [{}, {"ord": 2.0}, {"ord": 0.7}],
    "adagc": [{"ratio": 0.8}, {"raw_history": True}],
    "adaptive_grad_clip": [{"ratio": 0.5}],
    "autoclip": [{}, {"norm": clipax.leaf_norm, "count_current": False}],
    "clip_by": [
        *(
            {"coefficient": coefficient}
            for coefficient in (clipax.coefficients.rational, clipax.coefficients.psac(0.1))
        ),
        {"coefficient": clipax.coefficients.normalized, "norm": clipax.unit_norm},
    ],
    "clip_by_average_norm": [{"max_norm": 0.2}],
    "clip_by_spectral_norm": [{}, {"coefficient": clipax.coefficients.tanh}],
    "skip_step": [{"skip_above": 5.0}],
    "spam_clip": [{}, {"reset_every": 3}],
    "zclip": [
        {},
        {"spike_bound": clipax.thresholds.mean_bound, "raw_history": True},
        {"spike_bound": clipax.thresholds.limit_bound, "learn_from_spikes": False},
    ],
}
# In a few steps with derivatives that are zero if they are lost.
LEARNING = ["acclip", "scale_by_stable_adam", "spam_clip", "stable_spam", "zclip"]


def continuous(factory: Callable[..., Any]) -> list[str]:
    """The arguments that may be any number of a range, by their annotation."""
    parameters = inspect.signature(factory).parameters
    numbers = np.ndarray  # It is one of `ArrayLike`.
    return [
        name for name, each in parameters.items() if numbers in typing.get_args(each.annotation)
    ]


# Thresholds and coefficients with numbers of their own.
BUILT: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "auto_s": (
        lambda s, c: clipax.clip_by(clipax.leaf_norm, c, clipax.coefficients.auto_s(s)),
        {"s": 0.2, "c": 0.9},
    ),
    "eps of hard": (
        lambda eps, c: clipax.clip_by(
            clipax.leaf_norm, c, functools.partial(clipax.coefficients.hard, eps=eps)
        ),
        {"eps": 0.2, "c": 0.9},
    ),
    "fixed, by path": (
        lambda a, b: clipax.clip_by(clipax.leaf_norm, {"bias": a, "kernel": b, "zero": a}),
        {"a": 0.7, "b": 0.9},
    ),
    "psac": (
        lambda s, c: clipax.clip_by(clipax.global_norm, c, clipax.coefficients.psac(s)),
        {"s": 0.2, "c": 0.9},
    ),
    "relative_to_params": (
        lambda ratio, eps: clipax.clip_by(
            clipax.unit_norm, clipax.thresholds.relative_to_params(ratio, eps)
        ),
        {"ratio": 0.4, "eps": 0.8},
    ),
    "rule of Optax": (
        lambda decay, times: clipax.clip_by(
            clipax.global_norm, optax.chain(optax.ema(decay), optax.scale(times))
        ),
        {"decay": 0.7, "times": 0.9},
    ),
    "schedule": (
        lambda start, rate: clipax.clip_by(clipax.leaf_norm, lambda n: start * jnp.exp(-rate * n)),
        {"start": 1.3, "rate": 0.3},
    ),
    "spectral rule": (
        lambda decay, times: clipax.clip_by_spectral_norm(
            optax.chain(optax.ema(decay), optax.scale(times))
        ),
        {"decay": 0.7, "times": 0.6},
    ),
}


def arguments(name: str, variant: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers, and what else the factory is called with."""
    factory = trees.public_factories()[name]
    taken = inspect.signature(factory).parameters
    given = {key: value for key, value in VALUES.items() if key in taken} | variant
    numbers = {key: jnp.asarray(given.pop(key), float) for key in continuous(factory)}
    return numbers, given


def cases(names: list[str]) -> list[Any]:
    return [
        pytest.param(name, variant, id=f"{name}-{row}")
        for name in names
        for row, variant in enumerate(VARIANTS.get(name, [{}]))
    ]


SHAPES = {"bias": (3,), "kernel": (3, 4), "zero": (2,)}
SIZES = {
    "a spike": [1.0, 1.3, 0.8, 6.0, 1.1],
    "zeros": [0.0] * 5,
    "zeros first": [0.0, 0.0, 1.0, 1.3, 0.7],
    "zeros last": [1.0, 1.3, 6.0, 0.0, 0.0],
}


def tree(seed: int, *leading: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(*leading, *shape)) for name, shape in SHAPES.items()}


def sequences(*, zero_entry: bool = True) -> dict[str, np.ndarray]:
    """Stacked: sequences of five steps, with a leaf that is zero and an entry that often is."""
    sizes = np.stack(list(SIZES.values()))
    stacked = {}
    for name, leaf in tree(0, 5).items():
        stacked[name] = leaf * sizes.reshape(*sizes.shape, *(1,) * (leaf.ndim - 1))
    if zero_entry:
        stacked["kernel"][:, 2:, 1, 1] = 0.0
    stacked["zero"] *= 0.0
    return stacked


@functools.cache
def params() -> Any:
    return tree(1)


def run(factory: Any, given: dict[str, Any], numbers: Any, sequence: Any) -> tuple[Any, Any]:
    """What comes out of all steps, and the state after them, in one vector each."""
    method = factory(**given, **numbers)
    loss = jnp.asarray(2.0)

    def step(state: Any, updates: Any) -> Any:
        clipped, state = method.update(
            updates, state, jax.tree.map(jnp.asarray, params()), loss=loss
        )
        return state, clipped

    state, clipped = jax.lax.scan(step, method.init(params()), sequence)
    return vector(clipped), vector(state)


def vector(tree: Any) -> Any:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def weights(like: Any) -> Any:
    return jnp.cos(jnp.arange(like.size, dtype=like.dtype)).reshape(like.shape)


def by_arguments(factory: Callable[..., Any], numbers: Any, given: dict[str, Any]) -> None:

    keys, values = list(numbers), jnp.stack(list(numbers.values()))
    moves = 1e-5 * jnp.diag(values)

    @trees.quick_jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def derivatives(sequence: Any, values: Any) -> Any:
        def everything(values: Any) -> Any:
            numbers = dict(zip(keys, values, strict=True))
            return jnp.concatenate(run(factory, given, numbers, sequence))

        # Programs that differ in numbers alone are compiled as one.
        base = values[None]
        moved = jnp.concatenate([base, base + moves, base - moves])
        results = jax.vmap(everything)(moved)
        ahead, behind = jnp.split(results[1:], 2)
        is_finite = jnp.isfinite(results[0])

        def total(values: Any) -> Any:
            result = everything(values)
            return jnp.sum(jnp.where(is_finite, result, 0) * weights(result))

        differences = (ahead - behind) / (2 * jnp.diag(moves)[:, None])
        return is_finite, jax.jacfwd(everything)(values).T, jax.grad(total)(values), differences

    results = jax.tree.map(np.asarray, derivatives(sequences(), values))
    for which, is_finite, forwards, backwards, expected in zip(SIZES, *results, strict=True):
        assert np.isfinite(forwards[:, is_finite]).all(), which
        for key, got, right in zip(keys, forwards, expected, strict=True):
            seen = is_finite & np.isfinite(right)
            np.testing.assert_allclose(
                got[seen], right[seen], 1e-5, 1e-6, err_msg=f"{key}, {which}"
            )
        summed = np.where(is_finite, forwards, 0) @ np.asarray(weights(forwards[0]))
        np.testing.assert_allclose(backwards, summed, 1e-9, 1e-9, err_msg=which)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), [case for case in cases(LEARNING) if case.id[-1] == "0"]
)
def test_derivatives_by_arguments_of_methods_that_remember_entries(
    name: str, variant: Any
) -> None:
    with trees.double_precision(True):
        by_arguments(trees.public_factories()[name], *arguments(name, variant))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), cases([n for n in METHODS if continuous(trees.public_factories()[n])])
)
def test_derivatives_by_arguments_equal_differences(name: str, variant: Any) -> None:
    with trees.double_precision(True):
        by_arguments(trees.public_factories()[name], *arguments(name, variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_derivatives_by_numbers_of_what_a_method_is_built_from(name: str) -> None:
    factory, numbers = BUILT[name]
    # JAX takes the derivative of Optax's powers after Optax has made them, in the mode of then.
    with trees.double_precision(True), jax.numpy_dtype_promotion("standard"):
        by_arguments(
            factory, {key: jnp.asarray(value, float) for key, value in numbers.items()}, {}
        )


def by_updates(name: str, variant: dict[str, Any]) -> Any:
    """Of what comes out, by all updates: first and second, with their differences."""
    numbers, given = arguments(name, variant)
    factory = trees.public_factories()[name]
    directions = tree(2, 5)

    @trees.quick_jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def derivatives(sequence: Any, moves: Any) -> Any:
        def outputs(sequence: Any) -> Any:
            return run(factory, given, numbers, sequence)[0]

        def total(sequence: Any) -> Any:
            values = outputs(sequence)
            return jnp.sum((values + values**2) * weights(values))

        def both(sequence: Any) -> Any:
            return outputs(sequence), jax.grad(total)(sequence)

        (values, gradient), (first, second) = jax.jvp(both, (sequence,), (moves,))
        summed = jnp.sum(first * (1 + 2 * values) * weights(values))
        along = jax.tree.map(lambda leaf, move: jnp.sum(leaf * move), gradient, moves)
        along = sum(jax.tree.leaves(along))

        def at(step: Any) -> Any:
            return both(jax.tree.map(lambda leaf, move: leaf + step * move, sequence, moves))

        ends = jax.vmap(at)(jnp.asarray([1e-6, -1e-6]))
        differences = jax.tree.map(lambda leaf: (leaf[0] - leaf[1]) / 2e-6, ends)
        return (first, second, along), (*differences, summed)

    # The norm of a zero leaf has a corner there.
    directions["zero"] *= 0
    # So have powers of moduli, but for squares.
    is_smooth = float((given | numbers).get("ord", 2)) == 2
    return derivatives(sequences(zero_entry=is_smooth), directions)


def assert_near(got: Any, expected: Any, rtol: float) -> None:
    rows = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, one), other in rows:
        size = 1 + np.abs(other).max(initial=0)
        np.testing.assert_allclose(one, other, rtol, rtol * size, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), cases(METHODS))
def test_derivatives_by_updates_equal_differences(name: str, variant: Any) -> None:
    with trees.double_precision(True):
        got, expected = by_updates(name, variant)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
        for row, which in enumerate(SIZES):
            (first, second, along), (difference, second_difference, summed) = (
                jax.tree.map(lambda leaf, row=row: leaf[row], each) for each in (got, expected)
            )
            np.testing.assert_allclose(along, summed, 1e-8, 1e-8, err_msg=which)
            if which == "a spike":
                assert_near(first, difference, 1e-6)
                assert_near(second, second_difference, 1e-5)


# Corners, and the ends of ranges.


# Where a weight of zero is a corner: a deviation of one value, a root; an RMS of exactly one; a
# bound that is the largest entry.
CORNERS = {
    "scale_by_stable_adam": ["b2"],
    "stable_spam": ["decay_bound"],
    "zclip": ["decay"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), cases(LEARNING))
def test_derivatives_by_decays_of_zero(name: str, variant: Any) -> None:
    """They exist from one side, where no entry is zero, but at corners: finite there too."""
    factory, updates = trees.public_factories()[name], tree(0, 5)
    step = 1e-7
    with trees.double_precision(True):
        numbers, given = arguments(name, variant)
        decays = [key for key in numbers if key.startswith(("decay", "b1", "b2"))]
        numbers |= dict.fromkeys(decays, jnp.zeros(()))

        @trees.quick_jit
        def derivatives(numbers: Any) -> Any:
            def outputs(numbers: Any) -> Any:
                return run(factory, given, numbers, updates)[0]

            def total(numbers: Any) -> Any:
                return jnp.sum(outputs(numbers) * weights(outputs(numbers)))

            moved = {key: jnp.full(2 * len(decays), value) for key, value in numbers.items()}
            for row, key in enumerate(decays):
                moved[key] = (
                    moved[key]
                    .at[jnp.array([row, row + len(decays)])]
                    .add(jnp.array([step, 2 * step]))
                )
            once, twice = jnp.split(jax.vmap(outputs)(moved), 2)
            # The second order: roots of small entries are curved.
            differences = (4 * once - twice - 3 * outputs(numbers)[None]) / (2 * step)
            return jax.jacfwd(outputs)(numbers), jax.grad(total)(numbers), differences

        forwards, backwards, differences = derivatives(numbers)
        for key, difference in zip(decays, differences, strict=True):
            assert np.isfinite(forwards[key]).all()
            summed = np.sum(forwards[key] * weights(difference))
            np.testing.assert_allclose(backwards[key], summed, 1e-9, 1e-9)
            if key not in CORNERS.get(name, ()):
                np.testing.assert_allclose(forwards[key], difference, 1e-4, 1e-5)


def bound_through_a_cotangent(x: Any, max_norm: Any) -> Any:
    def loss(x: Any) -> Any:
        y = clipax.clip_cotangent(x, clipax.clip_by_global_norm(max_norm))
        return jnp.sum(jnp.sin(y) * weights(y))

    return jax.grad(loss)(x)


def test_a_clipped_cotangent_has_derivatives() -> None:
    with trees.double_precision(True):
        x, direction, bound = jnp.asarray(tree(0)["kernel"]), jnp.asarray(tree(1)["kernel"]), 0.7

        def along(step: Any) -> Any:
            return bound_through_a_cotangent(x + step * direction, bound + step)

        _, got = jax.jvp(along, (0.0,), (1.0,))
        np.testing.assert_allclose(got, (along(1e-6) - along(-1e-6)) / 2e-6, 1e-6, 1e-8)


@pytest.mark.slow
def test_a_clipped_tree_has_derivatives() -> None:
    with trees.double_precision(True):
        x, direction, bound = jnp.asarray(tree(0)["kernel"]), jnp.asarray(tree(1)["kernel"]), 0.7

        def along(step: Any) -> Any:
            method = clipax.clip_by_unit_norm(bound + step)
            clipped, seen = clipax.clip_tree(x + step * direction, method)
            return jnp.sum(clipped * weights(clipped)) + seen["norm"]

        expected = (along(1e-6) - along(-1e-6)) / 2e-6
        np.testing.assert_allclose(jax.jvp(along, (0.0,), (1.0,))[1], expected, 1e-7)
        np.testing.assert_allclose(jax.grad(along)(0.0), expected, 1e-7)
