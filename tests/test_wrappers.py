"""What wrappers go round: any transformation, and states and updates that are no numbers."""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refusals
import trees

import clipax

WRAPPERS = {
    "observe": clipax.observe,
    "skip_step": clipax.skip_step,
    "track": clipax.track,
    "u_clip": clipax.u_clip,
    "clip21": clipax.clip21,
}
HOLD_NOTHING_BACK = {"observe", "track"}
wrappers = pytest.mark.parametrize("name", sorted(WRAPPERS))


class Doubling:
    """An object with the two functions, which is no `optax.GradientTransformation`."""

    def init(self, params: Any) -> Any:
        return optax.EmptyState()

    def update(self, updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda leaf: 2 * leaf, updates), state


class Scaling(Doubling):
    """One that takes extra arguments."""

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return jax.tree.map(lambda leaf: extra["value"] * leaf, updates), state


class Pair(NamedTuple):
    """A named tuple as optax's, but not optax's."""

    init: Any
    update: Any


class Own(optax.GradientTransformationExtraArgs):
    """A class of a user's own."""


LIKE_TRANSFORMATIONS = {
    "object": Doubling(),
    "object with extra arguments": Scaling(),
    "named tuple": Pair(Doubling().init, Doubling().update),
    "named tuple with extra arguments": Pair(Scaling().init, Scaling().update),
    "subclass": Own(Scaling().init, Scaling().update),
    "of optax": optax.GradientTransformation(Doubling().init, Doubling().update),
}


@wrappers
@pytest.mark.parametrize("kind", sorted(LIKE_TRANSFORMATIONS))
def test_wrappers_go_round_any_object_with_init_and_update(name: str, kind: str) -> None:
    wrapped = WRAPPERS[name](LIKE_TRANSFORMATIONS[kind])
    updates = {"w": jnp.array([3.0, 4.0])}
    for extra in ({"value": 2.0}, {"value": jnp.array(2.0), "unheard_of": "anything"}):
        out, state = wrapped.update(updates, wrapped.init(updates), updates, **extra)
        trees.assert_close(out, {"w": np.array([6.0, 8.0], np.float32)})
        trees.assert_same_type(state, wrapped.init(updates))


@wrappers
def test_wrappers_go_round_multi_steps_itself(name: str) -> None:
    """With extra arguments, and as they go round its transformation."""

    def scaled(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        return jax.tree.map(lambda leaf: value * leaf, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scaled)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        accumulate = optax.MultiSteps(inner, 2)
        wrapped = WRAPPERS[name](accumulate)
        step = jax.jit(wrapped.update)
        updates = {"w": jnp.array([3.0, 4.0])}
        state, outs = wrapped.init(updates), []
        for _ in range(2):
            out, state = step(updates, state, updates, value=jnp.array(2.0))
            outs.append(np.asarray(out["w"]))
        trees.assert_same_type(state, wrapped.init(updates))
        through = optax.GradientTransformationExtraArgs(accumulate.init, accumulate.update)
        alone = WRAPPERS[name](through)
        expected, _ = alone.update(updates, alone.init(updates), updates, value=2.0)
    np.testing.assert_array_equal(outs[0], expected["w"])
    assert bool(np.any(outs[1] != 0))


def test_thresholds_may_be_any_object_with_init_and_update() -> None:
    updates = {"w": jnp.array([3.0, 4.0])}
    for rule in (Doubling(), Pair(Doubling().init, Doubling().update)):
        clip = clipax.clip_by(clipax.global_norm, rule)
        _, state = clip.update(updates, clip.init(updates))
        assert float(state.max_norm) == 10
        per_norm = clipax.thresholds.per_norm(rule)
        assert float(per_norm.update(jnp.array(2.0), per_norm.init(jnp.array(2.0)))[0]) == 4


NO_TRANSFORMATIONS = [
    *(None, 1.0, "sgd", optax.sgd, {}, [optax.sgd(1.0)], (len, len)),
    *(Doubling, optax.MultiSteps, optax.GradientTransformation, optax.EmptyState()),
    Pair(None, Doubling().update),
]


@wrappers
@pytest.mark.parametrize("bad", NO_TRANSFORMATIONS)
def test_what_is_no_transformation_is_refused(name: str, bad: Any) -> None:
    with refusals.refused("inner must be an optax.GradientTransformation, got", bad):
        WRAPPERS[name](bad)
    with pytest.raises(ValueError, match=r"rule must be an optax\.GradientTransformation, got"):
        clipax.thresholds.per_norm(bad)


# Leaves that are no numbers.


class Colour(enum.Enum):
    RED = "red"


def double(x: Any) -> Any:
    return 2 * x


NO_NUMBERS: dict[str, Any] = {
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(1), (2, 3)),
    "key of another kind": jax.random.key(2, impl="rbg"),
    "function": double,
    "lambda": lambda x: x,
    "compiled": jax.jit(double),
    "partial": functools.partial(double, 1),
    "method": Doubling().update,
    "class": Doubling,
    "string": "relu",
    "bytes": b"relu",
    "strings": np.array(["a", "b"]),
    "objects": np.array([double, None]),
    "object": object(),
    "dtype": jnp.dtype("float32"),
    "enum": Colour.RED,
    "slice": slice(0, 2),
    "set": {1, 2},
    "date": np.array(["2020-01-01"], "datetime64[D]"),
    "float0": np.zeros((2,), jax.dtypes.float0),
}
SMALL_INTEGERS: dict[str, Any] = {
    "int4": jnp.array([1, -2], jnp.int4),
    "uint4": jnp.array([1, 2], jnp.uint4),
    "int2": jnp.array([1, -2], jnp.int2),
    "of NumPy": np.array([1, -2], jnp.int4),
    "key of old": jax.random.PRNGKey(0),
}
GOOD, BAD = jnp.array([3.0, 4.0]), jnp.array([1.0, np.nan])


def same(one: Any, other: Any) -> bool:
    if isinstance(other, jax.Array):  # a key
        return bool(jnp.all(one == other)) and one.dtype == other.dtype
    return one is other


good_and_bad = pytest.mark.parametrize("x", [GOOD, BAD], ids=["good", "bad"])


@wrappers
@good_and_bad
def test_updates_that_are_no_numbers_come_out_as_they_are(name: str, x: Any) -> None:
    wrapped = WRAPPERS[name](clipax.clip_by_global_norm(1.0))
    updates = {**NO_NUMBERS, "x": x}
    state = wrapped.init(updates)
    for _ in range(2):
        out, state = wrapped.update(updates, state, updates)
        for kind, leaf in NO_NUMBERS.items():
            assert same(out[kind], leaf), kind
    compiled = jax.jit(lambda x: wrapped.update({**updates, "x": x}, state, updates)[0]["x"])(x)
    assert bool(jnp.isfinite(compiled).all()) == (x is GOOD or name == "skip_step")


def carrying(leaf: Any) -> Any:
    """A transformation whose state holds the leaf beside a count."""

    def init(params: Any) -> Any:
        return {"leaf": leaf, "count": jnp.zeros((), jnp.int32)}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {**state, "count": state["count"] + 1}

    return optax.GradientTransformation(init, update)


@wrappers
@good_and_bad
def test_states_that_are_no_numbers_stay_as_they_are(name: str, x: Any) -> None:
    wrapped = WRAPPERS[name](carrying(NO_NUMBERS))
    start = wrapped.init({"x": x})

    def counted(x: Any) -> Any:
        """Compiled, what no program takes can only be closed over."""
        state = wrapped.update({"x": x}, start)[1].inner_state
        for kind, leaf in NO_NUMBERS.items():
            assert leaf is state["leaf"][kind], kind
        return state["count"]

    state = wrapped.update({"x": x}, start)[1].inner_state
    for kind, leaf in NO_NUMBERS.items():
        assert leaf is state["leaf"][kind], kind
    expected = int(x is GOOD or name in HOLD_NOTHING_BACK)
    assert int(state["count"]) == int(jax.jit(counted)(x)) == expected


@wrappers
@pytest.mark.parametrize("leaf", [3, 1_000_003, 2**40, True, 1.5, -0.0, 2j], ids=repr)
def test_static_numbers_in_a_state_stay_numbers_of_python(name: str, leaf: Any) -> None:
    wrapped = WRAPPERS[name](carrying(leaf))
    for x in (GOOD, BAD):
        _, state = wrapped.update({"x": x}, wrapped.init({"x": x}))
        assert type(state.inner_state["leaf"]) is type(leaf)
        assert repr(state.inner_state["leaf"]) == repr(leaf)


@pytest.mark.slow_but(4)
@wrappers
@good_and_bad
def test_small_integers_are_chosen_as_others_are(name: str, x: Any) -> None:
    updates = {**SMALL_INTEGERS, "x": x}
    wrapped = WRAPPERS[name](clipax.clip_by_global_norm(1.0))
    for update in (wrapped.update, jax.jit(wrapped.update)):
        out, _ = update(updates, wrapped.init(updates), updates)
        for kind, leaf in SMALL_INTEGERS.items():
            is_skipped = name == "skip_step" and x is BAD
            trees.assert_bitwise(out[kind], jnp.zeros_like(leaf) if is_skipped else leaf)

    def flipped(leaf: Any) -> Any:
        return jnp.asarray(leaf) ^ 1

    def update_leaves(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, jax.tree.map(flipped, state)

    counting = optax.GradientTransformation(lambda _: SMALL_INTEGERS, update_leaves)
    wrapped = WRAPPERS[name](counting)
    _, state = jax.jit(wrapped.update)({"x": x}, wrapped.init({"x": x}))
    is_kept = x is BAD and name not in HOLD_NOTHING_BACK
    for kind, leaf in SMALL_INTEGERS.items():
        trees.assert_bitwise(state.inner_state[kind], leaf if is_kept else flipped(leaf))


@pytest.mark.slow_but(5)
@wrappers
@good_and_bad
def test_keys_in_a_state_are_chosen(name: str, x: Any) -> None:
    keys = {kind: leaf for kind, leaf in NO_NUMBERS.items() if "key" in kind}

    def split(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, jax.tree.map(moved, state)

    def moved(key: Any) -> Any:
        fold = jax.random.fold_in
        for _ in range(key.ndim):
            fold = jax.vmap(fold, (0, None))
        return fold(key, 7)

    wrapped = WRAPPERS[name](optax.GradientTransformation(lambda _: keys, split))
    is_kept = x is BAD and name not in HOLD_NOTHING_BACK
    for update in (wrapped.update, jax.jit(wrapped.update)):
        _, state = update({"x": x}, wrapped.init({"x": x}))
        for kind, key in keys.items():
            assert same(state.inner_state[kind], key if is_kept else moved(key)), kind


@pytest.mark.parametrize("name", ["skip_step", "u_clip", "clip21"])
def test_a_static_state_that_changes_is_chosen_where_that_is_known(name: str) -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {"phase": "late", "rule": double}

    start = {"phase": "early", "rule": len}
    wrapped = WRAPPERS[name](optax.GradientTransformation(lambda _: start, update))
    for x, phase, rule in ((GOOD, "late", double), (BAD, "early", len)):
        _, state = wrapped.update({"x": x}, wrapped.init({"x": x}))
        assert state.inner_state == {"phase": phase, "rule": rule}
    with pytest.raises(ValueError, match=r"can change only numbers, arrays and keys, got both"):
        jax.jit(lambda x: wrapped.update({"x": x}, wrapped.init({"x": x}))[0])(GOOD)
