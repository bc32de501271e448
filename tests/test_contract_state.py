"""What every method keeps of its state: called without one, donated, mapped, looked up by name."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax

METHODS = sorted(trees.public_factories())
methods = pytest.mark.parametrize("name", METHODS)
some_methods = pytest.mark.parametrize("name", trees.mostly_slow(METHODS))
NO_STATES = {
    "None": None,
    "empty": optax.EmptyState(),
    "of another": optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)}),
    "tuple": (),
}


def has_no_memory(state: Any) -> bool:
    """Whether no step needs an earlier one, as in Optax's clips."""
    if isinstance(state, clipax.states.ObserveState):
        return has_no_memory(state.inner_state)
    return isinstance(state, clipax.states.ClipState) and not jax.tree.leaves(state.threshold)


@some_methods
@pytest.mark.parametrize("state", NO_STATES.values(), ids=NO_STATES)
def test_no_state_is_a_new_one_or_is_refused_with_what_to_do(name: str, state: Any) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    for update in (method.update, trees.quick_jit(method.update)):
        if has_no_memory(method.init(params)):
            expected = method.update(updates, method.init(params), params)
            trees.assert_close(update(updates, state, params), expected)
        else:
            with pytest.raises(
                ValueError, match=r"state must be .* state = method.init\(params\)"
            ):
                update(updates, state, params)


def test_a_scheduled_bound_is_a_memory() -> None:
    for method in (
        clipax.clip_by_global_norm(lambda count: 1.0 / (1 + count)),
        clipax.clip_by_value(lambda count: 1.0 / (1 + count)),
        clipax.clip_by_value(1.0, lambda count: -1.0 / (1 + count)),
        clipax.clip_by_leaf_norm({"a": 1.0, "b": optax.linear_schedule(1.0, 0.5, 3)}),
    ):
        with pytest.raises(ValueError, match="state must be the ClipState"):
            method.update({"a": jnp.ones(2), "b": jnp.ones(2)}, None)


def test_a_pair_of_bounds_takes_no_state_either() -> None:
    clip = clipax.clip_by_value(0.5, -0.25)
    updates = jnp.array([3.0, -3.0])
    clipped, state = clip.update(updates, optax.EmptyState())
    np.testing.assert_array_equal(clipped, [0.5, -0.25])
    trees.assert_same_type(state, clip.init(updates))


@some_methods
def test_metrics_survive_the_donation_of_the_state(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    state = method.init(params)
    step = trees.quick_jit(method.update, donate_argnums=1)
    for _ in range(2):
        logged = clipax.metrics(state, per_leaf=True)
        _, state = step(updates, state, params)
        assert all(np.isfinite(float(value)) or value > 0 for value in logged.values())


@pytest.mark.slow
@methods
def test_metrics_of_a_mapped_state_are_those_of_each_member(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf, 0.1 * leaf, 7 * leaf]), updates)
    states = jax.vmap(lambda _: method.init(params))(jnp.arange(4))
    _, states = jax.vmap(method.update, in_axes=(0, 0, None))(members, states, params)
    found = clipax.metrics(states, per_leaf=True)
    expected = jax.vmap(lambda state: clipax.metrics(state, per_leaf=True))(states)
    assert all(value.shape == (4,) for value in found.values())
    trees.assert_close(found, expected)


@methods
def test_no_counter_is_named_as_optaxs_are(name: str) -> None:
    method, (params, _) = trees.build(name), trees.params_and_updates()
    scheduled = clipax.clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 10))
    # Without the inner method, which is Optax's business.
    optimizer = optax.chain(scheduled, method, optax.scale_by_adam())
    assert int(optax.tree.get(optimizer.init(params), "count")) == 0


def test_leaves_whose_joined_names_are_alike_have_metrics_of_their_own() -> None:
    updates = {"a/b": jnp.array([3.0]), "a": {"b": jnp.array([5.0])}, "c": jnp.array([7.0])}
    for build in (clipax.clip_by_leaf_norm, clipax.clip_by_block_rms, clipax.clip_by_value):
        clip = build(1.0)
        clipped, state = clip.update(updates, clip.init(updates))
        values = clipax.metrics(state, per_leaf=True)
        norms = {key: float(value) for key, value in values.items() if key.startswith("norm/")}
        assert norms == {"norm/['a/b']": 3.0, "norm/['a']['b']": 5.0, "norm/c": 7.0}
        trees.assert_close(clipped, jax.tree.map(jnp.ones_like, updates))
    clip = clipax.clip_by_leaf_norm({"a/b": 1.0, "a": {"b": 2.0}, "c": 3.0})
    clipped, _ = clip.update(updates, clip.init(updates))
    assert [float(leaf[0]) for leaf in jax.tree.leaves(clipped)] == [2.0, 1.0, 3.0]


RULES = {
    "unit_axis": [clipax.clip_by_unit_norm, clipax.clip_by_spectral_norm],
    "stack_axis": [clipax.clip_by_leaf_norm, clipax.clip_by_spectral_norm],
    "axes": [clipax.clip_by_leaf_norm],
}


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("rule", RULES)
def test_a_tuple_in_the_place_of_a_tuple_is_not_read_in_silence(rule: str) -> None:
    updates = [(jnp.ones((2, 3)), 2 * jnp.ones((3, 2)))]
    for build in RULES[rule]:
        for meant in ([(1, 0)], ((1, 0),)):
            with pytest.raises(ValueError, match=rf"{rule} has \(1, 0\).* Write a list"):
                clipax.clip_tree(updates, build(1.0, **{rule: meant}))
        clipax.clip_tree(updates, build(1.0, **{rule: [[0, 0]]}))


@pytest.mark.slow
@methods
def test_the_state_of_another_method_is_none(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    for other in METHODS:
        state = trees.build(other).init(params)
        if jax.tree.structure(state) == jax.tree.structure(method.init(params)):
            continue  # Nothing tells the two apart.
        if has_no_memory(method.init(params)):
            expected = method.update(updates, method.init(params), params)
            trees.assert_close(method.update(updates, state, params), expected)
        elif name != "observe":
            with pytest.raises(ValueError, match="state must be "):
                method.update(updates, state, params)


STACKED = {"gamma": jnp.arange(1.0, 13.0), "w": jnp.ones((12, 4, 4))}


@pytest.mark.parametrize(
    "method",
    [
        clipax.adagc(stack_axis=0),
        clipax.clip_by_leaf_norm(1.0, stack_axis=0),
        clipax.clip_by_leaf_norm(lambda count: 1.0, axes=()),
        clipax.clip_by_unit_norm(1.0, unit_axis=lambda path, leaf: 0),
    ],
)
def test_norms_of_layers_are_no_members(method: Any) -> None:
    _, state = method.update(STACKED, method.init(STACKED))
    assert all(value.shape == () for value in clipax.metrics(state, per_leaf=True).values())


def test_members_of_members_have_two_axes() -> None:
    clip = clipax.clip_by_global_norm(1.0)
    states = jax.vmap(jax.vmap(clip.init))(jnp.ones((2, 3, 4)))
    assert all(value.shape == (2, 3) for value in clipax.metrics(states).values())


@pytest.mark.slow
def test_what_is_none_in_a_model_may_be_none_in_its_bounds() -> None:
    model = eqx.nn.MLP(3, 2, 4, 1, use_bias=False, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    bounds = jax.tree.map(lambda _: 0.5, params)
    for build in (
        clipax.clip_by_leaf_norm,
        clipax.clip_by_unit_norm,
        clipax.clip_by_block_rms,
        clipax.clip_by_value,
        clipax.adaptive_grad_clip,
        clipax.clip_by_spectral_norm,
        clipax.smooth_clip_by_value,
        lambda bound: clipax.zclip(max_norm=bound, norm=clipax.leaf_norm),
    ):
        clips = build(bounds), build(0.5)
        one, other = (clip.update(params, clip.init(params), params) for clip in clips)
        trees.assert_close(one, other)


def test_coefficients_may_be_plain_numbers() -> None:
    scaled = clipax.coefficients.scale_updates({"w": jnp.ones(2), "n": 7}, {"w": 0.5, "n": None})
    trees.assert_close(scaled, {"w": jnp.full(2, 0.5), "n": 7})
