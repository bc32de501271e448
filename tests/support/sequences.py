"""A long sequence of updates, and the arithmetic in NumPy float64 that clipping should equal."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax

COUNT = 60
SHAPES = {
    "conv": (2, 3, 2, 4),
    "dense": {"bias": (6,), "kernel": (5, 6)},
    "phase": (3, 2),
    "scale": (),
}


def spiky(shapes: Any = SHAPES, dtype: Any = np.float32, seed: int = 0) -> Any:
    """Updates of varied sizes, stacked: spikes, zeros, a plateau, a whisper, a loud leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=_is_shape)
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(sigma=1.0, size=COUNT)
    sizes[[7, 23, 51]] *= 1e3
    sizes[[11, 12, 40]] = 0.0
    sizes[45] = 1e-6

    def stacked(path: Any, shape: tuple[int, ...], is_first: bool) -> np.ndarray:
        values = rng.normal(size=(COUNT, *shape))
        if "phase" in jax.tree_util.keystr(path):
            values = values + 1j * rng.normal(size=values.shape)
        values = values * sizes.reshape((-1,) + (1,) * len(shape))
        values[30:37] = values[30]
        values[17] *= 500.0 if is_first else 1.0
        entries = values.reshape(COUNT, -1)
        entries[19, 0] *= 300.0
        entries[20:25, ::3] = 0.0
        kind = np.result_type(dtype, np.complex64) if np.iscomplexobj(values) else dtype
        return values.astype(kind)

    return jax.tree.unflatten(
        treedef, [stacked(path, shape, row == 0) for row, (path, shape) in enumerate(leaves)]
    )


LONG_COUNT = 400


def long_run(seed: int = 0, spread: float = 0.5) -> dict[str, np.ndarray]:
    """Updates of two leaves over 400 steps: spikes, plateaus, zeros, a new level, single NaNs.

    Each leaf has norms of its own; the NaNs come to one leaf at a time.
    """
    rng = np.random.default_rng([seed, 400])
    sequence = {}
    for name, size in (("b", 2), ("w", 3)):
        norms = rng.lognormal(sigma=spread, size=LONG_COUNT)
        norms[[60, 61, 190, 301]] *= 50.0
        norms[100:160] = norms[100]
        norms[250:] *= 3.0
        norms[[9, 40, 200, 201, 330]] = 0.0
        directions = rng.normal(size=(LONG_COUNT, size))
        directions[100:160] = directions[100]
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        sequence[name] = (directions * norms[:, None]).astype(np.float32)
    sequence["w"][[6, 45, 222], 1] = np.nan
    sequence["b"][[46, 310], 0] = np.nan
    return sequence


def long_norms(sequence: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The global norm of every step in float64, and each leaf's."""
    leaves = {
        name: np.sqrt(np.sum(np.square(leaf.astype(np.float64)), axis=1))
        for name, leaf in sequence.items()
    }
    return np.sqrt(sum(norm**2 for norm in leaves.values())), leaves


def run_norms(method: Any, norms: Any) -> tuple[np.ndarray, Any]:
    """The norms after clipping, and the states, of a run on vectors of one entry."""
    clipped, states = scanned(method, np.asarray(norms, np.float32)[:, None])
    return clipped[:, 0], states


# Near one, with a spike: short enough to follow by hand.
FEW_NORMS = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 5.0, 1.0, 1.3, 0.7]


def assert_bounded_by(
    method: Any,
    sequence: dict[str, np.ndarray],
    norms: Any,
    bounds: Any,
    rtol: float = 1e-5,
) -> None:
    """Holds a run against the norms and bounds of every step, global or by leaf.

    A bound of NaN is not compared: there the norm is none, and nothing is bounded.
    """
    clipped, states = scanned(method, sequence)
    one_for_all = isinstance(norms, np.ndarray)
    shares = []
    for name, leaf in sequence.items():
        norm, bound, got = (
            (tree if one_for_all else tree[name])
            for tree in (norms, bounds, states._asdict()["max_norm"])
        )
        is_known = ~np.isnan(bound)
        np.testing.assert_allclose(got[is_known], bound[is_known], rtol=rtol)
        with np.errstate(invalid="ignore"):
            factor = np.where(np.isnan(norm), np.nan, hard(norm, bound))
        np.testing.assert_allclose(clipped[name], leaf * factor[:, None], rtol=2 * rtol)
        shares.append(np.mean(factor < 1))
    assert 0.001 < max(shares) < 0.999, "the sequence tries only one side"


def long_entries(seed: int = 0) -> dict[str, np.ndarray]:
    """Updates for methods that know each entry, over 400 steps; `phase` is complex.

    Entries of several sizes, spikes of one entry and of all, plateaus, zeros, a new level, an
    entry that wakes late, one that falls asleep, single NaNs and one inf.
    """
    rng = np.random.default_rng([seed, 401])
    sizes = rng.lognormal(sigma=0.5, size=(LONG_COUNT, 1))
    sizes[[60, 61, 190, 301]] *= 300.0
    sizes[250:] *= 5.0
    sizes[[0, 9, 40, 200, 201, 330]] = 0.0
    sequence = {}
    for name, shape in {"grid": (4, 3), "phase": (3,), "scale": ()}.items():
        values = rng.normal(size=(LONG_COUNT, math.prod(shape)))
        if name == "phase":
            values = values + 1j * rng.normal(size=values.shape)
        values *= sizes * np.logspace(0, -4, values.shape[1])
        values[100:160] = values[100]
        for step in (30, 77, 130, 180, 260, 361):
            values[step, step % values.shape[1]] *= 1e4
        sequence[name] = values
    sequence["grid"][:240, 4] = 0.0
    sequence["grid"][170:, 5] = 0.0
    sequence["grid"][[6, 45, 222], 1] = np.nan
    sequence["grid"][270, 2] = -np.inf
    sequence["phase"][[46, 310], 0] = np.nan
    kinds = {"grid": np.float32, "phase": np.complex64, "scale": np.float32}
    shapes = {"grid": (4, 3), "phase": (3,), "scale": ()}
    return {
        name: values.reshape(LONG_COUNT, *shapes[name]).astype(kinds[name])
        for name, values in sequence.items()
    }


def is_finite_step(updates: dict[str, np.ndarray]) -> bool:
    return all(bool(np.isfinite(leaf).all()) for leaf in updates.values())


def assert_follows(
    build: Callable[..., Any], oracle: Callable[..., Any], setting: dict[str, Any], seed: int
) -> None:
    """Holds `build(setting)` against the bounds that `oracle` gives for all global norms."""
    sequence = long_run(seed)
    norms, _ = long_norms(sequence)
    assert_bounded_by(build(setting), sequence, norms, oracle(norms, **setting))


def assert_follows_leaf_by_leaf(
    build: Callable[..., Any], oracle: Callable[..., Any], setting: dict[str, Any]
) -> None:
    """The same with a history for each leaf."""
    sequence = long_run(2)
    _, norms = long_norms(sequence)
    bounds = {name: oracle(norm, **setting) for name, norm in norms.items()}
    assert_bounded_by(build(setting, norm=clipax.leaf_norm), sequence, norms, bounds)


def at(sequence: Any, step: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[step]), sequence)


def scanned(
    method: Any, sequence: Any, params: Any = None, read: Any = lambda state: state
) -> Any:
    """What comes out of every step, and what is read from the state after it."""

    def step(state: Any, updates: Any) -> Any:
        clipped, state = method.update(updates, state, params)
        return state, (clipped, read(state))

    first = at(sequence, 0)
    run = jax.jit(lambda xs: jax.lax.scan(step, method.init(first), xs)[1])
    return jax.tree.map(np.asarray, run(sequence))


def stepped(method: Any, steps: list[Any]) -> tuple[list[Any], Any]:
    """What comes out of every step, and the last state."""
    state, outputs, update = method.init(steps[0]), [], jax.jit(method.update)
    for updates in steps:
        clipped, state = update(updates, state)
        outputs.append(clipped)
    return outputs, state


def followed(step: Any, sequence: dict[str, np.ndarray]) -> Any:
    """What a rule in NumPy says of each step, stacked as by `scanned`."""
    results = [
        step({name: leaf[row] for name, leaf in sequence.items()}) for row in range(LONG_COUNT)
    ]
    return jax.tree.map(lambda *rows: np.stack(rows), *results)


def vectors(*entries: Any) -> list[Any]:
    return [jnp.atleast_1d(jnp.asarray(entry, jnp.float32)) for entry in entries]


def over_devices(steps: list[Any]) -> list[Any]:
    """The steps with the first axis of each leaf over four devices."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    return [jax.device_put(updates, sharding) for updates in steps]


def assert_all_devices_know_of_a_bad_step(method: Any) -> None:
    """Holds a run over four devices, one of which has a NaN, against the same run on one."""
    for bad in (0, 3):
        steps = vectors([2, 1, 2, 2], [2, 2, 2, 2], [2, 80, 2, -2], [1, 1, 1, 1])
        steps[1] = steps[1].at[bad].set(np.nan)
        outputs, state = stepped(method, steps)
        got, got_state = stepped(method, over_devices(steps))
        trees.assert_close(jax.device_get(got), jax.device_get(outputs), rtol=1e-6)
        trees.assert_close(jax.device_get(got_state), jax.device_get(state), rtol=1e-6)


def in_two_shards(method: Any, whole: Any, steps: list[Any]) -> Iterator[tuple[Any, ...]]:
    """After each step: what comes out of `method` for two shards, its state, and those of `whole`.

    The shards are halves of vectors of four entries, on an axis named "shards".
    """
    mapped = jax.jit(jax.vmap(method.update, axis_name="shards"))
    state = jax.vmap(method.init, axis_name="shards")(jnp.zeros((2, 2)))
    update, whole_state = jax.jit(whole.update), whole.init(jnp.zeros(4))
    for updates in steps:
        clipped, state = mapped(updates.reshape(2, 2), state)
        expected, whole_state = update(updates, whole_state)
        yield clipped, state, expected, whole_state


def assert_has_a_wide_history(method: Any, steps: list[Any]) -> None:
    """Holds a run on narrow updates against the run on the same updates in float32."""
    outputs, state = stepped(method, steps)
    wide, wide_state = stepped(method, [updates.astype(jnp.float32) for updates in steps])
    trees.assert_bitwise(outputs[-1], wide[-1].astype(steps[-1].dtype))
    trees.assert_bitwise(state, wide_state)


def p_norm(x: np.ndarray, ord: float = 2.0, axes: tuple[int, ...] | None = None) -> np.ndarray:
    """The norm at each step, over all axes of a leaf or some, which keep size one."""
    modulus = np.abs(x.astype(np.result_type(x.dtype, np.float64)))
    summed = tuple(axis + 1 for axis in (range(x.ndim - 1) if axes is None else axes))
    if ord == np.inf:
        return modulus.max(summed, keepdims=True, initial=0.0)
    return (modulus**ord).sum(summed, keepdims=True) ** (1.0 / ord)


def by_leaf(function: Callable[..., Any], sequence: Any, *rest: Any) -> Any:
    """Maps `function(path, leaf, ...)`, with paths such as "dense/kernel"."""

    def named(path: Any, *leaves: Any) -> Any:
        return function("/".join(str(key.key) for key in path), *leaves)

    return jax.tree_util.tree_map_with_path(named, sequence, *rest)


def by_path(tree: Any) -> Any:
    """A tree as a dict from paths to leaves, as norms are kept; one array as it is."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    by_path = {"/".join(str(key.key) for key in path): leaf for path, leaf in found}
    return by_path.get("", by_path)


def hard(norm: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """`min(1, bound / norm)`, and 1 for a norm of zero."""
    return np.where(norm > bound, bound / np.where(norm > 0, norm, 1.0), 1.0)


def over_steps(bound: Any, norm: np.ndarray) -> np.ndarray:
    """A number, or one for each step, in the shape of the norms."""
    return np.zeros_like(norm) + np.reshape(bound, (-1,) + (1,) * (norm.ndim - 1))


def assert_clips(
    method: Any, sequence: Any, norms: Any, bounds: Any, params: Any = None, rtol: float = 2e-6
) -> None:
    """Holds a method against `norms` and `bounds` of every step, leaf by leaf.

    Both are trees like the sequence, with None where nothing is measured, or one array.
    """
    clipped, states = scanned(method, sequence, params)
    factors = jax.tree.map(hard, norms, bounds)
    recorded = (states.norm, states.max_norm, states.coefficient)
    for got, expected in zip(recorded, (norms, bounds, factors), strict=True):
        expected = by_path(expected)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other.reshape(one.shape), rtol=rtol)
    every_factor = np.concatenate([factor.ravel() for factor in jax.tree.leaves(factors)])
    assert 0.05 < np.mean(every_factor < 1) < 0.95, "the sequence tries only one side"

    treedef = jax.tree.structure(sequence)
    one_for_all = isinstance(factors, np.ndarray)
    each = [factors] * treedef.num_leaves if one_for_all else treedef.flatten_up_to(factors)
    for got, leaf, factor in zip(
        jax.tree.leaves(clipped), jax.tree.leaves(sequence), each, strict=True
    ):
        assert got.dtype == leaf.dtype
        if factor is None:
            factor = np.ones((COUNT,) + (1,) * (leaf.ndim - 1))
        factor = np.broadcast_to(factor.reshape(COUNT, *_inner(factor, leaf)), leaf.shape)
        np.testing.assert_allclose(got, leaf * factor, rtol=rtol)
        assert (got == leaf)[factor == 1].all()


def _inner(factor: np.ndarray, leaf: np.ndarray) -> tuple[int, ...]:
    return factor.shape[1:] if factor.ndim == leaf.ndim else (1,) * (leaf.ndim - 1)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


# Entries whose squares overflow or vanish in their own dtype.
far_out = pytest.mark.parametrize(
    ("dtype", "size"), [("float16", 300.0), ("float32", 1e20), ("float32", 1e-30)]
)


def unmeasured() -> dict[str, Any]:
    """A leaf of every kind that passes through as it is."""
    return {
        "bool": jnp.array([True, False]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "integer": jnp.array([1, 2_000_000_000]),
        "masked": optax.MaskedNode(),
        "none": None,
        "python": 7,
    }


def beside_unmeasured(method: Any, leaf: Any, params: Any = None, **others: Any) -> Any:
    """What a method makes of one leaf, and its state, beside others that must come out untouched.

    These are `unmeasured()` and `others`. `params` has the leaves that are not like the updates.
    """
    others = unmeasured() | others
    updates = {"float": leaf, **others}
    params = updates | (params or {})
    clipped, state = method.update(updates, method.init(params), params)
    assert_untouched(clipped, others)
    return clipped["float"], state


def assert_untouched(clipped: dict[str, Any], others: dict[str, Any]) -> None:
    for name in others:
        trees.assert_bitwise(clipped[name], others[name])
        assert type(clipped[name]) is type(others[name])


# Every rank, with axes of length one too, and what each convention of units sums over.
RANKS = {
    "column": (4, 1),
    "matrix": (3, 4),
    "rank3": (2, 3, 4),
    "rank4": (2, 3, 2, 4),
    "rank5": (2, 1, 3, 2, 2),
    "rank6": (2, 1, 2, 1, 2, 3),
    "row": (1, 4),
    "scalar": (),
    "thin": (1, 1, 4, 1),
    "vector": (5,),
}
ALL_BUT_LAST = {
    "column": (0,),
    "matrix": (0,),
    "rank3": (0, 1),
    "rank4": (0, 1, 2),
    "rank5": (0, 1, 2, 3),
    "rank6": (0, 1, 2, 3, 4),
    "row": (0,),
    "scalar": (),
    "thin": (0, 1, 2),
    "vector": (0,),
}
SUMMED = {
    "output_last": ALL_BUT_LAST,
    "output_first": {
        "column": (1,),
        "matrix": (1,),
        "rank3": (1, 2),
        "rank4": (1, 2, 3),
        "rank5": (1, 2, 3, 4),
        "rank6": (1, 2, 3, 4, 5),
        "row": (1,),
        "scalar": (),
        "thin": (1, 2, 3),
        "vector": (0,),
    },
    "nfnets": {
        **ALL_BUT_LAST,
        "column": (0, 1),
        "rank3": (0,),
        "row": (0, 1),
        "thin": (0, 1, 2, 3),
    },
    "whole_leaf": {name: tuple(range(len(shape))) for name, shape in RANKS.items()},
}
