"""Mistakes in a user's program that type checkers find, each on a line that says so."""

import jax

import clipax
from clipax import coefficients


def factor(norm: jax.Array) -> jax.Array:
    return norm


def mistakes() -> int:
    clipax.clip_by_global_norm()  # refused
    clipax.clip_by_global_norm(1.0, max_value=2.0)  # refused
    clipax.autoclip(0.9, window_size="100")  # refused
    clipax.zclip(raw_history="yes")  # refused
    clipax.no_such_method(1.0)  # refused
    clipax.clip_by(3.0, 1.0)  # refused
    clipax.clip_by(clipax.leaf_norm, 1.0, factor)  # refused
    clipax.clip_by(clipax.leaf_norm, 1.0, coefficients.hard)
    values: dict[str, float] = clipax.metrics(None)  # refused
    floats: dict[str, float] = clipax.as_floats(values)
    code: int = clipax.advise([*floats.values()]).recommendations[0].code  # refused
    return code
