"""The code of a method, run over logged norms in the place of gradients."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _checks, _compat, _leaves, _paths
from clipax._core._clip_by import ClipState
from clipax._core._compat import core
from clipax._core._shown import shown
from clipax._core._typing import Array, Norms, Updates
from clipax.methods.skip_step import SkipState
from clipax.metrics import find_states


class Replay(NamedTuple):
    """What a method does at each step; the leading axis of each array is the steps.

    The first three have the structure of the norms that `replay` was given.
    """

    norm: Norms
    """The norm before clipping."""
    max_norm: Norms
    """The bound that it is held against; where a step is skipped, that of the last one taken."""
    coefficient: Norms
    """The factor that is applied; 0 where the step is skipped."""
    is_skipped: Array
    """Whether `skip_step` leaves the step out; bool, of shape [steps]."""


def replay(
    method: optax.GradientTransformation,
    norms: Any,
    losses: jax.typing.ArrayLike | None = None,
    *,
    params: Updates | None = None,
) -> Replay:
    """Runs a method over the norms that a training run logged.

    At each step, `max_norm = threshold(norm)` and `coefficient = coefficient(norm, max_norm)` by
    the method's own code, as one compiled scan. If the norms are those of a training run with
    this method, the result is what that run recorded, to the last bit. For another method, the
    replay is *open-loop*: with another clip, the later norms would have been others.

    Args:
      method: What is replayed: a method with one norm a step or a leaf, in a chain or in
        `skip_step` too. It must follow its norms alone.
      norms: Norms >= 0, NaN or inf, in the order of the steps: an array of shape [steps]; for
        a method with a norm a leaf, an array of shape [steps, leaves] or a dict from each leaf's
        path to an array [steps], as `metrics(..., per_leaf=True)` names them. They are what
        the method measures, before its clip.
      losses: The losses of shape [steps], for `skip_step` with `loss_z_max`.
      params: What `method.init` takes, shapes too, for a method that asks for the structure or
        the shapes of the leaves. None is one leaf a norm.

    Returns:
      A `Replay` of arrays: `norm`, `max_norm`, `coefficient` and `is_skipped`. The norms are
      float32, or float64 where `norms` are under `jax_enable_x64`.

    Raises:
      ValueError: `method` is no transformation, follows the gradients or the parameters
        themselves, or has more than one clip; `norms` are negative, no numbers, or do not have
        the method's structure; `losses` are missing or of another length.

    XLA rounds a sum of products as it fuses it. The bounds of a rule of your own, such as
    `optax.ema(0.9)` with its bias correction, can therefore differ in their last two bits.

    | norms | result |
    |---|---|
    | none, of shape [0] | arrays of shape [0] |
    | NaN or inf | as in training: coefficient NaN or 0, not learned; skipped by `skip_step` |
    | zero | coefficient 1 |
    | a bare [steps] for a method with a norm a leaf | those of one leaf |

    Example:
      >>> method = clip_by_quantile(0.5)
      >>> steps = replay(method, [1.0, 4.0, 2.0])
      >>> steps.max_norm.round(2), steps.coefficient.round(2)
      (Array([ inf, 1.  , 1.11], dtype=float32), Array([1.  , 0.25, 0.55], dtype=float32))
      >>> bool(steps.is_skipped.any())
      False
    """
    method = _checks.transformation(method=method)
    given = _checked_norms(norms)
    if losses is not None:
        losses = _checked_losses(losses, len(jax.tree.leaves(given)[0]))
    shapes = _stand_in(given) if params is None else jax.eval_shape(lambda tree: tree, params)
    expected = jax.eval_shape(lambda tree: _recorded(method.init(tree)).norm, shapes)
    named = _named(given, expected, shapes)

    def step(state_and_tree: Any, logged: Any) -> Any:
        state, updates, params = state_and_tree
        norm, loss = logged
        extra_args = {} if loss is None else {"loss": loss}
        _, state = method.update(updates, state, params, norm=norm, **extra_args)
        return (state, updates, params), _recorded(state)._replace(norm=norm)

    def run(updates: Updates, params: Updates, logged: Any) -> Replay:
        # From zeros of its own: a state takes the types of parameters by computing with them.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(step, (method.init(zeros), updates, params), logged)[1]

    # Gradients and parameters are there in name only: nothing that is asked for may need them.
    result = _without_values(run, (shapes, shapes), (named, losses))
    if not isinstance(named, dict) or isinstance(given, dict):
        return result
    norm, max_norm, coefficient = (
        jnp.stack([field[path] for path in named], axis=1) for field in result[:3]
    )
    return Replay(norm, max_norm, coefficient, result.is_skipped)


def _without_values(function: Any, absent: tuple[Updates, Updates], given: Any) -> Any:
    """`function(*absent, given)` with no value for the absent arguments, which it may not use."""
    program, shape = jax.make_jaxpr(function, return_shape=True)(*absent, given)
    needed, is_used = _compat.without_unused(program)
    used = iter(is_used)
    for name, tree in zip(("gradients", "parameters"), absent, strict=True):
        if any(next(used) for _ in jax.tree.leaves(tree)):
            raise _needs(name)
    values = [
        value for value, is_needed in zip(jax.tree.leaves(given), used, strict=True) if is_needed
    ]
    outputs = jax.jit(core.jaxpr_as_fun(needed))(*values)
    return jax.tree.unflatten(jax.tree.structure(shape), outputs)


def _needs(name: str) -> ValueError:
    return ValueError(
        "method must follow its norms alone, as clip_by_global_norm, zclip or skip_step do, got"
        f" one that needs the {name} themselves, which no log of norms holds."
    )


def _recorded(state: Any) -> Replay:
    """What the one clip, and the one `skip_step`, in a state say of the last step."""
    states = [found for _, found in find_states(state)]
    clips = [found for found in states if isinstance(found, ClipState)]
    skips = [found for found in states if isinstance(found, SkipState)]
    if len(clips) > 1 or len(skips) > 1 or not states:
        raise ValueError(
            "method must have one clip whose norms were logged, or one skip_step, or one in the"
            f" other, got {len(clips)} clips and {len(skips)} skip_steps."
        )
    is_skipped = skips[0].is_skipped if skips else jnp.zeros((), bool)
    if not clips:
        norm = skips[0].norm
        kept = jnp.where(is_skipped, jnp.zeros_like(norm), jnp.ones_like(norm))
        return Replay(norm, jnp.full_like(norm, jnp.inf), kept, is_skipped)
    (clip,) = clips
    if skips and isinstance(clip.norm, dict):
        raise ValueError(
            "method must follow one set of norms, got skip_step, which follows the global norm,"
            f" round a clip that follows those of the leaves {sorted(clip.norm)}."
        )
    coefficient = jax.tree.map(
        lambda factor: jnp.where(is_skipped, jnp.zeros_like(factor), factor), clip.coefficient
    )
    norm, max_norm, coefficient = map(_measured, (clip.norm, clip.max_norm, coefficient))
    return Replay(norm, max_norm, coefficient, is_skipped)


def _measured(norms: Norms) -> Norms:
    """The norms without the None of leaves that are masked out."""
    if not isinstance(norms, dict):
        return norms
    return {path: norm for path, norm in norms.items() if norm is not None}


def _checked_norms(norms: Any) -> Any:
    """The norms as floats, and over how many steps they go."""
    is_dict = isinstance(norms, Mapping)
    series = dict(norms) if is_dict else {"": norms}
    if not series:
        raise ValueError("norms must be an array [steps] or a dict of them, got an empty dict.")
    checked = {
        path: _checked(value, f"norms[{path!r}]" if is_dict else "norms")
        for path, value in series.items()
    }
    lengths = {path: value.shape[0] for path, value in checked.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"norms must all have one number of steps, got {lengths}.")
    for path, value in checked.items():
        if not is_dict and value.ndim > 2:
            raise ValueError(
                "norms must be an array [steps] or [steps, leaves], or a dict from paths to"
                f" arrays, got the shape {value.shape}."
            )
        is_known = not isinstance(value, jax.core.Tracer)
        if is_known and (below := np.argwhere(np.asarray(value) < 0)).size:
            place = f"norms[{path!r}]" if is_dict else "norms"
            raise ValueError(
                f"{place} must be >= 0, NaN or inf, got {value[tuple(below[0])]} at step"
                f" {below[0][0]}."
            )
    return checked if is_dict else checked[""]


def _checked_losses(losses: Any, steps: int) -> Array:
    checked = _checked(losses, "losses")
    if checked.shape != (steps,):
        raise ValueError(
            f"losses must have the shape {(steps,)} of the steps, got {checked.shape}."
        )
    return checked


def _checked(value: Any, name: str) -> Array:
    """An array of floats, float32 or wider, with an axis of steps."""
    given = value if isinstance(value, jax.Array) else np.asarray(value)
    is_real = jnp.issubdtype(given.dtype, np.integer) or jnp.issubdtype(given.dtype, np.floating)
    if not is_real or given.ndim == 0:
        raise ValueError(
            f"{name} must be an array of numbers, one for each step, got {shown(value)}."
        )
    # A double beyond all floats is an infinite one.
    with np.errstate(over="ignore"):
        array = jnp.asarray(given)
    return array.astype(_leaves.wide_dtype(array.dtype, jnp.float32))


def _stand_in(norms: Any) -> Updates:
    """The types of leaves with such norms, one leaf a norm."""

    def leaf(series: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return _compat.shape_dtype_struct(shape, series.dtype)

    if isinstance(norms, dict):
        return {path: leaf(series, series.shape[1:]) for path, series in norms.items()}
    return leaf(norms, ()) if norms.ndim == 1 else [leaf(norms, ())] * norms.shape[1]


def _named(norms: Any, expected: Norms, shapes: Updates) -> Norms:
    """The norms in the structure and dtype of the method's, each with an axis of steps."""
    if not isinstance(expected, dict):
        if not jax.tree_util.all_leaves([expected]):
            raise _needs("gradients")  # They are of several sides, which `norm=` cannot give.
        if isinstance(norms, dict) or norms.ndim != 1:
            shape = sorted(norms) if isinstance(norms, dict) else norms.shape
            raise ValueError(
                "norms must be an array of shape [steps], since method has one norm a step,"
                f" got {shape}."
            )
        return norms.astype(expected.dtype)
    paths = [path for path in _paths.of_leaves(shapes) if path in expected]
    if not isinstance(norms, dict):
        if norms.ndim != 2 or norms.shape[1] != len(paths):
            raise ValueError(
                f"norms must have the shape [steps, {len(paths)}] of the norms {paths} that method"
                f" measures, got {norms.shape}."
            )
        norms = dict(zip(paths, norms.T, strict=True))
    if sorted(norms) != sorted(paths):
        raise ValueError(
            f"norms must have the paths {sorted(paths)} that method measures, got {sorted(norms)}."
        )
    return {path: norm.astype(expected[path].dtype) for path, norm in norms.items()}
