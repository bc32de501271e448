"""Strict JAX for every test: no silent promotion, eight CPU devices, warnings are errors."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def _promotes() -> Iterator[None]:
    """Optax promotes its counters, and some of what it computes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
