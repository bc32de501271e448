"""Long programs are walked once, whatever adds up in them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from per_example_programs import CHAIN_BATCH, Seen, normal, watch

import clipax
from clipax.per_example import _plans, _programs
from clipax.per_example._rules import _recipes


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return watch(monkeypatch)


negate = jax.jit(jnp.negative)
negate_again: Callable[..., jax.Array] = jax.checkpoint(lambda w: -w)
LINKS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "transpose": lambda w, s: w.T,
    "reshape": lambda w, s: w.reshape(4, 16) if w.shape == (8, 8) else w.reshape(8, 8),
    "neg": lambda w, s: -w,
    "mul by a constant": lambda w, s: 1.001 * w,
    "mul by a number": lambda w, s: w * s,
    "div by a constant": lambda w, s: w / 1.001,
    "div by a number": lambda w, s: w / s,
    "rev": lambda w, s: lax.rev(w, (0,)),
    "rev of the other axis": lambda w, s: lax.rev(lax.rev(w, (0,)), (1,)),
    "pad and slice": lambda w, s: lax.slice(jnp.pad(w, ((1, 0), (0, 2))), (1, 0), (9, 8)),
    "slice and pad": lambda w, s: jnp.pad(w[1:], ((1, 0), (0, 0))),
    "broadcast": lambda w, s: lax.squeeze(lax.broadcast_in_dim(w, (1, 8, 8), (1, 2)), (0,)),
    "convert": lambda w, s: w.astype(jnp.bfloat16).astype(jnp.float32),
    "copy": lambda w, s: jnp.copy(w),
    "barrier": lambda w, s: lax.optimization_barrier(w),
    "jit": lambda w, s: negate(w),
    "checkpoint": lambda w, s: negate_again(w),
    "add a constant": lambda w, s: w + 1e-3,
    "split and join": lambda w, s: jnp.concatenate(jnp.split(w, [3])),
    "mapped": lambda w, s: lax.map(jnp.negative, w),
}
QUICK = {"neg", "pad and slice", "jit"}


def chain(link: Callable[[jax.Array, jax.Array], jax.Array], length: int) -> Any:
    def loss_fn(w: jax.Array, example: Any) -> jax.Array:
        x, size = example
        for _ in range(length):
            w = link(w, size)
        return zoo.mean_square(jnp.tanh(x @ w.reshape(8, 8)))

    return loss_fn


def equations(loss_fn: Any, params: Any, batch: Any) -> int:
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    return len(jax.make_jaxpr(jax.grad(loss_fn))(params, example).eqns)


@pytest.mark.parametrize("length", [250, pytest.param(1200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", trees.mostly_slow(LINKS, QUICK))
def test_a_long_chain_is_walked_once(name: str, length: int, seen: Seen) -> None:
    loss_fn, w = chain(LINKS[name], length), normal(8, 8) / 2
    clipax.explain_clipped_grad(loss_fn, w, CHAIN_BATCH)
    assert len(seen.recipes) <= 2 * equations(loss_fn, w, CHAIN_BATCH)
    (plan,) = seen.plans
    wanted = _plans.Way.EACH if name in ("split and join", "mapped") else _plans.Way.GRAM
    assert plan.way is wanted


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("name", trees.mostly_slow(LINKS, QUICK))
def test_a_long_chain_is_clipped(name: str) -> None:
    # A sum that is cast often is rounded often by `grad`, and not by clipax.
    tolerance = 0.01 if name == "convert" else 2e-4
    oracle.assert_clipped(chain(LINKS[name], 250), normal(8, 8) / 2, CHAIN_BATCH, tolerance)


def sums(w: jax.Array, x: jax.Array, length: int) -> jax.Array:
    """Products that are added up."""
    total = jnp.zeros(())
    for index in range(length):
        total = total + jnp.sum(jnp.sin(x[index % 3] @ w))
    return total


@pytest.mark.parametrize("length", [250, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_long_sum_is_walked_once(length: int, seen: Seen) -> None:
    loss_fn = functools.partial(sums, length=length)
    clipax.explain_clipped_grad(loss_fn, normal(8, 8), CHAIN_BATCH[0])
    assert len(seen.recipes) <= 2 * equations(loss_fn, normal(8, 8), CHAIN_BATCH[0])


@pytest.mark.slow
def test_a_very_long_sum_is_not_moved_term_by_term(seen: Seen) -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return sums(w.T, x, _recipes.MOST_CHANGED + 1)

    clipax.explain_clipped_grad(loss_fn, normal(8, 8), CHAIN_BATCH[0])
    assert seen.plans[0].why == "comes from transpose"


DOUBLINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "itself": lambda w: w + w,
    "in a call": jax.jit(lambda w: w + w),
    "scaled": lambda w: 0.75 * w + 1.25 * w,
    "subtracted": lambda w: w - jnp.negative(w),
    "transposed": lambda w: w + w.T,
    "with axes of one": lambda w: (w[None] + w[None])[0] / 2 + w.reshape(8, 1, 8)[:, 0],
    "flipped": lambda w: w + jnp.flip(w, 0),
    "shifted": lambda w: w + jnp.pad(w[1:], ((1, 0), (0, 0))),
}


def doubled(name: str, times: int) -> Any:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(times):
            w = DOUBLINGS[name](w)
        return zoo.mean_square(jnp.tanh(2.0**-times * (x @ w)))

    return loss_fn


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("name", DOUBLINGS)
def test_a_sum_of_itself_is_walked_once(name: str, seen: Seen) -> None:
    loss_fn, w, x = doubled(name, 40), normal(8, 8), CHAIN_BATCH[0]
    clipax.explain_clipped_grad(loss_fn, w, x)
    assert len(seen.plans[0].terms) <= 2
    assert len(seen.recipes) <= 2 * equations(loss_fn, w, x)


# XLA itself takes time without end for a sum of itself that is flipped forty times.
@pytest.mark.slow_but(4)
@pytest.mark.parametrize(("name", "times"), [("itself", 40), *((name, 6) for name in DOUBLINGS)])
def test_a_sum_of_itself_is_clipped(name: str, times: int) -> None:
    oracle.assert_clipped(doubled(name, times), normal(8, 8), CHAIN_BATCH[0])


@pytest.mark.slow
def test_a_sum_can_have_more_parts_than_floats_can_count(seen: Seen) -> None:
    # Of 2 ** 2000 times a number, JAX makes infinity, and of as many zeros zero.
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(2000):
            w = w + w
        return jnp.vdot(x @ w, jnp.ones((3, 8)))

    x = CHAIN_BATCH[0].at[0].set(0.0)
    norms = clipax.per_example_norms(loss_fn)(jnp.zeros((8, 8)), x)
    assert norms[0] == 0
    assert not np.any(np.isfinite(norms[1:]))
    assert len(seen.plans[0].terms) == 1


@pytest.mark.parametrize("times", [100, -100])
def test_scales_out_of_range_can_come_back_into_it(times: int) -> None:
    size = np.float32(2.0**60 if times < 0 else 2.0**-60)

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(abs(times)):
            w = w + w if times > 0 else 0.5 * w
        return jnp.vdot(x @ w, jnp.full((3, 8), size))

    w, x = jnp.zeros((8, 8)), size * CHAIN_BATCH[0]
    norms = zoo.wide(clipax.per_example_norms(loss_fn)(w, x)) * float(size) ** -2 / 2.0**times
    each = np.einsum("bti,o->bio", zoo.wide(CHAIN_BATCH[0]), np.ones(8)).reshape(4, -1)
    zoo.assert_near(norms, np.linalg.norm(each, axis=1))


def equations_once(function: Callable[..., Any], *args: Any) -> int:
    """The equations of a program, those of a body that it calls more than once counted once."""
    seen: dict[int, Any] = {}
    pending = [jax.make_jaxpr(function)(*args).jaxpr]
    while pending:
        program = pending.pop()
        if id(program) not in seen:
            seen[id(program)] = program
            pending += [body for each in program.eqns for body in _programs.bodies(each)]
    return sum(len(program.eqns) for program in seen.values())


# JAX itself writes the way forward out for each layer, and "twice" goes it three times.
@pytest.mark.parametrize(("memory", "ways"), [("kept", 1), ("twice", 3)])
def test_gradients_of_layers_of_one_function_are_traced_once(memory: Any, ways: int) -> None:
    w, x = normal(32, 32), normal(4, 3, 32)

    def another(length: int) -> int:
        @jax.checkpoint
        def layer(x: jax.Array, w: jax.Array) -> jax.Array:
            return functools.reduce(lambda x, _: jnp.sin(x), range(length), x) @ w

        def loss_fn(stack: Any, x: jax.Array) -> jax.Array:
            return zoo.mean_square(functools.reduce(layer, stack, x))

        clip = clipax.clipped_grad(loss_fn, 1.0, memory=memory)
        few, many = (equations_once(clip, [w] * count, x) for count in (3, 4))
        return many - few

    assert another(length=20) - another(length=2) <= 18 * ways
