"""Clipping singular values."""

import functools
import math
from typing import Any

import jax
import numpy as np
import optax

from clipax._core import _checks, _paths, _rules
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._shown import shown
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import AxisName, Bound, Coefficient, LeafRule, Norms, Updates
from clipax._spectral import _matrices, _spectral
from clipax._spectral._where_needed import clip_measured, clip_where_needed
from clipax.coefficients import hard, square_root
from clipax.norms import leaf_norm
from clipax.thresholds._per_norm import as_threshold


@injectable
def clip_by_spectral_norm(
    max_norm: Bound | optax.GradientTransformation,
    coefficient: Coefficient = hard,
    *,
    iterations: int | None = None,
    unit_axis: LeafRule = None,
    stack_axis: LeafRule = None,
    mask: LeafRule = True,
    exact_norm: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the singular values of each matrix so that its spectral norm is bounded.

    `U diag(s) V^H <- U diag(s * coefficient(s, max_norm)) V^H`, which is `min(s, max_norm)` by
    default. A vector has one singular value, its norm.

    Args:
      max_norm: The bound on singular values, >= 0: a number, a scalar array, a schedule
        `count -> value`, a tree prefix of them, or a threshold as in `clip_by`, which learns from
        the largest singular values. SPECTRA's code has 0.1 for gradients and 10 for an optimizer's
        updates.
      coefficient: `(s, max_norm) -> factor` in [0, 1], which must not grow with `s`: `hard`,
        `square_root` for SPECTRA's soft clipping, or another.
      iterations: None decomposes each matrix, which is exact but slow on accelerators. An integer
        >= 1 takes that many Newton-Schulz steps instead, for `hard` and `square_root` only. 10 are
        enough for a Frobenius norm of 1000 max_norm, and 5 more for each factor of 100; `hard` may
        then exceed max_norm by 2.5^-iterations of it. With fewer, `square_root` clips too much,
        and `hard` ends up to 40 % above max_norm.
      unit_axis: The axes that form the columns, as in `clip_by_unit_norm`; the others form the
        rows. None is `output_last`, right for Flax's and Haiku's dense layers, convolutions and
        attention's last projection. `output_first` is torch's; `nfnets` reads rank 3 as
        attention's first projections. A function that returns None makes the leaf a vector.
      stack_axis: The axis along which matrices or vectors are stacked, as in `clip_by_leaf_norm`.
      mask: Which leaves are clipped, as in `clip_by_leaf_norm`.
      exact_norm: Whether to decompose every matrix, so that `norm` is exact for all. By default, a
        matrix is decomposed only if no cheap bound shows that it stays. A threshold that learns
        from the norms gets exact ones in any case, and so does a bound of `inf`, which only
        measures.
      axis_name: As in `clip_by_global_norm`, for vectors. In a mapped program every matrix must be
        whole, because a shard does not show its singular values; `()` says so where types do not.

    Returns:
      A transformation whose state is a `ClipState` with a scalar per leaf, or an array that
      broadcasts against the leaf where matrices are stacked. `norm` is the largest singular value
      where a matrix is clipped (with `iterations`, a bound at most n^(1/2048) times too large for
      n of them). For other matrices, it may be an estimate that is never too large, unless
      `exact_norm` is set. `coefficient` is the factor of the largest singular value.

    Raises:
      ValueError: A value in `max_norm` is not a number >= 0; `coefficient` is not a function, or
        not one that `iterations` supports; `iterations` is not an integer >= 1, or
        `exact_norm` not a boolean; at `init` and `update`, a prefix does not fit or a leaf lacks
        an axis; at `update`, `unit_axis` and `stack_axis` share an axis, or a matrix may be
        sharded.

    | leaf | result |
    |---|---|
    | `norm` of the state <= max_norm (`hard`) | the matrix, bit for bit |
    | not clipped | the norm may be too small, unless `exact_norm` is set |
    | max_norm = inf, as a number | unchanged; the norm is exact |
    | all zero | zeros, also for max_norm = 0 |
    | any finite, max_norm = 0 | zeros |
    | a vector, or a matrix of one row or column | as in `clip_by_leaf_norm` |
    | no entries | unchanged; norm 0 |
    | float16, bfloat16 | computed in float32 |
    | complex | entries change their phase, as real ones change their sign |
    | an inf entry | its matrix all NaN, or unchanged for max_norm = inf; others unharmed |
    | a NaN entry | its matrix all NaN; others unharmed |
    | masked out, None, integer, bool, float0 | unchanged, not measured |

    In float32, the result is wrong by up to 1e-6 (decomposed on a CPU, 1e-5) of the largest
    singular value. First and second derivatives are those of the formula, also where singular
    values are zero or repeated; `hard` has a corner at `max_norm`. With `iterations` they come
    from a decomposition. Explicitly sharded matrices are gathered first. In a sharded program, the
    decision on each matrix takes collectives of its own; with `exact_norm`, all matrices share
    theirs.

    Example:
      >>> clip = clip_by_spectral_norm(2.0)
      >>> updates = jnp.diag(jnp.array([3.0, 1.0]))
      >>> clip.update(updates, clip.init(updates))[0]
      Array([[2., 0.],
             [0., 1.]], dtype=float32)

    References:
      Yukhimchuk et al., 2026, https://arxiv.org/abs/2605.11838
      Jiang, Semenov, Stich (SPECTRA), 2026, https://arxiv.org/abs/2603.14315
      Newhouse et al., 2025, https://arxiv.org/abs/2507.13338
      Chen, Chow, 2014, https://www.mcs.anl.gov/papers/P5059-0114.pdf (the scaled iteration)
    """
    _checks.function(coefficient=coefficient)
    if iterations is not None:
        _checks.positive_integer(iterations=iterations)
        if coefficient not in (hard, square_root):
            raise ValueError(
                f"coefficient must be hard or square_root with iterations={iterations}, because"
                f" matrix products compute only these two, got {shown(coefficient)}."
            )
    _checks.axes(unit_axis=unit_axis, stack_axis=stack_axis)
    _checks.static(mask=mask)
    _checks.flag(exact_norm=exact_norm)
    # A history learns from every norm.
    is_exact = exact_norm or _checks.is_transformation(max_norm) or _only_measures(max_norm)
    norm = functools.partial(leaf_norm, stack_axis=stack_axis)
    # This one records norms, bounds and factors of all leaves, and scales the vectors.
    recorder = clip_by(
        functools.partial(norm, mask=mask),
        as_threshold(max_norm=max_norm),
        coefficient,
        axis_name=axis_name,
    )

    def update_fn(
        updates: Updates, state: ClipState, params: Updates | None = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        wanted = _rules.wanted(updates, mask)
        views = _matrices.matrix_views(updates, wanted, unit_axis, stack_axis, axis_name)
        # Frobenius norms of matrices, and the norms of vectors.
        norms = _by_leaf(norm(updates, mask=mask, axis_name=axis_name), updates)
        every_path = {position.path: None for position in _paths.positions(updates)}

        def record(norms: list[Any]) -> tuple[list[Any], ClipState]:
            known = every_path | dict(zip(_paths.of_leaves(updates), norms, strict=True))
            own = known.get("", known)
            is_own = isinstance(getattr(state, "norm", own), dict) == isinstance(own, dict)
            scaled, new_state = recorder.update(updates, state if is_own else None, norm=own)
            return jax.tree.leaves(scaled), new_state

        def with_bounds(new_state: ClipState) -> list[Any]:
            bounds = _by_leaf(new_state.max_norm, updates)
            rows = views.items()
            return [(row, view, leaves[row], view.per_matrix(bounds[row])) for row, view in rows]

        if is_exact:
            measured = {
                row: _spectral.measure(view.matrices(leaves[row]), iterations)
                for row, view in views.items()
            }
            for row, view in views.items():
                norms[row] = view.as_norm(measured[row].norm)
            clipped, new_state = record(norms)
            for row, view, leaf, bound in with_bounds(new_state):
                clipped[row] = clip_measured(
                    view, leaf, measured[row], bound, coefficient, iterations
                )
            return jax.tree.unflatten(treedef, clipped), new_state

        matrices: dict[int, Any] = {}
        # The bound is fixed, so it is known before the norms.
        for row, view, leaf, bound in with_bounds(record(norms)[1]):
            known, matrices[row] = clip_where_needed(
                view, leaf, norms[row], bound, coefficient, iterations
            )
            norms[row] = view.as_norm(known)
        clipped, new_state = record(norms)
        for row, leaf in matrices.items():
            clipped[row] = leaf
        return jax.tree.unflatten(treedef, clipped), new_state

    return transformation(recorder.init, update_fn)


def _only_measures(max_norm: Bound) -> bool:
    numbers = (float, int, np.floating)
    leaves = jax.tree.leaves(max_norm, is_leaf=_checks.is_bound_leaf)
    return any(isinstance(leaf, numbers) and leaf == math.inf for leaf in leaves)


def _by_leaf(norms: Norms, updates: Updates) -> list[Any]:
    """The norm of each leaf, from norms in a flat dict or a tree; None where there is no norm."""
    by_path = _paths.flat(norms)
    return [
        by_path.get(path) if isinstance(by_path, dict) else by_path
        for path in _paths.of_leaves(updates)
    ]
