"""Strict JAX for every test: no silent promotion, eight CPU devices, warnings are errors.

Two variables of the environment are for `benchmarks/on_gpu.sh`: CLIPAX_TEST_PLATFORM is where
the tests run, and CLIPAX_TEST_SHARE, such as 2/4, which of them, where pytest-xdist is missing.
"""

import importlib.util
import os
from collections.abc import Iterator

import jax
import pytest

if importlib.util.find_spec("hypothesis") is None:
    import no_hypothesis

    no_hypothesis.install()

jax.config.update("jax_platforms", os.environ.get("CLIPAX_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# After all that deselects.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, shares = map(int, os.environ.get("CLIPAX_TEST_SHARE", "1/1").split("/"))
    left_out = [item for place, item in enumerate(items) if place % shares != number - 1]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[number - 1 :: shares]


@pytest.fixture
def _promotes() -> Iterator[None]:
    """Optax promotes its counters, and some of what it computes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
