"""How all tests compile their programs, and names that the examples in docstrings use."""

import atexit
import os
import shutil
import tempfile

# Before jax is imported, here and in the workers of the run, which find what another compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="clipax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jax.numpy as jnp
import optax
import pytest

import clipax
from clipax import coefficients, norms, states, thresholds, units


def pytest_configure(config: pytest.Config) -> None:
    # What they compute matters, and not how fast. Later versions hardly gain by it.
    if config.option.markexpr == "not slow" and jax.__version_info__ < (0, 11):
        flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        os.environ.setdefault("XLA_FLAGS", flags)


@pytest.fixture(autouse=True)
def _example_names(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        names = {
            name: getattr(room, name)
            for room in (coefficients, norms, states, thresholds, units, clipax)
            for name in dir(room)
            if name[0] != "_"
        }
        request.getfixturevalue("doctest_namespace").update(names, jax=jax, jnp=jnp, optax=optax)
