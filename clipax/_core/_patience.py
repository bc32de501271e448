"""How long a history may hold usual norms down before it is forgotten.

If a bound learns from clipped norms, or moves by a small share of itself per step, a few tiny
norms can hold it near zero for ever. The streams for which the papers made their rules never have
so many norms in a row so far above their bounds, so on those streams the rules are unchanged.
"""

import jax.numpy as jnp
import optax

from clipax._core._typing import Array

PATIENCE = 200
"""A history is forgotten after this many norms in a row that were clipped to less than half."""


def count_halved(count: Array, norm: Array, bound: Array) -> Array:
    """How many norms in a row, up to this one, were more than twice their bounds; int32."""
    return jnp.where(norm / 2 > bound, optax.safe_increment(count), 0)
