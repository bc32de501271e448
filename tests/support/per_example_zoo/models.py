"""How a model is entered, and what models are made of."""

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import clipax

EXAMPLES = 5
# What `clipax.explain_clipped_grad` says of a leaf.
ZERO, OUTER = "is zero", "norms of two vectors"
GRAM, EACH = "Gram matrices", "made for each example"
WAYS = (ZERO, OUTER, GRAM, EACH)


class Model(NamedTuple):
    """An entry of the zoo."""

    build: Callable[[], tuple[Callable[..., Any], Any, Any]]
    """Makes the loss of one example, parameters and a batch."""
    ways: dict[str, str]
    """How the norms of its main leaves are found."""
    tolerance: float
    """Of the largest entry."""
    is_rare: bool
    """Whether it is compared with the plain way in the slow group alone."""


ZOO: dict[str, Model] = {}


def model(*, tolerance: float = 2e-5, is_rare: bool = False, **ways: str) -> Callable[[Any], Any]:
    """Enters a function that makes a model. It gets a source of arrays."""

    def enter(build: Any) -> Any:
        def seeded() -> Any:
            return build(Source(len(build.__name__)))

        ZOO[build.__name__] = Model(seeded, ways, tolerance, is_rare)
        return build

    return enter


class Source:
    """Random arrays, the same at every run."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def weight(self, *shape: int) -> jax.Array:
        fan_in = max(1, int(np.prod(shape[:-1]))) if len(shape) > 1 else 1
        scaled = self._rng.normal(size=shape) / np.sqrt(fan_in)
        return jnp.asarray(scaled.astype(np.float32))

    def stacked(self, layers: int, *shape: int) -> jax.Array:
        return jnp.stack([self.weight(*shape) for _ in range(layers)])

    def batch(self, *shape: int) -> jax.Array:
        """Examples of different sizes."""
        sizes = self._rng.lognormal(size=(EXAMPLES, *[1] * len(shape)))
        return jnp.asarray((self._rng.normal(size=(EXAMPLES, *shape)) * sizes).astype(np.float32))

    def tokens(self, low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(low, high, size=(EXAMPLES, *shape), dtype=np.int32))


def wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def explanation(loss_fn: Any, *args: Any) -> str:
    """What `explain_clipped_grad` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        clipax.explain_clipped_grad(loss_fn, *args)
    return printed.getvalue()


_AFTER = ("total ", "All ", "No factors for ")


def lines_of_leaves(text: str) -> list[str]:
    """The lines of `explain_clipped_grad` that are about leaves."""
    head, *lines = text.splitlines()
    assert head.startswith("leaf ")
    ends = [row for row, line in enumerate(lines) if line.startswith(_AFTER)]
    return lines[: min(ends, default=len(lines))]


def assert_near(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Leaf by leaf, to a share of the largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = wide(one), wide(other)
        assert one.shape == other.shape
        atol = tolerance * np.max(np.abs(other), initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x))


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logits, label[..., None], -1))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x * scale[None] + bias[None]
