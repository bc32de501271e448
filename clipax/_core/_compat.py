"""What differs between the versions of JAX, each with the version it belongs to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec

if TYPE_CHECKING:
    from jax.extend import core as core
else:

    class _Core:
        def __getattr__(self, name: str) -> Any:
            found = getattr(importlib.import_module("jax.extend.core"), name)
            setattr(self, name, found)  # The next time, Python finds it without this method.
            return found

    # It is loaded on first use, because it takes a tenth of the time of `import optax`.
    core = _Core()

# Primitives that call a program. The one of `jit` had another name before jax 0.7.
CALLS = {"jit", "pjit", "closed_call", "core_call"}

# JAX gives them no type.
partition_spec: Callable[..., PartitionSpec] = PartitionSpec
shape_dtype_struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct
reshard: Callable[..., jax.Array] = jax.sharding.reshard
optimization_barrier: Callable[[Any], Any] = jax.lax.optimization_barrier
# Before jax 0.10, doubles have derivatives only if JAX computes with doubles everywhere.
HAS_DOUBLES = jax.__version_info__ >= (0, 10)

# Before jax 0.12, second derivatives of a scan ignore custom derivative rules.
RULES_LAST = jax.__version_info__ >= (0, 12)


def doubles() -> AbstractContextManager[Any]:
    """A context in which float64 stays float64, whatever `jax_enable_x64` is."""
    made: AbstractContextManager[Any] = jax.enable_x64(True)
    return made


def stands_for_params(params: Any) -> bool:
    """Whether Optax asks, in `optax.tree_map_params`, where a state holds parameters."""
    return type(params).__name__ == "_ParamsPlaceholder"


def bound_axes() -> tuple[Hashable, ...]:
    """The mapped axes of the enclosing `shard_map`, `pmap` and named `vmap`."""
    if hasattr(core, "unsafe_get_axis_names_DO_NOT_USE"):  # jax >= 0.10
        return tuple(core.unsafe_get_axis_names_DO_NOT_USE())
    return tuple(jax.core.unsafe_get_axis_names_DO_NOT_USE())  # jax < 0.10


def varying_axes(x: Any) -> frozenset[Hashable]:
    """The manual mesh axes over which `x` varies, according to its type."""
    return varying_axes_of(jax.typeof(x))


def varying_axes_of(aval: Any) -> frozenset[Hashable]:
    """The manual mesh axes over which a value of this type varies."""
    if hasattr(aval, "manual_axis_type"):  # jax >= 0.10
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))  # jax < 0.10


def is_on_one_device(x: Any) -> bool:
    """Whether the type of `x` shows neither a mesh nor mapped axes."""
    aval = jax.typeof(x)
    return bool(aval.sharding.mesh.empty) and not varying_axes_of(aval)


def varying_over(x: Any, axes: Iterable[Hashable]) -> Any:
    """The same values, with a type that varies over these manual mesh axes too."""
    more = tuple(axis for axis in axes if axis not in varying_axes(x))
    if not more:
        return x
    if hasattr(jax.lax, "pcast"):  # jax >= 0.8.3
        return jax.lax.pcast(x, more, to="varying")
    assert hasattr(jax.lax, "pvary")  # jax < 0.8.3
    return jax.lax.pvary(x, more)


def varying_like(x: Any, other: Any) -> Any:
    """The values of `x`, with a type that varies over the axes of the type of `other` too."""
    return varying_over(x, varying_axes(other))


def unreduced_axes(x: Any) -> tuple[Hashable, ...]:
    """The manual mesh axes over which `x` must still be summed."""
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):  # jax >= 0.10
        return tuple(aval.manual_axis_type.unreduced)
    return ()


def reduced_spec(x: Any) -> PartitionSpec | None:
    """How `x` is sharded once it is summed over its devices, or None if it is summed already."""
    spec = jax.typeof(x).sharding.spec
    if spec.unreduced or spec.reduced:
        return partition_spec(*getattr(spec, "partitions", spec))  # jax >= 0.9
    return None


def is_typed(axis: Hashable) -> bool:
    """Whether types show what varies over `axis`; not in `pmap`, nor with `check_vma=False`."""
    return axis in varying_axes(jax.lax.axis_index(axis))


def untyped_axes() -> tuple[Hashable, ...]:
    """The enclosing mapped axes over which types do not show what varies."""
    return tuple(axis for axis in bound_axes() if not is_typed(axis))


def without_unused(program: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, list[bool]]:
    """The program without unused equations and inputs, and which inputs are used."""
    jaxpr, is_used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return core.ClosedJaxpr(jaxpr, program.consts), is_used
