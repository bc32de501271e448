"""How long a history may hold usual norms down before it is given up.

Where a bound learns from what it let through, or by a small share of itself a step, a few tiny
norms can make it as good as zero for ever. No stream that the rules are made for has so many
norms in a row so far above their bounds: until then, a rule is its paper's.
"""

import jax.numpy as jnp
import optax

from clipax._core._typing import Array

PATIENCE = 200
"""After how many norms in a row that were clipped to less than half, a history is given up."""


def count_halved(count: Array, norm: Array, bound: Array) -> Array:
    """How many norms in a row, with this one, were more than twice their bounds; int32."""
    return jnp.where(norm / 2 > bound, optax.safe_increment(count), 0)
