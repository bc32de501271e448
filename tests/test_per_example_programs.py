"""Programs of every form: parts of parameters, types that vary, long ones, mutable arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import clipax
from clipax.per_example import _plans, _walk
from clipax.per_example._rules import _recipes

BOUND = 0.05


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plainly(loss_fn: Any, params: Any, batch: Any) -> Any:
    """Norms leaf by leaf, and the sum of the clipped gradients, from the gradient of each."""
    each = trees.quick_jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch)
    each = jax.tree.map(zoo.wide, each)
    norms = jax.tree.map(lambda leaf: np.linalg.norm(leaf.reshape(len(leaf), -1), axis=1), each)

    def total(leaf: np.ndarray, norm: np.ndarray) -> np.ndarray:
        shares = np.minimum(1, BOUND / np.maximum(norm, 1e-300))
        return np.einsum("b,b...->...", shares, leaf)

    return norms, jax.tree.map(total, each, norms)


def clipped(loss_fn: Any, params: Any, batch: Any) -> Any:
    bounds = jax.tree.map(lambda _: BOUND, params)
    grads, info = clipax.clipped_grad(loss_fn, bounds, mean=False)(params, batch)
    return info.norms, grads


def assert_plain(loss_fn: Any, params: Any, batch: Any, tolerance: float = 2e-5) -> None:
    found = trees.quick_jit(functools.partial(clipped, loss_fn))(params, batch)
    zoo.assert_near(found, plainly(loss_fn, params, batch), tolerance)


class Seen(NamedTuple):
    plans: list[Any]
    recipes: list[Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The plans that are made, and the equations that are read for them."""
    found = Seen([], [])
    plan, recipe = _plans.plan, _walk._recipe

    def plan_seen(*args: Any) -> Any:
        found.plans.append(plan(*args))
        return found.plans[-1]

    def recipe_seen(*args: Any) -> Any:
        found.recipes.append(args)
        return recipe(*args)

    monkeypatch.setattr(_plans, "plan", plan_seen)
    monkeypatch.setattr(_walk, "_recipe", recipe_seen)
    return found


# -- A part of a parameter, and a term that all examples share -----------------------------------

X = normal(4, 3, 16, seed=1) * jnp.asarray([0.3, 1.0, 2.0, 5.0]).reshape(4, 1, 1)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(-3, 14, (4, 3)), jnp.int32)
IMAGES = normal(4, 1, 5, 5, 8, seed=3)


def dense(matrix: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return lambda w, x: zoo.mean_square(jnp.tanh(x @ matrix(w)))


def conv(w: jax.Array, x: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=numbers)
    return zoo.mean_square(jnp.tanh(y))


def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
    return zoo.mean_square(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])


SPREAD = [(0, 0, 0), (1, 2, 1)]
# The losses of one example, the shape of the parameter, the batch.
PARTS: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], jax.Array]] = {
    "one of a stack": (dense(lambda w: w[1]), (3, 16, 16), X),
    "the last of a stack": (dense(lambda w: w[-1]), (3, 16, 16), X),
    "columns": (dense(lambda w: w[:, 2:22]), (16, 30), X),
    "every second row": (dense(lambda w: w[1::2]), (32, 16), X),
    "rows in another shape": (dense(lambda w: w[1:3].reshape(16, 18)), (5, 16, 9), X),
    "a stretch": (dense(lambda w: w.reshape(-1)[7:263].reshape(16, 16)), (20, 16), X),
    "transposed": (dense(lambda w: w[1].T), (3, 20, 16), X),
    "flipped": (dense(lambda w: jnp.flip(w)[2:]), (18, 18), X),
    "spread": (dense(lambda w: lax.pad(w[:, 1:9], 0.0, SPREAD)), (16, 9), X),
    "two unlike parts": (dense(lambda w: w[0, :16] + w[1, 2:]), (2, 18, 16), X),
    "a part and the whole": (
        lambda w, x: dense(lambda w: w[1])(w, x) + dense(lambda w: w.sum(0))(w, x),
        (3, 16, 16),
        X,
    ),
    "rows looked up": (lambda w, t: zoo.mean_square(jnp.tanh(w[1][t])), (2, 12, 16), TOKENS),
    "columns looked up": (lambda w, t: zoo.mean_square(jnp.tanh(w[:, :7][t])), (12, 9), TOKENS),
    "channels of a kernel": (lambda w, x: conv(w[:, :, 1:9, :12], x), (3, 3, 10, 14), IMAGES),
    "rows of a kernel": (lambda w, x: conv(w[1:, :, :, 2:], x), (4, 3, 8, 12), IMAGES),
    "layers of a stack": (lambda w, x: scanned(w[1:3], x), (4, 16, 16), X),
    "rows of layers": (lambda w, x: scanned(w[:, :16], x), (2, 20, 16), X),
}
SHARED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "all of it": lambda w: 0.1 * jnp.sum(w**2),
    "a part of it": lambda w: jnp.sum(jnp.sin(w.reshape(-1)[3:-2])),
    "the first of it": lambda w: jnp.sum(jnp.cos(w[0])),
    "another part": lambda w: jnp.sum(jnp.sin(w[-1])),
    "one entry": lambda w: 3.0 * w.reshape(-1)[-1],
    "moved": lambda w: jnp.vdot(
        jnp.sin(w.T), jnp.arange(w.size, dtype=w.dtype).reshape(w.T.shape)
    ),
}
COMMON = {"one of a stack", "rows looked up", "channels of a kernel"}


def _is_common(part: str, shared: str) -> bool:
    return part in COMMON and (shared == "all of it" or part == "one of a stack")


@pytest.mark.parametrize(
    ("part", "shared"),
    [
        pytest.param(part, shared, marks=[] if _is_common(part, shared) else [pytest.mark.slow])
        for part in PARTS
        for shared in SHARED
    ],
)
def test_a_part_of_a_parameter_and_a_term_that_all_examples_share(part: str, shared: str) -> None:
    loss_of_part, shape, batch = PARTS[part]
    params = {"w": normal(*shape) / 4}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return loss_of_part(params["w"], example) + SHARED[shared](params["w"])

    assert_plain(loss_fn, params, batch)


def test_these_parts_are_measured_by_gram_matrices(seen: Seen) -> None:
    for name in sorted(COMMON):
        loss_of_part, shape, batch = PARTS[name]
        clipax.explain_clipped_grad(
            lambda w, e, loss=loss_of_part: loss(w, e) + SHARED["all of it"](w),
            jnp.zeros(shape),
            batch,
        )
    assert [plan.way for plan in seen.plans] == [_plans.Way.GRAM] * len(COMMON)


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-18, 1e-30])
def test_the_rest_may_be_of_any_size(size: float) -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return min(size, 1.0) * dense(lambda w: w[0])(w, x) + size * jnp.sum(jnp.sin(w))

    w, batch = normal(3, 16, 16) / 4, X
    norms = trees.quick_jit(clipax.per_example_norms(loss_fn))(w, batch)
    each = zoo.wide(trees.quick_jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(w, batch))
    zoo.assert_near(zoo.wide(norms) / size, np.linalg.norm(each.reshape(4, -1), axis=1) / size)


def test_the_rest_is_there_where_products_cancel() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        # Of the products and the term that all share, 1e-3 is left.
        rows = jnp.vdot(jnp.ones(16), (1e-3 * x - 1.0)[:1] @ w[0])
        return rows + jnp.sum(w[0]) + 1e-4 * jnp.sum(jnp.sin(w[1:]))

    assert_plain(loss_fn, normal(3, 16, 16), X)


WIDTHS = [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize(
    ("of_params", "of_compute"),
    [
        *(pytest.param(one, other, marks=pytest.mark.slow) for one in WIDTHS for other in WIDTHS),
    ],
)
def test_the_rest_of_every_width(of_params: Any, of_compute: Any) -> None:
    with trees.double_precision(True):
        w, batch = (normal(3, 16, 16) / 4).astype(of_params), X

        def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
            y = jnp.tanh(x.astype(of_compute) @ w[0].astype(of_compute))
            return zoo.mean_square(y).astype(of_params) + jnp.sum(jnp.sin(w))

        tolerance = {jnp.float64: 1e-4, jnp.float32: 1e-4, jnp.bfloat16: 0.02, jnp.float16: 3e-3}
        narrow = min(of_params, of_compute, key=lambda dtype: jnp.finfo(dtype).nmant)
        assert_plain(loss_fn, w, batch, tolerance[narrow])
        norms = clipax.per_example_norms(loss_fn)(w, batch)
        assert norms.dtype == (jnp.float64 if of_params == jnp.float64 else jnp.float32)


@pytest.mark.parametrize(
    ("bad", "place"),
    [
        (np.inf, (2, 1, 1)),
        pytest.param(np.nan, (2, 1, 1), marks=pytest.mark.slow),
        pytest.param(np.inf, (0, 1, 1), marks=pytest.mark.slow),
        pytest.param(np.nan, (0, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_a_rest_that_is_no_number_is_loud_and_can_be_left_out(bad: float, place: Any) -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return dense(lambda w: w[0])(w, x) + jnp.sum(shared * w)

    shared = jnp.ones((3, 16, 16)).at[place].set(bad)
    w = normal(3, 16, 16) / 4
    grads, info = trees.quick_jit(clipax.clipped_grad(loss_fn, 1.0))(w, X)
    assert not np.any(np.isfinite(info.norms))
    assert np.isnan(grads[place])
    skip = clipax.clipped_grad(loss_fn, 1.0, skip_nonfinite=True)
    grads, info = trees.quick_jit(skip)(w, X)
    assert not np.any(info.is_counted)
    assert not np.any(grads)


# -- Types that say over which axes of a mesh a value varies -------------------------------------


def varying(tree: Any) -> Any:
    if hasattr(lax, "pcast"):
        return lax.pcast(tree, ("data",), to="varying")
    return lax.pvary(tree, ("data",))  # jax < 0.8.3


def recurrent(w: jax.Array, x: jax.Array) -> jax.Array:
    start = varying(jnp.zeros(16)) if "data" in _axes() else jnp.zeros(16)
    state = lax.scan(lambda state, row: (jnp.tanh(state @ w + row), None), start, x)[0]
    return zoo.mean_square(state)


def _axes() -> Any:
    return jax.sharding.get_abstract_mesh().manual_axes


VARYING: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], jax.Array]] = {
    "dense": (dense(lambda w: 0.5 * w), (16, 16), X),
    "vectors": (lambda w, x: zoo.mean_square(jnp.tanh(x[0] @ w)), (16, 16), X),
    "look-up": (lambda w, t: zoo.mean_square(jnp.tanh(w[t])), (12, 16), TOKENS),
    "look-up of one": (lambda w, t: zoo.mean_square(jnp.tanh(w[t[0]])), (12, 16), TOKENS),
    "look-up and back": (lambda w, t: zoo.mean_square(jnp.tanh(w[t] @ w.T)), (12, 16), TOKENS),
    "dynamic slice": (
        lambda w, t: zoo.mean_square(lax.dynamic_index_in_dim(w, t[0])),
        (12, 16),
        TOKENS,
    ),
    "recurrent": (recurrent, (16, 16), X),
    "layers": (scanned, (2, 16, 16), X),
    "convolution": (conv, (3, 3, 8, 12), IMAGES),
    "part": (dense(lambda w: jnp.pad(w[1], ((0, 0), (1, 2)))), (2, 16, 16), X),
    "entry by entry": (lambda w, x: zoo.mean_square(jnp.tanh(x * w[None])), (16,), X),
    "unused": (lambda w, x: zoo.mean_square(x), (4, 4), X),
}
DECAY: dict[str, Callable[[jax.Array], jax.Array]] = {
    "alone": lambda w: jnp.zeros(()),
    "with decay": lambda w: 0.1 * jnp.sum(w**2),
}


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("look-up", "alone"),
        ("dense", "with decay"),
        ("recurrent", "with decay"),
        ("convolution", "with decay"),
        ("unused", "alone"),
        *(
            pytest.param(name, decay, marks=pytest.mark.slow)
            for name in VARYING
            for decay in DECAY
        ),
    ],
)
def test_varying_parameters_give_the_same_on_each_device(name: str, decay: str) -> None:
    loss_of_example, shape, batch = VARYING[name]
    params = {"w": normal(*shape) / 4}
    batch = jnp.concatenate([batch, -batch, batch[::-1], batch])  # two on each device

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return loss_of_example(params["w"], example) + DECAY[decay](params["w"])

    def on_a_device(params: Any, batch: Any) -> Any:
        params = varying(params)
        norms, grads = clipped(loss_fn, params, batch)
        separate = clipax.per_example_norms(loss_fn, per_leaf=True)(params, batch)
        return norms, separate, jax.tree.map(lambda leaf: lax.psum(leaf, "data"), grads)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(whole, spread), out_specs=(spread, spread, whole)
    )
    norms, separate, grads = trees.quick_jit(sharded)(params, batch)
    wanted = plainly(loss_fn, params, batch)
    zoo.assert_near((norms, grads), wanted)
    zoo.assert_near(separate, wanted[0])


# -- Long programs -------------------------------------------------------------------------------

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


CHAIN_BATCH = (normal(4, 3, 8, seed=5), jnp.asarray([0.999, 1.0, 1.001, 1.002]))


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


@pytest.mark.parametrize("name", trees.mostly_slow(LINKS, QUICK))
def test_a_long_chain_is_clipped(name: str) -> None:
    # A sum that is cast often is rounded often by `grad`, and not by clipax.
    tolerance = 0.01 if name == "convert" else 2e-4
    assert_plain(chain(LINKS[name], 250), normal(8, 8) / 2, CHAIN_BATCH, tolerance)


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


def test_a_sum_of_more_products_than_are_moved_one_by_one(seen: Seen) -> None:
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


@pytest.mark.parametrize("name", DOUBLINGS)
def test_a_sum_of_itself_is_walked_once(name: str, seen: Seen) -> None:
    loss_fn, w, x = doubled(name, 40), normal(8, 8), CHAIN_BATCH[0]
    clipax.explain_clipped_grad(loss_fn, w, x)
    assert len(seen.plans[0].terms) <= 2
    assert len(seen.recipes) <= 2 * equations(loss_fn, w, x)


# XLA itself takes time without end for a sum of itself that is flipped forty times.
@pytest.mark.parametrize(("name", "times"), [("itself", 40), *((name, 6) for name in DOUBLINGS)])
def test_a_sum_of_itself_is_clipped(name: str, times: int) -> None:
    assert_plain(doubled(name, times), normal(8, 8), CHAIN_BATCH[0])


def test_a_sum_may_have_more_parts_than_there_are_numbers(seen: Seen) -> None:
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
def test_numbers_out_of_range_may_come_back_into_it(times: int) -> None:
    size = np.float32(2.0**60 if times < 0 else 2.0**-60)

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(abs(times)):
            w = w + w if times > 0 else 0.5 * w
        return jnp.vdot(x @ w, jnp.full((3, 8), size))

    w, x = jnp.zeros((8, 8)), size * CHAIN_BATCH[0]
    norms = zoo.wide(clipax.per_example_norms(loss_fn)(w, x)) * float(size) ** -2 / 2.0**times
    each = np.einsum("bti,o->bio", zoo.wide(CHAIN_BATCH[0]), np.ones(8)).reshape(4, -1)
    zoo.assert_near(norms, np.linalg.norm(each, axis=1))


# -- What else a walk has to tell apart ----------------------------------------------------------


@jax.custom_vjp
def looked_up(w: jax.Array, x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.sum(w * x[0, 0]) + jnp.sum(w[rows])


def _looked_up_backward(kept: Any, ct: jax.Array) -> Any:
    w, x, rows = kept
    # What rows are added to is no zero, and no product.
    return ct * jnp.sin(w * x[0, 0]).at[rows].add(x), None, None


looked_up.defvjp(lambda w, x, rows: (looked_up(w, x, rows), (w, x, rows)), _looked_up_backward)


@jax.custom_vjp
def summed_by_steps(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(w) * jnp.sum(x)


def _summed_by_steps_backward(kept: Any, ct: jax.Array) -> Any:
    w, x = kept
    start = jnp.sin(w * x[0, 0])
    return ct * lax.scan(lambda g, row: (g + row[:, None] * row[None], None), start, x)[0], None


summed_by_steps.defvjp(lambda w, x: (summed_by_steps(w, x), (w, x)), _summed_by_steps_backward)


def test_rows_may_be_added_to_what_is_made_for_each_example() -> None:
    batch = (CHAIN_BATCH[0], jnp.asarray([[0, 1, 1], [2, 2, 2], [4, 0, 9], [3, 3, 1]], jnp.int32))
    assert_plain(lambda w, e: looked_up(w, *e), normal(10, 8), batch)


def test_a_scan_may_add_to_what_is_made_for_each_example() -> None:
    assert_plain(summed_by_steps, normal(8, 8), CHAIN_BATCH[0])


# -- Mutable arrays ------------------------------------------------------------------------------


def new_ref(value: jax.Array) -> Any:
    made: Callable[[jax.Array], Any] = jax.new_ref
    return made(value)


def accumulated(params: Any, x: jax.Array) -> jax.Array:
    total = new_ref(jnp.zeros(8))
    for row in x:
        total[...] = total[...] + jnp.tanh(row @ params["w"] + params["b"])
    return zoo.mean_square(total[...])


def accumulated_in_a_scan(params: Any, x: jax.Array) -> jax.Array:
    total = new_ref(jnp.zeros(8))

    def step(carry: Any, row: jax.Array) -> Any:
        total[...] = total[...] + jnp.tanh(row @ params["w"] + params["b"])
        return carry, None

    lax.scan(step, None, x)
    return zoo.mean_square(total[...])


def inside_of_a_call(params: Any, x: jax.Array) -> jax.Array:
    @jax.jit
    def project(w: jax.Array, x: jax.Array) -> jax.Array:
        made = new_ref(jnp.zeros((3, 8)))
        for index in range(3):
            made[index] = jnp.sin(x[index] @ w)
        return made[...]

    return zoo.mean_square(project(params["w"], x) + params["b"][None])


def made_of_parameters(params: Any, x: jax.Array) -> jax.Array:
    w = new_ref(params["w"])
    w[0] = 2 * x[0] * params["b"]
    return zoo.mean_square(jnp.tanh(x @ w[...])) + jnp.sum(params["w"] ** 2)


def counted(params: Any, x: jax.Array) -> jax.Array:
    seen = new_ref(jnp.zeros(()))

    def step(index: Any, carry: Any) -> Any:
        seen[...] = seen[...] + lax.stop_gradient(jnp.sum(x))
        return carry

    lax.fori_loop(0, 3, step, 0)
    return seen[...] * zoo.mean_square(x @ params["w"] + params["b"][None])


MUTABLE = [
    accumulated_in_a_scan,
    made_of_parameters,
    pytest.param(accumulated, marks=pytest.mark.slow),
    pytest.param(inside_of_a_call, marks=pytest.mark.slow),
    pytest.param(counted, marks=pytest.mark.slow),
]
needs_refs = pytest.mark.skipif(
    not hasattr(jax, "new_ref"), reason="this version of JAX has no mutable arrays"
)


@needs_refs
@pytest.mark.parametrize("loss_fn", MUTABLE)
def test_a_loss_may_write_to_arrays_of_its_own(loss_fn: Any) -> None:
    params = {"w": normal(8, 8) / 2, "b": normal(8, seed=1), "unused": normal(3)}
    assert_plain(loss_fn, params, CHAIN_BATCH[0])


@needs_refs
def test_a_loss_may_tell_what_it_wrote() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> Any:
        written = new_ref(jnp.zeros(()))
        written[...] = jnp.sum(x)
        return jnp.sum(w * x), {"written": written[...], "constant": 3}

    _, info = clipax.clipped_grad(loss_fn, 1.0, has_aux=True)(jnp.ones((3, 8)), CHAIN_BATCH[0])
    zoo.assert_near(info.aux["written"], np.sum(CHAIN_BATCH[0], (1, 2)))
    assert info.aux["constant"].tolist() == [3] * 4


@needs_refs
def test_a_loss_may_read_an_array_that_is_written_elsewhere() -> None:
    read = new_ref(2 * jnp.ones(8))

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return zoo.mean_square(jnp.tanh((x * read[...][None]) @ w))

    wanted = plainly(
        lambda w, x: zoo.mean_square(jnp.tanh(2 * x @ w)), normal(8, 8), CHAIN_BATCH[0]
    )
    found = trees.quick_jit(functools.partial(clipped, loss_fn))(normal(8, 8), CHAIN_BATCH[0])
    zoo.assert_near(found, wanted)


@needs_refs
@pytest.mark.parametrize("is_jitted", [False, True])
def test_a_loss_must_not_write_to_an_array_of_all_examples(is_jitted: bool) -> None:
    written = new_ref(jnp.zeros(8))

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        written[...] = x[0]
        return zoo.mean_square(x @ w)

    for function in (clipax.clipped_grad(loss_fn, 1.0), clipax.per_example_norms(loss_fn)):
        run = jax.jit(function) if is_jitted else function
        with pytest.raises(ValueError, match=r"loss_fn must use mutable arrays .* jax.new_ref"):
            run(normal(8, 8), CHAIN_BATCH[0])
