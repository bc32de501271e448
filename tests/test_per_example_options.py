"""Each option of `clipped_grad` and `per_example_norms`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from per_example_cases import EXAMPLES, PAIRS, clip, every_way, total, with_example

import clipax


def test_a_part_of_the_parameters_can_have_its_own_bound() -> None:
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


def test_several_arguments_can_have_parameters_or_examples() -> None:
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
    each = oracle.gradients(loss_fn, *args, **options)
    norms = oracle.norms(each)
    weights = np.minimum(1, 0.01 / norms) / zoo.EXAMPLES
    zoo.assert_near(info.norms, norms)
    zoo.assert_near(grads, oracle.weighted_sum(each, weights))
    trees.assert_same_type(grads, (args[4], args[1]))
    norm_fn = clipax.per_example_norms(loss_fn, per_leaf=True, **options)
    bias, weight = trees.quick_jit(norm_fn)(*args)
    zoo.assert_near(jnp.hypot(bias, weight["w"]), norms)


@pytest.mark.parametrize("argnums", [1, np.int64(1), [1]])
def test_positions_can_be_any_integers(argnums: Any) -> None:
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


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_each_example_can_have_its_own_key(make: Any) -> None:
    source = zoo.Source(2)

    def loss_fn(w: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        is_kept = jax.random.bernoulli(key, 0.5, x.shape)
        return zoo.mean_square(jnp.where(is_kept, 2 * x, 0.0) @ w)

    args = (source.weight(12, 6), source.batch(12), jax.random.split(make(0), zoo.EXAMPLES))
    each = oracle.gradients(loss_fn, *args, batch_argnums=(1, 2))
    grad_fn = clipax.clipped_grad(loss_fn, 0.1, batch_argnums=(1, 2), mean=False)
    grads, info = trees.quick_jit(grad_fn)(*args)
    norms = oracle.norms(each)
    zoo.assert_near(info.norms, norms)
    zoo.assert_near(grads, oracle.weighted_sum(each, np.minimum(1, 0.1 / norms)))
    # One key for all of them is an argument like another.
    norm_fn = clipax.per_example_norms(loss_fn)
    norms = oracle.norms(oracle.gradients(loss_fn, *args[:2], args[2][0]))
    zoo.assert_near(norm_fn(*args[:2], args[2][0]), norms)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(("size", "mean"), [(1, True), (2, False), (EXAMPLES, True)])
def test_microbatches_give_the_same_result(size: int, mean: bool) -> None:
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


def test_microbatches_keep_aux_and_the_bound_of_the_call() -> None:
    grad_fn = clipax.clipped_grad(
        lambda w, x: (total(w, x), 2 * x), 9.0, has_aux=True, microbatch_size=1
    )
    grads, info = grad_fn(jnp.zeros(2), PAIRS, max_norm=1.0)
    zoo.assert_near(grads, np.array([0.3, 0.65]))
    assert info.aux.tolist() == (2 * PAIRS).tolist()
    assert info.max_norm == 1


def test_microbatches_can_have_leaves_without_entries() -> None:
    batch = {"x": PAIRS, "empty": jnp.zeros((2, 0))}
    grad_fn = clipax.clipped_grad(lambda w, e: total(w, e["x"]), 1.0, microbatch_size=1)
    zoo.assert_near(grad_fn(jnp.zeros(2), batch)[0], np.array([0.3, 0.65]))


def test_microbatches_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match=r"microbatch_size must divide the 2 examples, got 3"):
        clipax.clipped_grad(total, 1.0, microbatch_size=3)(jnp.zeros(2), PAIRS)
