"""How a loss is drawn, of what examples."""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Draw: TypeAlias = random.Random
Shape: TypeAlias = tuple[int, ...]
OnArray: TypeAlias = Callable[[Any, jax.Array], jax.Array]
Maker: TypeAlias = Callable[[Draw, Shape], OnArray | None]

# So few steps and so wide that most norms come from Gram matrices.
TIME, WIDTH, LARGEST = 2, 12, 512
SHAPES = {
    "matrix": (WIDTH, WIDTH),
    "stack": (3, WIDTH, WIDTH),
    "table": (14, WIDTH),
    "flat": (14 * WIDTH,),
    "heads": (2, WIDTH, 8),
    "scalar": (),
}
NUMBERS = np.random.default_rng(1).normal(size=8192)
VIEWS: list[Maker] = []
USES: list[Maker] = []


class Drawn(NamedTuple):
    """A loss, and what it is."""

    loss_fn: Callable[[Any, Any], jax.Array]
    terms: list[str]


def view(make: Maker) -> Maker:
    """Enters a view that is drawn as often as six rare ones."""
    VIEWS.extend([make] * 6)
    return make


def rare_view(make: Maker) -> Maker:
    """Enters a view through which no gradient is a product, or hardly any."""
    VIEWS.append(make)
    return make


def use(make: Maker) -> Maker:
    """Enters a use that is drawn as often as six rare ones."""
    USES.extend([make] * 6)
    return make


def rare_use(make: Maker) -> Maker:
    """Enters a use whose gradient is no product."""
    USES.append(make)
    return make


def params(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def batch(seed: int, examples: int) -> dict[str, jax.Array]:
    """Examples of different sizes. Some tokens are outside of every table."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(examples, TIME * LARGEST)) * rng.lognormal(size=(examples, 1))
    return {
        "numbers": jnp.asarray(numbers),
        "tokens": jnp.asarray(rng.integers(-3, 16, (examples, TIME)), jnp.int32),
        "place": jnp.asarray(rng.integers(0, 4, examples), jnp.int32),
    }


def loss(seed: int) -> Drawn:
    """The loss of a seed."""
    draw = random.Random(seed)
    terms, names = [], []
    name = _name(draw)
    for _ in range(draw.choice([1, 1, 2, 2, 3])):
        # Mostly the same parameter again, whose terms are then unlike.
        name = name if draw.random() < 0.7 else _name(draw)
        term, label = _term(draw, SHAPES[name])
        terms.append((name, term))
        names.append(f"{name} {label}")

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return sum((term(example, params[name]) for name, term in terms), start=jnp.zeros(()))

    return Drawn(loss_fn, names)


def _name(draw: Draw) -> str:
    return draw.choice([*SHAPES, "matrix", "stack", "table", "heads"])


def _term(draw: Draw, shape: Shape) -> tuple[OnArray, str]:
    steps: list[OnArray] = []
    labels = [str(shape)]
    for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
        step, label, shape = _drawn(draw, VIEWS, shape)
        steps.append(step)
        labels.append(f"{label} {shape}")
    last, label, _ = _drawn(draw, USES, shape)

    def term(example: Any, value: jax.Array) -> jax.Array:
        for step in steps:
            value = step(example, value)
        return last(example, value)

    return term, " > ".join([*labels, label])


def _drawn(draw: Draw, makers: list[Maker], shape: Shape) -> tuple[OnArray, str, Shape]:
    """A view or a use of an array of this shape, its name, and the shape of what it returns."""
    while True:
        make = draw.choice(makers)
        made = make(draw, shape)
        if made is None:
            continue
        wrap, prefix = draw.choice(WRAPS) if draw.random() < 0.1 else (None, "")
        found = made if wrap is None else wrap(made)
        example = jax.tree.map(lambda leaf: leaf[0], batch(0, 1))
        out = jax.eval_shape(made, example, jax.ShapeDtypeStruct(shape, NUMBERS.dtype)).shape
        if 0 < math.prod(out) <= LARGEST and len(out) <= 4:
            return found, prefix + make.__name__, out


def _in_branches(function: OnArray) -> OnArray:
    def branch(example: Any, value: jax.Array) -> jax.Array:
        half = lambda example, value: 0.5 * function(example, value)  # noqa: E731
        return lax.switch(example["place"] % 2, [function, half], example, value)

    return branch


def _in_scan(function: OnArray) -> OnArray:
    def scan(example: Any, value: jax.Array) -> jax.Array:
        def step(carry: jax.Array, number: jax.Array) -> Any:
            return carry + number, number * function(example, value)

        return lax.scan(step, jnp.zeros(()), example["numbers"][:2])[1].sum(0)

    return scan


def _in_cond(function: OnArray) -> OnArray:
    def cond(example: Any, value: jax.Array) -> jax.Array:
        nothing = lambda example, value: jnp.zeros_like(function(example, value))  # noqa: E731
        return lax.cond(example["numbers"][0] < 1, function, nothing, example, value)

    return cond


WRAPS: list[tuple[Callable[[OnArray], OnArray], str]] = [
    (jax.jit, "jitted "),
    (jax.checkpoint, "rematerialized "),
    (_in_branches, "switched "),
    (_in_cond, "conditional "),
    (_in_scan, "scanned "),
]


def numbers(example: Any, *shape: int) -> jax.Array:
    """Numbers of the example, in some shape."""
    return example["numbers"][: math.prod(shape)].reshape(shape)


def constants(*shape: int) -> jax.Array:
    return jnp.asarray(NUMBERS[: math.prod(shape)].reshape(shape))
