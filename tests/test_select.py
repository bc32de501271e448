"""A step that is not taken: its state stays, bit for bit, and no second one is held for it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from skipping import assert_bitwise, promotes, unkeyed

import clipax
from clipax._core import _choice, _select

PARAMS = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}


def gradients(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), PARAMS)


def bad_gradients(bad: float) -> Any:
    return {**gradients(1), "b": jnp.array([bad, 1.0])}


def zeros(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def added(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def by_sum(change: Callable[[Any, Any], Any], init: Callable[[Any], Any] = zeros) -> Any:
    """A transformation whose updates are its new state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = change(updates, state)
        return state, state

    return optax.GradientTransformation(init, update)


def kept_in(change: Callable[[Any, Any], Any], init: Callable[[Any], Any] = zeros) -> Any:
    """A transformation that passes the updates through, with a state."""
    return optax.GradientTransformation(
        init, lambda updates, state, params=None: (updates, change(updates, state))
    )


def two(params: Any) -> Any:
    return zeros(params), jax.tree.map(jnp.ones_like, params)


def of_a_call(wrap: Callable[..., Any]) -> Any:
    adam = optax.adam(0.1)
    update = wrap(lambda updates, state: adam.update(updates, state))
    return optax.GradientTransformation(
        adam.init, lambda updates, state, params=None: update(updates, state)
    )


@jax.custom_jvp
def rooted(x: Any) -> Any:
    return jnp.sqrt(jnp.abs(x)), 2 * x


@rooted.defjvp
def _rooted_jvp(primals: Any, tangents: Any) -> Any:
    return rooted(*primals), (tangents[0], 2 * tangents[0])


@jax.custom_vjp
def doubled(x: Any) -> Any:
    return x + x, x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, cotangents: (2 * cotangents[0],))


def through(function: Callable[[Any], Any]) -> Any:
    """Updates and a state that one call makes of their sum."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        sums, structure = jax.tree.flatten(added(state, updates))
        first, second = zip(*map(function, sums), strict=True)
        return structure.unflatten(first), structure.unflatten(second)

    return optax.GradientTransformation(zeros, update)


def odd_state(params: Any) -> Any:
    keys = jax.random.split(jax.random.key(1), 4)
    return {
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
        "keys": keys,
        "integers": jnp.arange(5, dtype=jnp.int32),
        "none": None,
        "number": 1.5,
    }


def odd_change(updates: Any, state: Any) -> Any:
    first, second = jax.random.split(state["key"])
    keys = jax.vmap(jax.random.fold_in, (0, None))(state["keys"], 1)
    integers = state["integers"] + jax.random.randint(second, (5,), 1, 9)
    return {**state, "key": first, "keys": keys, "integers": integers}


def scanned(updates: Any, state: Any) -> Any:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        return jax.tree.map(lambda old, new: 0.5 * old + new, carry, updates), None

    return jax.lax.scan(step, state, length=3)[0]


def branched(updates: Any, state: Any) -> Any:
    return jax.lax.cond(updates["b"][1] > 0, lambda: added(state, updates), lambda: state)


def looped(updates: Any, state: Any) -> Any:
    return jax.lax.while_loop(
        lambda now: now["b"][1] < 3, lambda now: added(now, PARAMS | {"b": jnp.ones(2)}), state
    )


def called_back(updates: Any, state: Any) -> Any:
    def double(leaf: Any) -> Any:
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return jax.pure_callback(lambda x: 2 * np.asarray(x), shape, leaf)

    return jax.tree.map(double, added(updates, state))


def seen_by_a_callback(updates: Any, state: Any) -> Any:
    jax.debug.callback(lambda _: None, updates["b"])
    return added(updates, state)


# How many leaves of the state are chosen at the equation that makes them; the others, behind.
INNER: dict[str, tuple[Callable[[], Any], int]] = {
    "chain": (lambda: optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(0.1)), 4),
    "multi steps": (lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), 6),
    "partition": (
        lambda: optax.partition(
            {"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}, {"a": "x", "b": "y"}
        ),
        3,
    ),
    "injected": (lambda: optax.inject_hyperparams(optax.adam)(lambda count: 0.1 / (1 + count)), 4),
    "skip_step in itself": (lambda: clipax.skip_step(optax.adam(0.1), 5.0), 4),
    "jit": (lambda: of_a_call(jax.jit), 4),
    "jit in jit": (lambda: of_a_call(lambda update: jax.jit(jax.jit(update))), 4),
    "remat": (lambda: of_a_call(jax.checkpoint), 4),
    "scan": (lambda: by_sum(scanned), 2),
    "cond": (lambda: by_sum(branched), 2),
    "while": (lambda: by_sum(looped), 2),
    "custom_jvp": (lambda: through(rooted), 2),
    "custom_vjp": (lambda: through(doubled), 2),
    "pure_callback": (lambda: by_sum(called_back), 2),
    "debug.callback": (lambda: by_sum(seen_by_a_callback), 0),
    "state that is the updates": (lambda: kept_in(lambda updates, state: updates), 0),
    "constant state": (lambda: kept_in(lambda updates, state: zeros(state)), 2),
    "leaves that change places": (lambda: kept_in(lambda updates, state: state[::-1], two), 0),
    "leaf in two places": (
        lambda: kept_in(lambda updates, state: (added(state[0], updates),) * 2, two),
        2,
    ),
    "kept leaf in two places": (lambda: kept_in(lambda updates, state: (state[1],) * 2, two), 0),
    "wider state": (
        lambda: by_sum(
            lambda updates, state: jax.tree.map(
                lambda x, y: x + y.astype(x.dtype), updates, state
            ),
            lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params),
        ),
        0,
    ),
    "keys, integers and what is no array": (lambda: kept_in(odd_change, odd_state), 0),
}


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many leaves each evaluation of a whole program chose at once."""
    counts: list[int] = []
    evaluate = _select._evaluated

    def counted(step: Any, is_taken: Any) -> Any:
        inside = _select._evaluate
        made: list[int] = []

        def spied(*args: Any) -> Any:
            results, chosen = inside(*args)
            made.append(sum(choice is not None for choice in chosen))
            return results, chosen

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_select, "_evaluate", spied)
            result = evaluate(step, is_taken)
        counts.append(made[-1])
        return result

    monkeypatch.setattr(_select, "_evaluated", counted)
    return counts


def numbers(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(unkeyed(tree))
    return [leaf for leaf in leaves if jnp.asarray(leaf).dtype != jax.dtypes.float0]


def step_of(inner: Any) -> Any:
    """`update_if` round an inner transformation."""
    update = optax.with_extra_args_support(inner).update

    def step(is_taken: Any, updates: Any, state: Any) -> Any:
        return _select.update_if(is_taken, update, updates, state, PARAMS)

    return step


@pytest.mark.slow_but(11)
@promotes
@pytest.mark.parametrize("name", INNER)
def test_a_step_is_taken_as_a_whole_or_leaves_no_trace(name: str, choices: list[int]) -> None:
    make, at_once = INNER[name]
    inner = make()
    step, alone = map(
        trees.quick_jit, (step_of(inner), optax.with_extra_args_support(inner).update)
    )
    state = expected = inner.init(PARAMS)
    for seed, bad in enumerate((None, np.nan, None, np.inf, 1e30, None)):
        if bad is None:
            updates, state = step(True, gradients(seed), state)
            alike, expected = alone(gradients(seed), expected, PARAMS)
            # Compiled, two programs may round differently.
            trees.assert_close(numbers((updates, state)), numbers((alike, expected)))
        else:
            _, kept = step(False, bad_gradients(bad), state)
            assert_bitwise(kept, state)
    if name != "wider state":
        assert set(choices) == ({at_once} if name != "debug.callback" else set())


@promotes
@pytest.mark.parametrize("name", INNER)
def test_the_types_of_a_state_are_those_of_a_choice_behind_it(name: str) -> None:
    inner = optax.with_extra_args_support(INNER[name][0]())

    def behind(is_taken: Any, updates: Any, state: Any) -> Any:
        updates, new_state = inner.update(updates, state, PARAMS)
        return updates, _choice.choose(is_taken, new_state, state)

    def types(step: Any) -> list[Any]:
        found: list[Any] = []

        def look(is_taken: Any, updates: Any) -> None:
            made, state = step(is_taken, updates, inner.init(PARAMS))
            found[:] = map(str, map(jax.typeof, numbers((made, state))))

        jax.eval_shape(look, True, gradients(0))
        return found

    assert types(step_of(inner)) == types(behind)


@promotes
@pytest.mark.parametrize(
    "name", ["chain", "injected", "jit", "scan", "cond", "leaf in two places", "custom_vjp"]
)
def test_under_vmap_each_step_is_taken_or_not(name: str) -> None:
    inner = INNER[name][0]()
    step, state = step_of(inner), inner.init(PARAMS)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), gradients(0), bad_gradients(np.nan))
    both = jax.vmap(lambda is_taken, updates: step(is_taken, updates, state)[1])
    _, expected = step(True, gradients(0), state)
    states = trees.quick_jit(both)(jnp.array([True, False]), stacked)
    trees.assert_close(jax.tree.map(lambda leaf: leaf[0], states), expected)
    assert_bitwise(jax.tree.map(lambda leaf: leaf[1], states), state)


# The compiled program.


def share_of_temporaries(update: Callable[..., Any], init: Callable[..., Any]) -> float:
    """The memory of a compiled step of training, next to that of the parameters."""
    params = {name: jnp.ones((256, 500)) for name in "ab"}

    def step(params: Any, state: Any, updates: Any) -> Any:
        made, state = update(updates, state, params)
        return optax.apply_updates(params, made), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, init(params), params)
    tree = sum(leaf.nbytes for leaf in params.values())
    return lowered.compile().memory_analysis().temp_size_in_bytes / tree


IN_PLACE: dict[str, Callable[[], Any]] = {
    "adam": lambda: optax.adam(0.1),
    "weight decay": lambda: optax.adamw(0.1, weight_decay=0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "jit": lambda: of_a_call(jax.jit),
    "jit in jit": lambda: of_a_call(lambda update: jax.jit(jax.jit(update))),
    "partition": lambda: optax.partition(
        {"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}, {"a": "x", "b": "y"}
    ),
}


@pytest.mark.slow_but(4)
@promotes
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_guarded_step_of_training_holds_no_state_twice(name: str) -> None:
    # XLA before jax 0.10 holds a tree for the norm.
    clipped = optax.chain(clipax.clip_by_global_norm(1.0), IN_PLACE[name]())
    method = clipax.skip_step(clipped, 10.0, z_max=6.0)
    alone = share_of_temporaries(clipped.update, clipped.init)
    assert alone < 0.01 or jax.__version_info__ < (0, 10)
    assert share_of_temporaries(method.update, method.init) < alone + 0.01


@promotes
def test_a_choice_behind_a_step_holds_a_state_twice() -> None:
    inner = optax.adam(0.1)

    def behind(updates: Any, state: Any, params: Any) -> Any:
        is_taken = updates["a"][0, 0] < 2
        made, new_state = inner.update(updates, state)
        made = jax.tree.map(lambda leaf: jnp.where(is_taken, leaf, 0), made)
        return made, _choice.choose(is_taken, new_state, state)

    assert share_of_temporaries(behind, inner.init) > 0.9


@promotes
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA before jax 0.10 holds more for the norms"
)
def test_stable_adam_holds_no_more_than_what_is_summed() -> None:
    method = optax.chain(clipax.scale_by_stable_adam(), optax.scale(-0.1))
    # The ratios of the record and the means that must be finite: XLA stores what it sums. With
    # choices behind the step it holds two more, and those of jax 0.10 share the memory of one.
    assert share_of_temporaries(method.update, method.init) < 2.1


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_learned_is_seen_in_every_step_and_kept_if_it_is_taken(compiled: bool) -> None:
    memory, learned = PARAMS, jax.tree.map(lambda leaf: 2 * leaf + 1, PARAMS)

    def step(is_taken: Any, memory: Any) -> Any:
        learn = lambda old: jax.tree.map(lambda leaf: 2 * leaf + 1, old)  # noqa: E731
        return _select.learned_if(is_taken, learn, memory)

    run = jax.jit(step) if compiled else step
    assert_bitwise(run(jnp.array(True), memory), (learned, learned))
    assert_bitwise(run(jnp.array(False), memory), (learned, memory))


# What cannot be traced apart, and what an inner transformation may do.


def test_python_of_a_step_runs_once_for_each_trace() -> None:
    runs = []

    def change(updates: Any, state: Any) -> Any:
        runs.append(updates["b"].shape)
        return added(updates, state)

    step = jax.jit(step_of(by_sum(change)))
    for is_taken in (True, False):
        step(is_taken, gradients(0), zeros(PARAMS))
    assert runs == [(2,)]


def test_extra_arguments_may_have_any_name() -> None:
    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * extra_args["update"], updates), state

    method = clipax.skip_step(optax.GradientTransformationExtraArgs(zeros, update))
    run = jax.jit(lambda update: method.update(PARAMS, method.init(PARAMS), update=update)[0])
    assert_bitwise(run(2.0), jax.tree.map(lambda leaf: leaf * 2, PARAMS))


def test_an_error_of_a_step_arrives_as_it_is() -> None:
    def change(updates: Any, state: Any) -> Any:
        raise KeyError("no such label")

    with pytest.raises(KeyError, match="no such label") as caught:
        jax.jit(step_of(by_sum(change)))(True, gradients(0), zeros(PARAMS))
    assert caught.value.__context__ is None


def test_a_state_that_changes_its_structure_is_refused() -> None:
    step = step_of(kept_in(lambda updates, state: [state], lambda params: zeros(params)))
    with pytest.raises(ValueError, match=r"(?i)structure|mismatch|expected"):
        jax.jit(step)(True, gradients(0), zeros(PARAMS))


def test_values_known_while_tracing_stay_known() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, kind: str, scale: float) -> Any:
        made = jax.tree.map(lambda leaf: leaf * scale if scale > 1 else leaf, updates)
        return (made if kind == "scaled" else updates), added(state, made)

    @jax.jit
    def step(is_taken: Any, updates: Any) -> Any:
        kinds = {"kind": "scaled", "scale": 2.0}
        return _select.update_if(is_taken, update, updates, zeros(PARAMS), **kinds)

    made, state = step(True, gradients(0))
    for tree in (made, state):
        trees.assert_bitwise(tree, jax.tree.map(lambda leaf: leaf * 2, gradients(0)))


def test_a_sharding_that_a_call_asks_for_is_kept() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    call = jax.jit(lambda x, y: (x + y, x + y), out_shardings=(sharding, sharding))
    inner = optax.GradientTransformation(
        jnp.zeros_like, lambda updates, state, params=None: call(updates, state)
    )

    @jax.jit
    def step(is_taken: Any, updates: Any, state: Any) -> Any:
        return _select.update_if(is_taken, inner.update, updates, state)

    lowered = step.lower(True, jnp.ones(16), jnp.zeros(16)).as_text()
    made, _ = step(True, jnp.ones(16), jnp.zeros(16))
    assert made.sharding.is_equivalent_to(sharding, 1), lowered


# Derivatives and NaN.


@promotes
def test_derivatives_through_a_step_that_is_not_taken_are_those_of_its_old_state() -> None:
    # The root of a moment of zero has an infinite derivative, and a count of zero no inverse.
    inner = optax.adam(0.1)
    start = inner.init(PARAMS)

    def total(updates: Any, moments: Any, is_taken: Any) -> Any:
        state = (start[0]._replace(**moments), start[1])
        made, state = _select.update_if(is_taken, inner.update, updates, state)
        made = jax.tree.map(lambda leaf: jnp.where(is_taken, leaf, 0), made)
        return sum(map(jnp.sum, jax.tree.leaves((made, state[0].mu))))

    derivatives = jax.grad(total, (0, 1))
    for program in (derivatives, jax.jit(derivatives)):
        moments = {"mu": zeros(PARAMS), "nu": zeros(PARAMS)}
        by_updates, by_moments = program(gradients(0), moments, jnp.array(False))
        for leaf in jax.tree.leaves((by_updates, by_moments["nu"])):
            np.testing.assert_array_equal(leaf, 0)
        for leaf in jax.tree.leaves(by_moments["mu"]):
            np.testing.assert_array_equal(leaf, 1)


@promotes
def test_a_first_step_that_is_not_taken_makes_no_nan() -> None:
    guarded = clipax.skip_step(optax.adam(0.1), 0.5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), gradients(0), gradients(1))
    with jax.debug_nans(True):
        # Without `jit`, every value is looked at.
        skipped = jax.vmap(lambda each: guarded.update(each, guarded.init(PARAMS))[1].is_skipped)
        assert skipped(stacked).all()


# Placed on devices.


@promotes
@pytest.mark.parametrize("is_checked", [True, False])
def test_states_of_shards_are_chosen_at_once(is_checked: bool, choices: list[int]) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"sharded": PartitionSpec("x"), "whole": PartitionSpec()}
    params = {"sharded": jnp.ones((16, 4)), "whole": jnp.ones(3)}
    inner = optax.adam(0.1)

    def step(is_taken: Any, updates: Any) -> Any:
        state = inner.init(updates)
        kept = _select.update_if(is_taken, inner.update, updates, state)[1][0].mu
        # A choice that differs from shard to shard has another type than a whole leaf.
        is_first = jax.lax.axis_index("x") == 0
        some = _select.update_if(is_first, inner.update, updates, state)[1][0].mu
        return kept, some["sharded"]

    program = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(PartitionSpec(), specs),
            out_specs=(specs, PartitionSpec("x")),
            check_vma=is_checked,
        )
    )
    expected = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), params)
    kept, some = program(True, params)
    trees.assert_close(kept, expected)
    trees.assert_close(some, expected["sharded"].at[2:].set(0))
    trees.assert_bitwise(program(False, params)[0], zeros(params))
    assert choices == [4, 2 if is_checked else 4]


@promotes
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_state_is_chosen_at_once_where_it_lies(
    kind: AxisType, choices: list[int]
) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    inner = optax.sgd(0.1, momentum=0.9)
    step = jax.jit(step_of(inner))
    state = inner.init(params)
    for is_taken in (True, False):
        _, new_state = step(is_taken, params, state)
        (trace,) = jax.tree.leaves(new_state)
        assert trace.sharding.is_equivalent_to(sharding, 1)
        trees.assert_bitwise(np.asarray(trace), np.asarray(params) * is_taken)
    assert choices == [1]
