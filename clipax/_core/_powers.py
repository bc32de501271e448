"""Powers of moduli, with derivatives that are finite at zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core._typing import Array


@jax.custom_jvp
def _square(modulus: Array, signed: Array) -> Array:
    """The square of a modulus, with the derivative of the signed square, which has no corner."""
    del signed
    return modulus * modulus


@_square.defjvp
def _square_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    signed, signed_dot = primals[1], tangents[1]
    return _square(*primals), signed * signed_dot + signed_dot * signed


def powers(x: Array, width: Any, scale: Any, power: float) -> Array:
    """|scale * x|^2 or |x / scale|^power in the given width."""

    def squared(part: Array) -> Array:
        # A product, because the derivative 2 * x of a square overflows for the largest floats.
        if scale is None:
            return part.astype(width) * part.astype(width)
        signed = part.astype(width) * scale
        # Without this maximum, XLA would square the scale first. The number that replaces zero
        # has a square of zero. It depends on the scale, because leaves of one shape would share
        # a constant, which XLA would broadcast for all of them and keep in memory.
        modulus = jnp.maximum(jnp.abs(signed), jnp.minimum(scale, np.finfo(width).tiny))
        # Entries that are not tiny must stay finite too, or their derivative would be NaN.
        if isinstance(scale, float) and scale > 1:
            modulus, signed = jnp.minimum(modulus, scale), jnp.clip(signed, -scale, scale)
        return _square(modulus, signed)

    if power == 2:
        if jnp.iscomplexobj(x):
            return squared(x.real) + squared(x.imag)
        return squared(x)
    modulus = jnp.abs(x).astype(width)
    if scale is None:
        return modulus
    modulus = modulus / scale
    # The inner `where` keeps the derivative of x**p finite at zero for p < 1. Zero and NaN are
    # their own powers, and the derivative of a modulus at zero is not that of its power.
    kept = jax.lax.stop_gradient(modulus)
    return jnp.where(modulus > 0, jnp.where(modulus > 0, modulus, 1.0) ** power, kept)


def root(sums: Array, power: float) -> Array:
    """sums**(1/power) with a derivative of zero, not NaN, at zero."""
    if power == 1:
        return sums
    positive = jnp.where(sums > 0, sums, jnp.ones_like(sums))
    roots = jnp.sqrt(positive) if power == 2 else positive ** (1 / power)
    # A NaN is not > 0 and must come through.
    return jnp.where(sums > 0, roots, sums)
