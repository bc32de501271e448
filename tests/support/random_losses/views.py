"""Views: what moves, selects, joins or scales the entries of a parameter."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from random_losses.drawing import TIME, Draw, OnArray, Shape, constants, rare_view, view


def axis_of(draw: Draw, shape: Shape) -> int:
    return draw.randrange(len(shape))


def along(axis: int, part: Any) -> tuple[Any, ...]:
    """An index along one axis."""
    return (slice(None),) * axis + (part,)


@view
def part(draw: Draw, shape: Shape) -> OnArray | None:
    def of(size: int) -> slice:
        start = draw.randrange((size + 2) // 3)
        stop = draw.randint(max(start + 1, size // 2), size)
        return slice(start, stop, draw.choice([1, 1, 2]))

    index = tuple(slice(None) if draw.random() < 0.5 else of(size) for size in shape)
    return lambda example, value: value[index]


@view
def one_of_a_stack(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)
    place = draw.randrange(shape[axis])
    return lambda example, value: lax.index_in_dim(value, place, axis, keepdims=False)


@view
def one_of_a_split(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape or max(shape) < 2:
        return None
    axis = draw.choice([axis for axis, size in enumerate(shape) if size > 1])
    border = draw.randint(1, shape[axis] - 1)
    which = draw.randrange(2)
    return lambda example, value: jnp.split(value, [border], axis)[which]


@rare_view
def one_of_the_example(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)
    return lambda example, value: lax.dynamic_index_in_dim(value, example["place"], axis, False)


@rare_view
def stretch_of_the_example(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)
    size = draw.randint(1, shape[axis])
    return lambda example, value: lax.dynamic_slice_in_dim(value, example["place"], size, axis)


@view
def gathered(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis, mode = axis_of(draw, shape), draw.choice(["fill", "clip", "wrap"])

    def take(example: Any, value: jax.Array) -> jax.Array:
        return jnp.take(value, example["tokens"], axis, mode=mode, fill_value=0.0)

    return take


@rare_view
def gathered_at_two_axes(draw: Draw, shape: Shape) -> OnArray | None:
    if len(shape) < 2:
        return None
    index = (draw.choice([0, 1]), draw.choice([0, 1]))

    def take(example: Any, value: jax.Array) -> jax.Array:
        tokens = example["tokens"]
        rows, columns = (jnp.flip(tokens) if flipped else tokens for flipped in index)
        return value.at[rows, columns].get(mode="clip")

    return take


@view
def padded(draw: Draw, shape: Shape) -> OnArray | None:
    between = [0, 0, 1]
    edges = [(draw.randint(-1, 2), draw.randint(0, 2), draw.choice(between)) for _ in shape]
    return lambda example, value: lax.pad(value, jnp.zeros((), value.dtype), edges)


@view
def flipped(draw: Draw, shape: Shape) -> OnArray | None:
    axis = axis_of(draw, shape) if shape else None
    return None if axis is None else lambda example, value: jnp.flip(value, axis)


@view
def rolled(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)
    by = draw.randint(1, shape[axis])
    return lambda example, value: jnp.roll(value, by, axis)


@view
def transposed(draw: Draw, shape: Shape) -> OnArray | None:
    order = draw.sample(range(len(shape)), len(shape))
    return lambda example, value: jnp.transpose(value, order)


@view
def reshaped(draw: Draw, shape: Shape) -> OnArray | None:
    new: list[int] = []
    left = jnp.zeros(shape).size
    for factor in draw.sample([2, 3, 4, 1], 3):
        if left % factor == 0 and draw.random() < 0.7:
            new.append(factor)
            left //= factor
    new.insert(draw.randint(0, len(new)), left)
    return lambda example, value: value.reshape(new)


@view
def joined(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)
    start = draw.randrange(shape[axis])

    def join(example: Any, value: jax.Array) -> jax.Array:
        end = lax.slice_in_dim(value, start, None, axis=axis)
        return jnp.concatenate([value, 0.5 * end], axis)

    return join


@view
def stacked(draw: Draw, shape: Shape) -> OnArray | None:
    axis = draw.randint(0, len(shape))
    return lambda example, value: jnp.stack([value, -2.0 * value], axis)


@view
def scaled(draw: Draw, shape: Shape) -> OnArray | None:
    return draw.choice(
        [
            lambda example, value: 3.0 * value,
            lambda example, value: -value / 2.0,
            lambda example, value: value * constants(*value.shape),
            lambda example, value: value * example["numbers"][5],
        ]
    )


@rare_view
def masked(draw: Draw, shape: Shape) -> OnArray | None:
    if draw.random() < 0.5:
        return lambda example, value: jnp.where(constants(*value.shape) > 0, value, 0.0)
    return lambda example, value: jnp.where(example["numbers"][7] > 0, value, 0.0)


@rare_view
def written_to(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis, how = axis_of(draw, shape), draw.choice(["set", "add"])

    def write(example: Any, value: jax.Array) -> jax.Array:
        rows = value.at[along(axis, example["tokens"])]
        return getattr(rows, how)(example["numbers"][2], mode="drop")

    return write


@rare_view
def updated(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)

    def update(example: Any, value: jax.Array) -> jax.Array:
        new = 2.0 * lax.slice_in_dim(value, 0, (value.shape[axis] + 1) // 2, axis=axis)
        return lax.dynamic_update_slice_in_dim(value, new, example["place"], axis)

    return update


@rare_view
def scattered(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None

    def scatter(example: Any, value: jax.Array) -> jax.Array:
        rows = value[:TIME]
        return jnp.zeros((4, *rows.shape[1:])).at[example["tokens"][: len(rows)]].add(rows)

    return scatter


@rare_view
def added_up(draw: Draw, shape: Shape) -> OnArray | None:
    axis = axis_of(draw, shape) if shape else None
    return None if axis is None else lambda example, value: value.sum(axis, keepdims=True)


@rare_view
def averaged(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)
    return lambda example, value: value - value.mean(axis, keepdims=True)


@rare_view
def broadcast(draw: Draw, shape: Shape) -> OnArray | None:
    return lambda example, value: jnp.broadcast_to(value, (2, *value.shape))


@view
def sum_with_itself(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)
    return lambda example, value: value + 0.5 * jnp.flip(value, axis)


@view
def sum_with_its_transpose(draw: Draw, shape: Shape) -> OnArray | None:
    if len(shape) < 2 or shape[-1] != shape[-2]:
        return None
    return lambda example, value: value + jnp.swapaxes(value, -1, -2)


@rare_view
def taken_step_by_step(draw: Draw, shape: Shape) -> OnArray | None:
    if not shape:
        return None
    axis = axis_of(draw, shape)

    def take(example: Any, value: jax.Array) -> jax.Array:
        def step(carry: jax.Array, place: jax.Array) -> Any:
            return carry, 2.0 * jnp.take(value, place, axis, mode="clip")

        return lax.scan(step, jnp.zeros(()), example["tokens"])[1]

    return take


@rare_view
def running_sum(draw: Draw, shape: Shape) -> OnArray | None:
    axis = axis_of(draw, shape) if shape else None
    return None if axis is None else lambda example, value: jnp.cumsum(value, axis)


@rare_view
def squashed(draw: Draw, shape: Shape) -> OnArray | None:
    """No view, but what a weight is often passed through."""
    return draw.choice(
        [
            lambda example, value: jnp.tanh(value),
            lambda example, value: value / jnp.sqrt(1.0 + jnp.sum(value * value)),
        ]
    )
