"""A run saved with Orbax goes on on another mesh, and under a clip that it began without."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
import test_resume
import trees
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import clipax

CUT, STEPS = 7, 12
SIZES = {2: 0.0, 9: 300.0}
"""Factors on the updates of single steps, one before the cut and one after it."""
# What all devices hold, as the bias, has no axis that eight divides: Orbax would write a part of
# it from each, for which it calls JAX in a way that old versions do not know.
SHAPES = {"kernel": (16, 12), "bias": (12,)}
SPECS = {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("x",))


def normal(seed: int, mesh: Mesh, size: float = 1.0) -> Any:
    random = np.random.default_rng(seed)
    return {
        name: jax.device_put(
            np.float32(size * random.normal(size=shape)), NamedSharding(mesh, SPECS[name])
        )
        for name, shape in SHAPES.items()
    }


def params_on(mesh: Mesh) -> Any:
    return normal(0, mesh)


def updates_on(mesh: Mesh) -> list[Any]:
    return [normal(1 + step, mesh, SIZES.get(step, 1.0)) for step in range(STEPS)]


def like(tree: Any, mesh: Mesh) -> Any:
    """Shapes to restore into; what is on no mesh, as a counter of Optax, goes to all of it."""

    def shape(leaf: Any) -> Any:
        on_mesh = isinstance(leaf.sharding, NamedSharding)
        sharding = leaf.sharding if on_mesh else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def save(path: pathlib.Path, tree: Any) -> None:
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path: pathlib.Path, shapes: Any) -> Any:
    with orbax.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, shapes)


def run(step: Callable[..., Any], state: Any, updates: list[Any], params: Any) -> Any:
    """The state after the updates, and what was made of each."""
    outputs = []
    for update in updates:
        made, state = step(update, state, params)
        outputs.append(made)
    return state, outputs


def assert_as_exact_as_float32(one: Any, other: Any) -> None:
    """Beside the largest entry of each leaf: of small ones, sums leave less."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        finite = np.abs(right)[np.isfinite(right)]
        atol = 2e-6 * np.max(finite, initial=0.0)
        np.testing.assert_allclose(left, right, rtol=0, atol=atol)


def all_methods() -> optax.GradientTransformation:
    """Every method beside the others, each on the same updates: compiled as one program."""
    methods = {name: test_resume.build(name) for name in test_resume.METHODS}

    def init(params: Any) -> Any:
        return {name: method.init(params) for name, method in methods.items()}

    def update(updates: Any, states: Any, params: Any) -> Any:
        both = {
            name: method.update(updates, states[name], params) for name, method in methods.items()
        }
        return tuple({name: pair[part] for name, pair in both.items()} for part in (0, 1))

    return optax.GradientTransformation(init, update)


@pytest.mark.slow
def test_every_method_goes_on_on_another_mesh(tmp_path: pathlib.Path) -> None:
    methods, mesh = all_methods(), mesh_of(8)
    params, step = params_on(mesh), jax.jit(methods.update)
    middle, _ = run(step, methods.init(params), updates_on(mesh)[:CUT], params)
    expected = run(step, middle, updates_on(mesh)[CUT:], params)
    save(tmp_path / "run", {"params": params, "opt_state": middle})
    for devices in (8, 4, 1):
        mesh = mesh_of(devices)
        fresh = {"params": params_on(mesh), "opt_state": methods.init(params_on(mesh))}
        # Nothing of clipax's is anywhere else.
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(fresh))
        restored = restore(tmp_path / "run", like(fresh, mesh))
        trees.assert_bitwise(restored, {"params": params, "opt_state": middle})
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(restored))
        again = run(step, restored["opt_state"], updates_on(mesh)[CUT:], restored["params"])
        (trees.assert_bitwise if devices == 8 else assert_as_exact_as_float32)(again, expected)


# -- a checkpoint without the clip -------------------------------------------------------------

ADAM = optax.adam(0.01)
CLIP = clipax.zclip(warmup_steps=2, max_norm=None)


def trained(optimizer: Any, updates: list[Any], params: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        state = optimizer.init(params)
        return run(jax.jit(optimizer.update), state, updates, params)[0]


def went_on(optimizer: Any, state: Any, updates: list[Any], params: Any) -> list[Any]:
    with jax.numpy_dtype_promotion("standard"):
        return run(jax.jit(optimizer.update), state, updates, params)[1]


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def under_a_clip_from_here(state: Any, updates: list[Any], params: Any) -> list[Any]:
    """What a clip that begins makes of the updates, and of that the Adam in a state goes on."""
    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    assert len(found) == 1
    clipped = went_on(CLIP, CLIP.init(params), updates, params)
    # It learns soon enough to see the spike.
    pairs = zip(clipped, updates, strict=True)
    assert any(np.any(one["kernel"] != other["kernel"]) for one, other in pairs)
    return went_on(ADAM, (found[0], optax.EmptyState()), clipped, params)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 4])
def test_a_clip_is_put_before_a_saved_optimizer(devices: int, tmp_path: pathlib.Path) -> None:
    """The recipe in `docs/howto/checkpoints.md`."""
    mesh = mesh_of(8)
    params, sequence = params_on(mesh), updates_on(mesh)
    state, path = trained(ADAM, sequence[:CUT], params), tmp_path / "run"
    save(path, {"params": params, "opt_state": state})
    expected = under_a_clip_from_here(state, sequence[CUT:], params)
    unclipped = went_on(ADAM, state, sequence[CUT:], params)
    before = {"params": params, "opt_state": state}

    mesh = mesh_of(devices)
    params, late = params_on(mesh), updates_on(mesh)[CUT:]
    old, clip = ADAM, CLIP
    optimizer = optax.chain(clip, old)
    shapes = like({"params": params, "opt_state": old.init(params)}, mesh)
    with orbax.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(path, shapes)
    params, opt_state = saved["params"], (clip.init(params), saved["opt_state"])

    trees.assert_bitwise(saved, before)
    trees.assert_same_type(opt_state, optimizer.init(params))
    outputs = went_on(optimizer, opt_state, late, params)
    assert_as_exact_as_float32(outputs, expected)
    # Until the clip has learned what is usual, it is as if it were not there.
    assert_as_exact_as_float32(outputs[:2], unclipped[:2])


class Case(NamedTuple):
    """A row of the table in `docs/howto/checkpoints.md`."""

    old: Any
    new: Any
    join: Callable[[Any, Any], Any]
    """From a fresh state of the clip and a saved one of `old` to one of `new`."""
    repeats: int = 1
    """How often each update comes, where they are accumulated."""


@optax.inject_hyperparams
def adam(learning_rate: Any) -> Any:
    return optax.adam(learning_rate)


@optax.inject_hyperparams
def clipped_adam(learning_rate: Any) -> Any:
    return optax.chain(CLIP, optax.adam(learning_rate))


CASES = {
    "any optimizer": Case(
        adam(learning_rate=0.01),
        optax.chain(CLIP, adam(learning_rate=0.01)),
        lambda clip_state, old_state: (clip_state, old_state),
    ),
    "a chain": Case(
        optax.chain(optax.scale_by_adam(), optax.scale(-0.01)),
        optax.chain(CLIP, optax.scale_by_adam(), optax.scale(-0.01)),
        lambda clip_state, old_state: (clip_state, *old_state),
    ),
    "a chain with a clip": Case(
        optax.chain(optax.clip_by_global_norm(1.0), ADAM),
        optax.chain(CLIP, ADAM),
        lambda clip_state, old_state: (clip_state, *old_state[1:]),
    ),
    "MultiSteps": Case(
        optax.MultiSteps(ADAM, 2),
        optax.MultiSteps(optax.chain(CLIP, ADAM), 2),
        lambda clip_state, old_state: old_state._replace(
            inner_opt_state=(clip_state, old_state.inner_opt_state)
        ),
        repeats=2,
    ),
    "inject_hyperparams": Case(
        adam(learning_rate=0.01),
        clipped_adam(learning_rate=0.01),
        lambda clip_state, old_state: old_state._replace(
            inner_state=(clip_state, old_state.inner_state)
        ),
    ),
    "skip_step": Case(
        clipax.skip_step(ADAM),
        clipax.skip_step(optax.chain(CLIP, ADAM)),
        lambda clip_state, old_state: old_state._replace(
            inner_state=(clip_state, old_state.inner_state)
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_where_the_state_of_the_clip_goes(name: str, tmp_path: pathlib.Path) -> None:
    case, mesh = CASES[name], mesh_of(1)
    params, sequence = params_on(mesh), updates_on(mesh)
    early, late = (
        [update for update in part for _ in range(case.repeats)]
        for part in (sequence[:CUT], sequence[CUT:])
    )
    state = trained(case.old, early, params)
    save(tmp_path / "run", state)
    saved = restore(tmp_path / "run", like(case.old.init(params), mesh))
    opt_state = case.join(CLIP.init(params), saved)
    trees.assert_same_type(opt_state, case.new.init(params))
    outputs = went_on(case.new, opt_state, late, params)[case.repeats - 1 :: case.repeats]
    assert_as_exact_as_float32(outputs, under_a_clip_from_here(state, sequence[CUT:], params))
