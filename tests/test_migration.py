"""Every row of `docs/howto/migration.md`: the peer's rule, the peer itself, and clipax.

The rules are the documented formulas in NumPy, so that every row is checked wherever the
tests run; the peers themselves are called where they are installed. What is a drop-in for
optax by name is in `test_optax_drop_in.py`.
"""

import functools
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

Tree = dict[str, np.ndarray]
_RNG = np.random.default_rng(0)
_SHAPES = {"w": (3, 4), "b": (4,), "k": (2, 3, 2, 2)}


def _random(scale: float = 1.0, **scales: float) -> Tree:
    return {
        name: (scales.get(name, scale) * _RNG.normal(size=shape)).astype(np.float32)
        for name, shape in _SHAPES.items()
    }


_ZERO = _random(0.0)
# Its leaves have the norms 5, 12 and 0, the tree 13, 19 (p = 1) and 12 (p = inf): bounds below.
_TRIPLES = _ZERO | {
    "w": np.pad(np.float32([[3, 4]]), ((0, 2), (0, 2))),
    "b": np.float32([0, 12, 0, 0]),
}
_TREES = {"random": _random(), "one_hot_leaf": _random(w=1e3), "triples": _TRIPLES, "zero": _ZERO}
_PARAMS = _random()
_BOUNDS = (0.5, 5.0, 12.0, 13.0, 19.0, 1e3)


# -- The rules of the peers ------------------------------------------------------------------


def _p_norm(array: np.ndarray, ord: float, axes: Any = None) -> np.ndarray:
    modulus = np.abs(array.astype(np.float64))
    if ord == math.inf:
        return modulus.max(axis=axes, keepdims=True)
    return (modulus**ord).sum(axis=axes, keepdims=True) ** (1 / ord)


def _total(tree: Tree, ord: float = 2.0) -> float:
    return _p_norm(np.concatenate([leaf.ravel() for leaf in tree.values()]), ord).item()


def _torch_norm(tree: Tree, params: Tree, bound: float, ord: float = 2.0) -> Tree:
    factor = min(1.0, bound / (_total(tree, ord) + 1e-6))
    return {name: leaf * factor for name, leaf in tree.items()}


def _value(tree: Tree, params: Tree, bound: float, lowest: float = -1.0) -> Tree:
    return {name: np.clip(leaf, lowest * bound, bound) for name, leaf in tree.items()}


def _tf_norm(tree: Tree, params: Tree, bound: float, axes: Any = None) -> Tree:
    return {
        name: leaf * bound / np.maximum(_p_norm(leaf, 2.0, axes), bound)
        for name, leaf in tree.items()
    }


def _tf_global(tree: Tree, params: Tree, bound: float) -> Tree:
    return {name: leaf * bound / max(_total(tree), bound) for name, leaf in tree.items()}


def _mean_norm(tree: Tree, params: Tree, bound: float, power: float) -> Tree:
    """With a power of 1 TensorFlow's average norm, with 1/2 optax's root mean square."""
    return {
        name: leaf / np.maximum(1.0, _p_norm(leaf, 2.0) / leaf.size**power / bound)
        for name, leaf in tree.items()
    }


def _agc(tree: Tree, params: Tree, bound: float, axes_of: Any, ord: float = 2.0) -> Tree:
    def clip(leaf: np.ndarray, param: np.ndarray) -> np.ndarray:
        norm, param_norm = (_p_norm(x, ord, axes_of(x.ndim)) for x in (leaf, param))
        max_norm = bound / 13 * np.maximum(param_norm, 1e-3)
        return np.where(norm < max_norm, leaf, leaf * max_norm / np.maximum(norm, 1e-6))

    return {name: clip(leaf, params[name]) for name, leaf in tree.items()}


def _torch_units(ndim: int) -> Any:
    return None if ndim <= 1 else tuple(range(1, ndim))


def _optax_units(ndim: int) -> Any:
    return {0: None, 1: None, 2: 0, 4: (0, 1, 2)}[ndim]


# -- The peers themselves; a test that calls one is skipped where it is not installed ----------


def _torch(call: Callable[..., Any], tree: Tree, params: Tree, bound: float) -> Tree:
    torch = pytest.importorskip("torch")
    weights = [torch.nn.Parameter(torch.tensor(params[name])) for name in tree]
    for weight, leaf in zip(weights, tree.values(), strict=True):
        weight.grad = torch.tensor(leaf)
    call(torch, weights, bound)
    return {name: weight.grad.numpy() for name, weight in zip(tree, weights, strict=True)}


def _timm(mode: str, ord: float, tree: Tree, params: Tree, bound: float) -> Tree:
    dispatch = pytest.importorskip("timm.utils").dispatch_clip_grad
    value = bound / 13 if mode == "agc" else bound
    return _torch(lambda _, ps, c: dispatch(ps, value, mode, ord), tree, params, bound)


def _tf(call: Callable[..., Any], tree: Tree, params: Tree, bound: float) -> Tree:
    tf = pytest.importorskip("tensorflow")
    leaves = call(tf, [tf.constant(leaf) for leaf in tree.values()], bound)
    return {name: leaf.numpy() for name, leaf in zip(tree, leaves, strict=True)}


def _keras(argument: str, tree: Tree, params: Tree, bound: float) -> Tree:
    keras = pytest.importorskip("keras")
    variables = [keras.Variable(np.zeros_like(leaf)) for leaf in tree.values()]
    optimizer = keras.optimizers.SGD(learning_rate=1.0, **{argument: bound})
    optimizer.apply([keras.ops.convert_to_tensor(leaf) for leaf in tree.values()], variables)
    with warnings.catch_warnings():
        # Keras and TensorFlow have not followed NumPy 2 here yet.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        steps = [keras.ops.convert_to_numpy(variable) for variable in variables]
    return {name: -step for name, step in zip(tree, steps, strict=True)}


def _ours(make: Callable[..., Any], tree: Tree, params: Tree, bound: Any) -> Any:
    clip = make(bound)
    tree, params = jax.tree.map(jnp.asarray, (tree, params))
    return clip.update(tree, clip.init(params), params)[0]


class Row(NamedTuple):
    rule: Callable[[Tree, Tree, float], Tree]
    clipax: Callable[[Any], optax.GradientTransformation]
    peer: Callable[[Tree, Tree, float], Tree]


_of = functools.partial
_ROWS = {
    "torch clip_grad_value_": Row(
        _value,
        clipax.clip_by_value,
        _of(_torch, lambda torch, ps, c: torch.nn.utils.clip_grad_value_(ps, c)),
    ),
    "tf.clip_by_value": Row(
        _of(_value, lowest=-0.1),
        lambda c: clipax.clip_by_value(c, -0.1 * c),
        _of(_tf, lambda tf, us, c: [tf.clip_by_value(u, -0.1 * c, c) for u in us]),
    ),
    "tf.clip_by_norm": Row(
        _tf_norm,
        clipax.clip_by_leaf_norm,
        _of(_tf, lambda tf, us, c: [tf.clip_by_norm(u, c) for u in us]),
    ),
    "tf.clip_by_norm axes": Row(
        _of(_tf_norm, axes=0),
        lambda c: clipax.clip_by_leaf_norm(c, axes=0),
        _of(_tf, lambda tf, us, c: [tf.clip_by_norm(u, c, axes=[0]) for u in us]),
    ),
    "tf.clip_by_global_norm": Row(
        _tf_global,
        clipax.clip_by_global_norm,
        _of(_tf, lambda tf, us, c: tf.clip_by_global_norm(us, c)[0]),
    ),
    "tf.compat.v1.clip_by_average_norm": Row(
        _of(_mean_norm, power=1),
        clipax.clip_by_average_norm,
        _of(_tf, lambda tf, us, c: [tf.compat.v1.clip_by_average_norm(u, c) for u in us]),
    ),
    "keras clipnorm": Row(_tf_norm, clipax.clip_by_leaf_norm, _of(_keras, "clipnorm")),
    "keras clipvalue": Row(_value, clipax.clip_by_value, _of(_keras, "clipvalue")),
    "keras global_clipnorm": Row(
        _tf_global, clipax.clip_by_global_norm, _of(_keras, "global_clipnorm")
    ),
    "timm value": Row(_value, clipax.clip_by_value, _of(_timm, "value", 2.0)),
    "timm agc": Row(
        _of(_agc, axes_of=_torch_units),
        lambda c: clipax.adaptive_grad_clip(c / 13, unit_axis=clipax.units.output_first),
        _of(_timm, "agc", 2.0),
    ),
    "optax.clip": Row(_value, clipax.clip, _of(_ours, optax.clip)),
    "optax.clip_by_global_norm": Row(
        _tf_global, clipax.clip_by_global_norm, _of(_ours, optax.clip_by_global_norm)
    ),
    "optax.clip_by_block_rms": Row(
        _of(_mean_norm, power=0.5), clipax.clip_by_block_rms, _of(_ours, optax.clip_by_block_rms)
    ),
    "optax.adaptive_grad_clip": Row(
        _of(_agc, axes_of=_optax_units),
        lambda c: clipax.adaptive_grad_clip(c / 13),
        _of(_ours, lambda c: optax.adaptive_grad_clip(c / 13)),
    ),
}
for _p in (1.0, 2.0, 3.0, math.inf):
    _rule = _of(_torch_norm, ord=_p)
    _call = _of(clipax.clip_by_global_norm, ord=_p, eps=1e-6)
    _peer = _of(_torch, lambda torch, ps, c, p=_p: torch.nn.utils.clip_grad_norm_(ps, c, p))
    _ROWS[f"torch clip_grad_norm_ p={_p}"] = Row(_rule, _call, _peer)
    _ROWS[f"timm norm p={_p}"] = Row(_rule, _call, _of(_timm, "norm", _p))
    _ROWS[f"timm agc p={_p}"] = Row(
        _of(_agc, axes_of=_torch_units, ord=_p),
        lambda c, p=_p: clipax.clip_by(
            _of(clipax.unit_norm, ord=p, unit_axis=clipax.units.output_first),
            clipax.thresholds.relative_to_params(c / 13),
        ),
        _of(_timm, "agc", _p),
    )


@pytest.mark.parametrize("name", _ROWS)
def test_the_clipax_call_does_what_the_peers_rule_says(name):
    clip = jax.jit(functools.partial(_ours, _ROWS[name].clipax))
    for tree, params, bound in _cases():
        _assert_close(clip(tree, params, bound), _ROWS[name].rule(tree, params, bound))


@pytest.mark.parametrize("name", _ROWS)
def test_the_peer_itself_does_what_its_rule_and_the_clipax_call_say(name):
    clip = jax.jit(functools.partial(_ours, _ROWS[name].clipax))
    for tree, params, bound in _cases():
        peers = _ROWS[name].peer(tree, params, bound)
        _assert_close(peers, _ROWS[name].rule(tree, params, bound))
        _assert_close(peers, clip(tree, params, bound))


def _cases() -> list[tuple[Tree, Tree, float]]:
    """Clipped, not clipped, at the bound and zero; the triples are at AGC's bound as well."""
    return [
        (tree, _TRIPLES if tree is _TRIPLES else _PARAMS, bound)
        for tree in _TREES.values()
        for bound in _BOUNDS
    ]


def _assert_close(actual: Any, expected: Any) -> None:
    for name, leaf in expected.items():
        np.testing.assert_allclose(actual[name], leaf, rtol=3e-6, atol=0)
