"""Reading the states of clipax into a flat dict of scalars for a logger."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _checks, _leaves, _paths, _window
from clipax._core._clip_by import ClipState
from clipax._core._shown import shown
from clipax._core._typing import Array, Norms
from clipax._core._window import WindowState
from clipax.methods.measure import DEFAULT_QUANTILES, Quantiles
from clipax.methods.observe import ObserveState
from clipax.methods.skip_step import SkipState
from clipax.methods.track import TrackState

_WRAPPERS = (ObserveState, SkipState, TrackState)


def metrics(opt_state: Any, *, per_leaf: bool = False) -> dict[str, Array]:
    """Reads every clipax state in an optimizer state, however deeply it is nested.

    It works inside and outside `jit`, on the state of any chain, mask, partition, injection or
    accumulation.

    Args:
      opt_state: Any pytree that holds states of clipax.
      per_leaf: Whether to add the values of each leaf, with its path in the key.

    Returns:
      A dict from names to scalars, which are copies. A clipping state gives

      | key | value |
      |---|---|
      | `norm` | the norm before clipping, the largest of several |
      | `clipped_norm` | the norm after clipping, `coefficient * norm`, the largest of several |
      | `max_norm` | the bound, the largest of several |
      | `coefficient` | the factor, the smallest of several |
      | `clip_fraction` | the share of norms whose factor is not one |
      | `norm_q50`, `norm_q90`, `norm_q99` | quantiles of the window of norms, if there is one |

      or the quantiles that `measure` was given. With `per_leaf`, there are also `norm/<path>`,
      `clipped_norm/<path>`, `max_norm/<path>` and `coefficient/<path>`, of methods that have a
      norm for each leaf; `measure(leaf_norm)` in the chain gives them beside any other. An
      `observe` state gives `norm_in`, `norm_out` and `cosine`. A `skip_step` state gives

      | key | value |
      |---|---|
      | `raw_norm` | the norm of the incoming updates, NaN and inf included |
      | `is_skipped` | 1 if the last step was skipped, else 0; its mean is the share |
      | `skipped` | how many steps were skipped in all |
      | `consecutive_skipped` | how many in a row, up to the last, not counting `skip_ranges` |

      A `track` state gives, for the steps with a finite norm since its last reset,

      | key | value |
      |---|---|
      | `tracked/steps`, `tracked/steps_clipped` | how many there were, and how many clipped |
      | `tracked/steps_not_finite` | how many more had a norm of NaN or inf |
      | `tracked/mean_norm`, `tracked/largest_norm` | mean and largest norm before clipping |
      | `tracked/mean_norm/<group>`, `tracked/largest_norm/<group>` | the same for each group |
      | `tracked/mean_coefficient` | the mean of the norm after clipping over the norm before |
      | `tracked/removed_share` | the share of the sum of all norms that was clipped off |

      Each of them gives the values of its inner state too, which after a skipped step are those
      of the last step that was taken.

      Names on the way to a state, from `optax.named_chain` or the labels of `optax.partition`,
      precede its keys, as in `grads/norm`. States of one kind with equal names are numbered in
      order, as in `0/norm`, `1/norm`. If `vmap` gave the states an axis of members, every value
      has that axis; where all norms are of units or layers, use `jax.vmap(clipax.metrics)`.

    Raises:
      ValueError: `opt_state` is a transformation, or `per_leaf` is not a boolean.

    | opt_state | result |
    |---|---|
    | no clipax state | {} |
    | no update so far | norm 0, max_norm inf, coefficient 1; quantiles inf |
    | no measured leaf | norm 0, clip_fraction 0 |

    Example:
      >>> optimizer = optax.chain(clip_by_global_norm(1.0), optax.sgd(1e-3))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> _, opt_state = optimizer.update(params, optimizer.init(params))
      >>> {name: round(float(value), 3) for name, value in metrics(opt_state).items()}
      {'norm': 5.0, 'clipped_norm': 1.0, 'max_norm': 1.0, 'coefficient': 0.2, 'clip_fraction': 1.0}
    """
    if _checks.is_transformation(opt_state):
        raise ValueError(
            "opt_state must be a state, which init and update return, got the transformation"
            " itself."
        )
    _checks.flag(per_leaf=per_leaf)
    states = list(find_states(opt_state))
    names = _distinct([("/".join(path), type(state)) for path, state in states])
    result: dict[str, Array] = {}
    for name, (_, state) in zip(names, states, strict=True):
        read = functools.partial(_read, per_leaf=per_leaf)
        for _ in range(_axes_of_members(state)):
            read = jax.vmap(read)
        for key, value in read(state).items():
            # A copy, because the array of the state may be donated to the next step.
            result[f"{name}/{key}" if name else key] = jnp.copy(value)
    return result


def as_floats(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """Turns metrics into plain floats under keys that every logger accepts.

    Call it between steps; it fetches all values at once. `json.dumps` takes the result, and
    so do `mlflow.log_metrics`, `wandb.log` and, value by value, TensorBoard's `add_scalar`.

    Args:
      values: A dict from names to scalars, as `metrics` returns it, or to arrays of scalars, as
        for the members of a `vmap`.
      prefix: A prefix of each key, such as "train/".

    Returns:
      A dict from keys to floats. Keys consist of ASCII letters and digits, `_`, `-`, `.` and `/`.
      No key is a folder of another key, because MLflow keeps keys as files.

    Raises:
      ValueError: A value is not a real number, or has no value, as under `jit`.

    | key or value | result |
    |---|---|
    | an empty segment, or one without letters and digits, such as Haiku's `~` | left out |
    | any other character | `_` |
    | a folder of other keys, such as `norm` beside `norm/w` | `norm/all` |
    | by now equal to an earlier key | a number is appended, as in `a_b_2` |
    | an array | a key for each entry, `key/0`, `key/1`, `key/0_1` |
    | NaN, inf | as it is, which `json.dumps` writes as `NaN` and `Infinity` |

    Example:
      >>> values = {"norm": jnp.array(5.0), "norm/mlp/~/linear": jnp.array(3.0)}
      >>> as_floats(values, prefix="train/")
      {'train/norm/all': 5.0, 'train/norm/mlp/linear': 3.0}
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"values must be a dict from names to numbers, got {values!r}.")
    if not isinstance(prefix, str):
        raise ValueError(f"prefix must be a string, got {shown(prefix)}.")
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            raise ValueError(
                f"values must be known, got {shown(value)} for {name!r}: call as_floats outside of"
                " jit, on its results."
            )
    fetched = {name: np.asarray(value) for name, value in jax.device_get(dict(values)).items()}
    entries: list[tuple[str, Any]] = []
    for name, array in fetched.items():
        if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool) or np.iscomplexobj(
            array
        ):
            raise ValueError(f"values must be real numbers, got {shown(array)} for {name!r}.")
        key = _accepted(prefix + name)
        for place, entry in np.ndenumerate(array):
            entries.append(("/".join(filter(None, (key, "_".join(map(str, place))))), entry))
    folders = {key[:end] for key, _ in entries for end, sign in enumerate(key) if sign == "/"}
    result: dict[str, float] = {}
    for key, entry in entries:
        key = f"{key}/all" if key in folders else key
        numbered = (f"{key}_{number}" for number in itertools.count(2))
        free = key if key not in result else next(each for each in numbered if each not in result)
        result[free] = float(entry)
    return result


def _accepted(name: str) -> str:
    """The name in characters that all loggers accept."""
    segments = (re.sub(r"[^A-Za-z0-9_.-]", "_", segment) for segment in name.split("/"))
    return "/".join(segment for segment in segments if re.search(r"[A-Za-z0-9]", segment))


def _read(state: Any, per_leaf: bool) -> dict[str, Array]:
    return _clipped(state, per_leaf) if isinstance(state, ClipState) else _wrapped(state)


def _axes_of_members(state: Any) -> int:
    """How many axes of members a state has; each `vmap` adds one."""
    if not isinstance(state, ClipState):
        return int(jnp.ndim(jax.tree.leaves(state._replace(inner_state=None))[0]))
    if not all(map(jnp.ndim, jax.tree.leaves(state))):
        return 0
    # Norms of units and layers have axes without any `vmap`: a summed axis stays, with one entry.
    shapes = {norm.shape for norm in jax.tree.leaves(state.norm)}
    if len(shapes) == 1:
        (shape,) = shapes
        return 0 if 1 in shape else len(shape)
    is_of_layers = all(set(shape[1:]) <= {1} for shape in shapes)
    is_alike = len({shape[0] for shape in shapes}) == 1 and min(map(len, shapes)) == 1
    return int(is_alike and not is_of_layers)


def find_states(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """States of clipax with the names on the way to them, outer ones first."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_state)
    for path, node in found:
        names = (str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        if _is_state(node):
            here = (*above, *names)
            yield here, node
            if isinstance(node, _WRAPPERS):
                yield from find_states(node.inner_state, here)


def _is_state(node: Any) -> bool:
    return isinstance(node, (ClipState, *_WRAPPERS))


def _distinct(named: list[tuple[str, type]]) -> list[str]:
    """The names, with a number where a name and kind occur more than once."""
    totals, distinct = Counter(named), []
    taken = {(name, kind) for name, kind in named if totals[name, kind] == 1}
    for name, kind in named:
        if totals[name, kind] > 1:
            numbered = ("/".join(filter(None, (name, str(n)))) for n in itertools.count())
            name = next(free for free in numbered if (free, kind) not in taken)
            taken.add((name, kind))
        distinct.append(name)
    return distinct


def _wrapped(state: ObserveState | SkipState | TrackState) -> dict[str, Array]:
    if isinstance(state, TrackState):
        return {f"tracked/{key}": value for key, value in _tracked(state).items()}
    if isinstance(state, ObserveState):
        return {"norm_in": state.norm_in, "norm_out": state.norm_out, "cosine": state.cosine}
    return {
        "raw_norm": state.norm,
        "is_skipped": state.is_skipped.astype(jnp.float32),
        "skipped": state.skipped_count,
        "consecutive_skipped": state.consecutive_count,
    }


def _tracked(state: TrackState) -> dict[str, Array]:
    whole = jnp.where(state.mean_norm > 0, state.mean_norm, 1)
    return {
        "steps": state.step_count,
        "steps_clipped": state.clipped_count,
        "steps_not_finite": state.skipped_count,
        "mean_norm": state.mean_norm,
        "largest_norm": state.largest_norm,
        "mean_coefficient": state.mean_coefficient,
        "removed_share": state.mean_removed / whole,
        **{f"mean_norm/{name}": norm for name, norm in state.group_mean_norm.items()},
        **{f"largest_norm/{name}": norm for name, norm in state.group_largest_norm.items()},
    }


def _clipped(state: ClipState, per_leaf: bool) -> dict[str, Array]:
    trees = {
        "norm": state.norm,
        "clipped_norm": jax.tree.map(_clipped_norm, state.norm, state.max_norm, state.coefficient),
        "max_norm": state.max_norm,
        "coefficient": state.coefficient,
    }
    result = {name: _extreme(name, *jax.tree.leaves(tree)) for name, tree in trees.items()}
    result["clip_fraction"] = _clip_fraction(state.coefficient)
    quantiles = _quantiles(state.threshold)
    for window in jax.tree.leaves(state.threshold, is_leaf=_is_window):
        if _is_window(window):
            for q in quantiles:
                value = jnp.max(_window.quantile(window, q))
                key = f"norm_q{100 * q:g}"
                result[key] = jnp.maximum(result[key], value) if key in result else value
    if per_leaf:
        for name, tree in trees.items():
            for path, leaf in zip(_paths.of_leaves(tree), jax.tree.leaves(tree), strict=True):
                if path:
                    result[f"{name}/{path}"] = _extreme(name, leaf)
    return result


def _clipped_norm(norm: Array, max_norm: Array, coefficient: Array) -> Array:
    # A coefficient below the smallest normal number is recorded as zero, but did clip.
    is_lost = (coefficient == 0) & jnp.isfinite(norm) & (norm > 2.0**64)
    return jnp.where(is_lost, jnp.minimum(norm, max_norm), norm * coefficient)


def _extreme(name: str, *leaves: Array) -> Array:
    pick, start = (jnp.min, 1.0) if name == "coefficient" else (jnp.max, 0.0)
    if not leaves:
        return jnp.asarray(start, jnp.float32)
    wide = _leaves.wide_dtype(*(leaf.dtype for leaf in leaves))
    return pick(jnp.stack([pick(leaf, initial=start).astype(wide) for leaf in leaves]))


def _clip_fraction(coefficient: Norms) -> Array:
    leaves = jax.tree.leaves(coefficient)
    total = sum(leaf.size for leaf in leaves)
    # A NaN factor changes the updates, so it counts as clipped.
    zero = jnp.zeros((), jnp.int32)
    clipped = sum((jnp.sum(~(leaf >= 1), dtype=jnp.int32) for leaf in leaves), start=zero)
    return clipped.astype(jnp.float32) / max(total, 1)


def _quantiles(threshold: Any) -> tuple[float, ...]:
    """Which quantiles of its windows a threshold asks for."""
    asked = threshold[-1] if type(threshold) is tuple and threshold else None
    return tuple(map(float, asked.names)) if isinstance(asked, Quantiles) else DEFAULT_QUANTILES


def _is_window(node: Any) -> bool:
    return isinstance(node, WindowState)
