"""Clipping singular values in programs: derivatives, transformations of JAX, devices."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sequences
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from spectral import clipped_by, either_way

import clipax
from clipax.coefficients import hard, square_root

# Derivatives.


def derivative_cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    complex_parts = rng.normal(size=(2, 4, 3))
    return {
        "tall": rng.normal(size=(5, 3)),
        "wide": rng.normal(size=(3, 5)),
        "square": rng.normal(size=(4, 4)),
        "complex": complex_parts[0] + 1j * complex_parts[1],
        "repeated": 3.0 * np.linalg.qr(rng.normal(size=(4, 4)))[0],
        "repeated in pairs": np.diag([3.0, 3.0, 0.4, 0.4]),
        "nearly repeated": np.diag([3.0, 3.0 * (1 + 1e-9), 0.4, 0.4 * (1 + 1e-7)]),
        "low rank": np.diag([3.0, 0.5, 0.0, 0.0]),
        "within": 0.1 * rng.normal(size=(4, 3)),
        "zero": np.zeros((4, 3)),
    }


@functools.partial(jax.jit, static_argnums=(3, 4))
def derivatives(x: Any, direction: Any, weights: Any, coefficient: Any, iterations: Any) -> Any:
    """Forwards, by differences, backwards and backwards again by the sum that forwards gives."""

    def clip(t: Any, max_norm: Any) -> Any:
        moved = jnp.asarray(x) + jnp.asarray(t, x.dtype) * direction
        return clipped_by(max_norm, moved, coefficient, iterations=iterations)[0]

    def total(t: Any, max_norm: Any) -> Any:
        return jnp.sum((clip(t, max_norm) * weights).real)

    width = x.real.dtype
    zero, step, bound, bound_dot = (jnp.asarray(v, width) for v in (0.0, 1e-5, 1.1, 0.7))
    _, forwards = jax.jvp(clip, (zero, bound), (zero + 1, bound_dot))
    ahead = clip(step, bound + step * bound_dot)
    behind = clip(-step, bound - step * bound_dot)
    along, across = jax.grad(total, (0, 1))(zero, bound)
    backwards = along + bound_dot * across
    return forwards, (ahead - behind) / 2e-5, backwards, jnp.sum((forwards * weights).real)


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [hard, square_root])
@pytest.mark.parametrize("name", derivative_cases())
def test_derivatives_equal_differences(name: str, coefficient: Any) -> None:
    x = derivative_cases()[name]
    rng = np.random.default_rng(9)
    direction, weights = (rng.normal(size=x.shape).astype(x.dtype) for _ in range(2))
    with trees.double_precision(True):
        got, by_difference, backwards, expected = derivatives(
            x, direction, weights, coefficient, None
        )
        # Rounding over the step, and the third derivative times its square.
        np.testing.assert_allclose(got, by_difference, atol=1e-8)
        np.testing.assert_allclose(backwards, expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [hard, square_root])
def test_derivatives_are_the_same_by_iterations(coefficient: Any) -> None:
    x = derivative_cases()["repeated"].astype(np.float32)
    direction = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    got, _, backwards, _ = derivatives(x, direction, direction, coefficient, 15)
    exact, _, exact_backwards, _ = derivatives(x, direction, direction, coefficient, None)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-7)
    np.testing.assert_allclose(backwards, exact_backwards, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=(2, 3))
def gradients(x: Any, bound: Any, coefficient: Any, iterations: Any) -> Any:
    def total(x: Any, bound: Any) -> Any:
        return jnp.sum(clipped_by(bound, x, coefficient, iterations=iterations)[0])

    return jax.grad(total, (0, 1))(x, bound)


@pytest.mark.slow
@either_way
@pytest.mark.parametrize("coefficient", [hard, square_root])
def test_derivatives_are_finite_everywhere(coefficient: Any, iterations: int | None) -> None:
    """The rule of the decomposition itself gives NaN where two singular values are equal."""

    def naive(x: Any) -> Any:
        u, s, vh = jnp.linalg.svd(x, full_matrices=False)
        return jnp.sum((u * jnp.minimum(s, 1.0)[None]) @ vh)

    zeros = jnp.zeros((3, 3))
    assert not np.isfinite(jax.jit(jax.grad(naive))(zeros)).all()
    for max_norm in (0.0, 1.0, math.inf):
        for x in (zeros, jnp.eye(3), jnp.diag(jnp.array([2.0, 1.0, 0.0])), jnp.ones((3, 3))):
            grads = gradients(x, jnp.float32(max_norm), coefficient, iterations)
            assert all(bool(jnp.isfinite(grad).all()) for grad in grads)
            if max_norm == math.inf:
                trees.assert_bitwise(grads[0], jnp.ones_like(x))


# By iterations too, what the contract asks.


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [hard, square_root])
def test_by_iterations_inside_transformations_of_jax(coefficient: Any) -> None:
    method = clipax.clip_by_spectral_norm(0.1, coefficient, iterations=10)
    params, updates = trees.params_and_updates()
    clipped, state = method.update(updates, method.init(params))
    trees.assert_same_type(state, method.init(params))
    traced = jax.jit(method.update)(updates, method.init(params))
    trees.assert_close(traced, (clipped, state), rtol=1e-5, atol=1e-7)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), updates)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    mapped, _ = jax.jit(jax.vmap(method.update))(stacked, states)
    scanned, _ = sequences.scanned(method, stacked)
    for several in (mapped, scanned):
        first = jax.tree.map(lambda leaf: leaf[0], several)
        trees.assert_close(first, clipped, rtol=1e-5, atol=1e-7)
    with trees.double_precision(True):
        params, updates = trees.params_and_updates(jnp.float64)
        double, _ = jax.jit(method.update)(updates, method.init(params))
        trees.assert_same_type(double, updates)
    narrow = jax.tree.map(lambda leaf: leaf.astype(np.float32), jax.tree.map(np.asarray, double))
    # Ten iterations leave the same at the bound, in any width.
    trees.assert_close(narrow, clipped, rtol=1e-5, atol=1e-6)


# Over several devices.

LAYERS = {
    "bias": (16,),
    "kernel": (8, 16),
    "layers": (4, 8, 6),
}
SPECS = {
    "bias": PartitionSpec("x"),
    "kernel": PartitionSpec("x", "y"),
    "layers": PartitionSpec("x", None, "y"),
}
BY_LAYER = {"bias": None, "kernel": None, "layers": 0}


def layers() -> dict[str, Any]:
    rng = np.random.default_rng(10)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in LAYERS.items()}


@pytest.mark.slow
@either_way
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_matrices_come_out_as_they_were(axis_type: Any, iterations: int | None) -> None:
    method = clipax.clip_by_spectral_norm(0.5, iterations=iterations, stack_axis=BY_LAYER)
    updates = layers()
    expected, state = method.update(updates, method.init(updates))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    sharded = jax.device_put(updates, shardings)
    clipped, new_state = jax.jit(method.update)(sharded, method.init(sharded))
    trees.assert_close((clipped, new_state), (expected, state), rtol=1e-5, atol=1e-6)
    for name, leaf in clipped.items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)


def mapped(method: Any, specs: Any, updates: Any, **check: Any) -> Any:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    def clip(updates: Any) -> Any:
        return method.update(updates, method.init(updates))[0]

    shards = jax.shard_map(clip, mesh=mesh, in_specs=(specs,), out_specs=specs, **check)
    return jax.jit(shards)(updates)


WHOLE = {name: PartitionSpec() for name in LAYERS}
BY_SHARD = WHOLE | {"bias": PartitionSpec("x"), "layers": PartitionSpec("x")}
TORN = WHOLE | {"kernel": PartitionSpec(None, "x")}


@pytest.mark.slow
@either_way
def test_mapped_matrices_that_are_whole(iterations: int | None) -> None:
    updates = layers()

    def method(axis_name: Any) -> Any:
        return clipax.clip_by_spectral_norm(
            0.5, iterations=iterations, stack_axis=BY_LAYER, axis_name=axis_name
        )

    expected, _ = method(None).update(updates, method(None).init(updates))
    for specs, axis_name, check in (
        (WHOLE, None, {}),
        (BY_SHARD, {"bias": None, "kernel": None, "layers": ()}, {}),
        (WHOLE, (), {"check_vma": False}),
        (BY_SHARD, {"bias": "x", "kernel": (), "layers": ()}, {"check_vma": False}),
    ):
        clipped = mapped(method(axis_name), specs, updates, **check)
        trees.assert_close(clipped, expected, rtol=1e-5, atol=1e-6)


@either_way
@pytest.mark.parametrize(
    ("specs", "axis_name", "check", "message"),
    [
        (TORN, None, {}, r"^A matrix in a leaf of shape \(8, 4\) may be sharded over \["),
        (TORN, "x", {}, r"^A matrix in a leaf of shape \(8, 4\) may be sharded over \['x'\]"),
        (TORN, "x", {"check_vma": False}, r"^A matrix in a leaf of shape \(8, 4\) may be sharded"),
        (WHOLE, None, {"check_vma": False}, "^This program is mapped over"),
    ],
)
def test_a_shard_of_a_matrix_is_refused(
    specs: Any, axis_name: Any, check: Any, message: str, iterations: int | None
) -> None:
    method = clipax.clip_by_spectral_norm(0.5, iterations=iterations, axis_name=axis_name)
    updates = {"kernel": layers()["kernel"]}
    with pytest.raises(ValueError, match=message):
        mapped(method, {"kernel": specs["kernel"]}, updates, **check)


def test_a_row_of_a_matrix_is_no_vector() -> None:
    method = clipax.clip_by_spectral_norm(0.5)
    with pytest.raises(ValueError, match=r"shape \(1, 4\) may be sharded over \["):
        mapped(method, PartitionSpec("x"), jnp.ones((4, 4)))
