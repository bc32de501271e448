"""Programs drawn at random are clipped as `vmap` and `grad` differentiate them."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
from hypothesis import strategies as st
from jax import lax

# A program is a list of steps on `x` of shape (time, width). Each draws what it needs, enters its
# parameters, and gives a function of the parameters and `x`.

WIDTH = 8
Step = Callable[[Any, jax.Array, jax.Array], jax.Array]
Term = Callable[[Any, jax.Array], jax.Array]
MADE = [
    "flat",
    "cut",
    "padded",
    "joined",
    "twice",
    "one of a stack",
    "a stretch",
    "strided",
    "spread",
    "in scaled rows",
    "in scaled columns",
    "of factors",
]


class Program:
    def __init__(self, draw: Any):
        self.draw = draw
        self.params: dict[str, jax.Array] = {}
        self._rng = np.random.default_rng(draw(st.integers(0, 99)))

    def leaf(self, *shape: int) -> str:
        """A parameter of its own, or one of that shape that is there already."""
        there = [name for name, leaf in self.params.items() if leaf.shape == shape]
        name = self.draw(st.sampled_from([f"p{len(self.params)}", *there]))
        if name not in self.params:
            values = self._rng.normal(size=shape) / np.sqrt(shape[-1])
            self.params[name] = jnp.asarray(values, jnp.float32)
        return name

    def square(self) -> Callable[[Any], jax.Array]:
        """A matrix made of parameters, by what only moves, joins or scales them."""
        kind = self.draw(st.sampled_from(["itself", "transposed", "scaled", *MADE, *MADE]))
        if kind == "twice":
            one, other = self.square(), self.square()
            return lambda params: one(params) + 0.5 * other(params).T
        if kind in ("in scaled rows", "in scaled columns"):
            one, name, axis = self.square(), self.leaf(WIDTH), int(kind == "in scaled rows")
            scaled = self.draw(st.sampled_from([jnp.exp, lambda scale: 1 + scale]))
            return lambda params: one(params) * jnp.expand_dims(scaled(params[name]), axis)
        if kind == "of factors":
            one, other = self.leaf(WIDTH, 2), self.leaf(2, WIDTH)
            return lambda params: params[one] @ params[other]
        if kind == "one of a stack":
            name, index = self.leaf(3, WIDTH, WIDTH), self.draw(st.integers(0, 2))
            return lambda params: params[name][index]
        if kind == "a stretch":
            return self.stretch(self.leaf(3, WIDTH, WIDTH), (WIDTH, WIDTH))
        if kind == "strided":
            name = self.leaf(2 * WIDTH, WIDTH)
            start = self.draw(st.integers(0, 1))
            return lambda params: lax.rev(params[name][start::2], (0,))
        if kind == "spread":
            name = self.leaf(WIDTH, WIDTH // 2)
            spread = [(0, 0, 0), (0, 1, 1)]
            return lambda params: lax.pad(params[name], jnp.zeros(()), spread)
        if kind == "flat":
            name = self.leaf(WIDTH * WIDTH)
            return lambda params: params[name].reshape(WIDTH, WIDTH)
        if kind == "cut":
            name = self.leaf(WIDTH + 3, WIDTH)
            start = self.draw(st.integers(0, 3))
            return lambda params: params[name][start : start + WIDTH]
        if kind == "padded":
            name = self.leaf(WIDTH, WIDTH - 3)
            low = self.draw(st.integers(0, 3))
            return lambda params: jnp.pad(params[name], ((0, 0), (low, 3 - low)))
        if kind == "joined":
            left, right = self.leaf(WIDTH, 3), self.leaf(WIDTH, WIDTH - 3)
            return lambda params: jnp.concatenate([params[left], params[right]], 1)
        name = self.leaf(WIDTH, WIDTH)
        if kind == "transposed":
            return lambda params: params[name].T
        factor = self.draw(st.sampled_from([0.5, -2.0])) if kind == "scaled" else 1.0
        return lambda params: factor * params[name]

    def stretch(self, name: str, shape: tuple[int, ...]) -> Callable[[Any], jax.Array]:
        """Entries of a parameter that stand one after the other."""
        size = math.prod(shape)
        start = self.draw(st.integers(0, self.params[name].size - size))
        return lambda params: params[name].reshape(-1)[start : start + size].reshape(shape)

    def shared(self) -> Term:
        """A term of the loss that all examples share, of a parameter or of a part of it."""
        name = self.draw(st.sampled_from(sorted(self.params)))
        size = self.draw(st.integers(1, self.params[name].size))
        part = self.draw(
            st.sampled_from([lambda params: params[name], self.stretch(name, (size,))])
        )
        function = self.draw(st.sampled_from([jnp.square, jnp.sin, jnp.cos]))
        weight = self.draw(st.sampled_from([1e-3, 0.1, 10.0]))
        return lambda params, x: weight * jnp.sum(function(part(params)))

    def entry_by_entry(self) -> Term:
        """A term whose gradient is no product: it is made for each example."""
        name = self.draw(st.sampled_from(sorted(self.params)))
        return lambda params, x: 0.1 * jnp.sum(jnp.sin(params[name] * jnp.sum(x)))

    def dense(self) -> Step:
        matrix = self.square()
        return lambda params, x, tokens: jnp.tanh(x @ matrix(params))

    def called(self) -> Step:
        matrix, wrap = self.square(), self.draw(st.sampled_from([jax.jit, jax.checkpoint]))
        inner = wrap(lambda x, w: jnp.sin(x @ w))
        return lambda params, x, tokens: inner(x, matrix(params))

    def bias(self) -> Step:
        name = self.leaf(WIDTH)
        return lambda params, x, tokens: x + params[name][None]

    def scale(self) -> Step:
        name = self.leaf(WIDTH)
        return lambda params, x, tokens: x * (1.0 + params[name][None])

    def look_up(self) -> Step:
        name = self.leaf(12, WIDTH)
        return lambda params, x, tokens: x + params[name][tokens]

    def convolution(self) -> Step:
        name, dilation = self.leaf(2, WIDTH, WIDTH), self.draw(st.integers(1, 2))

        def step(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
            y = lax.conv_general_dilated(
                x[None],
                params[name],
                (1,),
                "SAME",
                rhs_dilation=(dilation,),
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            return jnp.tanh(y[0])

        return step

    def layers(self) -> Step:
        name = self.leaf(2, WIDTH, WIDTH)

        def step(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params[name])[0]

        return step

    def over_time(self) -> Step:
        matrix = self.square()

        def step(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
            def move(state: jax.Array, row: jax.Array) -> Any:
                state = jnp.tanh(state @ matrix(params) + row)
                return state, state

            return lax.scan(move, jnp.ones(WIDTH), x)[1]

        return step

    def moved(self) -> Step:
        return lambda params, x, tokens: jnp.concatenate([x[1:], 0.5 * x[:1]]) + jnp.flip(x, 1)


STEPS = [
    Program.dense,
    Program.dense,
    Program.called,
    Program.bias,
    Program.scale,
    Program.look_up,
    Program.convolution,
    Program.layers,
    Program.over_time,
    Program.moved,
]
TERMS = [Program.shared, Program.shared, Program.shared, Program.entry_by_entry]


def check_program(data: st.DataObject) -> None:
    program = Program(data.draw)
    kinds = data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))
    steps = [program.dense(), *[kind(program) for kind in kinds]]
    kinds = data.draw(st.lists(st.sampled_from(TERMS), min_size=1, max_size=3))
    terms = [kind(program) for kind in kinds]
    time, rng = data.draw(st.integers(1, 3)), np.random.default_rng(0)
    batch = (
        jnp.asarray(rng.normal(size=(3, time, WIDTH)) * [[[0.3]], [[1.0]], [[2.0]]], jnp.float32),
        jnp.asarray(rng.integers(0, 12, (3, time)), jnp.int32),
    )

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, tokens = example
        first = x
        for step in steps:
            x = step(params, x, tokens)
        return zoo.mean_square(x - 0.3) + sum(term(params, first) for term in terms)

    oracle.assert_clipped(loss_fn, program.params, batch)


def check_convolution(data: st.DataObject) -> None:
    draw = data.draw
    axes = draw(st.integers(1, 2))
    # Of few places and many channels, so that Gram matrices are cheaper for most of them.
    sizes = draw(st.lists(st.integers(3, 4), min_size=axes, max_size=axes))
    window = draw(st.lists(st.integers(2, 3), min_size=axes, max_size=axes))
    spacing = draw(st.integers(1, 2)) if max(window) < 3 else 1
    groups = draw(st.sampled_from([1, 1, 1, 1, 2]))
    inputs, outputs = draw(st.integers(4, 8)), groups * draw(st.integers(4, 8))
    more_in, more_out, more = (draw(st.integers(0, 2)) for _ in range(3))
    options = {
        "window_strides": (draw(st.sampled_from([3, 2, 1])),) * axes,
        "padding": [draw(st.sampled_from([(0, 0), (0, 1), (1, 2)]))] * axes,
        "lhs_dilation": (draw(st.sampled_from([1, 1, 1, 2])),) * axes,
        "rhs_dilation": (spacing,) * axes,
        "feature_group_count": groups,
    }
    letters = "HW"[:axes]
    layout = draw(
        st.sampled_from(
            [
                (f"N{letters}C", f"{letters}IO", f"N{letters}C"),
                (f"NC{letters}", f"OI{letters}", f"NC{letters}"),
            ]
        )
    )
    kernel = {"I": inputs, "O": outputs, **dict(zip(letters, window, strict=True))}
    stored = {"I": inputs + more_in, "O": outputs + more_out, letters[0]: window[0] + more}
    shape = [(kernel | stored)[letter] for letter in layout[1]]
    starts = {letter: draw(st.integers(0, stored[letter] - kernel[letter])) for letter in stored}
    image = {"N": 1, "C": groups * inputs, **dict(zip(letters, sizes, strict=True))}
    is_flipped, is_moved = draw(st.booleans()), draw(st.booleans())
    program = Program(draw)
    name = program.leaf(*(reversed(shape) if is_moved else shape))
    terms = [program.shared() for _ in range(draw(st.sampled_from([1, 1, 0, 2])))]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, *(image[letter] for letter in layout[0])))
    scale = np.asarray([0.3, 1.0, 2.0]).reshape(3, *[1] * (x.ndim - 1))

    def part(params: Any) -> jax.Array:
        whole = params[name].T if is_moved else params[name]
        for index, letter in enumerate(layout[1]):
            start = starts.get(letter, 0)
            whole = lax.slice_in_dim(whole, start, start + kernel[letter], axis=index)
        return jnp.flip(whole, 0) if is_flipped else whole

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, part(params), dimension_numbers=layout, **options)
        return zoo.mean_square(jnp.tanh(y) - 0.3) + sum(term(params, x) for term in terms)

    oracle.assert_clipped(loss_fn, program.params, jnp.asarray(x * scale, jnp.float32))


def drawn(number: int) -> Any:
    return hypothesis.settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=number,
        phases=[hypothesis.Phase.generate],
    )


@drawn(5)
@hypothesis.given(st.data())
def test_random_programs_are_clipped_as_they_are_differentiated(data: st.DataObject) -> None:
    check_program(data)


@drawn(8)
@hypothesis.given(st.data())
def test_random_convolutions_are_clipped_as_they_are_differentiated(data: st.DataObject) -> None:
    check_convolution(data)


@pytest.mark.slow
@drawn(80)
@hypothesis.given(st.data())
def test_many_random_programs_are_clipped_as_they_are_differentiated(
    data: st.DataObject,
) -> None:
    check_program(data)


@pytest.mark.slow
@drawn(50)
@hypothesis.given(st.data())
def test_many_random_convolutions_are_clipped_as_they_are_differentiated(
    data: st.DataObject,
) -> None:
    check_convolution(data)
