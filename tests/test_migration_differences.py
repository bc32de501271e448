"""Where clipax differs from the peers of `test_migration.py`, with both numbers.

Each difference in `docs/howto/migration.md` is a row here: what the peer gives, seen
wherever it is installed, and what clipax gives.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipax

# -- The factor, to the last bit ---------------------------------------------------------------


def _norms(max_norm: float) -> np.ndarray:
    triples = [5, 13, 17, 25, 29, 41, 1, 2, 1e6]
    some = np.exp(np.random.default_rng(1).normal(0, 4, 2000))
    above = np.nextafter(np.float32(max_norm), np.inf, dtype=np.float32)
    return np.float32([*triples, *some, 0.0, max_norm * 0.5, above + np.float32(1e-5)])


def _torch_factor(norms: np.ndarray, max_norm: float) -> np.ndarray:
    # torch divides a number by a tensor by multiplying with the tensor's reciprocal.
    reciprocal = np.float32(1) / (norms + np.float32(1e-6))
    return np.minimum(np.float32(max_norm) * reciprocal, np.float32(1))


def _factor(norms: np.ndarray, max_norm: float) -> np.ndarray:
    clip = clipax.clip_by_global_norm(max_norm, eps=1e-6)
    state = clip.init(jnp.ones(1))

    def factor(norm: jax.Array) -> jax.Array:
        return clip.update(jnp.ones(1), state, norm=norm)[0][0]

    return np.asarray(jax.jit(jax.vmap(factor))(jnp.asarray(norms)))


@pytest.mark.parametrize("max_norm", [1.0, 0.25, 8.0, 0.1, 6.5])
def test_with_eps_the_factor_is_torchs_to_the_last_bit_for_the_same_norm(max_norm):
    norms = _norms(max_norm)
    np.testing.assert_array_equal(_factor(norms, max_norm), _torch_factor(norms, max_norm))


@pytest.mark.parametrize("max_norm", [1.0, 0.25, 8.0, 0.1, 6.5])
def test_with_eps_the_factor_is_torchs_to_one_unit_in_the_last_place(max_norm):
    norms = _norms(max_norm)
    np.testing.assert_array_max_ulp(_factor(norms, max_norm), _torch_factor(norms, max_norm), 1)


@pytest.mark.parametrize("max_norm", [1.0, 0.25, 8.0, 0.1, 6.5])
def test_torch_itself_has_the_factor_that_its_rule_says(max_norm):
    torch = pytest.importorskip("torch")
    weight, norms = torch.nn.Parameter(torch.ones(())), _norms(max_norm)
    factors = []
    for norm in norms:
        weight.grad = torch.ones(())
        torch.nn.utils.clip_grads_with_norm_([weight], max_norm, torch.tensor(norm))
        factors.append(weight.grad.item())
    np.testing.assert_array_equal(np.float32(factors), _torch_factor(norms, max_norm))


def test_a_norm_of_integers_is_measured_to_the_last_bit():
    for legs, norm in {(3, 4): 5, (5, 12): 13, (8, 15): 17, (7, 24): 25, (20, 21): 29}.items():
        info = clipax.clip_tree(jnp.asarray(legs, jnp.float32), clipax.clip_by_global_norm(1.0))[1]
        assert float(info["norm"]) == norm


# -- Differences, row by row -------------------------------------------------------------------


def _torch(name: str, leaves: list[Any], *args: Any) -> Any:
    torch = pytest.importorskip("torch")
    weights = [torch.nn.Parameter(torch.zeros(len(leaf))) for leaf in leaves]
    for weight, leaf in zip(weights, leaves, strict=True):
        weight.grad = torch.tensor(leaf)
    getattr(torch.nn.utils, name)(weights, *args)
    return [weight.grad.numpy() for weight in weights]


def _timm(mode: str, leaves: list[Any], value: float) -> Any:
    torch, utils = pytest.importorskip("torch"), pytest.importorskip("timm.utils")
    weight = torch.nn.Parameter(torch.zeros(len(leaves[0])))
    weight.grad = torch.tensor(leaves[0])
    utils.dispatch_clip_grad([weight], value, mode)
    return [weight.grad.numpy()]


def _tf(name: str, leaves: list[Any], *args: Any) -> Any:
    tf = pytest.importorskip("tensorflow")
    tensors = [tf.constant(leaf, tf.float32) for leaf in leaves]
    if name == "clip_by_global_norm":
        return [leaf.numpy() for leaf in tf.clip_by_global_norm(tensors, *args)[0]]
    return [getattr(tf, name)(tensor, *args).numpy() for tensor in tensors]


def _keras(argument: str, leaves: list[Any], bound: float) -> Any:
    keras = pytest.importorskip("keras")
    variables = [keras.Variable(np.zeros(len(leaf), np.float32)) for leaf in leaves]
    optimizer = keras.optimizers.SGD(learning_rate=1.0, **{argument: bound})
    optimizer.apply([keras.ops.convert_to_tensor(np.float32(leaf)) for leaf in leaves], variables)
    with warnings.catch_warnings():
        # Keras and TensorFlow have not followed NumPy 2 here yet.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return [-keras.ops.convert_to_numpy(variable) for variable in variables]


class Difference(NamedTuple):
    peer: Callable[..., Any]
    name: str
    leaves: list[Any]
    arguments: tuple[Any, ...]
    they_give: Any
    clipax: Callable[..., optax.GradientTransformation]
    we_give: Any
    """The clipped leaves, or ValueError."""


def _torch_total(max_norm: float, ord: float = 2.0) -> optax.GradientTransformation:
    return clipax.clip_by_global_norm(max_norm, ord, eps=1e-6)


def _tf_value(lowest: Any, highest: Any) -> optax.GradientTransformation:
    return clipax.clip_by_value(highest, lowest)


_leaf, _total = clipax.clip_by_leaf_norm, clipax.clip_by_global_norm
_value, _agc = clipax.clip_by_value, clipax.adaptive_grad_clip
_INF, _NAN, _BAD = math.inf, math.nan, ValueError
_34, _0, _HUGE, _DIAGONAL = [[3.0, 4.0]], [[0.0, 0.0]], [[1e20, 1e20]], [[0.5**0.5, 0.5**0.5]]
_ONE_INF = [[3.0, _INF], [4.0]]
_ALL_NAN = [[_NAN, _NAN], [_NAN]]
_DIFFERENCES = [
    # torch: a negative bound turns the gradient round; a float32 norm overflows; inf * 0 at a
    # bound of inf; at the bound 1e-6 counts; orders <= 0; a negative value reverses the clamp.
    Difference(_torch, "clip_grad_norm_", _34, (-1.0,), [[-0.6, -0.8]], _torch_total, _BAD),
    Difference(_torch, "clip_grad_norm_", _HUGE, (1.0,), _0, _torch_total, _DIAGONAL),
    Difference(_torch, "clip_grad_norm_", _ONE_INF, (_INF,), _ALL_NAN, _torch_total, _ONE_INF),
    Difference(
        _torch,
        "clip_grad_norm_",
        [[3e-6, 4e-6]],
        (5e-6,),
        [[2.5e-6, 1e-5 / 3]],
        _total,
        [[3e-6, 4e-6]],
    ),
    Difference(_torch, "clip_grad_norm_", _34, (1.0, -_INF), [[1.0, 4 / 3]], _torch_total, _BAD),
    Difference(_torch, "clip_grad_norm_", _34, (1.0, 0.0), _34, _torch_total, _BAD),
    Difference(_torch, "clip_grad_value_", _34, (-1.0,), [[-1.0, -1.0]], _value, _BAD),
    # timm: the update's norm has a floor of 1e-6, here under parameters of zero.
    Difference(_timm, "agc", [[5e-7]], (1e-4,), [[5e-8]], _agc, [[1e-7]]),
    Difference(_timm, "agc", _34, (-1.0,), [[-6e-4, -8e-4]], _agc, _BAD),
    # TensorFlow: zero may lie outside the bounds, a bound may be an array; a negative norm
    # counts as zero; 0 / 0; inf / inf; in the global norm a negative bound counts as none.
    Difference(_tf, "clip_by_value", [[0.0, 3.0]], (0.5, 1.0), [[0.5, 1.0]], _tf_value, _BAD),
    Difference(
        _tf,
        "clip_by_value",
        _34,
        ([0.0, 0.0], np.float32([1.0, 2.0])),
        [[1.0, 2.0]],
        _tf_value,
        _BAD,
    ),
    Difference(_tf, "clip_by_norm", _34, (-1.0,), _0, _leaf, _BAD),
    Difference(_tf, "clip_by_norm", _0, (0.0,), [[_NAN, _NAN]], _leaf, _0),
    Difference(_tf, "clip_by_norm", _34, (_INF,), [[_NAN, _NAN]], _leaf, _34),
    Difference(_tf, "clip_by_norm", _HUGE, (1.0,), _0, _leaf, _DIAGONAL),
    Difference(_tf, "clip_by_global_norm", _34, (-1.0,), _34, _total, _BAD),
    Difference(_tf, "clip_by_global_norm", _0, (0.0,), [[_NAN, _NAN]], _total, _0),
    Difference(_tf, "clip_by_global_norm", _34, (_INF,), [[_NAN, _NAN]], _total, _34),
    Difference(_tf, "clip_by_global_norm", _HUGE, (1.0,), [[_NAN, _NAN]], _total, _DIAGONAL),
    Difference(
        _tf, "clip_by_global_norm", _ONE_INF, (1.0,), _ALL_NAN, _total, [[0.0, _NAN], [0.0]]
    ),
    # Keras: zero and less turn clipping off; the global norm is TensorFlow's.
    *(
        Difference(_keras, name, _34, (bound,), _34, ours, _0 if bound == 0 else _BAD)
        for name, ours in {
            "clipnorm": _leaf,
            "global_clipnorm": _total,
            "clipvalue": _value,
        }.items()
        for bound in (0.0, -1.0)
    ),
    Difference(_keras, "clipnorm", _HUGE, (1.0,), _0, _leaf, _DIAGONAL),
    Difference(_keras, "global_clipnorm", _HUGE, (1.0,), [[_NAN, _NAN]], _total, _DIAGONAL),
    Difference(
        _keras, "global_clipnorm", _ONE_INF, (1.0,), _ALL_NAN, _total, [[0.0, _NAN], [0.0]]
    ),
]
_every_difference = pytest.mark.parametrize(
    "row", _DIFFERENCES, ids=lambda row: f"{row.peer.__name__}-{row.name}-{row.arguments}"
)


@_every_difference
def test_where_a_peer_differs_clipax_does_what_the_table_says(row):
    if row.we_give is ValueError:
        with pytest.raises(ValueError, match=r"max_norm|max_value|min_value|ratio|ord"):
            _clipped(row)
    else:
        _assert_close(_clipped(row), row.we_give)


@_every_difference
def test_the_peer_itself_differs_as_the_table_says(row):
    _assert_close(row.peer(row.name, row.leaves, *row.arguments), row.they_give)


def _clipped(row: Difference) -> Any:
    leaves = [jnp.asarray(leaf, jnp.float32) for leaf in row.leaves]
    params = jax.tree.map(jnp.zeros_like, leaves)
    return clipax.clip_tree(leaves, row.clipax(*row.arguments), params)[0]


def _assert_close(actual: Any, expected: Any) -> None:
    for leaf, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=0)


# -- What is an argument there and not here ----------------------------------------------------


_NOT_FINITE = pytest.mark.parametrize(
    ("entry", "expected"), [(_INF, [[0.0, _NAN], [0.0]]), (_NAN, _ALL_NAN)]
)


@_NOT_FINITE
def test_the_recorded_norm_says_what_torchs_error_if_nonfinite_raises_for(entry, expected):
    leaves = [jnp.array([3.0, entry]), jnp.array([4.0])]
    clipped, info = clipax.clip_tree(leaves, _torch_total(1.0))
    assert not np.isfinite(info["norm"])
    _assert_close(clipped, expected)


@_NOT_FINITE
def test_torch_itself_gives_the_same_and_raises_on_demand(entry, expected):
    leaves = [[3.0, entry], [4.0]]
    _assert_close(_torch("clip_grad_norm_", leaves, 1.0), expected)
    with pytest.raises(RuntimeError, match="non-finite"):
        _torch("clip_grad_norm_", leaves, 1.0, 2.0, True)


def test_a_known_norm_serves_as_tensorflows_use_norm():
    clipped, info = clipax.clip_tree(jnp.array(_34), _total(1.0), norm=jnp.array(10.0))
    _assert_close(clipped, [[0.3, 0.4]])
    assert float(info["norm"]) == 10.0


def test_tensorflow_itself_gives_the_same_with_use_norm():
    _assert_close(_tf("clip_by_global_norm", _34, 1.0, np.float32(10.0)), [[0.3, 0.4]])


def test_several_clips_chain_where_keras_takes_one():
    clip = optax.chain(clipax.clip_by_value(3.0), clipax.clip_by_leaf_norm(1.0))
    _assert_close(clipax.clip_tree(jnp.array([[3.0, 9.0]]), clip)[0], _DIAGONAL)


def test_keras_itself_takes_one_only():
    keras = pytest.importorskip("keras")
    with pytest.raises(ValueError, match="Only one of"):
        keras.optimizers.SGD(clipvalue=3.0, clipnorm=1.0)


# -- bitsandbytes: a rule with a history, known by its formula alone ---------------------------


def _bitsandbytes_bounds(norms: np.ndarray, rank: int) -> np.ndarray:
    """A hundred slots, all with the first norm at first; the bound is the norm of that rank."""
    slots = np.full(100, norms[0])
    bounds = []
    for step, norm in enumerate(norms, start=1):
        slots[step % 100] = norm
        bounds.append(np.sort(slots)[rank])
    return np.array(bounds)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("rank", [1, 5, 98])
def test_autoclip_of_each_leaf_is_bitsandbytes_percentile_clipping_once_its_slots_are_full(rank):
    sizes = np.exp(np.random.default_rng(0).normal(size=(2, 250))).astype(np.float32)
    clip = clipax.autoclip(rank / 99, 100, norm=clipax.leaf_norm)

    def step(state, size):
        updates = {"a": jnp.array([0.6, 0.8]) * size[0], "b": jnp.array([1.0]) * size[1]}
        return clip.update(updates, state)[::-1]

    zeros = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    _, clipped = jax.lax.scan(step, clip.init(zeros), jnp.asarray(sizes.T))
    for norms, leaf in zip(sizes, clipped.values(), strict=True):
        ends = np.linalg.norm(np.float64(leaf), axis=1)
        bounds = _bitsandbytes_bounds(np.float64(norms), rank)
        expected = np.minimum(norms, bounds)
        np.testing.assert_allclose(ends[99:], expected[99:], rtol=1e-6)
        assert np.mean(norms[99:] > bounds[99:]) > 0
        assert not np.allclose(ends[:99], expected[:99], rtol=1e-2)
