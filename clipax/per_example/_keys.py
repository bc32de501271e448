"""Gives each example a random key of its own."""

from typing import Any

import jax


def split(keys: Any, examples: int, prng_argnum: int) -> Any:
    """Splits a key, or each key of a tree, into one for each example."""

    def split_one(key: Any) -> Any:
        try:
            if isinstance(key, jax.ShapeDtypeStruct):
                return jax.eval_shape(lambda key: jax.random.split(key, examples), key)
            return jax.random.split(key, examples)
        except (TypeError, ValueError) as error:
            kind = f"{key.dtype}{list(key.shape)}" if hasattr(key, "shape") else repr(key)
            raise ValueError(
                f"prng_argnum is {prng_argnum}, so argument {prng_argnum} must be one PRNG key,"
                f" such as jax.random.key(0), or a tree of them, got {kind}. Keys that are split"
                " already belong into batch_argnums."
            ) from error

    return jax.tree.map(split_one, keys)
