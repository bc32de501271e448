"""Inner products of updates with what was made of them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _compat, _kinds, _leaves, _mapped, _rules
from clipax._core._operations import SUM, in_rows, sums_in_one_loop
from clipax._core._stacks import across_shards
from clipax._core._typing import Array, AxisName, Updates


def product_and_square(
    one: Updates, other: Updates, *, axis_name: AxisName
) -> tuple[Array, Array]:
    """`sum_i one_i * other_i` and `sum_i |other_i|^2` over all leaves, from one read."""
    names = _rules.per_leaf(other, axis_name=axis_name)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), names, strict=True)
    sums_of = _kinds.once_per_kind(_sums_of_leaf)
    sums: list[Array] = []
    shards: list[Any] = []
    for left, right, name in pairs:
        sums += sums_of(left, right)
        shards += [_mapped.sharding_axes(each, name, None) for each in sums[-2:]]
    whole = across_shards(SUM, sums, shards)
    return jnp.sum(jnp.stack(whole[::2])), jnp.sum(jnp.stack(whole[1::2]))


def _sums_of_leaf(one: Array, other: Array) -> list[Array]:
    if jnp.iscomplexobj(one) or jnp.iscomplexobj(other):
        product = one.real * other.real + one.imag * other.imag
    else:
        product = one * other
    terms = [product, _leaves.squared_modulus(other)]
    rows = [in_rows(term, range(term.ndim), 16) for term in terms]
    if None in rows:
        return _sums(terms)
    arrays, (axis, _) = zip(*rows, strict=True)
    in_steps = functools.partial(_sums_in_two_steps, axis)
    result: list[Array] = jax.lax.platform_dependent(list(arrays), cpu=in_steps, default=_sums)
    return result


def _sums(terms: Sequence[Array]) -> list[Array]:
    return [jnp.sum(term) for term in terms]


def _sums_in_two_steps(axis: int, terms: Sequence[Array]) -> list[Array]:
    """Sums in one loop; XLA would keep what both sums read, and read it for each of them."""
    # Without the barrier, XLA would join both steps.
    return _sums(_compat.optimization_barrier(_sums_over(terms, axis)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sums_over(terms: Sequence[Array], axis: int) -> list[Array]:
    return sums_in_one_loop(terms, axis)


@_sums_over.defjvp
def _sums_over_jvp(axis: int, primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda terms: [jnp.sum(term, axis) for term in terms], primals, tangents)
