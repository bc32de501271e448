"""Examples in mapped programs are clipped as on one device, or refused with advice."""

import functools
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
from per_example_cases import total

import clipax
from clipax._core import _compat

DEVICES, EXAMPLES = 4, 8
P = PartitionSpec
TYPED, UNTYPED = "shard_map", ["shard_map(check_vma=False)", "pmap", "vmap"]
in_every_mapping = pytest.mark.parametrize("kind", [TYPED, *UNTYPED])


def mesh_of(*sizes: int) -> Any:
    axes = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes))


def varying(tree: Any, *axes: str) -> Any:
    """As `docs/per-example.md` advises."""
    return jax.tree.map(lambda leaf: _compat.varying_over(leaf, axes), tree)


def on_devices(kind: str, step: Callable[..., Any], whole: Any, *split: Any) -> Any:
    """Calls `step(whole, *split)` on devices that have all of one and a part of the others.

    What comes out is stacked, one for each device.
    """

    def stacking(*args: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], step(*args))

    def typed(whole: Any, *split: Any) -> Any:
        return varying(stacking(varying(whole, "data"), *split), "data")

    if kind in ("pmap", "vmap"):
        parts = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), split)
        in_axes = (None, *[0] * len(split))
        if kind == "pmap":
            return jax.pmap(step, "data", in_axes=in_axes)(whole, *parts)
        return trees.quick_jit(jax.vmap(step, in_axes, axis_name="data"))(whole, *parts)
    mapped = jax.shard_map(
        typed if kind == TYPED else stacking,
        mesh=mesh_of(DEVICES),
        in_specs=(P(), *[P("data")] * len(split)),
        out_specs=P("data"),
        check_vma=kind == TYPED,
    )
    return trees.quick_jit(mapped)(whole, *split)


def joined(stacked: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked)


def summed(stacked: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sum(0), stacked)


Model = tuple[Callable[..., Any], Any, Any]


def small() -> Model:
    """Two leaves, one of which is measured from two factors."""
    source = zoo.Source(3)

    def loss_fn(params: Any, example: jax.Array) -> jax.Array:
        return zoo.mean_square(jnp.tanh(example @ params["gram"]) + params["each"][None])

    return loss_fn, {"gram": source.weight(8, 8), "each": source.weight(8)}, examples(2, 8)


def large() -> Model:
    """Leaves of every way to a norm."""
    source = zoo.Source(3)
    params = {
        "gram": source.weight(16, 16),
        "each": source.weight(16),
        "outer": source.weight(16, 4),
        "unused": source.weight(3),
    }

    def loss_fn(params: Any, example: jax.Array) -> jax.Array:
        hidden = jnp.tanh(example @ params["gram"] + params["each"][None])
        return zoo.mean_square(hidden.sum(0) @ params["outer"] + 0.1 * example[0, :4])

    return loss_fn, params, examples(2, 16)


def examples(*shape: int) -> jax.Array:
    """Of different sizes."""
    rng = np.random.default_rng(5)
    sizes = rng.lognormal(1.0, 1.0, (EXAMPLES, *[1] * len(shape)))
    return jnp.asarray(rng.normal(size=(EXAMPLES, *shape)) * sizes, jnp.float32)


of_every_size = pytest.mark.parametrize(
    "build", [small, pytest.param(large, marks=pytest.mark.slow)]
)


# In halves they have the norms (5, 0), (5, 12), (4, 3) and (0, 12), and other sums in quarters.
ZEROS = jnp.zeros(4)
VECTORS = jnp.array([[3.0, 4, 0, 0], [0, 5, 12, 0], [0, 4, 0, 3], [0, 0, 0, 12]] * 2)
NORMS = np.array([5.0, 13, 5, 12] * 2)
CLIPPED = np.einsum("b,bi->i", 1 / NORMS, VECTORS)


# -- The examples on several devices -------------------------------------------------------------


DATA_PARALLEL: dict[str, tuple[dict[str, Any], bool]] = {
    "one bound": ({}, False),
    "a bound for each leaf": ({}, True),
    "parts": ({"microbatch_size": 1}, False),
}


@pytest.mark.slow_but(2)
@in_every_mapping
@pytest.mark.parametrize("name", trees.mostly_slow(DATA_PARALLEL, ["one bound"]))
@of_every_size
def test_each_device_clips_its_own_examples(
    kind: str, name: str, build: Callable[[], Model]
) -> None:
    loss_fn, params, batch = build()
    options, is_tree = DATA_PARALLEL[name]
    bounds = {key: 0.02 * place for place, key in enumerate(params)} if is_tree else 0.1
    mask = np.arange(EXAMPLES) != 3
    batch = batch.at[5, 0, 0].set(np.nan)
    grad_fn = clipax.clipped_grad(loss_fn, 1.0, mean=False, skip_nonfinite=True, **options)

    def step(params: Any, batch: Any, mask: Any) -> Any:
        return grad_fn(params, batch, mask=mask, max_norm=bounds)

    wanted, of_wanted = trees.quick_jit(step)(params, batch, mask)
    grads, info = on_devices(kind, step, params, batch, mask)
    zoo.assert_near(summed(grads), wanted)
    is_finite = np.arange(EXAMPLES) != 5
    assert joined(info.is_counted).tolist() == (mask & is_finite).tolist()
    for field in ("losses", "norms", "coefficients"):
        found, known = joined(getattr(info, field)), getattr(of_wanted, field)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True):
            zoo.assert_near(one[is_finite], other[is_finite])


@pytest.mark.slow_but(2)
@in_every_mapping
def test_each_example_can_have_its_key_on_several_devices(kind: str) -> None:
    def loss_fn(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        noisy = x + (jax.random.key_data(key)[1] % 8).astype(x.dtype)
        return total(params["a"], noisy) + total(params["b"], x)

    params = {"a": ZEROS, "b": ZEROS}
    keys = jax.random.split(jax.random.key(0), EXAMPLES)
    grad_fn = clipax.clipped_grad(loss_fn, 1.0, mean=False, batch_argnums=(1, 2))
    wanted, of_wanted = grad_fn(params, VECTORS, keys)
    grads, info = on_devices(kind, grad_fn, params, VECTORS, keys)
    zoo.assert_near(summed(grads), wanted)
    zoo.assert_near(joined(info.norms), of_wanted.norms)


@pytest.mark.slow_but(4)
@in_every_mapping
@pytest.mark.parametrize("per_leaf", [False, True])
@of_every_size
def test_each_device_measures_its_own_examples(
    kind: str, per_leaf: bool, build: Callable[[], Model]
) -> None:
    loss_fn, params, batch = build()
    norm_fn = clipax.per_example_norms(loss_fn, per_leaf=per_leaf)
    found = on_devices(kind, norm_fn, params, batch)
    zoo.assert_near(joined(found), norm_fn(params, batch))


@in_every_mapping
def test_explain_works_in_a_mapped_program(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    loss_fn, params, batch = small()

    def step(params: Any, batch: Any) -> Any:
        clipax.explain_clipped_grad(loss_fn, params, batch)
        return jnp.zeros(())

    on_devices(kind, step, params, batch)
    text = capsys.readouterr().out
    clipax.explain_clipped_grad(loss_fn, params, batch)
    # The leaves are the same; a device has fewer examples.
    alone = zoo.lines_of_leaves(capsys.readouterr().out)
    assert zoo.lines_of_leaves(text) == alone


@pytest.mark.slow_but(4)
@in_every_mapping
@pytest.mark.parametrize("is_shared", [False, True])
@of_every_size
def test_each_device_can_have_a_model_of_its_own(
    kind: str, is_shared: bool, build: Callable[[], Model]
) -> None:
    """With examples of its own, or with those that all have."""
    loss_fn, params, batch = build()
    members = [jax.tree.map(lambda leaf, i=i: (1 + i) * leaf, params) for i in range(DEVICES)]
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *members)
    grad_fn = clipax.clipped_grad(loss_fn, 0.1)
    if is_shared:
        parts = [batch] * DEVICES
        grads, info = on_devices(
            kind, lambda batch, member: grad_fn(member, batch), batch, stacked
        )
    else:
        parts = list(batch.reshape(DEVICES, -1, *batch.shape[1:]))
        grads, info = on_devices(
            kind, lambda _, member, batch: grad_fn(member, batch), jnp.zeros(()), stacked, batch
        )
    run = trees.quick_jit(grad_fn)
    for place, (member, part) in enumerate(zip(members, parts, strict=True)):
        wanted, known = run(member, part)
        zoo.assert_near(jax.tree.map(lambda leaf, place=place: leaf[place], grads), wanted)
        zoo.assert_near(info.norms[place], known.norms)


def test_parameters_that_do_not_vary_as_the_examples_do_are_refused() -> None:
    loss_fn, params, batch = large()
    for name in params:

        def step(params: Any, batch: Any, name: str = name) -> Any:
            others = varying(params, "data")
            return clipax.per_example_norms(loss_fn)({**others, name: params[name]}, batch)

        mapped = jax.shard_map(
            step, mesh=mesh_of(DEVICES), in_specs=(P(), P("data")), out_specs=P("data")
        )
        with pytest.raises(ValueError, match=rf"the parameter {name} does not.*pcast"):
            jax.eval_shape(mapped, params, batch)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("other", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("size", [None, 1])
def test_other_mesh_axes_can_shard_the_model(other: AxisType, size: int | None) -> None:
    """One axis of examples is mapped, and one of the model is not: automatic or explicit."""
    loss_fn, params, batch = small()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(other, other))
    grad_fn = clipax.clipped_grad(loss_fn, 0.1, mean=False, microbatch_size=size)
    specs = {"gram": P(None, "model"), "each": P("model")}

    def step(params: Any, batch: Any) -> Any:
        grads, info = grad_fn(varying(params, "data"), batch)
        return jax.tree.map(lambda leaf: lax.psum(leaf, "data"), grads), info.norms

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P(), P("data")),
        axis_names={"data"},
    )
    laid = {
        key: jax.device_put(params[key], NamedSharding(mesh, spec)) for key, spec in specs.items()
    }
    rows = jax.device_put(batch, NamedSharding(mesh, P("data")))
    grads, norms = jax.jit(mapped)(laid, rows)
    wanted, info = trees.quick_jit(grad_fn)(params, batch)
    zoo.assert_near(grads, wanted)
    zoo.assert_near(norms, info.norms)


# -- A model in shards ---------------------------------------------------------------------------


SHARDS = {"rows": P("model", None), "columns": P(None, "model"), "bias": P("model"), "whole": P()}


def layers(params: Any, example: jax.Array, add: Callable[[Any], Any] = lambda x: x) -> Any:
    """Two layers whose hidden units may lie on several devices, that `add` adds up."""
    hidden = jnp.tanh(example @ params["columns"] + params["bias"][None])
    return zoo.mean_square(add(hidden @ params["rows"]) + params["whole"][None])


def model_of_layers() -> Any:
    source = zoo.Source(11)
    return {
        "columns": source.weight(8, 8),
        "bias": source.weight(8),
        "rows": source.weight(8, 4),
        "whole": source.weight(4),
    }


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    ("sizes", "options", "is_tree"),
    [
        ((1, 2), {}, False),
        ((2, 2), {}, True),
        ((2, 2), {"microbatch_size": 2}, False),
        pytest.param((2, 4), {"microbatch_size": 1}, True, marks=pytest.mark.slow),
    ],
)
def test_shards_of_a_model_make_one_norm(
    sizes: tuple[int, int], options: Any, is_tree: bool
) -> None:
    params, batch = model_of_layers(), examples(2, 8)
    bounds = {key: 0.01 * (1 + place) for place, key in enumerate(params)} if is_tree else 0.1
    mask = np.arange(EXAMPLES) != 3
    loss_fn = functools.partial(layers, add=lambda part: lax.psum(part, "model"))
    alone, together = (
        clipax.clipped_grad(each, bounds, mean=False, **options) for each in (layers, loss_fn)
    )

    def step(params: Any, batch: Any, mask: Any) -> Any:
        grads, info = together(varying(params, "data"), batch, mask=mask)
        norms = clipax.per_example_norms(loss_fn, per_leaf=True)(varying(params, "data"), batch)
        return jax.tree.map(lambda leaf: lax.psum(leaf, "data"), grads), info.norms, norms

    mapped = jax.shard_map(
        step,
        mesh=mesh_of(*sizes),
        in_specs=(SHARDS, P("data"), P("data")),
        # Where types say that it differs between the shards of a model, JAX refuses a norm.
        out_specs=(SHARDS, P("data"), P("data")),
    )
    grads, norms, of_leaves = trees.quick_jit(mapped)(params, batch, mask)
    wanted, info = trees.quick_jit(alone)(params, batch, mask=mask)
    zoo.assert_near(grads, wanted)
    zoo.assert_near(norms, info.norms)
    zoo.assert_near(of_leaves, clipax.per_example_norms(layers, per_leaf=True)(params, batch))


def shards_of_vectors(
    step: Callable[..., Any], of_examples: tuple[Any, ...] = (), **options: Any
) -> Any:
    """Calls `step(w, examples)` with a half of `w` on each of two devices."""
    mapped = jax.shard_map(
        step,
        mesh=jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,)),
        in_specs=(P("model"), P(*of_examples)),
        out_specs=(P("model"), P()),
        **options,
    )
    return trees.quick_jit(mapped)(ZEROS, VECTORS)


def own_half(example: jax.Array) -> jax.Array:
    return lax.dynamic_slice(example, (2 * lax.axis_index("model"),), (2,))


def in_halves(w: jax.Array, example: jax.Array) -> jax.Array:
    return total(w, own_half(example))


def in_shards(w: jax.Array, example: jax.Array) -> jax.Array:
    return lax.psum(in_halves(w, example), "model")


def clip_halves(loss_fn: Any, **at_call: Any) -> Callable[..., Any]:
    def step(w: Any, batch: Any) -> Any:
        grads, info = clipax.clipped_grad(loss_fn, 1.0, mean=False)(w, batch, **at_call)
        return grads, info.norms

    return step


def assert_clipped(found: tuple[Any, Any]) -> None:
    zoo.assert_near(found[0], CLIPPED)
    zoo.assert_near(found[1], NORMS)


def test_one_leaf_in_shards_makes_one_norm() -> None:
    assert_clipped(shards_of_vectors(clip_halves(in_shards)))


def test_parameters_can_be_gathered_over_devices_with_the_same_examples() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.pmean(total(lax.all_gather(w, "model", tiled=True), x), "model")

    assert_clipped(shards_of_vectors(clip_halves(loss_fn)))


@pytest.mark.parametrize("name", ["mask", "max_norm"])
def test_shards_of_one_gradient_must_have_one_weight(name: str) -> None:
    def step(w: Any, batch: Any, *, reduce: Callable[[Any], Any]) -> Any:
        place = lax.axis_index("model")
        bound = 0.5 + 0.5 * place.astype(jnp.float32)
        value = reduce({"mask": jnp.full(EXAMPLES, place), "max_norm": bound}[name])
        at_call = {name: value > 0 if name == "mask" else value}
        return clip_halves(in_shards, **at_call)(w, batch)

    with pytest.raises(ValueError, match=rf"{name} must be the same over the mesh axes.*pmax"):
        shards_of_vectors(functools.partial(step, reduce=lambda value: value))
    as_advised = functools.partial(step, reduce=lambda value: lax.pmax(value, "model"))
    assert_clipped(shards_of_vectors(as_advised))


# -- What mixes gradients, and what does not -----------------------------------------------------


PAIRS = [(place, (place + 1) % DEVICES) for place in range(DEVICES)]
CROSSING: dict[str, Callable[[jax.Array], jax.Array]] = {
    "psum": lambda w: lax.psum(w, "data"),
    "pmean": lambda w: lax.pmean(w, "data"),
    "pmax": lambda w: w * lax.pmax(lax.stop_gradient(w), "data"),
    "pmin": lambda w: w * lax.pmin(lax.stop_gradient(w), "data"),
    "all_gather": lambda w: lax.all_gather(w, "data"),
    "psum_scatter": lambda w: lax.psum_scatter(w, "data", tiled=True),
    "all_to_all": lambda w: lax.all_to_all(w, "data", 0, 0, tiled=True),
    "ppermute": lambda w: lax.ppermute(w, "data", PAIRS),
    "in jit": jax.jit(lambda w: lax.psum(w, "data")),
    "in checkpoint": jax.checkpoint(lambda w: lax.psum(jnp.sin(w), "data")),
    "in scan": lambda w: lax.scan(
        lambda c, _: (lax.ppermute(c, "data", PAIRS), None), w, length=2
    )[0],
    "in cond": lambda w: lax.cond(
        w.size > 2, lambda w: lax.ppermute(w, "data", PAIRS), lambda w: w, w
    ),
    "in vmap": jax.vmap(lambda w: lax.psum(w, "data")),
}


@pytest.mark.slow_but(26)
@in_every_mapping
@pytest.mark.parametrize("name", CROSSING)
def test_a_loss_that_mixes_examples_of_several_devices_is_refused(kind: str, name: str) -> None:
    def of_parameters(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(CROSSING[name](w)) + total(w, x)

    def of_examples(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(w) * jnp.sum(CROSSING[name](x))

    advice = "before and after this call, and not in loss_fn"
    for loss_fn in (of_parameters, of_examples):
        for make in (
            clipax.per_example_norms,
            functools.partial(clipax.clipped_grad, max_norm=1.0),
        ):
            with pytest.raises(ValueError, match=rf"over the mapped axis 'data'.*{advice}"):
                on_devices(kind, make(loss_fn), ZEROS, VECTORS)
    if kind in UNTYPED:
        # Where nothing says that the examples are the same, either.
        with pytest.raises(ValueError, match=r"no types say what is sharded.*check_vma=True"):
            on_devices(
                kind,
                lambda batch, w: clipax.per_example_norms(of_parameters)(w, batch),
                VECTORS,
                jnp.zeros(4 * DEVICES),
            )


@in_every_mapping
def test_communication_that_no_gradient_crosses_is_not_refused(kind: str) -> None:
    """Constants that are gathered, numbers of devices, and what is returned besides."""

    def loss_fn(w: jax.Array, x: jax.Array, frozen: jax.Array) -> Any:
        base = lax.all_gather(frozen, "data", tiled=True)
        factor = lax.psum(1, "data") / lax.axis_size("data")
        own = 0.0 * lax.axis_index("data").astype(jnp.float32)
        loss = factor * total(w, x) + total(base, x) + own
        return loss, lax.pmean(loss, "data")

    def step(w: Any, batch: Any, frozen: Any) -> Any:
        grads, info = clipax.clipped_grad(loss_fn, 1.0, mean=False, has_aux=True)(w, batch, frozen)
        return grads, info.norms, info.losses, info.aux

    frozen = jnp.arange(4.0)
    grads, norms, losses, aux = on_devices(kind, step, ZEROS, VECTORS, frozen)
    assert_clipped((summed(grads), joined(norms)))
    zoo.assert_near(joined(losses), VECTORS @ frozen)
    zoo.assert_near(aux, jnp.broadcast_to(losses.mean(0), aux.shape))


# -- What is advised -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TYPED, "shard_map(check_vma=False)", "vmap"])
def test_sharded_parameters_can_be_gathered_before_the_call(kind: str) -> None:
    def as_advised(_: Any, w: jax.Array, batch: Any) -> Any:
        gathered = lax.all_gather(w, "data", tiled=True)
        grads, info = clipax.clipped_grad(total, 1.0, mean=False)(gathered, batch)
        return lax.psum_scatter(grads, "data", tiled=True), info.norms

    grads, norms = on_devices(kind, as_advised, ZEROS, ZEROS, VECTORS)
    assert_clipped((joined(grads), joined(norms)))


@in_every_mapping
def test_a_mean_over_devices_can_be_taken_after_the_call(kind: str) -> None:
    def as_advised(w: jax.Array, batch: Any) -> Any:
        grads, info = clipax.clipped_grad(total, 1.0, mean=False)(w, batch)
        number = lax.psum(jnp.sum(info.is_counted).astype(jnp.float32), "data")
        return lax.psum(grads, "data") / number, info.norms

    grads, norms = on_devices(kind, as_advised, ZEROS, VECTORS)
    assert_clipped((EXAMPLES * grads[0], joined(norms)))


def test_sharded_examples_can_be_sliced_in_the_loss() -> None:
    with pytest.raises(ValueError, match=r"examples vary.*slice them in loss_fn.*axis_index"):
        shards_of_vectors(
            clip_halves(lambda w, x: lax.psum(total(w, x), "model")), (None, "model")
        )
    assert_clipped(shards_of_vectors(clip_halves(in_shards)))


@pytest.mark.parametrize("is_gathered", [False, True])
def test_a_loss_that_differs_between_shards_is_refused(is_gathered: bool) -> None:
    """In parts, or `n` times the same: JAX differentiates the sum over devices."""

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        w, b = params
        if is_gathered:
            w = lax.all_gather(w, "model", tiled=True)
            return total(w, x) + 0.5 * (total(b, x[:2]) + total(b, x[2:]))
        return total(w + b, own_half(x))

    def step(loss_fn: Any, w: Any, batch: Any) -> Any:
        # A leaf in shards, and one that all have.
        params = (w, jnp.zeros(2))
        norms = clipax.per_example_norms(loss_fn, per_leaf=True)(params, batch)
        return w, norms

    with pytest.raises(ValueError, match=r"psum\(loss, 'model'\).*pmean\(loss, 'model'\)"):
        shards_of_vectors(functools.partial(step, loss_fn))
    reduce = lax.pmean if is_gathered else lax.psum

    def as_advised(params: Any, x: jax.Array) -> jax.Array:
        return reduce(loss_fn(params, x), "model")

    _, (of_shards, of_whole) = shards_of_vectors(functools.partial(step, as_advised))
    halves = np.asarray(VECTORS[:, :2] + VECTORS[:, 2:])
    zoo.assert_near(of_shards, NORMS)
    zoo.assert_near(of_whole, (0.5 if is_gathered else 1.0) * np.linalg.norm(halves, axis=1))


def test_without_types_shards_are_refused_and_with_types_right() -> None:
    step = clip_halves(in_shards)
    with pytest.raises(ValueError, match=r"use jax.shard_map with check_vma=True"):
        shards_of_vectors(step, check_vma=False)
    assert_clipped(shards_of_vectors(step, check_vma=True))


@pytest.mark.parametrize("spec", [P("data"), P()])
@pytest.mark.parametrize("of_examples", [P("data"), P()])
def test_sharded_arrays_outside_mapped_programs_are_clipped(spec: P, of_examples: P) -> None:
    mesh = mesh_of(DEVICES)
    w = jax.device_put(ZEROS, NamedSharding(mesh, spec))
    batch = jax.device_put(VECTORS, NamedSharding(mesh, of_examples))
    grads, info = jax.jit(clipax.clipped_grad(total, 1.0, mean=False))(w, batch)
    assert_clipped((grads, info.norms))


def test_a_loss_can_be_mapped_itself() -> None:
    """Its own mapped axes are none of those round the call."""

    def mapped(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.shard_map(
            lambda w, x: lax.psum(total(w, x), "data"),
            mesh=mesh_of(DEVICES),
            in_specs=P("data"),
            out_specs=P(),
        )(w, x)

    def vmapped(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda w, x: lax.psum(w * x, "own"), axis_name="own")(w, x)[0]

    for loss_fn in (mapped, vmapped):
        grads, info = jax.jit(clipax.clipped_grad(loss_fn, 1.0, mean=False))(ZEROS, VECTORS)
        assert_clipped((grads, info.norms))
    # JAX itself has no sum over a name of `vmap` where types say what varies.
    for kind in UNTYPED:
        norms = on_devices(kind, clipax.per_example_norms(vmapped), ZEROS, VECTORS)
        zoo.assert_near(joined(norms), NORMS)
