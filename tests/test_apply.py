"""Clipping without an optimizer, inside back-propagation, and checks between steps."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refusals
import sequences
import trees
from jax.sharding import AxisType, PartitionSpec

import clipax


def test_clip_tree_tells_what_happened() -> None:
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    for run in (clipax.clip_tree, jax.jit(clipax.clip_tree, static_argnums=1)):
        clipped, info = run(updates, clipax.clip_by_global_norm(6.5))
        trees.assert_close(clipped, {"w": np.array([1.5, 2.0]), "b": np.array([6.0])})
        assert float(info["norm"]) == 13
        assert float(info["coefficient"]) == 0.5


def test_clip_tree_passes_params_known_norms_and_paths() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    clipped, _ = clipax.clip_tree(updates, clipax.clip_by_global_norm(1.0), norm=10.0)
    trees.assert_close(clipped, {"w": np.array([0.3, 0.4], np.float32)})
    params = {"w": jnp.array([0.6, 0.8])}
    relative = clipax.adaptive_grad_clip(0.5)
    clipped, info = clipax.clip_tree(updates, relative, params, per_leaf=True)
    trees.assert_close(clipped, {"w": np.array([0.3, 0.4], np.float32)})
    assert float(info["norm/w"]) == 5


def test_clip_tree_takes_any_transformation() -> None:
    clipped, info = clipax.clip_tree(jnp.ones(2), optax.scale(2.0))
    trees.assert_close(clipped, np.full(2, 2.0))
    assert info == {}


def recurrent_loss(weight: Any, method: Any, steps: int = 30) -> Any:
    """h <- h * w, thirty times: the gradient grows as w**30."""

    def step(hidden: Any, _: None) -> Any:
        if method is not None:
            hidden = clipax.clip_cotangent(hidden, method)
        return hidden * weight, None

    hidden, _ = jax.lax.scan(step, jnp.ones(2), None, length=steps)
    return hidden.sum()


def oracle(weight: float, bound: float, steps: int = 30) -> float:
    """The same backward pass by hand, in NumPy."""
    hidden = [np.ones(2)]
    for _ in range(steps):
        hidden.append(hidden[-1] * weight)
    cotangent, gradient = np.ones(2), 0.0
    for step in reversed(range(steps)):
        gradient += (cotangent * hidden[step]).sum()
        cotangent = cotangent * weight
        cotangent *= min(1.0, bound / np.sqrt((cotangent**2).sum()))
    return gradient


@pytest.mark.parametrize("bound", [0.5, 1.0, 1.8, 100.0, np.inf])
def test_the_cotangent_is_clipped_at_every_step_of_a_scan(bound: float) -> None:
    method = clipax.clip_by_global_norm(bound)
    gradient = jax.jit(jax.grad(lambda weight: recurrent_loss(weight, method)))(1.4)
    np.testing.assert_allclose(gradient, oracle(1.4, bound), rtol=1e-5)
    if bound == np.inf:
        plain = jax.grad(lambda weight: recurrent_loss(weight, None))(1.4)
        np.testing.assert_allclose(gradient, plain, rtol=1e-6)


def test_forwards_it_is_the_identity() -> None:
    _, updates = trees.params_and_updates()
    trees.assert_bitwise(clipax.clip_cotangent(updates, clipax.clip(0.1)), updates)


def test_cotangents_within_the_bound_zero_nan_and_inf() -> None:
    def back(cotangent: Any) -> Any:
        _, pull = jax.vjp(
            lambda x: clipax.clip_cotangent(x, clipax.clip_by_global_norm(1.0)), cotangent
        )
        return pull(cotangent)[0]

    small = jnp.array([0.3, 0.4])
    trees.assert_bitwise(back(small), small)
    trees.assert_bitwise(back(jnp.zeros(2)), jnp.zeros(2))
    assert bool(jnp.isnan(back(jnp.array([1.0, jnp.nan]))).all())
    np.testing.assert_array_equal(back(jnp.array([1.0, jnp.inf])), [0.0, np.nan])


def test_integers_pass_and_trees_are_clipped_together() -> None:
    def loss(x: Any) -> Any:
        y = clipax.clip_cotangent({"x": x, "n": jnp.arange(2)}, clipax.clip_by_global_norm(2.5))
        return (y["x"] * jnp.array([3.0, 4.0])).sum() + y["n"].sum().astype(jnp.float32)

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(2)), [1.5, 2.0])


@pytest.mark.parametrize(("mapped", "names"), [({}, None), ({}, ()), ({"axis_name": "batch"}, ())])
def test_vmap_clips_each_sequence_by_itself(mapped: Any, names: Any) -> None:
    clip = clipax.clip_by_global_norm(1.0, axis_name=names)

    def gradient(scale: Any) -> Any:
        return jax.grad(lambda x: (scale * clipax.clip_cotangent(x, clip)).sum())(jnp.ones(2))

    clipped = jax.vmap(gradient, **mapped)(jnp.array([0.1, 10.0]))
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=1), [0.1 * np.sqrt(2), 1.0], rtol=1e-6)


def test_a_traced_bound_anywhere() -> None:
    def gradient(bound: Any) -> Any:
        method = clipax.clip_by_global_norm(bound)
        return jax.grad(lambda x: clipax.clip_cotangent(x, method).sum())(jnp.ones(4))

    np.testing.assert_allclose(jax.jit(gradient)(1.0), np.full(4, 0.5))
    np.testing.assert_allclose(jax.vmap(gradient)(jnp.array([1.0, 0.5])).sum(axis=1), [2, 1])


def test_a_traced_bound_in_scan_remat_and_jit() -> None:
    def in_scan(weight: Any, bound: Any) -> Any:
        return recurrent_loss(weight, clipax.clip_by_global_norm(bound))

    for wrap in (jax.jit, jax.checkpoint):
        gradient = jax.jit(jax.grad(wrap(in_scan)))(1.4, 1.0)
        np.testing.assert_allclose(gradient, oracle(1.4, 1.0), rtol=1e-5)

    def bounds_of_steps(weight: Any, bounds: Any) -> Any:
        def step(hidden: Any, bound: Any) -> Any:
            method = clipax.clip_by_global_norm(bound)
            return clipax.clip_cotangent(hidden, method) * weight, None

        return jax.lax.scan(step, jnp.ones(2), bounds)[0].sum()

    gradient = jax.jit(jax.grad(bounds_of_steps))(1.4, jnp.ones(30))
    np.testing.assert_allclose(gradient, oracle(1.4, 1.0), rtol=1e-5)


def test_edge_a_probe_has_what_happened_as_its_gradient() -> None:
    def loss(x: Any, probe: Any) -> Any:
        y = clipax.clip_cotangent(x, clipax.clip_by_leaf_norm(4.0), probe=probe)
        return (y["a"] * jnp.array([3.0, 4.0])).sum() + 2.0 * y["b"].sum()

    x = {"a": jnp.ones(2), "b": jnp.ones(1)}
    for wrap in (lambda f: f, jax.jit):
        gradient, probe = wrap(jax.grad(loss, argnums=(0, 1)))(x, jnp.zeros(3))
        np.testing.assert_allclose(gradient["a"], [2.4, 3.2], rtol=1e-6)
        np.testing.assert_allclose(probe, [5.0, 4.0, 0.5], rtol=1e-6)


def test_rows_of_a_probe_watch_each_step_of_a_scan() -> None:
    method = clipax.clip_by_global_norm(1.0)

    def loss(weight: Any, probes: Any) -> Any:
        def step(hidden: Any, probe: Any) -> Any:
            return clipax.clip_cotangent(hidden, method, probe=probe) * weight, None

        return jax.lax.scan(step, jnp.ones(2), probes)[0].sum()

    gradient, rows = jax.jit(jax.grad(loss, argnums=(0, 1)))(1.4, jnp.zeros((30, 3)))
    np.testing.assert_allclose(gradient, oracle(1.4, 1.0), rtol=1e-5)
    last = 1.4 * np.sqrt(2)
    before = np.array([*[1.4] * 29, last])
    np.testing.assert_allclose(rows[:, 0], before, rtol=1e-5)
    np.testing.assert_allclose(rows[:, 1:], np.ones((30, 2)), rtol=1e-5)


def test_a_probe_in_vmap_has_a_row_for_each_member() -> None:
    method = clipax.clip_by_global_norm(1.0)

    def loss(scale: Any, probe: Any) -> Any:
        return (scale * clipax.clip_cotangent(jnp.ones(2), method, probe=probe)).sum()

    scales = jnp.array([0.1, 10.0])
    rows = jax.vmap(jax.grad(loss, argnums=1))(scales, jnp.zeros((2, 3)))
    np.testing.assert_allclose(rows[:, 0], scales * np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(rows[:, 2], [0, 1])


@pytest.mark.parametrize("bad", [1.0, jnp.zeros(2), jnp.zeros((1, 3)), jnp.zeros(3, int), "a"])
def test_what_is_no_probe_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^probe must be an array of three floats, got "):
        clipax.clip_cotangent(jnp.ones(2), clipax.clip(1.0), probe=bad)


def test_a_probe_needs_a_clip_that_reports() -> None:
    with pytest.raises(ValueError, match=r"^transformation must have one clip of clipax"):
        clipax.clip_cotangent(jnp.ones(2), optax.clip(1.0), probe=jnp.zeros(3))


def test_the_bound_has_no_gradient() -> None:
    def loss(bound: Any) -> Any:
        return clipax.clip_cotangent(jnp.ones(2), clipax.clip_by_global_norm(bound)).sum()

    assert float(jax.grad(loss)(1.0)) == 0


# What a clip of cotangents closes over.


class Traced(NamedTuple):
    """Values of every type from which a bound can be made."""

    step: Any
    flag: Any
    key: Any
    size: Any
    small: Any


def traced_values(step: int) -> Traced:
    key = jax.random.key(step)
    return Traced(*map(jnp.asarray, (step, True)), key, jnp.array(0.5), jnp.uint8(step))


def bound_of(values: Traced) -> Any:
    step, small = (x.astype(jnp.float32) for x in (values.step, values.small))
    noise = 1e-3 * jax.random.uniform(values.key)
    return jnp.where(values.flag, step * values.size, 100.0) + noise + 0.25 * small


def closing_over(values: Traced) -> Any:
    """A clip whose schedule, called in the backward pass alone, reads them all."""
    return clipax.clip_by_global_norm(lambda count: bound_of(values))


def pulled_back(x: Any, values: Traced) -> Any:
    return 10.0 * clipax.clip_cotangent(x, closing_over(values))


def gradient_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda x, *rest: function(x, *rest).sum())


def over_steps(x: Any, rows: Traced, body: Callable[..., Any] = pulled_back) -> Any:
    return jax.lax.scan(lambda hidden, row: (body(hidden, row) / 10.0, None), x, rows)[0] * 10.0


def in_a_branch(x: Any, values: Traced) -> Any:
    def otherwise(x: Any) -> Any:
        return x

    return jax.lax.cond(values.flag, lambda x: pulled_back(x, values), otherwise, x)


def in_a_while_body(x: Any, values: Traced) -> Any:
    """The body takes a derivative; the clip in it closes over what the loop carries."""

    def body(carry: Any) -> Any:
        count, _, values = carry
        return count + 1, gradient_of(pulled_back)(x, values), values

    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, x, values))[1]


def in_a_fori_loop(x: Any, values: Traced) -> Any:
    """The number of the step is the loop's own counter."""

    def body(count: Any, _: Any) -> Any:
        return gradient_of(pulled_back)(x, values._replace(step=count + 2))

    return jax.lax.fori_loop(0, 2, body, x)


def nested(x: Any, rows: Traced) -> Any:
    def body(x: Any, row: Traced) -> Any:
        return jax.checkpoint(jax.jit(in_a_branch))(x, row)

    return jax.jit(over_steps, static_argnums=2)(x, rows, body)


def stacked(*values: Traced) -> Traced:
    return jax.tree.map(lambda *rows: jnp.stack(rows), *values)


ONE, ROWS = traced_values(3), stacked(*map(traced_values, (4, 3, 5)))


@pytest.mark.slow_but(6)
@pytest.mark.parametrize(
    "run",
    [
        lambda x: gradient_of(pulled_back)(x, ONE),
        lambda x: jax.jit(gradient_of(pulled_back))(x, ONE),
        lambda x: gradient_of(jax.jit(pulled_back))(x, ONE),
        lambda x: gradient_of(jax.checkpoint(pulled_back))(x, ONE),
        lambda x: jax.vjp(lambda x: pulled_back(x, ONE), x)[1](jnp.ones_like(x))[0],
        lambda x: jax.vmap(gradient_of(pulled_back), (None, 0))(x, ROWS)[1],
        lambda x: gradient_of(lambda x: jax.vmap(pulled_back, (0, None))(x, ONE))(x[None])[0],
        lambda x: gradient_of(over_steps)(x, ROWS),
        lambda x: jax.jit(gradient_of(over_steps))(x, ROWS),
        lambda x: gradient_of(lambda x: over_steps(x, ROWS, jax.checkpoint(pulled_back)))(x),
        lambda x: gradient_of(in_a_branch)(x, ONE),
        lambda x: jax.jit(gradient_of(in_a_branch))(x, ONE),
        lambda x: in_a_while_body(x, ONE),
        lambda x: in_a_fori_loop(x, ONE),
        lambda x: gradient_of(nested)(x, ROWS),
    ],
    ids=[
        *("eager", "jit_of_grad", "grad_of_jit", "remat", "vjp", "vmap_values", "vmap_x", "scan"),
        *("jit_scan", "scan_remat", "cond", "jit_cond", "while", "fori", "nested"),
    ],
)
def test_a_clip_of_cotangents_closes_over_traced_values_of_any_type(run: Any) -> None:
    gradient = run(jnp.ones(4))
    np.testing.assert_allclose(np.linalg.norm(gradient), bound_of(ONE), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.full(4, gradient[0]), rtol=1e-6)


def test_traced_values_that_a_clip_closes_over_have_no_gradient() -> None:
    def loss(size: Any, step: Any) -> Any:
        return pulled_back(jnp.ones(4), ONE._replace(size=size, step=step)).sum()

    gradient, step_gradient = jax.grad(loss, (0, 1), allow_int=True)(ONE.size, ONE.step)
    assert float(gradient) == 0
    assert step_gradient.dtype == jax.dtypes.float0


# What is taken for a transformation.


class Doubling:
    """An object with the two functions, which is no `optax.GradientTransformation`."""

    def init(self, params: Any) -> Any:
        return optax.EmptyState()

    def update(self, updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda leaf: 2 * leaf, updates), state


@pytest.mark.parametrize("method", [Doubling(), optax.MultiSteps(optax.scale(2.0), 1)])
def test_any_object_with_init_and_update_clips_trees_and_cotangents(method: Any) -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        assert float(clipax.clip_tree(jnp.array(3.0), method)[0]) == 6
        gradient = jax.grad(lambda x: clipax.clip_cotangent(x, method))(jnp.array(3.0))
    assert float(gradient) == 2


@pytest.mark.parametrize("bad", [None, 1.0, optax.sgd, Doubling, optax.MultiSteps, "sgd", {}])
def test_what_is_no_transformation_clips_no_tree_and_no_cotangent(bad: Any) -> None:
    for function in (clipax.clip_tree, clipax.clip_cotangent):
        with refusals.refused("transformation must be an optax.", bad):
            function(jnp.ones(2), bad)


# Checks between steps.


@pytest.mark.parametrize(
    ("leaf", "nans", "infs"),
    [
        (jnp.array([1.0, np.nan, np.inf, -np.inf]), 1, 2),
        (np.array([[np.nan, 1e300], [-np.inf, np.nan]]), 2, 1),
        (jnp.array([np.nan, 2.0], jnp.bfloat16), 1, 0),
        (np.array([np.inf, 2.0], jnp.bfloat16), 0, 1),
        (jnp.array([np.inf, np.nan], jnp.float16), 1, 1),
        (jnp.array([np.nan, 1.0], jnp.float8_e4m3fn), 1, 0),
        (jnp.array([complex(np.nan, np.inf), complex(0, -np.inf), 1j]), 1, 1),
        (math.nan, 1, 0),
        (-math.inf, 0, 1),
        (complex(1.0, math.inf), 0, 1),
    ],
)
def test_check_finite_names_each_bad_leaf(leaf: Any, nans: int, infs: int) -> None:
    tree = {"layers": [{"kernel": leaf}, {"kernel": jnp.ones(3)}], "bias": jnp.zeros(2)}
    with pytest.raises(FloatingPointError) as caught:
        clipax.check_finite(tree, "grads")
    dtype, shape = getattr(leaf, "dtype", "float"), np.shape(leaf)
    assert str(caught.value) == (
        "grads must be finite, got 1 of 3 leaves with NaN or inf:\n  layers/0/kernel:"
        f" {nans} NaN and {infs} inf of {np.size(leaf)} entries, {dtype} of shape {shape}"
    )


def test_check_finite_names_all_bad_leaves_and_a_lone_array() -> None:
    with pytest.raises(FloatingPointError) as caught:
        clipax.check_finite({"a": jnp.array([np.inf]), "b": jnp.array(np.nan), "c": 1.0})
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [*"ab"]
    with pytest.raises(FloatingPointError, match=r"\n  loss: 1 NaN and 0 inf of 1 entries"):
        clipax.check_finite(jnp.array(np.nan), "loss")


def test_check_finite_passes_what_is_finite_and_what_is_no_float() -> None:
    huge = np.array([1e300])
    leaves = [jnp.zeros((0, 3)), jnp.array([3e38]), huge, 1e300, 2j, jnp.array([1.0], jnp.float16)]
    foreign = [*sequences.unmeasured().values(), jax.random.key(0), "name", math.sqrt, optax.sgd]
    clipax.check_finite({"leaves": leaves, "foreign": foreign})
    clipax.check_finite(None)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_check_finite_counts_on_all_shards(kind: Any) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("x"))
    elsewhere = jax.device_put(jnp.array([np.inf]), jax.devices()[5])
    leaf = jax.device_put(np.where(np.arange(16) % 5 == 1, np.nan, 1.0), sharding)
    with pytest.raises(FloatingPointError, match=r"a: 3 NaN and 0 inf .*\n  b: 0 NaN and 1 inf"):
        clipax.check_finite({"a": leaf, "b": elsewhere})


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, jax.grad])
def test_check_finite_refuses_traced_values(wrap: Any) -> None:
    def step(x: Any) -> Any:
        clipax.check_finite({"w": x}, "grads")
        return x.sum()

    with pytest.raises(ValueError, match=r"^check_finite needs values, got .* at 'w' of grads"):
        wrap(step)(jnp.ones(3))
    with pytest.raises(ValueError, match="Call it outside of jit"):
        clipax.check_finite(jax.ShapeDtypeStruct((2,), jnp.float32))


def stuck(count: int, **rules: Any) -> Any:
    """The state after a step that is taken and so many that are not."""
    optimizer = clipax.skip_step(optax.sgd(1.0), **rules)
    state = optimizer.init(jnp.zeros(2))
    for bad in (1.0, *[np.nan] * count):
        _, state = optimizer.update(jnp.array([bad, 1.0]), state)
    return state


def test_check_not_stuck_counts_up_to_the_last_step() -> None:
    state = stuck(4)
    clipax.check_not_stuck(state, 4)
    with pytest.raises(
        RuntimeError, match=r"^skip_step skipped the last 4 steps in a row"
    ) as caught:
        clipax.check_not_stuck(state, 3)
    for part in ("max_consecutive=3", "4 in all", "last norm was nan", "check_finite(grads)"):
        assert part in str(caught.value)
    _, state = clipax.skip_step(optax.sgd(1.0)).update(jnp.ones(2), state)
    clipax.check_not_stuck(state, 1)


def test_check_not_stuck_says_how_to_look_further_at_a_spike() -> None:
    optimizer = clipax.skip_step(optax.sgd(1.0), 5.0)
    state = optimizer.init(jnp.zeros(1))
    for _ in range(2):
        _, state = optimizer.update(jnp.array([7.0]), state)
    with pytest.raises(RuntimeError, match=r"last norm was 7\.0\. .*raw_norm"):
        clipax.check_not_stuck(state, 1)


@pytest.mark.parametrize("place", ["chain", "dict", "multi_steps", "masked", "observe", "nested"])
def test_check_not_stuck_finds_every_state(place: str) -> None:
    state, fresh = stuck(3), stuck(0)
    masked = optax.masked(optax.sgd(1.0), True).init(jnp.zeros(2))
    multi = optax.MultiSteps(optax.sgd(1.0), 2).init(jnp.zeros(2))
    observed = clipax.observe(optax.sgd(1.0)).init(jnp.zeros(2))
    opt_state, path = {
        "chain": ((optax.EmptyState(), fresh, state), "[2]"),
        "dict": ({"tree": [fresh, {"of": state}]}, "['tree'][1]['of']"),
        "multi_steps": (multi._replace(inner_opt_state=state), ".inner_opt_state"),
        "masked": (masked._replace(inner_state=(state,)), ".inner_state[0]"),
        "observe": (observed._replace(inner_state=state), ".inner_state"),
        "nested": (fresh._replace(inner_state=(state,)), ".inner_state[0]"),
    }[place]
    clipax.check_not_stuck(opt_state, 3)
    with pytest.raises(RuntimeError) as caught:
        clipax.check_not_stuck(opt_state, 2)
    assert f"see opt_state{path}." in str(caught.value)


def test_check_not_stuck_takes_the_longest_row_of_a_vmap() -> None:
    states = jax.tree.map(lambda *rows: jnp.stack(rows), *map(stuck, (0, 3, 1)))
    clipax.check_not_stuck(states, 3)
    with pytest.raises(RuntimeError, match="skipped the last 3 steps"):
        clipax.check_not_stuck(states, 2)


def test_check_not_stuck_leaves_out_steps_that_were_skipped_on_purpose() -> None:
    clipax.check_not_stuck(stuck(5, skip_ranges=((1, 5),)), 1)
    with pytest.raises(RuntimeError, match="skipped the last 2 steps in a row"):
        clipax.check_not_stuck(stuck(5, skip_ranges=((2, 5),)), 1)


def test_check_not_stuck_refuses_bad_arguments() -> None:
    for bad in (0, -1, 1.5, True, None, "3", jnp.array(3)):
        with pytest.raises(ValueError, match=r"^max_consecutive must be "):
            clipax.check_not_stuck(stuck(0), bad)
    for empty in (None, (), optax.sgd(1.0).init(jnp.ones(2))):
        with pytest.raises(ValueError, match=r"^opt_state must hold a state of skip_step"):
            clipax.check_not_stuck(empty, 3)
    with pytest.raises(ValueError, match=r"^check_not_stuck needs values, got .*outside of jit"):
        jax.jit(lambda state: clipax.check_not_stuck(state, 3))(stuck(0))


def test_checks_raise_from_callbacks_as_their_messages_say() -> None:
    """What a callback raises reaches the caller with its message, in an error of JAX."""
    not_stuck = functools.partial(clipax.check_not_stuck, max_consecutive=2)

    def run(check: Any, tree: Any) -> None:
        jax.block_until_ready(jax.jit(lambda tree: (tree, jax.debug.callback(check, tree)))(tree))
        jax.effects_barrier()

    for check, good, bad in (
        (clipax.check_finite, {"w": jnp.ones(2)}, {"w": jnp.array([1.0, np.nan])}),
        (not_stuck, stuck(2), stuck(3)),
    ):
        run(check, good)
        with pytest.raises(Exception, match=r"w: 1 NaN|last 3 steps in a row"):
            run(check, bad)
