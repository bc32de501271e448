"""Strict JAX for every test: no silent promotion, eight CPU devices, warnings are errors."""

import collections
from collections.abc import Iterator

import jax
import pytest
import trees

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-of-each-kind",
        action="store_true",
        help="leave out all but one method of each kind where a test runs for every method",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("one_of_each_kind"):
        return
    methods, names = set(trees.public_factories()), collections.defaultdict(set)
    for item in items:
        names[_function(item)].add(_method(item))
    left_out = [
        item
        for item in items
        if names[_function(item)] >= methods and _method(item) in methods - trees.ONE_OF_EACH_KIND
    ]
    config.hook.pytest_deselected(items=left_out)
    dropped = set(left_out)
    items[:] = [item for item in items if item not in dropped]


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _method(item: pytest.Item) -> str | None:
    return item.callspec.params.get("name") if hasattr(item, "callspec") else None


@pytest.fixture
def _promotes() -> Iterator[None]:
    """Optax promotes its counters, and some of what it computes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
