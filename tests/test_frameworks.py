"""Every method on the parameters of frameworks: in boxes, modules, and classes that check."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import per_example_zoo as zoo
import pytest
import trees
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import clipax

METHODS = sorted(trees.public_factories())
methods = pytest.mark.parametrize("name", METHODS)
some_methods = pytest.mark.parametrize("name", trees.mostly_slow(METHODS))
SPEC = PartitionSpec(None, "model")


def plain() -> tuple[Any, list[Any]]:
    """Parameters and three steps of updates, in dicts."""
    rng = np.random.default_rng(3)

    def tree(size: float) -> Any:
        shapes = {"kernel": (4, 8), "bias": (8,)}
        return {
            layer: {
                key: jnp.asarray(size * rng.normal(size=shape), jnp.float32)
                for key, shape in shapes.items()
            }
            for layer in ("first", "second")
        }

    return tree(1.0), [tree(size) for size in (1.0, 30.0, 0.2)]


def run(method: Any, params: Any, sequence: list[Any], state: Any = None) -> tuple[Any, Any]:
    state = method.init(params) if state is None else state
    update = trees.quick_jit(method.update)
    for updates in sequence:
        clipped, state = update(updates, state, params)
    return clipped, state


@jax.tree_util.register_pytree_with_keys_class
class Field:
    """An array with names for its axes, which it looks at whenever it is made."""

    def __init__(self, data: Any, axes: tuple[str, ...]):
        shape = getattr(data, "shape", None)
        if shape is not None and len(shape) != len(axes):
            raise ValueError(f"{axes} do not name the axes of {shape}")
        self.data, self.axes = data, axes

    def tree_flatten_with_keys(self) -> Any:
        return ((jax.tree_util.FlattenedIndexKey(0), self.data),), self.axes

    @classmethod
    def tree_unflatten(cls, axes: Any, children: Any) -> "Field":
        if any(isinstance(child, float) for child in children):
            raise ValueError(f"{axes} name the axes of an array, got {children}")
        return cls(*children, axes)


def as_fields(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: Field(leaf, ("x", "y")[: leaf.ndim]), tree)


def as_boxes(tree: Any) -> Any:
    def box(leaf: Any) -> Any:
        return nn.Partitioned(leaf, (None, "model")) if leaf.ndim == 2 else leaf

    return jax.tree.map(box, tree)


class Module(eqx.Module):
    kernel: Any
    bias: Any


def as_modules(tree: Any) -> Any:
    return {layer: Module(**leaves) for layer, leaves in tree.items()}


CONTAINERS = {"fields": as_fields, "boxes": as_boxes, "modules": as_modules}


@pytest.mark.slow_but(8)
@some_methods
@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_contains_the_leaves_makes_no_difference(name: str, kind: str) -> None:
    contain, method = CONTAINERS[kind], trees.build(name)
    params, sequence = plain()
    expected, expected_state = run(method, params, sequence)
    clipped, state = run(method, contain(params), list(map(contain, sequence)))
    assert jax.tree.structure(clipped) == jax.tree.structure(contain(expected))
    trees.assert_close(jax.tree.leaves(clipped), jax.tree.leaves(contain(expected)))
    assert clipax.metrics(state, per_leaf=True).keys() == (
        clipax.metrics(expected_state, per_leaf=True).keys()
    )


@pytest.mark.slow_but(15)
@methods
def test_a_state_of_boxed_parameters_takes_bare_updates(name: str) -> None:
    """As under `nnx.Optimizer`, whose `init` sees variables and whose `update` does not."""
    method, (params, sequence) = trees.build(name), plain()
    state = method.init(as_boxes(params))
    unboxed = jax.tree.map(
        lambda node: node.value if isinstance(node, nn.Partitioned) else node,
        state,
        is_leaf=lambda node: isinstance(node, nn.Partitioned),
    )
    trees.assert_same_type(unboxed, method.init(params))
    clipped, _ = run(method, params, sequence, unboxed)
    trees.assert_close(clipped, run(method, params, sequence)[0])


@methods
def test_optax_tells_the_norms_of_a_state_from_its_parameters(name: str) -> None:
    params, _ = plain()
    state = trees.build(name).init(params)
    of_params: list[Any] = []
    optax.tree_map_params(trees.build(name), of_params.append, state)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert [leaf.shape for leaf in of_params] == shapes * (len(of_params) // len(shapes))
    moved = optax.tree_map_params(trees.build(name), lambda leaf: leaf + 1, state)
    trees.assert_same_type(moved, state)


@methods
def test_linen_shards_no_norm_as_its_parameter(name: str) -> None:
    params, _ = plain()
    state = trees.build(name).init(as_boxes(params))
    specs = nn.get_partition_spec(state)
    rows = zip(
        jax.tree.leaves(nn.unbox(state)),
        jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)),
        strict=True,
    )
    for leaf, spec in rows:
        assert len(spec) <= leaf.ndim
        assert (spec == SPEC) == (leaf.shape == (4, 8))


@functools.cache
def mesh() -> Any:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class Layer(nnx.Module):
    def __init__(self, leaves: Any):
        def partitioned(leaf: Any, *names: Any) -> Any:
            return nnx.Param(nnx.with_partitioning(lambda: leaf, names)())

        self.kernel = partitioned(leaves["kernel"], None, "model")
        self.bias = partitioned(leaves["bias"], "model")


class Model(nnx.Module):
    def __init__(self, leaves: Any):
        self.first, self.second = Layer(leaves["first"]), Layer(leaves["second"])


def unboxed(opt_state: Any) -> Any:
    if hasattr(nnx, "as_pure"):
        return nnx.as_pure(opt_state)

    def is_box(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    return jax.tree.map(
        lambda node: node.value if is_box(node) else node, opt_state, is_leaf=is_box
    )


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("name", trees.mostly_slow(METHODS, ("adagc", "clip_by_value")))
def test_nnx_optimizers_train_sharded_parameters(name: str) -> None:
    params, sequence = plain()
    optimizer = optax.chain(trees.build(name), optax.sgd(0.1))
    expected, state = params, optimizer.init(params)
    for updates in sequence:
        steps, state = optimizer.update(updates, state, expected)
        expected = optax.apply_updates(expected, steps)

    with (jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh)(mesh()):
        model = nnx.jit(lambda: Model(params))()
        trained = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, trained: Any, updates: Any) -> None:
            gradient = nnx.state(model, nnx.Param)
            nnx.replace_by_pure_dict(gradient, updates)
            trained.update(model, gradient)

        for updates in sequence:
            step(model, trained, updates)
        trees.assert_close(
            nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected, rtol=1e-5, atol=1e-6
        )
        values = clipax.metrics(unboxed(trained.opt_state), per_leaf=True)
        assert values.keys() == clipax.metrics(state, per_leaf=True).keys()


def test_a_rule_sees_one_path_at_init_at_update_and_in_the_log() -> None:
    params, sequence = plain()
    seen: dict[str, set[str]] = {}

    def rule_of(step: str) -> Any:
        def rule(path: str, leaf: Any) -> bool:
            seen.setdefault(step, set()).add(path)
            return path.endswith("kernel")

        return rule

    for kind, contain in {"dicts": lambda tree: tree, **CONTAINERS}.items():
        clip = clipax.clip_by_leaf_norm(0.1, mask=rule_of(f"{kind} at init"))
        state = clip.init(contain(params))
        clip = clipax.clip_by_leaf_norm(0.1, mask=rule_of(f"{kind} at update"))
        _, state = clip.update(contain(sequence[0]), state)
        keys = [key for key in clipax.metrics(state, per_leaf=True) if key.startswith("norm/")]
        assert set(keys) == {"norm/first/kernel", "norm/second/kernel"}
    paths = {f"{layer}/{key}" for layer in ("first", "second") for key in ("kernel", "bias")}
    assert all(found == paths for found in seen.values())
    assert len(seen) == 8


@pytest.mark.parametrize("kind", trees.mostly_slow(CONTAINERS, ("boxes",)))
def test_plain_dicts_are_prefixes_of_any_container(kind: str) -> None:
    params, sequence = plain()
    contain = CONTAINERS[kind]
    updates, bounds = sequence[1], {"first": 1.0, "second": {"kernel": 2.0, "bias": 3.0}}
    mask = {"first": True, "second": {"kernel": True, "bias": False}}
    for clip in (
        clipax.clip_by_leaf_norm(bounds, mask=mask),
        clipax.clip_by_unit_norm(bounds, mask=mask),
        clipax.adaptive_grad_clip(bounds, mask=mask),
        clipax.clip_by_value(bounds),
        clipax.smooth_clip_by_value(bounds),
        clipax.clip_by_spectral_norm(bounds, mask=mask),
    ):
        expected, _ = run(clip, params, [updates])
        clipped, _ = run(clip, contain(params), [contain(updates)])
        trees.assert_close(jax.tree.leaves(clipped), jax.tree.leaves(contain(expected)))


@pytest.mark.slow
def test_bounds_in_the_shape_of_a_model_that_can_be_called_are_no_schedule() -> None:
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    bounds = jax.tree.map(lambda _: 0.5, linear)
    updates = jax.tree.map(jnp.ones_like, linear)
    for build in (
        clipax.clip_by_leaf_norm,
        clipax.clip_by_unit_norm,
        clipax.clip_by_block_rms,
        clipax.clip_by_average_norm,
        clipax.clip_by_value,
        clipax.smooth_clip_by_value,
        clipax.clip_by_spectral_norm,
        clipax.adaptive_grad_clip,
        clipax.spam_clip,
        lambda bound: clipax.clip_by(clipax.leaf_norm, bound),
        lambda bound: clipax.zclip(max_norm=bound, norm=clipax.leaf_norm),
        lambda bound: clipax.autoclip(max_norm=bound, norm=clipax.leaf_norm),
        lambda bound: clipax.clip_by_quantile(max_norm=bound, norm=clipax.leaf_norm),
        lambda bound: clipax.clip_by_mean_std(max_norm=bound, norm=clipax.leaf_norm),
    ):
        for _ in range(2):
            trees.assert_close(
                run(build(bounds), updates, [updates] * 3),
                run(build(0.5), updates, [updates] * 3),
            )
    for one in (clipax.clip_by_global_norm, clipax.delta_gclip, clipax.smooth_clip_by_global_norm):
        with pytest.raises(ValueError, match="max_norm must be one number, array or schedule"):
            one(bounds)


def test_a_schedule_may_be_any_function() -> None:
    class Schedule:
        def __call__(self, count: Any) -> Any:
            return 1.0 + count

    class StaticSchedule(eqx.Module):
        start: float = eqx.field(static=True)

        def __call__(self, count: Any) -> Any:
            return self.start + count

    for schedule in (
        lambda count: 1.0 + count,
        Schedule(),
        StaticSchedule(1.0),
        jax.tree_util.Partial(lambda start, count: start + count, 1.0),
        functools.partial(lambda start, count: start + count, 1.0),
    ):
        _, state = run(clipax.clip_by_global_norm(schedule), jnp.ones(2), [jnp.ones(2)] * 3)
        assert float(state.max_norm) == 3.0


GLOBAL = {
    "clip_by_global_norm": clipax.clip_by_global_norm,
    "smooth_clip_by_global_norm": clipax.smooth_clip_by_global_norm,
    "delta_gclip": clipax.delta_gclip,
    "clip_by": functools.partial(clipax.clip_by, clipax.global_norm),
    "autoclip": lambda bound, **mask: clipax.autoclip(0.9, max_norm=bound, **mask),
    "zclip": lambda bound, **mask: clipax.zclip(max_norm=bound, **mask),
    "clip_by_quantile": lambda bound, **mask: clipax.clip_by_quantile(max_norm=bound, **mask),
    "clip_by_mean_std": lambda bound, **mask: clipax.clip_by_mean_std(max_norm=bound, **mask),
}


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("name", GLOBAL)
def test_masked_leaves_stay_out_of_the_global_norm_and_pass(name: str) -> None:
    params, sequence = plain()
    masks = (
        lambda path, leaf: path != "second/bias",
        {"first": True, "second": {"kernel": True, "bias": False}},
    )
    frozen = [jax.tree.map(jnp.asarray, updates) for updates in sequence]
    for updates in frozen:
        updates["second"] = {**updates["second"], "bias": None}
    expected, expected_state = run(GLOBAL[name](0.1), params, frozen)
    for mask in masks:
        clipped, state = run(GLOBAL[name](0.1, mask=mask), params, sequence)
        trees.assert_bitwise(clipped["second"].pop("bias"), sequence[-1]["second"]["bias"])
        del expected["second"]["bias"]
        trees.assert_close(clipped, expected)
        trees.assert_close(state, expected_state)
        expected["second"]["bias"] = None


@pytest.mark.parametrize("mask", [1, "kernel", {"first": 1.0, "second": True}, lambda *_: None])
def test_a_mask_that_is_no_boolean_is_refused(mask: Any) -> None:
    params, _ = plain()
    for build in GLOBAL.values():
        with pytest.raises(ValueError, match="mask must say True or False of each leaf"):
            build(0.1, mask=mask).init(params)


def test_rules_in_the_shape_of_a_model_are_read_leaf_by_leaf() -> None:
    model = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    updates = jax.tree.map(jnp.ones_like, model)

    def like_model(value: Any) -> Any:
        return jax.tree.map(lambda _: value, model)

    for rules in (
        {"stack_axis": like_model(None)},
        {"axes": like_model(None)},
        {"axis_name": like_model(())},
        {"mask": like_model(True)},
    ):
        clip = clipax.clip_by_leaf_norm(like_model(0.5), **rules)
        expected, _ = run(clipax.clip_by_leaf_norm(0.5), updates, [updates])
        trees.assert_close(run(clip, updates, [updates])[0], expected)


def test_bounds_of_examples_in_the_shape_of_a_model_are_tracked() -> None:
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    bounds = jax.tree.map(lambda _: 0.1, params)

    def loss_fn(params: Any, example: Any) -> Any:
        return jnp.sum(eqx.combine(params, static)(example))

    _, info = clipax.clipped_grad(loss_fn, bounds)(params, jnp.ones((4, 3)))
    moved = clipax.track_quantile(bounds, info)
    assert jax.tree.structure(moved) == jax.tree.structure(bounds)
    assert all(float(leaf) != 0.1 for leaf in jax.tree.leaves(moved))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_plain_dicts_are_bounds_of_examples_in_any_container(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params, sequence = plain()
    contain = CONTAINERS[kind]
    bounds = {"first": 1.0, "second": {"kernel": 2.0, "bias": 3.0}}

    def loss_fn(params: Any, example: Any) -> Any:
        return optax.tree.vdot(jax.tree.leaves(params), example)

    def batch_of(trees: list[Any]) -> Any:
        return [jnp.stack(leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]

    batch, contained = batch_of(sequence), batch_of(list(map(contain, sequence)))
    expected, info = clipax.clipped_grad(loss_fn, bounds)(params, batch)
    clipped, found = clipax.clipped_grad(loss_fn, bounds)(contain(params), contained)
    trees.assert_close(jax.tree.leaves(clipped), jax.tree.leaves(contain(expected)))
    trees.assert_close(found.norms, info.norms)
    norms = clipax.per_example_norms(loss_fn, per_leaf=True)(contain(params), contained)
    assert len(jax.tree.leaves(norms)) == len(batch)
    clipax.explain_clipped_grad(loss_fn, contain(params), contained)
    names = {line.split()[0] for line in zoo.lines_of_leaves(capsys.readouterr().out)}
    paths = {f"{layer}/{key}" for layer in ("first", "second") for key in ("kernel", "bias")}
    assert names == paths
