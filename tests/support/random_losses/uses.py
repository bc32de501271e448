"""Uses: what makes a number of a parameter."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from random_losses.drawing import (
    TIME,
    WIDTH,
    Draw,
    OnArray,
    Shape,
    constants,
    numbers,
    rare_use,
    use,
)


def matrix_of(value: jax.Array) -> jax.Array:
    if value.ndim == 1 and value.size % WIDTH == 0:
        return value.reshape(-1, WIDTH)
    return value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)


def matrices_of(value: jax.Array) -> jax.Array:
    return value.reshape(-1, *value.shape[-2:]) if value.ndim > 1 else matrix_of(value)[None]


def sequence(example: Any, width: int) -> jax.Array:
    return numbers(example, TIME, width)


def loss_of(x: jax.Array) -> jax.Array:
    """No symmetric one, under which mistakes could cancel."""
    return jnp.sum(jnp.tanh(x) * constants(*x.shape))


@use
def dense(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        return loss_of(sequence(example, matrix.shape[0]) @ matrix)

    return apply


@use
def dense_of_a_vector(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        return loss_of(numbers(example, matrix.shape[0]) @ matrix)

    return apply


@use
def dense_transposed(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        return loss_of(jnp.einsum("ij,tj->it", matrix, sequence(example, matrix.shape[1])))

    return apply


@use
def used_twice(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        hidden = jnp.tanh(sequence(example, matrix.shape[0]) @ matrix)
        return loss_of(hidden @ matrix.T)

    return apply


@use
def several_axes(draw: Draw, shape: Shape) -> OnArray | None:
    if len(shape) < 3:
        return None
    letters = "abcd"[: len(shape)]
    kept = draw.choice(letters)
    summed = letters.replace(kept, "")

    def apply(example: Any, value: jax.Array) -> jax.Array:
        sizes = [value.shape[letters.index(letter)] for letter in summed]
        return loss_of(
            jnp.einsum(f"t{summed},{letters}->t{kept}", numbers(example, 2, *sizes), value)
        )

    return apply


@use
def heads(draw: Draw, shape: Shape) -> OnArray | None:
    if len(shape) < 3:
        return None

    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrices = matrices_of(value)
        x = sequence(example, matrices.shape[1])
        return loss_of(jnp.einsum("ti,hij->htj", x, matrices))

    return apply


@use
def a_head_each(draw: Draw, shape: Shape) -> OnArray | None:
    if len(shape) < 3:
        return None

    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrices = matrices_of(value)
        x = numbers(example, len(matrices), 2, matrices.shape[1])
        return loss_of(jax.vmap(jnp.matmul)(x, matrices))

    return apply


@use
def bilinear(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        left, right = (sequence(example, size) for size in matrix.shape)
        return loss_of(jnp.einsum("ti,ij,sj->ts", left, matrix, right))

    return apply


@use
def attention(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        x = sequence(example, matrix.shape[0])
        scores = (x @ matrix) @ (jnp.flip(x, 0) @ matrix).T
        return loss_of(jax.nn.softmax(scores, -1) @ x)

    return apply


@rare_use
def total(draw: Draw, shape: Shape) -> OnArray | None:
    return lambda example, value: jnp.sum(value) * example["numbers"][3]


@use
def constant(draw: Draw, shape: Shape) -> OnArray | None:
    factor = draw.choice([0.01, 1.0, 30.0])
    return lambda example, value: factor * jnp.sum(value * constants(*value.shape))


@use
def decay(draw: Draw, shape: Shape) -> OnArray | None:
    return lambda example, value: 0.1 * jnp.sum(value**2)


@rare_use
def entry_by_entry(draw: Draw, shape: Shape) -> OnArray | None:
    return lambda example, value: loss_of(value * numbers(example, *value.shape))


@rare_use
def bias(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        flat = value.reshape(-1)
        return loss_of(sequence(example, flat.size) + flat[None])

    return apply


@rare_use
def gain(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        flat = value.reshape(-1)
        return loss_of(sequence(example, flat.size) * flat[None])

    return apply


@use
def looked_up(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        rows = matrix_of(value).at[example["tokens"]].get(mode="fill", fill_value=0)
        return loss_of(rows * sequence(example, 1))

    return apply


@use
def one_hot(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        table = matrix_of(value)
        rows = jax.nn.one_hot(example["tokens"], len(table), dtype=table.dtype) @ table
        return loss_of(rows * sequence(example, 1))

    return apply


@use
def tied(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        table = matrix_of(value)
        hidden = jnp.tanh(
            jnp.take(table, example["tokens"], 0, mode="clip") + sequence(example, 1)
        )
        return jnp.sum(jax.nn.logsumexp(hidden @ table.T, axis=-1)) - hidden[0] @ table[-1]

    return apply


@use
def layers(draw: Draw, shape: Shape) -> OnArray | None:
    wrap = draw.choice([lambda step: step, jax.checkpoint])
    reverse = draw.choice([False, True])

    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrices = matrices_of(value)
        rows = matrices.shape[1]

        def step(x: jax.Array, matrix: jax.Array) -> Any:
            x = jnp.tanh(x @ matrix)
            return jnp.resize(x, (TIME, rows)), None

        x = sequence(example, rows)
        return loss_of(lax.scan(wrap(step), x, matrices, reverse=reverse)[0])

    return apply


@use
def unrolled_layers(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrices = matrices_of(value)
        x = sequence(example, matrices.shape[1])
        for matrix in matrices[:3]:
            x = jnp.resize(jnp.tanh(x @ matrix), x.shape)
        return loss_of(x)

    return apply


@use
def recurrent(draw: Draw, shape: Shape) -> OnArray | None:
    wrap = draw.choice([lambda step: step, jax.checkpoint])

    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        rows = matrix.shape[0]

        def step(state: jax.Array, x: jax.Array) -> Any:
            new = jnp.tanh(jnp.resize(state @ matrix, (rows,)) + x)
            return new, new

        start = jnp.ones(rows)
        return loss_of(lax.scan(wrap(step), start, sequence(example, rows))[1])

    return apply


@rare_use
def step_by_step(draw: Draw, shape: Shape) -> OnArray | None:
    """Rows of a stack, each of which scales a number of the example."""

    def apply(example: Any, value: jax.Array) -> jax.Array:
        def step(state: jax.Array, row: jax.Array) -> Any:
            return jnp.sum(jnp.tanh(row * numbers(example, *row.shape) + state)), None

        return lax.scan(step, jnp.zeros(()), matrix_of(value))[0]

    return apply


@use
def convolution(draw: Draw, shape: Shape) -> OnArray | None:
    if len(shape) < 2:
        return None
    stride, dilation = draw.choice([1, 2]), draw.choice([1, 2])
    padding = draw.choice([(0, 0), (1, 2)])

    def apply(example: Any, value: jax.Array) -> jax.Array:
        kernel = matrices_of(value)
        width, channels, _ = kernel.shape
        image = (
            numbers(example, 1, 1, channels) * jnp.arange(1.0, dilation * width + 2)[None, :, None]
        )
        y = lax.conv_general_dilated(
            image,
            kernel,
            (stride,),
            (padding,),
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return loss_of(y)

    return apply


@rare_use
def depthwise_convolution(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        kernel = matrix_of(value)
        width, channels = kernel.shape
        image = numbers(example, 1, 1, channels) * jnp.cos(jnp.arange(width + 1.0))[None, :, None]
        y = lax.conv_general_dilated(
            image,
            kernel[:, None],
            (1,),
            "VALID",
            feature_group_count=channels,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return loss_of(y)

    return apply


@use
def added_to_rows(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        rows = sequence(example, matrix.shape[0]) @ matrix
        return loss_of(jnp.zeros((5, matrix.shape[1])).at[example["tokens"]].add(rows))

    return apply


@rare_use
def low_rank(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        merged = constants(*matrix.shape) + matrix[:, :1] @ matrix[:1]
        return loss_of(sequence(example, matrix.shape[0]) @ merged)

    return apply


@rare_use
def normalized(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        matrix = matrix / jnp.sqrt(0.1 + jnp.sum(matrix**2, 0, keepdims=True))
        return loss_of(sequence(example, matrix.shape[0]) @ matrix)

    return apply


@use
def of_each_row(draw: Draw, shape: Shape) -> OnArray | None:
    def apply(example: Any, value: jax.Array) -> jax.Array:
        matrix = matrix_of(value)
        return loss_of(jax.vmap(lambda row: row @ matrix)(sequence(example, matrix.shape[0])))

    return apply
