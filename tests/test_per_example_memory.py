"""Factors can be made twice, so that clipping takes the memory of a gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from per_example_cases import EXAMPLES, PAIRS, every_way, total

import clipax
from clipax._core import _compat

WIDTH, LAYERS = 16, 3
source = zoo.Source(11)
PARAMS = {
    "w": source.stacked(LAYERS, WIDTH, WIDTH),
    "b": source.weight(LAYERS, WIDTH),
    "out": source.weight(WIDTH, 4),
}
BATCH = jnp.concatenate([source.batch(2, WIDTH), source.batch(2, WIDTH)])[:EXAMPLES]


@jax.checkpoint
def layer(x: jax.Array, weights: Any) -> jax.Array:
    return jnp.tanh(x @ weights["w"] + weights["b"][None])


def scanned(params: Any, x: jax.Array) -> jax.Array:
    """The loss of layers that are scanned and rematerialized."""
    layers = {name: params[name] for name in "wb"}
    x = lax.scan(lambda x, weights: (layer(x, weights), None), x, layers)[0]
    return zoo.mean_square(x @ params["out"])


def unrolled(params: Any, x: jax.Array) -> jax.Array:
    for index in range(len(params["w"])):
        x = layer(x, {name: params[name][index] for name in "wb"})
    return zoo.mean_square(x @ params["out"])


def clip(memory: Any, loss_fn: Any = scanned, bound: Any = 0.1, **options: Any) -> Any:
    return trees.quick_jit(clipax.clipped_grad(loss_fn, bound, memory=memory, **options))


def assert_same(found: Any, wanted: Any) -> None:
    (grads, info), (wanted_grads, of_wanted) = found, wanted
    zoo.assert_near(grads, wanted_grads)
    assert info.is_counted.tolist() == of_wanted.is_counted.tolist()
    zoo.assert_near(info.coefficients, of_wanted.coefficients)
    zoo.assert_near(info.clip_fraction, of_wanted.clip_fraction)
    is_finite = np.isfinite(of_wanted.losses)
    zoo.assert_near(info.losses[is_finite], of_wanted.losses[is_finite])
    trees.assert_same_type(info, of_wanted)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (unrolled, {}),
        (scanned, {"microbatch_size": 2, "mean": False}),
        (scanned, {"bound": dict.fromkeys(PARAMS, 0.05)}),
    ],
)
def test_factors_made_twice_give_the_same(loss_fn: Any, options: Any) -> None:
    found, wanted = (
        clip(memory, loss_fn, **options)(PARAMS, BATCH) for memory in ("twice", "kept")
    )
    zoo.assert_near(found[1].norms, wanted[1].norms)
    assert_same(found, wanted)


@pytest.mark.slow
def test_one_example_can_be_clipped_by_factors_made_twice() -> None:
    assert_same(clip("twice")(PARAMS, BATCH[:1]), clip("kept")(PARAMS, BATCH[:1]))


@pytest.mark.slow
def test_examples_left_out_do_not_reach_the_second_pass() -> None:
    batch = BATCH.at[3].set(jnp.nan).at[5].set(jnp.inf)
    mask = np.arange(EXAMPLES) != 1
    twice, kept = (clip(memory, skip_nonfinite=True) for memory in ("twice", "kept"))
    for given in (mask, np.zeros(EXAMPLES, bool)):
        assert_same(twice(PARAMS, batch, mask=given), kept(PARAMS, batch, mask=given))
    grads, _ = clip("twice")(PARAMS, batch)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_an_ensemble_can_be_trained_by_factors_made_twice() -> None:
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), PARAMS)

    def train(memory: Any) -> Any:
        grad_fn = clipax.clipped_grad(scanned, 0.1, memory=memory)

        def step(params: Any, batch: jax.Array) -> Any:
            grads, info = grad_fn(params, batch)
            return jax.tree.map(lambda leaf, grad: leaf - grad, params, grads), info.norms

        run = jax.vmap(lambda params: lax.scan(step, params, jnp.stack([BATCH, BATCH[::-1]])))
        return trees.quick_jit(run)(params)

    zoo.assert_near(train("twice"), train("kept"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_factors_of_a_sharded_batch_can_be_made_twice(kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    laid = (
        jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(BATCH, by_example),
    )
    found = clip("twice")(*laid)
    assert found[1].norms.sharding.is_equivalent_to(by_example, 1)
    zoo.assert_near(found[0], clip("kept")(PARAMS, BATCH)[0])


@pytest.mark.slow
def test_factors_of_a_sharded_parameter_can_be_made_twice() -> None:
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(x, lax.axis_index("model") * 4, 4, 1)
        return zoo.mean_square(jnp.tanh(lax.psum(part @ w, "model")))

    def run(memory: Any) -> Any:
        def step(w: jax.Array, x: jax.Array) -> Any:
            grads, info = clipax.clipped_grad(loss_fn, 0.1, memory=memory)(w, x)
            return grads, info.norms

        rows = PartitionSpec("model")
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(rows, PartitionSpec()),
            out_specs=(rows, PartitionSpec()),
        )
        return trees.quick_jit(mapped)(PARAMS["w"][0], BATCH)

    zoo.assert_near(run("twice"), run("kept"))


@pytest.mark.slow
def test_each_device_can_make_the_factors_of_its_examples_twice() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def step(params: Any, batch: jax.Array) -> Any:
        params = jax.tree.map(lambda leaf: _compat.varying_over(leaf, ("data",)), params)
        grads, info = clipax.clipped_grad(scanned, 0.1, memory="twice", mean=False)(params, batch)
        return lax.psum(grads, "data"), info.norms

    specs = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
    grads, norms = trees.quick_jit(mapped)(PARAMS, BATCH)
    wanted, info = clip("kept", mean=False)(PARAMS, BATCH)
    zoo.assert_near((grads, norms), (wanted, info.norms))


@pytest.mark.slow
@pytest.mark.parametrize("is_scanned", [False, True])
def test_norms_of_products_that_cancel_are_measured_again(is_scanned: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 1, 64))
    batch = jnp.asarray(np.concatenate([x, x * (1 + 1e-4 * rng.normal(size=x.shape))], 1), "f4")
    w = jnp.asarray(rng.normal(size=(2, 64, 32)), jnp.float32)

    def difference(w: jax.Array, x: jax.Array) -> jax.Array:
        above, below = jnp.tanh(1e-3 * (x @ w))
        return jnp.sum(above) - jnp.sum(below)

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        if is_scanned:
            return jnp.sum(lax.scan(lambda none, w: (none, difference(w, x)), None, w)[1])
        return difference(w[0], x)

    norms = oracle.norms(oracle.gradients(loss_fn, w, batch))
    found = trees.quick_jit(clipax.per_example_norms(loss_fn, memory="twice"))(w, batch)
    zoo.assert_near(found, norms, tolerance=1e-4)


def test_small_coefficients_do_not_leave_the_range_of_float16() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        y = (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32)
        return 2.0**14 * zoo.mean_square(y)

    w, batch = PARAMS["w"][0], 0.1 * BATCH
    each = oracle.gradients(loss_fn, w, batch)
    norms = oracle.norms(each)
    grads, _ = clip("twice", loss_fn, 1e-3 * float(norms.min()), mean=False)(w, batch)
    wanted = oracle.weighted_sum(each, 1e-3 * norms.min() / norms)
    zoo.assert_near(grads, wanted, tolerance=0.003)


# -- The memory, with the choice -----------------------------------------------------------------


def temp_bytes(function: Any, *args: Any) -> int:
    compiled = jax.jit(function).lower(*args).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("is_scanned", [True, False])
def test_the_memory_is_that_of_the_gradient_of_the_batch(is_scanned: bool) -> None:
    layers, width, length, examples = 6, 256, 128, 8

    @jax.checkpoint
    def block(x: jax.Array, weights: Any) -> jax.Array:
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"]

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        if is_scanned:
            return zoo.mean_square(lax.scan(lambda x, w: (block(x, w), None), x, params)[0])
        for weights in params:
            x = block(x, weights)
        return zoo.mean_square(x)

    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda params: jax.vmap(loss_fn, (None, 0))(params, batch).mean())(params)

    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def stack(*lead: int) -> Any:
        return {"up": shaped(*lead, width, 4 * width), "down": shaped(*lead, 4 * width, width)}

    params = stack(layers) if is_scanned else [stack() for _ in range(layers)]
    args = params, shaped(examples, length, width)
    wanted = temp_bytes(plain, *args)
    found = {
        memory: temp_bytes(clipax.clipped_grad(loss_fn, 1.0, memory=memory), *args)
        for memory in ("auto", "twice", "kept")
    }
    assert found["auto"] == found["twice"] < 1.5 * wanted
    assert found["twice"] < found["kept"]
    norm_fn = clipax.per_example_norms(loss_fn, memory="twice")
    assert temp_bytes(norm_fn, *args) < 1.5 * wanted
    if is_scanned:
        assert found["kept"] > 2 * wanted


def takes_twice(capsys: pytest.CaptureFixture[str], loss_fn: Any, *args: Any) -> bool:
    clipax.explain_clipped_grad(loss_fn, *args)
    shares = {line.split()[-1] for line in zoo.lines_of_leaves(capsys.readouterr().out)}
    return shares == {"0%"}


def test_rematerialized_factors_are_made_twice(capsys: pytest.CaptureFixture[str]) -> None:
    long = jnp.zeros((EXAMPLES, 32, WIDTH))
    assert takes_twice(capsys, scanned, PARAMS, long)
    # They are kept if they are smaller than the parameters.
    assert not takes_twice(capsys, scanned, PARAMS, long[:1, :1])
    # They are kept if nothing is rematerialized.
    loss_fn, params, batch = every_way()
    assert not takes_twice(capsys, loss_fn, params, batch)

    @jax.custom_vjp
    def clipping(x: jax.Array) -> jax.Array:
        return x

    clipping.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -1e-3, 1e-3),))

    def with_rule(params: Any, x: jax.Array) -> jax.Array:
        return scanned(params, clipping(x @ params["w"][0]))

    assert not takes_twice(capsys, with_rule, PARAMS, long)
    found = clip("auto", with_rule)(PARAMS, BATCH)
    assert_same(found, clip("kept", with_rule)(PARAMS, BATCH))
    message = "memory must be 'kept' or 'auto' here, because loss_fn has a jax.custom_vjp"
    with pytest.raises(ValueError, match=message):
        clip("twice", with_rule)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=message):
        clipax.explain_clipped_grad(with_rule, PARAMS, BATCH, memory="twice")
    # Norms alone need no second pass.
    twice, kept = (
        clipax.per_example_norms(with_rule, memory=memory)(PARAMS, BATCH)
        for memory in ("twice", "kept")
    )
    zoo.assert_near(twice, kept)


@pytest.mark.slow
def test_sums_wider_than_the_parameters_are_not_made_twice() -> None:
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (PARAMS, BATCH))
    message = "memory must be 'kept' or 'auto' here, because a second pass adds gradients in"
    for options in ({"mean": False}, {"normalize_by": 4.0}, {"dtype": jnp.float32}):
        with pytest.raises(ValueError, match=message):
            clip("twice", **options)(params, batch)
        found = clip("auto", **options)(params, batch)
        assert_same(found, clip("kept", **options)(params, batch))
        assert {leaf.dtype for leaf in jax.tree.leaves(found[0])} == {jnp.dtype(jnp.float32)}
    grads, _ = clip("twice")(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_several_bounds_keep_the_factors() -> None:
    bounds = dict.fromkeys(PARAMS, 0.1)
    args = PARAMS, jnp.zeros((EXAMPLES, 32, WIDTH))
    auto, kept = (
        temp_bytes(clipax.clipped_grad(scanned, bounds, memory=memory), *args)
        for memory in ("auto", "kept")
    )
    assert auto == kept


@pytest.mark.parametrize("memory", ["once", "", None, True, 2, ["twice"]])
def test_every_bad_memory_is_refused(memory: Any) -> None:
    message = "memory must be 'auto', 'kept' or 'twice', got "
    with pytest.raises(ValueError, match=message):
        clipax.clipped_grad(total, 1.0, memory=memory)
    with pytest.raises(ValueError, match=message):
        clipax.per_example_norms(total, memory=memory)
    with pytest.raises(ValueError, match=message):
        clipax.explain_clipped_grad(total, jnp.zeros(2), PAIRS, memory=memory)
