"""Strict JAX for every test: no silent promotion, eight CPU devices, warnings are errors.

Two variables of the environment: CLIPAX_TEST_PLATFORM is where the tests run, and
CLIPAX_TEST_SHARE, such as 2/4, which of them.
"""

import collections
import gc
import importlib.util
import os
import time
import zlib
from collections.abc import Generator, Iterator

import jax
import pytest

if importlib.util.find_spec("hypothesis") is None:
    import no_hypothesis

    no_hypothesis.install()

# By default, a tenth of the time goes into looking for garbage.
gc.set_threshold(100_000, 20, 100)
jax.config.update("jax_platforms", os.environ.get("CLIPAX_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    _mark_as_slow_but_some(items)
    yield  # Here the options `-m` and `-k` deselect.
    _take_a_share(config, items)


def _mark_as_slow_but_some(items: list[pytest.Item]) -> None:
    variants: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow_but") and not item.get_closest_marker("slow"):
            variants[item.nodeid.partition("[")[0]].append(item)
    for those_of_a_test in variants.values():
        [number] = those_of_a_test[0].get_closest_marker("slow_but").args
        total = len(those_of_a_test)
        for place, item in enumerate(those_of_a_test):
            # Some from all over, because neighbors are alike.
            if place * number // total == (place - 1) * number // total:
                item.add_marker("slow")


def _take_a_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, shares = map(int, os.environ.get("CLIPAX_TEST_SHARE", "1/1").split("/"))
    parts: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        # By its name, because places go with parameters.
        parts[zlib.crc32(item.nodeid.encode()) % shares == number - 1].append(item)
    if parts[False]:
        config.hook.pytest_deselected(items=parts[False])
        items[:] = parts[True]


_forgotten_at = time.monotonic()


@pytest.fixture(autouse=True)
def _programs_are_forgotten() -> Iterator[None]:
    """Lowering takes three times as long once JAX remembers two thousand programs."""
    global _forgotten_at
    yield
    if time.monotonic() - _forgotten_at > 120:
        jax.clear_caches()
        _forgotten_at = time.monotonic()


@pytest.fixture
def _promotes() -> Iterator[None]:
    """Optax promotes its counters, and some of what it computes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
