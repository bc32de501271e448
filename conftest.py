"""Names that the examples in docstrings use without an import."""

import jax
import jax.numpy as jnp
import optax
import pytest

import clipax


@pytest.fixture(autouse=True)
def _example_names(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        names = {name: getattr(clipax, name) for name in dir(clipax) if name[0] != "_"}
        request.getfixturevalue("doctest_namespace").update(names, jax=jax, jnp=jnp, optax=optax)
