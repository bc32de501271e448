"""Places the state of a norm on the devices of what is measured, sharded alike."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from clipax._core import _compat, _leaves, _mapped, _paths, _rules
from clipax._core._typing import Array, AxisName, Norm


def zero_norms(norm: Norm, params: Any, *, axis_name: AxisName) -> Any:
    """Zeros in the type and sharding of the norms of `params`, flat by path."""
    # Mapped axes are rarely bound where a state is made, and only types matter here.
    norm = _mapped.with_names(norm, _mapped.bound_here(axis_name))
    params = _rules.only_measured(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        # Only the norm itself is placed, and varies over mapped axes, as norms in this program do.
        return jax.tree.map(lambda size: filled_like(size, 0.0), _paths.flat(norm(params)))
    shapes = jax.tree.map(_shape_in_place, params)
    sharded = {
        path: leaf.sharding
        for path, leaf in _paths.leaves(shapes).items()
        if getattr(leaf, "sharding", None) is not None
    }
    whole = next(iter(sharded.values()), None)

    def zero(path: str, norm: Any) -> Any:
        sharding = sharded.get(path, whole)
        if isinstance(sharding, NamedSharding):
            # A summed axis has one entry left, which is on every device.
            kept = zip(norm.shape, tuple(sharding.spec), strict=False)
            spec = [part if size != 1 else None for size, part in kept]
            sharding = NamedSharding(sharding.mesh, _compat.partition_spec(*spec))
        return jnp.zeros(norm.shape, norm.dtype, device=sharding)

    norms = _paths.flat(jax.eval_shape(norm, shapes))
    if not isinstance(norms, dict):
        return zero("", norms)
    return {path: None if size is None else zero(path, size) for path, size in norms.items()}


def filled_like(norm: Array, value: Any) -> Array:
    """Fills an array with a value, in the shape, dtype and sharding of a norm."""
    value = jnp.asarray(value).astype(norm.dtype)
    if norm.ndim == 0 and _compat.is_on_one_device(norm):
        return value
    # The selection has the sharding of the norm, which a constant would not have. Without the
    # barrier, XLA would compute the value once and copy it in a kernel for each norm.
    filled = _compat.optimization_barrier(value)
    return jnp.where(jnp.isnan(norm), value, filled)


def zeros_like(leaf: Any) -> Array:
    """Zeros in the width of moments, placed like the leaf."""
    wide = _leaves.widened(jnp.zeros_like(leaf))
    # Under jit, only a value that depends on the leaf is placed like it.
    is_on_mesh = isinstance(leaf, jax.core.Tracer) and _sharding_of(leaf) is not None
    return jnp.where(jnp.isnan(leaf), wide, wide) if is_on_mesh else wide


def beside(norm: Array, state: Any) -> Any:
    """Puts a state on the mesh of a norm; arrays of the norm's shape are sharded like it."""
    sharding = _sharding_of(norm)
    if sharding is None:
        return state
    whole = NamedSharding(sharding.mesh, _compat.partition_spec())

    def lay(leaf: Any) -> Any:
        is_alike = jnp.shape(leaf) == norm.shape
        if not isinstance(leaf, jax.Array) or (_sharding_of(leaf) and not is_alike):
            return leaf
        put = _compat.reshard if isinstance(leaf, jax.core.Tracer) else jax.device_put
        return put(leaf, sharding if is_alike else whole)

    return jax.tree.map(lay, state)


def _shape_in_place(leaf: Any) -> Any:
    """The type of an array, with its sharding where the array is bound to it."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding
    is_bound = sharding is not None and getattr(leaf, "committed", True)
    if is_bound and sharding.memory_kind is not None:
        device = next(iter(sharding.device_set))
        sharding = sharding.with_memory_kind(device.default_memory().kind)
    return _compat.shape_dtype_struct(
        leaf.shape, leaf.dtype, sharding=sharding if is_bound else None
    )


def _sharding_of(array: Array) -> NamedSharding | None:
    """How an array is sharded over a mesh, or None if that is not known here."""
    if not isinstance(array, jax.core.Tracer):
        return array.sharding if isinstance(array.sharding, NamedSharding) else None
    sharding = jax.typeof(array).sharding
    return None if sharding.mesh.empty else sharding
