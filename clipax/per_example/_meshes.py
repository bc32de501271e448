"""Calls functions of examples where no mesh axis is explicit."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
from jax.sharding import AxisType, NamedSharding

from clipax._core import _compat
from clipax.per_example._calls import Call

Placement: TypeAlias = Literal["params", "examples", "replicated"]
"""How a result is placed: like the parameters, along the examples, or whole on each device."""

# JAX gives it no type.
_automatic: Callable[..., Any] = jax.sharding.auto_axes


def with_automatic_axes(
    function: Callable[..., Any], call: Call, *others: Any, out: tuple[Any, ...]
) -> Any:
    """Calls `function(call, *others)`, which returns a tuple placed like a prefix of placements.

    On explicit axes, every sum and shape of the program would have to say how it is sharded.
    """
    meshes = [_mesh_of(leaf) for leaf in jax.tree.leaves((call.args, others))]
    mesh = next((each for each in meshes if AxisType.Explicit in each.axis_types), None)
    if mesh is None:
        return function(call, *others)

    def on_mesh(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, _compat.partition_spec(*axes))

    spread = {_spec_on(mesh, leaf)[:1] for leaf in jax.tree.leaves(call.batch)} - {(None,), ()}
    shardings: dict[Placement, Any] = {
        "params": jax.tree.map(lambda leaf: on_mesh(*_spec_on(mesh, leaf)), call.params),
        "examples": on_mesh(*next(iter(spread), ())),
        "replicated": on_mesh(),
    }
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # Inside `shard_map`, other axes can be manual, and they stay so.
    explicit = tuple(axis for axis, kind in kinds if kind is AxisType.Explicit)

    def of_arrays(args: Any, *others: Any) -> Any:
        return function(call._replace(args=args), *others)

    run = _automatic(
        of_arrays, axes=explicit, out_sharding=jax.tree.map(shardings.__getitem__, out)
    )
    return jax.jit(run)(call.args, *others)


def _mesh_of(leaf: Any) -> Any:
    return jax.typeof(leaf).sharding.mesh


def _spec_on(mesh: Any, leaf: Any) -> tuple[Any, ...]:
    return tuple(jax.typeof(leaf).sharding.spec) if _mesh_of(leaf) == mesh else ()
