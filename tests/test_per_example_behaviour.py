"""What `clipped_grad` and its kin promise besides: every row, every argument, every error."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax
from benchmarks.compilers import hlo

EXAMPLES = 8
COEFFICIENTS: dict[str, tuple[Any, Callable[..., np.ndarray]]] = {
    "hard": (clipax.coefficients.hard, lambda n, c: np.minimum(1, c / n)),
    "unclipped": (clipax.coefficients.unclipped, lambda n, c: np.ones_like(n)),
    "rational": (clipax.coefficients.rational, lambda n, c: 1 / (1 + n / c)),
    "square_root": (clipax.coefficients.square_root, lambda n, c: 1 / np.sqrt(1 + (n / c) ** 2)),
    "tanh": (clipax.coefficients.tanh, lambda n, c: np.tanh(n / c) / (n / c)),
    "normalized": (clipax.coefficients.normalized, lambda n, c: c / n),
    "auto_s": (clipax.coefficients.auto_s(0.5), lambda n, c: c / (n + 0.5)),
    "psac": (clipax.coefficients.psac(0.2), lambda n, c: c / (n + 0.2 / (n + 0.2))),
    "of one's own": (lambda n, c: jnp.where(n > c, 0.0, 2.0), lambda n, c: 2.0 * (n <= c)),
}


def total(w: jax.Array, x: jax.Array) -> jax.Array:
    """Its gradient is the example."""
    return jnp.sum(w * x)


def product(w: jax.Array, example: Any) -> jax.Array:
    """Its gradient is the outer product of two vectors, or a sum of a few."""
    x, y = example
    return jnp.vdot(x @ w, y)


PAIRS = jnp.array([[3.0, 4.0], [0.0, 0.5]])


@functools.cache
def every_way() -> tuple[Callable[..., jax.Array], Any, Any]:
    """Leaves of every way to a norm; the last part of an example is the size of its loss."""
    source = zoo.Source(7)
    params = {
        "each": source.weight(16),
        "gram": source.weight(16, 16),
        "outer": source.weight(16, 4),
        "table": source.weight(20, 16),
        "unused": source.weight(3),
    }
    rng = np.random.default_rng(3)
    batch = {
        "x": jnp.asarray(rng.normal(size=(EXAMPLES, 2, 16)), jnp.float32),
        "tokens": jnp.asarray(rng.integers(0, 20, (EXAMPLES, 2)), jnp.int32),
        "size": jnp.asarray(rng.lognormal(1.0, 1.0, EXAMPLES), jnp.float32),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = example["x"] + params["table"][example["tokens"]]
        x = jnp.tanh(x @ params["gram"] + params["each"][None])
        return example["size"] * zoo.mean_square(x.sum(0) @ params["outer"])

    return loss_fn, params, batch


def plain(loss_fn: Any, *args: Any, argnums: Any = 0, batch_argnums: Any = (1,)) -> Any:
    """The gradient of each example, in NumPy."""
    in_axes = [0 if position in batch_argnums else None for position in range(len(args))]
    each = trees.quick_jit(jax.vmap(jax.grad(loss_fn, argnums), in_axes))(*args)
    return jax.tree.map(zoo.wide, each)


def norms_of(each: Any) -> np.ndarray:
    squares = [np.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in jax.tree.leaves(each)]
    return np.sqrt(sum(squares))


def weighted(each: Any, weights: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: np.einsum("b,b...->...", weights, leaf), each)


@functools.cache
def clip(coefficient: str = "hard", **options: Any) -> Any:
    """Of every way, compiled; the bound is 0.1 or given at the call."""
    rule = COEFFICIENTS[coefficient][0]
    return trees.quick_jit(clipax.clipped_grad(every_way()[0], 0.1, coefficient=rule, **options))


def with_example(index: int, **values: Any) -> Any:
    batch = every_way()[2]
    return batch | {key: batch[key].at[index].set(value) for key, value in values.items()}


# -- The table -----------------------------------------------------------------------------------


def test_by_hand() -> None:
    grads, info = clipax.clipped_grad(total, 1.0, mean=False)(jnp.zeros(2), PAIRS)
    zoo.assert_near(grads, np.array([0.6, 1.3]))
    zoo.assert_near(info.norms, np.array([5.0, 0.5]))
    zoo.assert_near(info.coefficients, np.array([0.2, 1.0]))
    zoo.assert_near(info.losses, np.zeros(2))
    assert info.clip_fraction == 0.5
    assert info.max_norm == 1.0
    assert info.is_counted.tolist() == [True, True]
    assert info.aux is None


@pytest.mark.parametrize("bound", [1e6, math.inf])
def test_what_is_under_the_bound_is_as_it_is(bound: float) -> None:
    loss_fn, params, batch = every_way()
    grads, info = clip()(params, batch, max_norm=bound)
    assert info.coefficients.tolist() == [1.0] * EXAMPLES
    assert info.clip_fraction == 0
    assert info.max_norm == bound
    zoo.assert_near(
        grads, weighted(plain(loss_fn, params, batch), np.full(EXAMPLES, 1 / EXAMPLES))
    )


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_coefficient(name: str) -> None:
    loss_fn, params, batch = every_way()
    each = plain(loss_fn, params, batch)
    norms = norms_of(each)
    bound = float(np.median(norms))
    weights = COEFFICIENTS[name][1](norms, bound)
    grads, info = clip(name)(params, batch, max_norm=bound)
    zoo.assert_near(info.coefficients, weights)
    zoo.assert_near(grads, weighted(each, weights / EXAMPLES))


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_zero_stays_zero(name: str) -> None:
    _, params, batch = every_way()
    silent = batch | {"size": jnp.zeros(EXAMPLES)}
    grads, info = clip(name)(params, silent, max_norm=0.1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not np.any(info.norms)
    assert np.all(np.isfinite(info.coefficients))


@pytest.mark.parametrize("name", sorted(set(COEFFICIENTS) - {"unclipped", "of one's own"}))
def test_a_bound_of_zero_gives_zeros(name: str) -> None:
    _, params, batch = every_way()
    grads, info = clip(name)(params, batch, max_norm=0.0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not np.any(info.coefficients)
    assert info.clip_fraction == 1


BAD = {
    "a NaN in the loss": {"size": math.nan},
    "an infinite loss": {"size": -math.inf},
    "a NaN in what goes in": {"x": math.nan},
    "inf in what goes in": {"x": math.inf},
}


@pytest.mark.parametrize("bad", BAD)
def test_nan_and_inf_are_loud(bad: str) -> None:
    grads, info = clip()(every_way()[1], with_example(3, **BAD[bad]))
    is_finite = np.isfinite(info.norms)
    assert not is_finite[3]
    assert is_finite.sum() == EXAMPLES - 1
    assert np.all(info.is_counted)
    assert np.any(np.isnan(grads["gram"]))


@pytest.mark.parametrize("bad", BAD)
def test_skips_nan_and_inf_as_if_they_were_not_there(bad: str) -> None:
    _, params, batch = every_way()
    skipped, info = clip(skip_nonfinite=True)(params, with_example(3, **BAD[bad]))
    is_counted = np.arange(EXAMPLES) != 3
    masked, of_masked = clip()(params, batch, mask=is_counted)
    # The others have the same entries, bit for bit, as beside an example that is masked out.
    trees.assert_bitwise(skipped, masked)
    assert info.is_counted.tolist() == is_counted.tolist()
    assert info.coefficients.tolist() == of_masked.coefficients.tolist()
    assert info.norms[is_counted].tolist() == of_masked.norms[is_counted].tolist()
    assert info.clip_fraction == of_masked.clip_fraction
    assert not np.isfinite(info.norms[3])


def test_skips_an_infinite_gradient_of_a_finite_loss() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sqrt(w * x)) + jnp.sum(w)

    batch = jnp.array([[1.0, 4.0], [1.0, 1.0]])
    params = jnp.array([0.0, 1.0])
    grads, info = clipax.clipped_grad(loss_fn, 1.0, skip_nonfinite=True)(params, batch)
    assert np.all(np.isfinite(info.losses))
    assert info.is_counted.tolist() == [False, False]
    assert grads.tolist() == [0.0, 0.0]


def test_skips_an_example_of_which_one_part_is_not_finite() -> None:
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    batch = {"a": PAIRS, "b": PAIRS.at[0, 0].set(math.nan)}
    grad_fn = clipax.clipped_grad(
        lambda params, x: total(params["a"], x["a"]) + total(params["b"], x["b"]),
        {"a": 1.0, "b": 1.0},
        skip_nonfinite=True,
    )
    grads, info = grad_fn(params, batch)
    assert info.is_counted.tolist() == [False, True]
    assert jax.tree.map(lambda leaf: leaf.tolist(), grads) == {"a": [0, 0.5], "b": [0, 0.5]}


@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf])
def test_what_is_masked_out_is_not_there(padding: float) -> None:
    _, params, batch = every_way()
    is_kept = np.arange(EXAMPLES) < 5
    there = jax.tree.map(lambda leaf: leaf[:5], batch)
    padded = batch | {key: np.array(batch[key]) for key in ("x", "size")}
    for key in ("x", "size"):
        padded[key][5:] = padding
    grads, info = clip()(params, padded, mask=is_kept)
    wanted, of_wanted = clip()(params, there)
    zoo.assert_near(grads, wanted)
    zoo.assert_near(info.norms[:5], of_wanted.norms)
    assert info.coefficients[5:].tolist() == [0, 0, 0]
    zoo.assert_near(info.clip_fraction, of_wanted.clip_fraction)
    assert info.is_counted.tolist() == is_kept.tolist()


@pytest.mark.parametrize("options", [{}, {"mean": False}, {"skip_nonfinite": True}])
def test_of_no_example_zeros(options: Any) -> None:
    _, params, batch = every_way()
    grads, info = clip(**options)(params, batch, mask=np.zeros(EXAMPLES, bool))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert info.clip_fraction == 0
    assert np.all(np.isfinite(info.norms))


# -- What is asked for ---------------------------------------------------------------------------


def test_a_part_of_the_parameters_has_a_bound_of_its_own() -> None:
    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        inside = total(params["in"]["a"], x) + total(params["in"]["b"], 2 * x)
        return inside + total(params["out"], x)

    params = {"in": {"a": jnp.zeros(2), "b": jnp.zeros(2)}, "out": jnp.zeros(2)}
    bounds = {"in": 1.0, "out": 5.0}
    grads, info = clipax.clipped_grad(loss_fn, bounds, mean=False)(params, PAIRS[:1])
    zoo.assert_near(info.norms, {"in": np.sqrt([125.0]), "out": np.array([5.0])})
    assert {key: float(share) for key, share in info.clip_fraction.items()} == {"in": 1, "out": 0}
    short = np.array([3.0, 4.0]) / np.sqrt(125)
    zoo.assert_near(grads, {"in": {"a": short, "b": 2 * short}, "out": np.array([3.0, 4.0])})
    assert jax.tree.structure(info.max_norm) == jax.tree.structure(bounds)


def test_a_bound_at_the_call_is_traced() -> None:
    traces = []

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        traces.append(1)
        return total(w, x)

    grad_fn = jax.jit(clipax.clipped_grad(loss_fn, 1.0))
    for bound, second in ((1.0, 0.65), (2.5, 1.25), (0.0, 0.0)):
        grads, info = grad_fn(jnp.zeros(2), PAIRS, max_norm=jnp.asarray(bound))
        zoo.assert_near(grads[1], np.asarray(second))
        assert info.max_norm == bound
    after_first = len(traces)
    grad_fn(jnp.zeros(2), PAIRS, max_norm=jnp.asarray(7.0))
    assert len(traces) == after_first
    # Without it, the bound that was given first.
    zoo.assert_near(grad_fn(jnp.zeros(2), PAIRS)[0], np.array([0.3, 0.65]))


def test_several_arguments_of_each_kind() -> None:
    source = zoo.Source(1)

    def loss_fn(x: Any, w: Any, shared: Any, y: Any, b: Any, *, power: int = 2) -> jax.Array:
        hidden = jnp.tanh(x["x"] @ w["w"]) + y[None] * shared
        return jnp.mean((hidden + b[None]) ** power)

    args = (
        {"x": source.batch(3, 4)},
        {"w": source.weight(4, 6)},
        jnp.asarray(0.5),
        source.batch(6),
        source.weight(6),
    )
    options: dict[str, Any] = {"argnums": (4, 1), "batch_argnums": (3, 0)}
    grad_fn = trees.quick_jit(clipax.clipped_grad(loss_fn, 0.01, **options))
    grads, info = grad_fn(*args)
    each = plain(loss_fn, *args, **options)
    norms = norms_of(each)
    weights = np.minimum(1, 0.01 / norms) / zoo.EXAMPLES
    zoo.assert_near(info.norms, norms)
    zoo.assert_near(grads, weighted(each, weights))
    trees.assert_same_type(grads, (args[4], args[1]))
    norm_fn = clipax.per_example_norms(loss_fn, per_leaf=True, **options)
    bias, weight = trees.quick_jit(norm_fn)(*args)
    zoo.assert_near(jnp.hypot(bias, weight["w"]), norms)


@pytest.mark.parametrize("argnums", [1, np.int64(1), [1]])
def test_which_arguments_may_be_any_integers(argnums: Any) -> None:
    options = {"argnums": argnums, "batch_argnums": np.int32(0)}
    grads, _ = clipax.clipped_grad(lambda x, w: total(w, x), 1.0, **options)(PAIRS, jnp.zeros(2))
    zoo.assert_near(
        grads, (np.array([0.3, 0.65]),) if isinstance(argnums, list) else np.array([0.3, 0.65])
    )


def test_aux_is_stacked() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> Any:
        aux = {"double": 2 * x, "count": jnp.sum(x > 1), "constant": 3, "nothing": None}
        return total(w, x), aux

    grads, info = jax.jit(clipax.clipped_grad(loss_fn, 1.0, has_aux=True))(jnp.zeros(2), PAIRS)
    zoo.assert_near(grads, np.array([0.3, 0.65]))
    assert info.aux["double"].tolist() == (2 * PAIRS).tolist()
    assert info.aux["count"].tolist() == [2, 0]
    assert info.aux["count"].dtype == jnp.int32
    assert info.aux["constant"].tolist() == [3, 3]
    assert info.aux["nothing"] is None
    norms = clipax.per_example_norms(loss_fn, has_aux=True)(jnp.zeros(2), PAIRS)
    assert norms.tolist() == [5.0, 0.5]


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_each_example_has_its_key(make: Any) -> None:
    source = zoo.Source(2)

    def loss_fn(w: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        is_kept = jax.random.bernoulli(key, 0.5, x.shape)
        return zoo.mean_square(jnp.where(is_kept, 2 * x, 0.0) @ w)

    args = (source.weight(12, 6), source.batch(12), jax.random.split(make(0), zoo.EXAMPLES))
    each = plain(loss_fn, *args, batch_argnums=(1, 2))
    grad_fn = clipax.clipped_grad(loss_fn, 0.1, batch_argnums=(1, 2), mean=False)
    grads, info = trees.quick_jit(grad_fn)(*args)
    norms = norms_of(each)
    zoo.assert_near(info.norms, norms)
    zoo.assert_near(grads, weighted(each, np.minimum(1, 0.1 / norms)))
    # One key for all of them is an argument like another.
    norm_fn = clipax.per_example_norms(loss_fn)
    norms = norms_of(plain(loss_fn, *args[:2], args[2][0]))
    zoo.assert_near(norm_fn(*args[:2], args[2][0]), norms)


@pytest.mark.parametrize(("size", "mean"), [(1, True), (2, False), (EXAMPLES, True)])
def test_parts_of_the_batch_give_the_same(size: int, mean: bool) -> None:
    params = every_way()[1]
    mask = np.arange(EXAMPLES) != 2
    bounds = {"each": 0.01, "gram": 0.1, "outer": 0.1, "table": 0.1, "unused": 1.0}
    at_call = {"mask": mask, "max_norm": bounds}
    batch = with_example(5, size=math.nan)
    options = {"mean": mean, "skip_nonfinite": True}
    whole, info = clip(**options)(params, batch, **at_call)
    parts, of_parts = clip(**options, microbatch_size=size)(params, batch, **at_call)
    zoo.assert_near(parts, whole)
    is_finite = np.arange(EXAMPLES) != 5
    zoo.assert_near(of_parts.losses[is_finite], info.losses[is_finite])
    for name in ("coefficients", "clip_fraction", "max_norm"):
        zoo.assert_near(getattr(of_parts, name), getattr(info, name))
    assert of_parts.is_counted.tolist() == (mask & is_finite).tolist()
    trees.assert_same_type(parts, params)
    trees.assert_same_type(of_parts, info)


def test_parts_of_the_batch_keep_aux_and_a_bound_at_the_call() -> None:
    grad_fn = clipax.clipped_grad(
        lambda w, x: (total(w, x), 2 * x), 9.0, has_aux=True, microbatch_size=1
    )
    grads, info = grad_fn(jnp.zeros(2), PAIRS, max_norm=1.0)
    zoo.assert_near(grads, np.array([0.3, 0.65]))
    assert info.aux.tolist() == (2 * PAIRS).tolist()
    assert info.max_norm == 1


def test_the_batch_must_divide_into_parts() -> None:
    with pytest.raises(ValueError, match=r"microbatch_size must divide the 2 examples, got 3"):
        clipax.clipped_grad(total, 1.0, microbatch_size=3)(jnp.zeros(2), PAIRS)


def test_float64_is_measured_in_float64() -> None:
    with trees.double_precision(True):
        wide, narrow = jnp.zeros(2, jnp.float64), jnp.zeros(2, jnp.float32)
        batch = jnp.array([[1.0, 1e-9], [1.0, 0.0]], jnp.float64)
        grads, info = clipax.clipped_grad(total, 1.0)(wide, batch)
        assert info.norms.dtype == grads.dtype == jnp.float64
        grads, info = clipax.clipped_grad(total, 1.0)(narrow, batch.astype(jnp.float32))
        assert info.norms.dtype == grads.dtype == jnp.float32


# -- Range ---------------------------------------------------------------------------------------


@functools.cache
def normalize_products() -> Any:
    return trees.quick_jit(
        clipax.clipped_grad(product, 1.0, coefficient=clipax.coefficients.normalized)
    )


@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("size", [1e25, 1e12, 1.0, 1e-12, 1e-25])
@pytest.mark.parametrize("left", [1.0, 1e6, 1e-6])
def test_any_norm_that_is_a_number(size: float, left: float, rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = (left * rng.normal(size=(3, *rows, 32))).astype(np.float32)
    y = (size / left * rng.normal(size=(3, *rows, 32))).astype(np.float32)
    axes = "btx,bty->bxy" if rows else "bx,by->bxy"
    each = np.einsum(axes, x.astype(np.float64), y.astype(np.float64))
    grads, info = normalize_products()(jnp.zeros((32, 32)), (x, y))
    norms = norms_of(each)
    zoo.assert_near(info.norms / size, norms / size)
    zoo.assert_near(grads, weighted(each, 1 / norms / 3))


# -- A bound that follows a quantile -------------------------------------------------------------


def test_one_move_by_hand() -> None:
    info = clipax.clipped_grad(total, 1.0)(jnp.zeros(2), PAIRS)[1]
    options = {"quantile": 0.9, "learning_rate": 0.5}
    # A half of them are at or under a bound of one, and of one half too.
    for bound in (1.0, 0.5):
        moved = clipax.track_quantile(jnp.asarray(bound), info, **options)
        zoo.assert_near(moved, np.asarray(bound * math.exp(0.5 * 0.4)))
    moved = clipax.track_quantile(jnp.asarray(5.0, jnp.bfloat16), info, **options)
    assert moved.dtype == jnp.bfloat16
    zoo.assert_near(moved, np.asarray(5 * math.exp(-0.05)), tolerance=1 / 256)


@pytest.mark.parametrize("bound", [0.5, {"a": 0.5, "b": 2.0}])
def test_of_no_example_the_bound_stays(bound: Any) -> None:
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    bound = jax.tree.map(jnp.asarray, bound)
    grad_fn = clipax.clipped_grad(lambda p, x: total(p["a"], x) + total(p["b"], x), bound)
    _, info = grad_fn(params, PAIRS, mask=jnp.zeros(2, bool))
    trees.assert_bitwise(clipax.track_quantile(bound, info), bound)


@functools.cache
def follow() -> Any:
    """A hundred steps with one bound and with a bound for each of two leaves."""

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return total(params["a"], x) + total(params["b"], 100 * x)

    def run(start: Any, quantile: Any) -> Any:
        def step(bound: Any, key: jax.Array) -> Any:
            batch = jnp.exp(jax.random.normal(key, (64, 1)))
            _, info = grad_fn(params, batch, max_norm=bound)
            return clipax.track_quantile(bound, info, quantile=quantile), info.clip_fraction

        grad_fn = clipax.clipped_grad(loss_fn, 1.0)
        params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        return lax.scan(step, start, jax.random.split(jax.random.key(1), 100))

    return jax.jit(run)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_bound_comes_to_the_quantile(quantile: float) -> None:
    one, of_one = follow()(20.0, quantile)
    each, of_each = follow()({"a": 0.2, "b": 20.0}, quantile)
    for fractions in (of_one, of_each["a"], of_each["b"]):
        assert abs(np.mean(fractions[50:]) - (1 - quantile)) < 0.05
    # The leaf that is a hundred times as large has a bound a hundred times as large.
    assert each["b"] / each["a"] == pytest.approx(100, rel=0.05)
    assert one == pytest.approx(math.hypot(each["a"], each["b"]), rel=0.05)


# -- What is refused -----------------------------------------------------------------------------


FACTORY_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"loss_fn": 3}, "loss_fn must be a function, got 3"),
    ({"coefficient": "hard"}, "coefficient must be a function, got 'hard'"),
    ({"has_aux": 1}, "has_aux must be True or False, got 1"),
    ({"mean": None}, "mean must be True or False, got None"),
    ({"skip_nonfinite": "yes"}, "skip_nonfinite must be True or False, got 'yes'"),
    *[
        ({"microbatch_size": bad}, rf"microbatch_size must be an integer >= 1, got {bad}")
        for bad in (0, -2, 1.5, True)
    ],
    *[
        ({"max_norm": bad}, f"max_norm must be a number .*, got {bad}")
        for bad in (True, -1.0, math.nan, None)
    ],
    ({"max_norm": "1"}, "max_norm must be a number .*, got '1'"),
    ({"max_norm": lambda count: 1.0}, "max_norm"),
    ({"max_norm": jnp.ones(3)}, "max_norm"),
    ({"max_norm": jnp.asarray(-1.0)}, "max_norm"),
    ({"max_norm": {"w": -1.0}}, r"max_norm\['w'\] must be a number .*, got -1.0"),
    *[
        ({name: bad}, f"{name} must be a position >= 0 or several different ones, got")
        for name in ("argnums", "batch_argnums")
        for bad in (-1, 1.5, True, "0", (), (2, 2), None, (0, "1"))
    ],
    ({"argnums": (0, 1)}, r"argnums and batch_argnums must differ, and both have \[1\]"),
]


@pytest.mark.parametrize(("bad", "message"), FACTORY_ERRORS)
def test_every_bad_argument(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.clipped_grad(**({"loss_fn": total, "max_norm": 1.0} | bad))
    if set(bad) <= {"loss_fn", "argnums", "batch_argnums", "has_aux"}:
        with pytest.raises(ValueError, match=message):
            clipax.per_example_norms(**({"loss_fn": total} | bad))


def test_every_bad_argument_of_the_others() -> None:
    with pytest.raises(ValueError, match="per_leaf must be True or False, got 1"):
        clipax.per_example_norms(total, per_leaf=1)  # type: ignore[arg-type]
    info = clipax.clipped_grad(total, 1.0)(jnp.zeros(2), PAIRS)[1]
    for bad in (0.0, 1.0, -0.5, math.nan, True, None):
        with pytest.raises(ValueError, match="quantile must be a number in"):
            clipax.track_quantile(1.0, info, quantile=bad)  # type: ignore[arg-type]
    for bad in (0.0, -1.0, math.nan, "fast"):
        with pytest.raises(ValueError, match="learning_rate must be a number > 0"):
            clipax.track_quantile(1.0, info, learning_rate=bad)  # type: ignore[arg-type]
    for bad in (-1.0, math.nan, None, {"w": 1.0}):
        with pytest.raises(ValueError, match="max_norm"):
            clipax.track_quantile(bad, info)


CALL_ERRORS: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "no second argument": ({}, (jnp.zeros(2),), "batch_argnums has 1, and there are 1 arguments"),
    "no third": ({"argnums": 2}, (jnp.zeros(2), PAIRS), "argnums has 2, and there are 2"),
    "integers": (
        {},
        ({"a": {"n": jnp.arange(2)}}, PAIRS),
        r"parameter .*n.* must be an array of floats, got int32",
    ),
    "one integer leaf": (
        {},
        (jnp.arange(2), PAIRS),
        "itself must be an array of floats, got int32",
    ),
    "booleans": ({}, (jnp.ones(2, bool), PAIRS), "array of floats, got bool"),
    "float0": ({}, (np.zeros(2, jax.dtypes.float0), PAIRS), "array of floats, got"),
    "a key": ({}, ({"key": jax.random.key(0)}, PAIRS), "parameter .*key.* must be an array"),
    "a Python number": ({}, (1.0, PAIRS), "array of floats, got float"),
    "a string": ({}, ({"name": "w"}, PAIRS), "parameter .*name.* must be an array of floats"),
    "no parameters": ({}, ({}, PAIRS), "parameters"),
    "None alone": ({}, (None, PAIRS), "parameters"),
    "a loss for each": ({"loss_fn": lambda w, x: w * x}, (jnp.zeros(2), PAIRS), r"float32\[2\]"),
    "an integer loss": (
        {"loss_fn": lambda w, x: jnp.sum(w * x).astype(jnp.int32)},
        (jnp.zeros(2), PAIRS),
        r"loss_fn must return one real number for one example, got int32\[\]",
    ),
    "a complex loss": (
        {"loss_fn": lambda w, x: lax.complex(total(w, x), 0.0)},
        (jnp.zeros(2), PAIRS),
        r"loss_fn must return one real number for one example, got complex64\[\]",
    ),
    "a loss that is None": ({"loss_fn": lambda w, x: None}, (jnp.zeros(2), PAIRS), "loss_fn must"),
    "a pair": ({"loss_fn": lambda w, x: (total(w, x), 1)}, (jnp.zeros(2), PAIRS), "has_aux"),
    "no pair": ({"has_aux": True}, (jnp.zeros(2), PAIRS), "With has_aux, loss_fn must return a"),
    "a scalar in the batch": (
        {},
        (jnp.zeros(2), {"x": PAIRS, "size": 2.0}),
        r"argument 1\['size'\] has no axis of examples: its shape is \(\)",
    ),
    "other leading axes": (
        {},
        (jnp.zeros(2), {"x": PAIRS, "y": jnp.ones((3, 2))}),
        r"one leading axis .* 2 in argument 1\['x'\], 3 in argument 1\['y'\]",
    ),
    "no examples": ({}, (jnp.zeros(2), jnp.ones((0, 2))), "at least one example, got 0 in"),
    "an empty batch": ({}, (jnp.zeros(2), {}), "at least one example, got no array"),
}


@pytest.mark.parametrize("name", CALL_ERRORS)
def test_every_bad_call(name: str) -> None:
    options, args, message = CALL_ERRORS[name]
    options = {"loss_fn": total} | options
    loss_fn = options.pop("loss_fn")
    with pytest.raises(ValueError, match=message):
        clipax.clipped_grad(loss_fn, 1.0, **options)(*args)
    with pytest.raises(ValueError, match=message):
        clipax.per_example_norms(loss_fn, **options)(*args)
    with pytest.raises(ValueError, match=message):
        clipax.explain_clipped_grad(loss_fn, *args, **options)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (jnp.ones(3, bool), r"bool\[3\]"),
        (jnp.ones((2, 1), bool), r"bool\[2, 1\]"),
        (True, r"bool\[\]"),
        (np.ones(2, np.float32), r"float32\[2\]"),
        (jnp.ones(2, jnp.int32), r"int32\[2\]"),
    ],
)
def test_every_bad_mask(mask: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"mask must be 2 booleans, .* got {found}"):
        clipax.clipped_grad(total, 1.0)(jnp.zeros(2), PAIRS, mask=mask)


@pytest.mark.parametrize(
    "bad", [-1.0, True, math.nan, "1", {"v": 1.0}, jnp.ones(2), lambda count: 1.0]
)
def test_every_bad_bound_at_the_call(bad: Any) -> None:
    params, batch = {"w": jnp.zeros(2)}, PAIRS
    grad_fn = clipax.clipped_grad(lambda params, x: total(params["w"], x), 1.0)
    with pytest.raises(ValueError, match="max_norm"):
        grad_fn(params, batch, max_norm=bad)


def test_bounds_that_do_not_fit() -> None:
    grad_fn = clipax.clipped_grad(lambda params, x: total(params["w"], x), {"v": 1.0})
    with pytest.raises(ValueError, match="max_norm"):
        grad_fn({"w": jnp.zeros(2)}, PAIRS)


# -- Under jit, on devices -----------------------------------------------------------------------


def test_trains_in_place() -> None:
    grad_fn = clipax.clipped_grad(total, 1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(w: jax.Array, batch: jax.Array) -> Any:
        grads, info = grad_fn(w, batch)
        return w - grads, info.losses

    w = jnp.ones(2)
    w, losses = step(w, PAIRS)
    assert losses.tolist() == [7.0, 0.5]
    w, losses = step(w, PAIRS)
    zoo.assert_near(losses, np.array([3 * 0.7 + 4 * 0.35, 0.5 * 0.35]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_gives_the_same(kind: AxisType) -> None:
    loss_fn, params, batch = every_way()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    grad_fn = trees.quick_jit(clipax.clipped_grad(loss_fn, 0.1))
    grads, info = grad_fn(params, batch)
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.device_put(params, whole), jax.device_put(batch, by_example)
    compiled = grad_fn.lower(*args).compile()
    sharded, of_sharded = compiled(*args)
    zoo.assert_near(sharded, grads)
    zoo.assert_near(of_sharded._replace(is_counted=None), info._replace(is_counted=None))
    # The examples stay where they are, but for a rare branch.
    assert of_sharded.norms.sharding.is_equivalent_to(by_example, 1)
    kinds = [operation.kind for operation in hlo.computations(compiled.as_text())["ENTRY"]]
    assert "all-reduce" in kinds
    assert not [kind for kind in kinds if kind.startswith("all-gather")]


@pytest.mark.slow
@pytest.mark.parametrize("is_eager", [True, False])
def test_explicit_mesh_axes_shard_examples_and_parameters(
    is_eager: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def loss_fn(params: Any, example: Any, key: jax.Array, scale: float) -> Any:
        hidden = jnp.tanh(example @ params["in"]) + 0.1 * jax.random.normal(key, (16,))
        return scale * jnp.mean(jnp.square(hidden @ params["out"])), hidden

    source = zoo.Source(7)
    params = {"in": source.weight(8, 16), "out": source.weight(16, 4)}
    args = (params, source.weight(16, 8), jax.random.split(jax.random.key(0), 16), 2.0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    places = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model")}
    laid = jax.tree.map(lambda leaf, spec: put(mesh, leaf, spec), params, places)
    rows = PartitionSpec("data")
    of_mesh = (laid, put(mesh, args[1], rows), put(mesh, args[2], rows), 2.0)
    bounds = {"in": 0.1, "out": 0.05}
    options: Any = {"batch_argnums": (1, 2), "has_aux": True}
    for more in ({}, {"microbatch_size": 4}):
        grad_fn = clipax.clipped_grad(loss_fn, bounds, **options, **more)
        run = grad_fn if is_eager else jax.jit(grad_fn)
        grads, info = run(*args)
        sharded, of_sharded = run(*of_mesh)
        zoo.assert_near(sharded, grads)
        zoo.assert_near(of_sharded._replace(is_counted=None), info._replace(is_counted=None))
        assert all(lie_alike(sharded[name], laid[name]) for name in laid)
        assert lie_alike(of_sharded.norms["in"], of_mesh[2])
        assert lie_alike(of_sharded.aux, of_mesh[1])
    clipax.explain_clipped_grad(loss_fn, *args, **options)
    clipax.explain_clipped_grad(loss_fn, *of_mesh, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    norm_fn = clipax.per_example_norms(loss_fn, **options)
    norms = (norm_fn if is_eager else jax.jit(norm_fn))(*of_mesh)
    zoo.assert_near(norms, norm_fn(*args))
    assert lie_alike(norms, of_mesh[2])


def lie_alike(one: jax.Array, other: jax.Array) -> bool:
    return one.sharding.is_equivalent_to(other.sharding, one.ndim)


def put(mesh: Any, value: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.device_put(value, NamedSharding(mesh, spec))


def test_memory_is_that_of_one_gradient() -> None:
    sizes, examples = (256, 512, 512, 10), 64

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        for kernel, bias in params:
            x = jnp.tanh(x @ kernel + bias)
        return zoo.cross_entropy(x, label)

    def plain_way(params: Any, batch: Any) -> Any:
        each = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        norms = jax.vmap(clipax.global_norm)(each)
        weights = clipax.coefficients.hard(norms, jnp.ones_like(norms)) / examples
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), each)

    def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    layers = itertools.pairwise(sizes)
    args = (
        [(shaped(rows, columns), shaped(columns)) for rows, columns in layers],
        (shaped(examples, sizes[0]), shaped(examples, dtype=jnp.int32)),
    )

    def memory(function: Any) -> int:
        compiled = jax.jit(function).lower(*args).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    assert memory(clipax.clipped_grad(loss_fn, 1.0)) < memory(plain_way) / 20


# -- Explained -----------------------------------------------------------------------------------


def test_explains_each_leaf_from_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    loss_fn, params, batch = every_way()
    clipax.explain_clipped_grad(loss_fn, params, batch)
    text = capsys.readouterr().out
    clipax.explain_clipped_grad(loss_fn, *jax.eval_shape(lambda *args: args, params, batch))
    assert capsys.readouterr().out == text
    head, *lines = text.splitlines()
    assert head.split()[:2] == ["leaf", "shape"]
    wanted = {
        "each": zoo.EACH,
        "gram": zoo.GRAM,
        "outer": zoo.OUTER,
        "table": zoo.GRAM,
        "unused": zoo.ZERO,
    }
    assert [line.split()[0] for line in lines] == list(wanted)
    for line, (name, way) in zip(lines, wanted.items(), strict=True):
        assert f"{params[name].shape} " in line
        assert f" {way} " in line
        assert line.endswith("%")
