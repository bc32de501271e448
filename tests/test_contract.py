"""What every method keeps, found by its annotation and built from its parameters' names."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clipax

METHODS = sorted(trees.public_factories())
methods = pytest.mark.parametrize("name", METHODS)
some_methods = pytest.mark.parametrize("name", trees.mostly_slow(METHODS))


def run(method: Any, sequence: list[Any], params: Any) -> tuple[list[Any], Any]:
    state, outputs = method.init(params), []
    for updates in sequence:
        clipped, state = method.update(updates, state, params)
        outputs.append(clipped)
    return outputs, state


def with_entry(updates: Any, value: float) -> Any:
    return {
        **updates,
        "dense": {**updates["dense"], "bias": updates["dense"]["bias"].at[3].set(value)},
    }


def test_the_suite_finds_the_methods() -> None:
    assert {"clip_by_global_norm", "clip_by", "observe", "measure", "adaptive_grad_clip"} <= set(
        METHODS
    )


@pytest.mark.slow
@methods
def test_acts_on_the_trees_that_this_suite_uses(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    # A method that learns its bound has seen enough when the last step comes, a spike.
    sizes = jnp.ones(150).at[-1].set(1e3)

    def step(state: Any, size: Any) -> Any:
        scaled = jax.tree.map(lambda leaf: leaf * size, updates)
        clipped, state = method.update(scaled, state, params)
        differ = jax.tree.map(lambda one, other: jnp.any(one != other), clipped, scaled)
        return state, jnp.any(jnp.stack(jax.tree.leaves(differ)))

    _, changed = trees.quick_jit(lambda: jax.lax.scan(step, method.init(params), sizes))()
    assert bool(changed.any()) == (name != "measure")


@methods
def test_jit_equals_eager_and_traces_once(name: str) -> None:
    method, (params, _) = trees.build(name), trees.params_and_updates()
    traces = []

    @jax.jit
    def update(updates: Any, state: Any) -> Any:
        traces.append(name)
        return method.update(updates, state, params)

    state = jitted_state = method.init(params)
    for updates in trees.steps(3):
        clipped, state = method.update(updates, state, params)
        jitted, jitted_state = update(updates, jitted_state)
        trees.assert_close(jitted, clipped)
        trees.assert_close(jitted_state, state)
    assert len(traces) == 1


@methods
def test_state_is_a_fixed_point_of_scan(name: str) -> None:
    method, (params, _) = trees.build(name), trees.params_and_updates()
    sequence = trees.steps(4)
    outputs, state = run(method, sequence, params)
    trees.assert_same_type(method.init(params), state)

    def step(state: Any, updates: Any) -> Any:
        clipped, state = method.update(updates, state, params)
        return state, clipped

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sequence)
    scanned_state, scanned = jax.lax.scan(step, method.init(params), stacked)
    trees.assert_close(scanned_state, state)
    trees.assert_close(jax.tree.map(lambda leaf: leaf[-1], scanned), outputs[-1])


@pytest.mark.slow
@methods
def test_vmap_is_a_loop(name: str) -> None:
    method, (params, _) = trees.build(name), trees.params_and_updates()
    sequence = trees.steps(3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sequence)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), method.init(params))
    mapped, _ = trees.quick_jit(jax.vmap(method.update, in_axes=(0, 0, None)))(
        stacked, states, params
    )
    for row, updates in enumerate(sequence):
        (alone,), _ = run(method, [updates], params)
        trees.assert_close(jax.tree.map(lambda leaf, row=row: leaf[row], mapped), alone)


dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])


@methods
@dtypes
def test_dtypes_are_kept(name: str, dtype: str) -> None:
    with trees.double_precision(dtype == "float64"):
        method, (params, updates) = trees.build(name), trees.params_and_updates(dtype)
        clipped, state = jax.eval_shape(method.update, updates, method.init(params), params)
        trees.assert_same_type(clipped, updates)
        trees.assert_same_type(state, method.init(params))


@pytest.mark.slow
@methods
@dtypes
def test_results_are_finite_in_every_dtype(name: str, dtype: str) -> None:
    with trees.double_precision(dtype == "float64"):
        method, (params, updates) = trees.build(name), trees.params_and_updates(dtype)
        (clipped,), state = run(method, [updates], params)
        trees.assert_same_type((clipped, state), (updates, method.init(params)))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(clipped))


@methods
def test_init_takes_shapes(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    shapes = jax.eval_shape(lambda: params)
    trees.assert_same_type(method.init(shapes), method.init(params))
    trees.assert_same_type(jax.eval_shape(method.init, params), method.init(params))
    method.update(updates, method.init(shapes), params)


@pytest.mark.slow
@methods
def test_explicit_sharding_on_eight_devices(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    (alone,), state_alone = run(method, [updates], params)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {
        "conv": PartitionSpec(None, None, "y", "x"),
        "attention": PartitionSpec("x", None, "y"),
        "dense": {"kernel": PartitionSpec("y", "x"), "bias": PartitionSpec("x")},
        "scale": PartitionSpec(),
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params, updates = jax.device_put((params, updates), (shardings, shardings))
    state = method.init(params)
    clipped, new_state = trees.quick_jit(method.update)(updates, state, params)
    for one, other in ((clipped, updates), (new_state, state)):
        same = jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), one, other
        )
        assert all(jax.tree.leaves(same)), same
    trees.assert_close(clipped, alone, rtol=1e-5)
    trees.assert_close(new_state, state_alone, rtol=1e-5)


@pytest.mark.slow
@methods
def test_a_fresh_state_can_be_donated(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    step = jax.jit(method.update, donate_argnums=1)
    _, state = step(updates, method.init(params), params)
    step(updates, state, params)


@methods
def test_zero_stays_zero(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    zeros = jax.tree.map(jnp.zeros_like, updates)
    (clipped, _), state = run(method, [zeros, zeros], params)
    trees.assert_close(clipped, zeros, rtol=0)
    assert not any(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@methods
def test_derivative_at_zero_is_finite(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    zeros = jax.tree.map(jnp.zeros_like, updates)

    def total(updates: Any) -> Any:
        clipped, _ = method.update(updates, method.init(params), params)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(clipped))

    @trees.quick_jit
    def derivatives(zeros: Any) -> Any:
        return jax.grad(total)(zeros), jax.jvp(total, (zeros,), (updates,))[1]

    finite = jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), derivatives(zeros))
    assert all(jax.tree.leaves(finite)), finite


@methods
@pytest.mark.parametrize("value", trees.mostly_slow([np.nan, np.inf, -np.inf], [np.inf]))
def test_one_bad_step_poisons_no_later_one(name: str, value: float) -> None:
    method, (params, _) = trees.build(name), trees.params_and_updates()
    sequence = trees.steps(5)
    bad = [*sequence[:2], with_entry(sequence[2], value), *sequence[2:]]
    outputs, state = run(method, sequence, params)
    with_bad, state_with_bad = run(method, bad, params)
    trees.assert_close(with_bad[3:], outputs[2:])
    # That a step was skipped is told on purpose; nothing else may differ.
    trees.assert_close(*map(trees.without_skipped_counts, (state_with_bad, state)))


@methods
def test_leaves_that_are_not_measured_pass_through(name: str) -> None:
    updates = {
        "none": None,
        "masked": optax.MaskedNode(),
        "integer": jnp.arange(3),
        "bool": jnp.array([True, False]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "float": jnp.array([3.0, 4.0]),
    }
    params = {**updates, "float0": jnp.arange(2)}
    (clipped,), state = run(trees.build(name), [updates], params)
    assert clipped["none"] is None
    assert clipped["masked"] == optax.MaskedNode()
    assert clipped["float0"].dtype == jax.dtypes.float0
    trees.assert_bitwise(clipped["integer"], updates["integer"])
    trees.assert_bitwise(clipped["bool"], updates["bool"])
    trees.assert_same_type(state, trees.build(name).init(params))


@methods
@pytest.mark.parametrize("updates", [{}, (), {"a": None}, {"n": jnp.arange(2)}])
def test_trees_without_a_measured_leaf(name: str, updates: Any) -> None:
    (clipped,), state = run(trees.build(name), [updates], updates)
    trees.assert_bitwise(clipped, updates)
    assert all(
        bool(jnp.isfinite(value)) or np.isposinf(value) for value in clipax.metrics(state).values()
    )


@methods
def test_scalars_and_complex_leaves(name: str) -> None:
    method = trees.build(name)
    for updates in (3.0, jnp.array(3.0), 3.0 + 4.0j, jnp.array([3.0 + 4.0j, 1.0j]), np.ones(2)):
        (clipped,), _ = run(method, [updates], updates)
        expected = jnp.asarray(updates)
        assert (clipped.shape, clipped.dtype) == (expected.shape, expected.dtype)
        # Clipping shrinks and does not turn: entry by entry, the phase stays.
        assert bool((jnp.abs(clipped) <= jnp.abs(expected) * (1 + 1e-6)).all())
        np.testing.assert_allclose(jnp.angle(clipped), jnp.angle(expected), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if trees.has_a_bound(name)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_huge_bounds_are_the_identity_bit_for_bit(name: str, dtype: str) -> None:
    params, updates = trees.params_and_updates(dtype)
    updates = {**updates, "odd": jnp.array([0.0, -0.0, 1e-4, 6e4, -7.5], dtype)}
    params = {**params, "odd": jnp.ones(5, dtype)}
    (clipped,), _ = run(trees.build_huge(name), [updates], params)
    trees.assert_bitwise(clipped, updates)


@methods
def test_extra_arguments_are_accepted(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    extra = {"value": jnp.array(1.0), "loss": jnp.array(1.0), "unheard_of": "anything"}
    clipped, _ = method.update(updates, method.init(params), params, **extra)
    (expected,), _ = run(method, [updates], params)
    trees.assert_close(clipped, expected)


@methods
def test_metrics_read_the_state(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    _, state = run(method, [updates], params)
    values = clipax.metrics((state, optax.EmptyState()), per_leaf=True)
    assert values
    assert all(np.shape(value) == () for value in values.values())
    trees.assert_close(jax.jit(clipax.metrics)((state,)), clipax.metrics((state,)))


def static_arguments(factory: Any, given: dict[str, Any]) -> tuple[str, ...]:
    """Functions and integers: what `inject_hyperparams` must leave alone."""
    bound = inspect.signature(factory).bind(**given)
    bound.apply_defaults()
    return tuple(
        name
        for name, value in bound.arguments.items()
        if callable(value) or (isinstance(value, int) and not isinstance(value, bool))
    )


@pytest.mark.slow
@methods
def test_inside_the_wrappers_of_optax(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    (expected,), _ = run(method, [updates], params)
    factory = trees.public_factories()[name]
    given = trees.required(factory, trees.ACTIVE)
    injected = optax.inject_hyperparams(factory, static_args=static_arguments(factory, given))
    labels = jax.tree.map(lambda _: "all", params)
    everywhere = jax.tree.map(lambda _: True, params)
    wrapped = {
        "chain": optax.chain(optax.identity(), method),
        "named_chain": optax.named_chain(("clip", method)),
        "masked": optax.masked(method, everywhere),
        "partition": optax.partition({"all": method}, labels),
        "inject_hyperparams": injected(**given),
    }
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        for wrapper, outer in wrapped.items():
            state = outer.init(params)
            clipped, new_state = outer.update(updates, state, params)
            trees.assert_close(clipped, expected)
            trees.assert_same_type(new_state, state)
            traced = jax.eval_shape(outer.update, updates, new_state, params)
            trees.assert_same_type(traced, (clipped, state))
            assert clipax.metrics(new_state), wrapper


@pytest.mark.slow
@methods
def test_multi_steps_clips_the_accumulated_update_once(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    (expected,), expected_state = run(method, [updates], params)
    accumulate = optax.MultiSteps(method, 2)
    with jax.numpy_dtype_promotion("standard"):
        step = trees.quick_jit(accumulate.update)
        first, state = step(updates, accumulate.init(params), params)
        second, state = step(updates, state, params)
    trees.assert_close(first, jax.tree.map(jnp.zeros_like, updates), rtol=0)
    trees.assert_close(second, expected, rtol=1e-5)
    trees.assert_close(state.inner_opt_state, expected_state, rtol=1e-5)
    trees.assert_same_type(state, accumulate.init(params))
    assert clipax.metrics(state)


@pytest.mark.slow
@methods
def test_apply_if_finite_freezes_the_state(name: str) -> None:
    method, (params, updates) = trees.build(name), trees.params_and_updates()
    (expected,), _ = run(method, [updates], params)
    guarded = optax.apply_if_finite(method, 3)
    step = trees.quick_jit(guarded.update)
    clipped, good = step(updates, guarded.init(params), params)
    trees.assert_close(clipped, expected)
    zeros, after = step(with_entry(updates, np.nan), good, params)
    trees.assert_close(zeros, jax.tree.map(jnp.zeros_like, updates), rtol=0)
    trees.assert_same_type(after, guarded.init(params))
    trees.assert_bitwise(after.inner_state, good.inner_state)


def optimizers() -> dict[str, Any]:
    """Every alias that the installed optax exports: what takes a learning rate."""
    found = {}
    for name in dir(optax):
        value = getattr(optax, name)
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        if "learning_rate" in inspect.signature(value).parameters:
            found[name] = value
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("optimizer", sorted(optimizers()))
def test_chains_with_every_optimizer_of_optax(optimizer: str) -> None:
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}

    def loss(params: Any) -> Any:
        return 50 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    factory = optimizers()[optimizer]
    taken = inspect.signature(factory).parameters
    given = {"learning_rate": 0.01} | ({"key": 0} if "key" in taken else {})
    value, grad = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # All methods stand in one chain before the optimizer: what each hands on, it takes.
        methods_and_optimizer = optax.chain(*map(trees.build, METHODS), factory(**given))
        tx = optax.with_extra_args_support(methods_and_optimizer)

        def update(state: Any) -> Any:
            return tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)

        state = tx.init(params)
        updates, new_state = update(state)
        trees.assert_same_type(new_state, state)
        trees.assert_same_type(jax.eval_shape(update, new_state)[1], state)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))
        if not any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(updates)):
            updates, _ = update(new_state)  # rprop only looks around at first
        assert any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(updates))
        assert clipax.metrics(new_state)
