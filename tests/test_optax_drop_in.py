"""`optax.` -> `clipax.` on the names that both have, and the optax calls that have no such name.

Compared on what optax gets right: float32, finite norms, bounds above zero.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipax

_SHAPES = {
    "scalar": (),
    "bias": (5,),
    "kernel": (4, 5),
    "heads": (4, 2, 3),
    "conv": (3, 2, 2, 5),
    "empty": (0, 3),
}
_ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "clip": [(0.5,)],
    "clip_by_global_norm": [(1.0,)],
    "clip_by_block_rms": [(0.3,)],
    "adaptive_grad_clip": [(0.1,), (0.1, 1.0)],
    "scale": [(0.5,)],
}


def _shared() -> list[str]:
    """The public functions and classes of both."""
    names = {name for name in dir(optax) if hasattr(clipax, name) and name[0] != "_"}
    return sorted(name for name in names if callable(getattr(clipax, name)))


def _random(seed: int, shapes: Any = _SHAPES) -> Any:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


def _assert_close(actual: Any, expected: Any) -> None:
    for name, leaf in expected.items():
        np.testing.assert_allclose(actual[name], leaf, rtol=2e-5, atol=1e-7, err_msg=name)


def _train(clip: optax.GradientTransformation) -> Any:
    """Six steps of Adam, on gradients from far below every bound to far above."""
    optimizer = optax.chain(clip, optax.adam(1e-2))
    params, gradients = _random(0), _random(1)

    def step(carry: Any, size: jax.Array) -> Any:
        params, state = carry
        updates = jax.tree.map(lambda leaf: size * leaf, gradients)
        updates, state = optimizer.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), None

    sizes = jnp.array([1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
    # optax's Adam raises a float to an integer power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        carry = params, optimizer.init(params)
        return jax.jit(lambda carry: jax.lax.scan(step, carry, sizes))(carry)[0][0]


@pytest.mark.parametrize("name", _shared())
def test_a_name_that_both_have_is_a_drop_in(name):
    theirs, ours = getattr(optax, name), getattr(clipax, name)
    if inspect.isclass(theirs):
        state = clipax.clip(1.0).init(jnp.ones(2))
        assert isinstance(state, ours)
        assert isinstance(optax.clip(1.0).init(jnp.ones(2)), theirs)
    elif name == "global_norm":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optax.global_norm is deprecated")
            expected = theirs(_random(0))
        np.testing.assert_allclose(ours(_random(0)), expected, rtol=1e-6)
    else:
        for arguments in _ARGUMENTS[name]:
            _assert_close(_train(ours(*arguments)), _train(theirs(*arguments)))


# -- AGC, rank by rank --------------------------------------------------------------------------

_AGC_SHAPES = {
    "rank_0": (),
    "rank_1": (7,),
    "rank_1_of_one": (1,),
    "rank_2": (4, 3),
    "rank_2_row": (1, 6),
    "rank_2_column": (6, 1),
    "rank_3": (4, 2, 3),
    "rank_3_one_head": (4, 1, 3),
    "rank_3_one_input": (1, 4, 3),
    "rank_3_line": (1, 6, 1),
    "rank_4": (2, 3, 2, 4),
    "rank_4_pointwise": (1, 1, 5, 4),
    "rank_4_one_output": (3, 3, 2, 1),
    "rank_4_line": (1, 1, 1, 4),
    "rank_5": (2, 2, 3, 2, 3),
    "rank_5_one_output": (2, 1, 3, 2, 1),
}
_HAS_AXIS = "axis" in inspect.signature(optax.adaptive_grad_clip).parameters


@pytest.mark.slow
def test_agc_has_optaxs_units_for_every_rank_and_every_axis_of_one():
    shapes = {
        # optax before 0.2.6 ends at rank 4.
        name: shape
        for name, shape in _AGC_SHAPES.items()
        if len(shape) < 5 or _HAS_AXIS
    }
    params, updates = _random(2, shapes), _random(3, shapes)
    theirs, ours = map(_clipper, (optax.adaptive_grad_clip, clipax.adaptive_grad_clip))
    for ratio in (0.1, 1.0, 10.0):
        _assert_close(ours(ratio, updates, params), theirs(ratio, updates, params))


@pytest.mark.slow_but(1)
@pytest.mark.skipif(not _HAS_AXIS, reason="this optax has no axis argument")
@pytest.mark.parametrize("axis", [0, (0, 2), -1])
def test_optaxs_agc_axis_is_a_leaf_norm_over_those_axes_against_the_params(axis):
    shapes = {"one": (3, 4, 2), "other": (2, 3, 5)}
    params, updates = _random(2, shapes), _random(3, shapes)
    norm = functools.partial(clipax.leaf_norm, axes=axis)
    theirs = _clipper(lambda ratio: optax.adaptive_grad_clip(ratio, axis=axis))
    ours = _clipper(
        lambda ratio: clipax.clip_by(norm, clipax.thresholds.relative_to_params(ratio))
    )
    _assert_close(ours(0.3, updates, params), theirs(0.3, updates, params))


def _clipper(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    @jax.jit
    def clip(bound: Any, updates: Any, params: Any) -> Any:
        transformation = make(bound)
        return transformation.update(updates, transformation.init(params), params)[0]

    return clip


# -- Names that clipax does not have ------------------------------------------------------------


_PER_EXAMPLE = {"w": (6, 3, 4), "b": (6, 4)}


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("max_norm", [0.0, 3.5, jnp.inf])
def test_per_example_global_clipping_is_a_vmap_of_clip_tree_and_a_sum(max_norm):
    gradients = list(_random(4, _PER_EXAMPLE).values())
    total, info = _sum_of_clipped(gradients, clipax.clip_by_global_norm(max_norm))
    expected, count = optax.per_example_global_norm_clip(gradients, max_norm)
    _assert_close(dict(enumerate(total)), dict(enumerate(expected)))
    assert int(info["clip_fraction"].sum()) == int(count)


def test_per_example_layer_clipping_is_a_vmap_of_clip_tree_by_leaf_norm():
    gradients = list(_random(4, _PER_EXAMPLE).values())
    total, _ = _sum_of_clipped(gradients, clipax.clip_by_leaf_norm(2.0 / len(gradients) ** 0.5))
    expected, _ = optax.per_example_layer_norm_clip(gradients, 2.0)
    _assert_close(dict(enumerate(total)), dict(enumerate(expected)))


def _sum_of_clipped(gradients: Any, clip: optax.GradientTransformation) -> Any:
    clipped, info = jax.jit(jax.vmap(lambda leaves: clipax.clip_tree(leaves, clip)))(gradients)
    return jax.tree.map(lambda leaf: leaf.sum(0), clipped), info


# -- Differences in the calls --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("clip", "max_delta", "max_value"),
        ("clip_by_block_rms", "threshold", "max_rms"),
        ("adaptive_grad_clip", "clipping", "ratio"),
        ("clip_by_global_norm", "max_norm", "max_norm"),
    ],
)
def test_the_bounds_keyword_has_clipaxs_name(name, theirs, ours):
    assert next(iter(inspect.signature(getattr(optax, name)).parameters)) == theirs
    assert next(iter(inspect.signature(getattr(clipax, name)).parameters)) == ours


def test_optaxs_third_argument_of_agc_is_refused_and_not_misread():
    with pytest.raises(TypeError):
        clipax.adaptive_grad_clip(0.1, 1e-3, 0)


# -- Calls without a state ------------------------------------------------------------------------

_FIXED = {"w": jnp.full((3, 4), 500.0), "b": (jnp.array([0.5, -2.0]), jnp.array(-4.0))}
_CLIPS = {
    "clip": lambda bound: (clipax.clip(bound), optax.clip(bound)),
    "clip_by_block_rms": lambda bound: (
        clipax.clip_by_block_rms(bound),
        optax.clip_by_block_rms(bound),
    ),
    "clip_by_global_norm": lambda bound: (
        clipax.clip_by_global_norm(bound),
        optax.clip_by_global_norm(bound),
    ),
    "adaptive_grad_clip": lambda bound: (
        clipax.adaptive_grad_clip(bound),
        optax.adaptive_grad_clip(bound),
    ),
}


@pytest.mark.parametrize("name", _CLIPS)
def test_a_clip_is_called_without_a_state_as_optaxs_is(name):
    params = jax.tree.map(lambda leaf: 0.3 * jnp.ones_like(leaf), _FIXED)
    ours, theirs = _CLIPS[name](1.0 / 3)
    expected, _ = theirs.update(_FIXED, theirs.init(params), params)
    for state in (None, optax.EmptyState(), (), ours.init(params)):
        clipped, _ = jax.jit(ours.update)(_FIXED, state, params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), clipped, expected)


def test_a_clipped_tree_has_the_bound_for_its_norm_without_a_state():
    for i in (1, 3, 10):
        bound = 1.0 / i
        clipped, _ = clipax.clip_by_global_norm(bound).update(_FIXED, None)
        np.testing.assert_allclose(optax.tree.norm(clipped), bound, rtol=1e-6)
        again, _ = clipax.clip_by_global_norm(2 * bound).update(clipped, None)
        jax.tree.map(np.testing.assert_array_equal, again, clipped)
        clipped, _ = clipax.clip_by_block_rms(bound).update(_FIXED, None)
        for leaf in jax.tree.leaves(clipped):
            np.testing.assert_allclose(np.sqrt(np.mean(leaf**2)), bound, rtol=1e-6)
        clipped, _ = clipax.clip(bound).update(_FIXED, None)
        for leaf in jax.tree.leaves(clipped):
            np.testing.assert_allclose(np.abs(leaf).max(), bound, rtol=1e-6)


def test_clips_stand_in_a_chain_whose_state_is_optaxs():
    """As where an optimizer state was made by the chain with optax's clip."""
    made_with_optax = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    used = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(0.1))
    with jax.numpy_dtype_promotion("standard"):
        state = made_with_optax.init(_FIXED)
        expected, _ = made_with_optax.update(_FIXED, state, _FIXED)
        updates, _ = used.update(_FIXED, state, _FIXED)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected)
