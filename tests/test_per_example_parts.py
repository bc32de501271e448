"""Parameters that are used in part, beside a term that all examples share."""

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
from per_example_programs import (
    CHAIN_BATCH,
    IMAGES,
    TOKENS,
    Seen,
    X,
    conv,
    dense,
    normal,
    scanned,
    watch,
)

import clipax
from clipax.per_example import _plans


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return watch(monkeypatch)


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


@pytest.mark.slow_but(4)
@pytest.mark.parametrize(
    ("part", "shared"),
    [
        pytest.param(part, shared, marks=[] if _is_common(part, shared) else [pytest.mark.slow])
        for part in PARTS
        for shared in SHARED
    ],
)
def test_parameters_used_in_part_can_have_a_term_that_all_examples_share(
    part: str, shared: str
) -> None:
    loss_of_part, shape, batch = PARTS[part]
    params = {"w": normal(*shape) / 4}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return loss_of_part(params["w"], example) + SHARED[shared](params["w"])

    oracle.assert_clipped(loss_fn, params, batch)


def test_parts_of_parameters_are_measured_by_gram_matrices(seen: Seen) -> None:
    for name in sorted(COMMON):
        loss_of_part, shape, batch = PARTS[name]
        clipax.explain_clipped_grad(
            lambda w, e, loss=loss_of_part: loss(w, e) + SHARED["all of it"](w),
            jnp.zeros(shape),
            batch,
        )
    assert [plan.way for plan in seen.plans] == [_plans.Way.GRAM] * len(COMMON)


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-18, 1e-30])
def test_the_shared_rest_can_have_any_size(size: float) -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return min(size, 1.0) * dense(lambda w: w[0])(w, x) + size * jnp.sum(jnp.sin(w))

    w, batch = normal(3, 16, 16) / 4, X
    norms = trees.quick_jit(clipax.per_example_norms(loss_fn))(w, batch)
    each = zoo.wide(trees.quick_jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(w, batch))
    zoo.assert_near(zoo.wide(norms) / size, np.linalg.norm(each.reshape(4, -1), axis=1) / size)


def test_the_shared_rest_is_measured_where_products_cancel() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        # Of the products and the term that all share, 1e-3 is left.
        rows = jnp.vdot(jnp.ones(16), (1e-3 * x - 1.0)[:1] @ w[0])
        return rows + jnp.sum(w[0]) + 1e-4 * jnp.sum(jnp.sin(w[1:]))

    oracle.assert_clipped(loss_fn, normal(3, 16, 16), X)


WIDTHS = [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize(
    ("of_params", "of_compute"),
    [
        *(pytest.param(one, other, marks=pytest.mark.slow) for one in WIDTHS for other in WIDTHS),
    ],
)
def test_the_shared_rest_can_have_any_width(of_params: Any, of_compute: Any) -> None:
    with trees.double_precision(True):
        w, batch = (normal(3, 16, 16) / 4).astype(of_params), X

        def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
            y = jnp.tanh(x.astype(of_compute) @ w[0].astype(of_compute))
            return zoo.mean_square(y).astype(of_params) + jnp.sum(jnp.sin(w))

        tolerance = {jnp.float64: 1e-4, jnp.float32: 1e-4, jnp.bfloat16: 0.02, jnp.float16: 3e-3}
        narrow = min(of_params, of_compute, key=lambda dtype: jnp.finfo(dtype).nmant)
        oracle.assert_clipped(loss_fn, w, batch, tolerance[narrow])
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
def test_a_shared_rest_that_is_not_finite_is_loud_or_skipped(bad: float, place: Any) -> None:
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


# -- Arrays to which terms are added -------------------------------------------------------------


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


def test_rows_can_be_added_to_an_array_that_is_made_for_each_example() -> None:
    batch = (CHAIN_BATCH[0], jnp.asarray([[0, 1, 1], [2, 2, 2], [4, 0, 9], [3, 3, 1]], jnp.int32))
    oracle.assert_clipped(lambda w, e: looked_up(w, *e), normal(10, 8), batch)


def test_a_scan_can_add_to_an_array_that_is_made_for_each_example() -> None:
    oracle.assert_clipped(summed_by_steps, normal(8, 8), CHAIN_BATCH[0])
