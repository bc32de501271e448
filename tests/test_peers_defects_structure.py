"""What was seen to break in optax 0.2.8: AGC's units, stacked layers, shards and states.

As in `test_peers_defects.py`, each docstring has what optax gives.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax

pytestmark = pytest.mark.slow


def _clip(transformation: optax.GradientTransformation, updates: Any, params: Any = None) -> Any:
    """The clipped updates and the state."""
    params = updates if params is None else params
    return transformation.update(updates, transformation.init(params), params)


# -- AGC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_axis", [None, -1, 0])
def test_agc_takes_one_axis_for_every_leaf_whatever_their_ranks(unit_axis):
    """optax: `axis=1` raises on the bias; ranks above five raise without an axis."""
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": (), "deep": (2, 1, 2, 1, 2, 4)}
    params = {name: jnp.full(shape, 2.0) for name, shape in shapes.items()}
    updates = jax.tree.map(lambda leaf: 100 * leaf, params)
    clipped, _ = _clip(clipax.adaptive_grad_clip(0.5, unit_axis=unit_axis), updates, params)
    for name in shapes:  # every unit is a hundred times its parameters
        np.testing.assert_allclose(clipped[name], 0.5 * params[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("unit_axis", "summed"),
    [(clipax.units.nfnets, 0), ((1, 2), 0), (clipax.units.output_last, (0, 1)), (1, (0, 2))],
)
def test_a_leaf_of_rank_three_has_the_units_that_are_asked_for(unit_axis, summed):
    """optax: documented as summed over (0, 1, 2), coded as 0."""
    updates, params = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
    size, param_size = (
        np.sqrt(np.square(leaf).sum(axis=summed, keepdims=True)) for leaf in (updates, params)
    )
    clip = clipax.adaptive_grad_clip(0.5, unit_axis=unit_axis)
    clipped, _ = _clip(clip, jnp.asarray(updates), jnp.asarray(params))
    expected = updates * np.minimum(1.0, 0.5 * param_size / size)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)


def test_a_frozen_leaf_without_an_update_stays_so_beside_its_parameter():
    """optax: a None beside an array is a ValueError of jax.tree.map."""
    params = {"frozen": jnp.array([5.0, 5.0]), "w": jnp.array([0.6, 0.8])}
    updates = {"frozen": None, "w": jnp.array([3.0, 4.0])}
    clipped, _ = jax.jit(functools.partial(_clip, clipax.adaptive_grad_clip(0.5)))(updates, params)
    assert clipped["frozen"] is None
    np.testing.assert_allclose(clipped["w"], [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()])
def test_agc_keeps_an_explicit_sharding_on_eight_devices(spec):
    """optax: `where` between arrays of different sharding raises."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    host = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
    expected, _ = _clip(clipax.adaptive_grad_clip(0.5), *map(jnp.asarray, host))
    updates, params = (jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf in host)
    clipped, _ = jax.jit(functools.partial(_clip, clipax.adaptive_grad_clip(0.5)))(updates, params)
    assert clipped.sharding.is_equivalent_to(updates.sharding, 2)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)


# -- Stacked layers ----------------------------------------------------------------------------


def test_a_hot_layer_of_a_stack_does_not_shrink_its_neighbours():
    """optax: seven layers of norm 1 beside one of 70 come out at 1/70 each."""
    calm = np.full((4, 4), 0.25, np.float32)
    updates = {"layers": jnp.asarray(np.stack([70 * calm, *[calm] * 7])), "head": jnp.ones(1)}
    clip = clipax.clip_by_leaf_norm(
        1.0, stack_axis=lambda path, leaf: 0 if path.startswith("layers") else None
    )
    clipped, state = _clip(clip, updates)
    # Every layer has the norm 1 now: the hot one by clipping, the others bit for bit.
    np.testing.assert_allclose(clipped["layers"][0], calm, rtol=1e-6)
    np.testing.assert_array_equal(clipped["layers"][1:], updates["layers"][1:])
    np.testing.assert_allclose(state.norm["layers"].ravel(), [70, *[1] * 7], rtol=1e-6)


# -- shard_map ---------------------------------------------------------------------------------

_SPECS = {"sharded": PartitionSpec("x"), "replicated": PartitionSpec()}
_LOCAL_AXES = {"sharded": "x", "replicated": ()}
_TREE = {
    # Shards of very different sizes, so that clipping each by itself turns the direction.
    "sharded": np.float32(np.outer(2.0 ** np.arange(8), np.ones(3))),
    "replicated": np.float32([30.0, 40.0]),
}
_NORM = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in _TREE.values()))


def _on_eight_shards(clip: optax.GradientTransformation, *, check_vma: bool) -> Any:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def local(tree: Any) -> Any:
        clipped, state = _clip(clip, tree)
        # Each shard's own copy of what should be replicated, side by side.
        copies = jax.tree.map(
            lambda leaf: leaf[None] + 0 * jax.lax.axis_index("x").astype(jnp.float32),
            (clipped["replicated"], state.norm),
        )
        return clipped["sharded"], copies

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_SPECS,),
        out_specs=PartitionSpec("x"),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(jax.tree.map(jnp.asarray, _TREE))


@pytest.mark.parametrize(("check_vma", "axis_name"), [(True, None), (False, _LOCAL_AXES)])
def test_eight_shards_are_clipped_to_one_global_norm_in_their_own_direction(check_vma, axis_name):
    """optax: a norm of 2.83 and another direction; the replicated leaf has eight values."""
    clip = clipax.clip_by_global_norm(1.0, axis_name=axis_name)
    sharded, (replicated, norms) = _on_eight_shards(clip, check_vma=check_vma)
    # A replicated leaf that were counted eight times would make the norm larger.
    np.testing.assert_allclose(norms, np.full(8, _NORM), rtol=1e-6)
    np.testing.assert_allclose(sharded, _TREE["sharded"] / _NORM, rtol=1e-6)
    expected = np.tile(_TREE["replicated"] / _NORM, (8, 1))
    np.testing.assert_allclose(replicated, expected, rtol=1e-6)


def test_without_types_and_axis_name_a_shard_is_not_taken_for_the_whole():
    """optax: silently wrong."""
    with pytest.raises(ValueError, match="axis_name"):
        _on_eight_shards(clipax.clip_by_global_norm(1.0), check_vma=False)


# -- State -------------------------------------------------------------------------------------


def test_the_norm_before_clipping_is_in_the_state_and_in_the_metrics():
    """optax: nothing is kept (optax#326)."""
    optimizer = optax.chain(clipax.clip_by_global_norm(1.0), optax.sgd(0.1))
    _, state = _clip(optimizer, {"w": jnp.array([3.0, 4.0])})
    assert float(state[0].norm) == 5.0
    read = {name: float(value) for name, value in clipax.metrics(state).items()}
    assert read["norm"] == 5.0
    assert read["coefficient"] == pytest.approx(0.2)
    assert read["clip_fraction"] == 1.0


_WRAPPERS = {
    "alone": lambda clip: clip,
    "chain": lambda clip: optax.chain(clip, optax.sgd(0.1)),
    "apply_if_finite": lambda clip: optax.apply_if_finite(clip, 3),
    "MultiSteps": lambda clip: optax.MultiSteps(clip, 2),
}
# With the norm that each measures of ones, the largest where there are several.
_CLIPS = {
    "global": (clipax.clip_by_global_norm(1.0), 4.0),
    "scheduled_leaf": (clipax.clip_by_leaf_norm(optax.constant_schedule(1.0)), 12**0.5),
    "agc": (clipax.adaptive_grad_clip(0.1), 2.0),
    "value": (clipax.clip(1.0), 1.0),
    "measure": (clipax.measure(window_size=3), 4.0),
}


@pytest.mark.parametrize("wrapper", _WRAPPERS)
@pytest.mark.parametrize("name", _CLIPS)
def test_the_states_type_is_constant_in_a_scan_and_a_round_trip_of_its_leaves(name, wrapper):
    """optax.monitor: the structure changes after the first update, and the scan fails."""
    clip, norm_of_ones = _CLIPS[name]
    transformation = _WRAPPERS[wrapper](clip)
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    first = transformation.init(params)

    def step(state: Any, size: jax.Array) -> Any:
        updates = jax.tree.map(lambda leaf: size * leaf, params)
        return transformation.update(updates, state, params)[1], None

    # optax.MultiSteps divides by an integer, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        last, _ = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(4.0)))(first)
    types = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in (first, last)]
    assert types[0] == types[1]

    restored = jax.tree.unflatten(jax.tree.structure(first), jax.tree.leaves(last))
    last_size = 2.5 if wrapper == "MultiSteps" else 3.0  # it saw the mean of 2 and 3
    norm = float(clipax.metrics(restored)["norm"])
    assert norm == pytest.approx(last_size * norm_of_ones, rel=1e-6)
