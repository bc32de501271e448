"""Statistics of a clip between two looks at the log, against NumPy over the same steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sequences
import trees

import clipax


def group(path: str, leaf: Any) -> str | None:
    return "dense" if path.startswith("dense/") else {0: "scalars", 1: "vectors"}.get(leaf.ndim)


def everything(path: str, leaf: Any) -> str:
    return "all"


def norm_of(updates: Any) -> float:
    leaves = [np.asarray(leaf, np.complex128).ravel() for leaf in jax.tree.leaves(updates)]
    return float(np.linalg.norm(np.concatenate(leaves)))


def oracle(inputs: list[Any], outputs: list[Any]) -> dict[str, float]:
    """What the metrics should be of steps with these updates before and after a clip."""
    before = np.array([norm_of(updates) for updates in inputs])
    after = np.array([norm_of(updates) for updates in outputs])
    is_finite = np.isfinite(before) & np.isfinite(after)
    changed = [
        any(
            np.any(np.asarray(one) != np.asarray(other))
            for one, other in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        )
        for old, new in zip(inputs, outputs, strict=True)
    ]
    kept = before[is_finite], after[is_finite]
    return {
        "steps": is_finite.sum(),
        "steps_clipped": np.sum(np.array(changed)[is_finite]),
        "steps_not_finite": np.sum(~is_finite),
        "mean_norm": kept[0].mean(),
        "largest_norm": kept[0].max(),
        "mean_coefficient": np.mean(
            np.where(kept[0] > 0, kept[1] / np.where(kept[0] > 0, kept[0], 1), 1)
        ),
        "removed_share": np.sum(np.maximum(kept[0] - kept[1], 0)) / kept[0].sum(),
        **{
            f"{name}_norm/{group}": reduce(
                [norm for norm, keep in zip(norms, is_finite, strict=True) if keep]
            )
            for group, norms in groups_of(inputs).items()
            for name, reduce in (("mean", np.mean), ("largest", np.max))
        },
    }


def groups_of(inputs: list[Any]) -> dict[str, list[float]]:
    return {
        "dense": [norm_of(updates["dense"]) for updates in inputs],
        "scalars": [norm_of(updates["scale"]) for updates in inputs],
    }


def tracked(state: Any) -> dict[str, np.ndarray]:
    return {
        key.removeprefix("tracked/"): np.asarray(value)
        for key, value in clipax.metrics(state).items()
        if key.startswith("tracked/")
    }


def assert_tracked(state: Any, expected: dict[str, float], rtol: float = 2e-5) -> None:
    values = tracked(state)
    assert set(values) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(values[key], value, rtol=rtol, err_msg=key)


def rows(stacked: Any, steps: range) -> list[Any]:
    return [jax.tree.map(lambda leaf, step=step: leaf[step], stacked) for step in steps]


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    "inner",
    [
        clipax.clip_by_global_norm(3.0),
        clipax.clip_by_leaf_norm(2.0),
        clipax.clip_by_value(0.5),
        optax.clip_by_global_norm(3.0),
    ],
    ids=["one norm", "norms of leaves", "values", "of optax"],
)
def test_equals_numpy_over_a_spiky_sequence_and_again_after_a_reset(inner: Any) -> None:
    sequence = sequences.spiky()
    sequence["dense"]["bias"][[3, 41], 1] = np.nan
    clip = clipax.track(inner, groups=group)
    reset_at = 33

    def step(state: Any, at: Any) -> Any:
        number, updates = at
        fresh = clipax.reset_tracking(state)
        state = jax.tree.map(
            lambda one, two: jnp.where(number == reset_at, one, two), fresh, state
        )
        clipped, state = clip.update(updates, state)
        return state, (clipped, state)

    numbers = jnp.arange(sequences.COUNT, dtype=jnp.int32)
    start = clip.init(sequences.at(sequence, 0))
    with jax.numpy_dtype_promotion("standard"):  # optax's clip
        _, (clipped, states) = jax.jit(lambda xs: jax.lax.scan(step, start, (numbers, xs)))(
            sequence
        )
    for first, last in ((0, reset_at - 1), (reset_at, sequences.COUNT - 1)):
        steps = range(first, last + 1)
        (state,) = rows(states, range(last, last + 1))
        expected = oracle(rows(sequence, steps), rows(clipped, steps))
        assert 0 < expected["steps_clipped"] < expected["steps"]
        assert expected["steps_not_finite"] == 1
        assert_tracked(state, expected)


def test_a_few_steps_by_hand() -> None:
    clip = clipax.track(clipax.clip_by_global_norm(2.0))
    _, state = sequences.stepped(clip, sequences.vectors(1.0, 4.0, 3.0))
    expected = {
        "steps": 3,
        "steps_clipped": 2,
        "steps_not_finite": 0,
        "mean_norm": 8 / 3,
        "largest_norm": 4.0,
        "mean_coefficient": (1 + 1 / 2 + 2 / 3) / 3,
        "removed_share": 3 / 8,
    }
    assert_tracked(state, expected, rtol=1e-6)


def test_the_norm_of_a_method_with_one_norm_is_its_own() -> None:
    clip = clipax.track(clipax.clip_by_global_norm(1.0))
    updates = jnp.array([3.0, 4.0])
    state = clip.init(updates)
    _, state = clip.update(updates, state, norm=10.0)
    assert float(tracked(state)["mean_norm"]) == 10
    assert float(tracked(state)["mean_coefficient"]) == pytest.approx(0.1)


def test_edge_what_comes_out_is_what_inner_gives() -> None:
    params, updates = trees.params_and_updates()
    inner = clipax.clip_by_leaf_norm(0.5)
    clip = clipax.track(inner, groups=["dense"])
    clipped, state = clip.update(updates, clip.init(params))
    expected, inner_state = inner.update(updates, inner.init(params))
    trees.assert_bitwise(clipped, expected)
    trees.assert_bitwise(state.inner_state, inner_state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("inner", [clipax.clip_by_global_norm(1.0), clipax.clip_by_value(1.0)])
def test_edge_a_norm_that_is_not_finite_is_counted_and_left_out(inner: Any, bad: float) -> None:
    clip = clipax.track(inner, groups=everything)
    _, state = sequences.stepped(clip, sequences.vectors(2.0, bad, 4.0))
    _, finite = sequences.stepped(clip, sequences.vectors(2.0, 4.0))
    values = tracked(state)
    assert values.pop("steps_not_finite") == 1
    for key, value in values.items():
        assert value == tracked(finite)[key], key


def test_edge_zero_updates_have_a_coefficient_of_one() -> None:
    for inner in (clipax.clip_by_global_norm(1.0), clipax.clip_by_value(1.0)):
        clip = clipax.track(inner)
        _, state = sequences.stepped(clip, sequences.vectors(0.0, 0.0))
        values = tracked(state)
        assert (values["steps"], values["mean_coefficient"], values["mean_norm"]) == (2, 1, 0)
        assert (values["steps_clipped"], values["removed_share"]) == (0, 0)


def test_edge_what_gets_longer_removes_nothing() -> None:
    for inner in (optax.scale(3.0), clipax.clip_by(clipax.global_norm, 6.0, longer)):
        clip = clipax.track(inner)
        _, state = sequences.stepped(clip, sequences.vectors(2.0))
        values = tracked(state)
        assert (values["removed_share"], values["mean_coefficient"]) == (0, 3)


def longer(norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    return clipax.coefficients.normalized(norm, max_norm)


def test_edge_before_the_first_step() -> None:
    clip = clipax.track(clipax.clip_by_global_norm(1.0), groups=everything)
    values = tracked(clip.init(jnp.ones(2)))
    assert values.pop("mean_coefficient") == 1
    assert all(value == 0 for value in values.values())


def test_edge_every_track_starts_again_wherever_it_is() -> None:
    one = clipax.track(clipax.track(clipax.clip_by_global_norm(1.0)))
    optimizer = clipax.skip_step(optax.chain(one, optax.sgd(1.0, momentum=0.9), one))
    updates = jnp.array([3.0])
    fresh = optimizer.init(updates)
    _, state = optimizer.update(updates, fresh)
    again = clipax.reset_tracking(state)
    trees.assert_same_type(again, state)
    for number in (0, 2):
        outer, was = again.inner_state[number], state.inner_state[number]
        trees.assert_bitwise(outer._replace(inner_state=None), fresh_part(fresh, number))
        trees.assert_bitwise(outer.inner_state.inner_state, was.inner_state.inner_state)
        assert int(outer.inner_state.step_count) == 0
        assert int(was.inner_state.step_count) == 1
    trees.assert_bitwise(again.inner_state[1], state.inner_state[1])


def fresh_part(state: Any, number: int) -> Any:
    return state.inner_state[number]._replace(inner_state=None)


def test_edge_members_of_vmap_start_again_in_their_shapes() -> None:
    clip = clipax.track(clipax.clip_by_global_norm(1.0))
    states = jax.vmap(clip.init)(jnp.ones((3, 2)))
    _, states = jax.vmap(clip.update)(jnp.ones((3, 2)), states)
    assert clipax.metrics(states)["tracked/steps"].shape == (3,)
    trees.assert_bitwise(
        clipax.reset_tracking(states)._replace(inner_state=None),
        jax.vmap(clip.init)(jnp.ones((3, 2)))._replace(inner_state=None),
    )


def test_sharded_steps_have_the_same_statistics() -> None:
    clip = clipax.track(clipax.clip_by_value(1.0), groups=everything)
    steps = [jnp.arange(8.0) * size for size in (0.1, 1.0, 2.0)]
    _, alone = sequences.stepped(clip, steps)
    _, state = sequences.stepped(clip, sequences.over_devices(steps))
    assert_tracked(state, tracked(alone), rtol=1e-6)
    trees.assert_same_type(jax.jit(clipax.reset_tracking)(state), state)


def test_reset_without_a_track_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^opt_state must hold a state of track, got one without"
    ):
        clipax.reset_tracking(optax.sgd(1.0).init(jnp.ones(1)))


@pytest.mark.parametrize("bad", ["dense", [1], {"a": "dense"}, None, {"dense"}])
def test_bad_groups_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^groups must be a list of paths"):
        clipax.track(optax.identity(), groups=bad)


def test_a_group_without_a_leaf_is_refused() -> None:
    clip = clipax.track(optax.identity(), groups=["haed"])
    with pytest.raises(ValueError, match=r"^groups must be paths of leaves, .* got 'haed'"):
        clip.init({"head": jnp.ones(1)})
    clip.init({})


def test_what_is_no_name_of_a_group_is_refused() -> None:
    clip = clipax.track(optax.identity(), groups=lambda path, leaf: 3)
    with pytest.raises(ValueError, match=r"^groups must give a name or None for each leaf, got 3"):
        clip.init(jnp.ones(1))


def test_a_path_is_no_prefix_of_letters_and_groups_may_share_leaves() -> None:
    clip = clipax.track(optax.identity(), groups=["layer_1", "layer_1/w"])
    updates = {"layer_1": {"w": jnp.array([3.0])}, "layer_10": {"w": jnp.array([4.0])}}
    _, state = clip.update(updates, clip.init(updates))
    values = tracked(state)
    assert (values["mean_norm/layer_1"], values["mean_norm/layer_1/w"]) == (3, 3)


@pytest.mark.parametrize("bad", [None, 1.0, optax.sgd])
def test_what_is_no_transformation_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^inner must be an optax\.GradientTransformation"):
        clipax.track(bad)
