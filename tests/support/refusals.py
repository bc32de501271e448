"""What is refused, and what the error says of it."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

# What is no number: no bound, no ratio and no eps.
NO_NUMBERS = [
    *(math.nan, True, np.True_, None, "1", 1j, jnp.array(True)),
    *(np.array([1.0, np.nan]), jnp.array(np.nan), jnp.array([1.0, -np.inf, np.nan])),
]
BELOW_ZERO = [-1, -1e-9, -math.inf, *NO_NUMBERS]


@contextlib.contextmanager
def refused(message: str, bad: Any) -> Iterator[None]:
    """Holds that a ValueError is raised that begins with `message` and shows what was given."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        yield
    assert repr(bad) in str(caught.value)


def assert_prefix_must_fit(name: str, bad: Any, method: Any, good: Any, params: Any) -> None:
    """Holds that `init` and `update` refuse an argument that is no prefix of the parameters.

    `good` is like the method, with an argument that fits: it makes the state for `update`.
    """
    state = good.init(params)
    for call in (lambda: method.init(params), lambda: method.update(params, state, params)):
        with refused(f"{name} must be one value or a tree prefix", bad):
            call()


other_structures = pytest.mark.parametrize(
    "updates", [{"v": jnp.ones(2)}, jnp.ones(2), {"w": 1.0, "n": 2.0}, [jnp.ones(2)]]
)


def assert_structure_must_fit(method: Any, updates: Any) -> None:
    """Holds that `update` refuses one of `other_structures` than `init` saw."""
    state = method.init({"w": jnp.ones(2), "n": jnp.array(3)})
    with pytest.raises(ValueError, match=r"^updates must have the structure that `init` saw"):
        method.update(updates, state)
