"""The trees whose gradients are clipped."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


class Tree(NamedTuple):
    name: str
    shapes: dict[str, Shape]
    dtype: str

    @property
    def bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize * sum(map(math.prod, self.shapes.values()))

    def __str__(self) -> str:
        leaves = "1 leaf" if len(self.shapes) == 1 else f"{len(self.shapes)} leaves"
        return f"{self.name}, {self.dtype}, {leaves}, {self.bytes / 1e6:.4g} MB"


BIG = ("one leaf", "GPT-2 small")
SMALL = "small leaves"
MATRICES = "matrices"


def tree(name: str, dtype: str, is_quick: bool) -> Tree:
    if name == "one leaf":
        shapes = {"kernel": (64, 128) if is_quick else (4096, 8192)}
    elif name == "GPT-2 small":
        shapes = _gpt2(blocks=1, width=8, words=50, length=16) if is_quick else _gpt2()
    elif name == SMALL:
        shapes = {f"leaf_{row}": (32, 32) for row in range(8 if is_quick else 1000)}
    else:
        side, count = (8, 2) if is_quick else (256, 8)
        shapes = {f"matrix_{row}": (side, side) for row in range(count)}
    return Tree(name, shapes, dtype)


def _gpt2(
    blocks: int = 12, width: int = 768, words: int = 50257, length: int = 1024
) -> dict[str, Shape]:
    """The parameters of GPT-2: 148 leaves, 124 million entries in its small size."""
    shapes: dict[str, Shape] = {"wte": (words, width), "wpe": (length, width)}
    linear = {
        "attn/c_attn": (width, 3 * width),
        "attn/c_proj": (width, width),
        "mlp/c_fc": (width, 4 * width),
        "mlp/c_proj": (4 * width, width),
    }
    norms = [f"h{block}/{norm}" for block in range(blocks) for norm in ("ln_1", "ln_2")]
    for norm in [*norms, "ln_f"]:
        shapes |= {f"{norm}/scale": (width,), f"{norm}/bias": (width,)}
    for block in range(blocks):
        for name, shape in linear.items():
            shapes |= {f"h{block}/{name}/kernel": shape, f"h{block}/{name}/bias": shape[1:]}
    return shapes


def gradients(of: Tree, seed: int = 0) -> dict[str, jax.Array]:
    """Normal entries, so that the norm is far above every bound."""
    rng = np.random.default_rng(seed)
    # Copied: memory of NumPy cannot be donated.
    return jax.block_until_ready(
        {
            name: jnp.array(rng.standard_normal(shape, dtype=np.float32), of.dtype)
            for name, shape in of.shapes.items()
        }
    )


def parameters(updates: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of the size of a network's."""
    return jax.block_until_ready(jax.tree.map(lambda leaf: 0.02 * leaf, updates))


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def restored(spent: Any, pristine: Any) -> Any:
    """The pristine values in the memory of a tree that is no longer needed."""
    del spent
    return jax.tree.map(jnp.copy, pristine)


def sum_of_squares(leaf: jax.Array, axis: int | None = None) -> jax.Array:
    """The plainest read of every entry."""
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis)


def scaled(leaf: jax.Array, number: jax.Array) -> jax.Array:
    """The plainest product, in the leaf's own dtype."""
    return (leaf * number).astype(leaf.dtype)


def require_close(one: Any, other: Any, what: str, rtol: float = 1e-3) -> None:
    """A peer that does other work would make its time no news."""
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        pair = np.asarray(left, np.float32), np.asarray(right, np.float32)
        np.testing.assert_allclose(*pair, rtol=rtol, atol=1e-7, err_msg=what)
