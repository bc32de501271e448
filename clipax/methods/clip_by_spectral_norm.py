"""Clipping singular values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _paths, _rules
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import AxisName, Bound, Coefficient, LeafRule, Norms, Updates
from clipax._spectral import _matrices, _spectral
from clipax.coefficients import hard, square_root
from clipax.norms import leaf_norm


@injectable
def clip_by_spectral_norm(
    max_norm: Bound | optax.GradientTransformation,
    coefficient: Coefficient = hard,
    *,
    iterations: int | None = None,
    unit_axis: LeafRule = None,
    stack_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each singular value of each matrix, so that its spectral norm is bounded.

    `U diag(s) V^H <- U diag(min(s, max_norm)) V^H`, or any other `s * coefficient(s,
    max_norm)`. What an outlier does to a few directions is cut there, and there alone.
    A vector has one singular value, its norm.

    Args:
      max_norm: The bound on singular values, >= 0: a number, a scalar array, a schedule
        `count -> value`, a tree prefix of them, or a threshold of `clip_by`, which learns
        from the largest singular values: `optax.chain(optax.ema(0.9), optax.scale(1.5))`.
        The code of SPECTRA has 0.1 for gradients, and 10 for the updates of an optimizer.
      coefficient: `(s, max_norm) -> factor` in [0, 1]: `hard`, or `square_root` for
        SPECTRA's soft clipping, `s / sqrt(1 + (s / max_norm)^2)`, or another.
      iterations: None decomposes each matrix: exact, but slow on accelerators. An integer
        >= 1 takes that many Newton-Schulz steps instead, products of matrices alone, for
        `hard` and `square_root`. 10 are enough for a Frobenius norm of 1000 max_norm, 5
        more for each hundredfold; `hard` may then exceed max_norm by 2.5^-iterations of it.
        With fewer, `square_root` clips too much, and `hard` is up to 40 % above max_norm.
      unit_axis: The axes that are the columns, as in `clip_by_unit_norm`; the other axes
        are the rows. None is `output_last`, right for Flax's and Haiku's dense layers,
        convolutions and attention's last projection. `output_first` is torch's; `nfnets`
        reads rank 3 as attention's first projections. Where it says None, the leaf is a vector.
      stack_axis: The axis along which layers are stacked, as in `clip_by_leaf_norm`, so
        that each matrix, or vector, is clipped by itself.
      mask: Which leaves are clipped: True, a tree prefix of booleans, or a function
        `(path, leaf) -> bool`.
      axis_name: As in `clip_by_global_norm` for vectors. A shard does not tell the singular
        values of its matrix: in mapped programs, matrices must be whole, and where types
        do not say so, `()` does.

    Returns:
      A transformation whose state is a `ClipState` of trees with a scalar a leaf, or an
      array that broadcasts against it where matrices are stacked: `norm` is the largest
      singular value (with `iterations` a bound on it, too large by n^(1/2048) at most for
      n of them), `coefficient` its factor, the smallest.

    Raises:
      ValueError: A number in `max_norm` is negative, NaN, boolean, None or a string;
        `coefficient` is no function, or `iterations` cannot do it or are no integer >= 1;
        at `init` and `update`, a prefix does not fit or a leaf lacks an axis; at `update`,
        `unit_axis` and `stack_axis` share one, or a matrix may be sharded.

    | leaf | result |
    |---|---|
    | `norm` of the state <= max_norm (`hard`) | the matrix, bit for bit |
    | all zero | zeros, also for max_norm = 0 |
    | any finite, max_norm = 0 | zeros |
    | a vector, or a matrix of one row or column | as `clip_by_leaf_norm` |
    | no entries | as it was; norm 0 |
    | float16, bfloat16 | computed in float32 |
    | complex | entries change their phase, as real ones their sign |
    | a NaN or inf entry | its matrix all NaN, for max_norm = inf as it was; others unharmed |
    | masked out, None, integer, bool, float0 | as it was, not measured |

    Its first and second derivatives, in the updates and in `max_norm`, are those of the
    formula, also where singular values are zero or repeated, and whatever `iterations` are:
    differentiated, it decomposes the matrices. The derivative of a largest singular value that
    is repeated is that of one of them. `hard` has a corner at `max_norm`.

    In float32, what comes out is wrong by up to 1e-6 (decomposed on a CPU, 1e-5) of the largest
    singular value, in every direction. Matrices whose sharding is explicit are gathered, and
    come out sharded as they were. Under `optax.inject_hyperparams`, functions
    and integers need `static_args`.

    Differences from the papers: all singular values are computed, where Yukhimchuk et al.
    have a randomized truncation. SPECTRA's code lets vectors jump from max_norm to
    max_norm / sqrt(2), iterates on a squared matrix, by default in bfloat16, and has factors
    of shape and learning rate, which are left to other transformations. The identity by
    which code for Newhouse et al. caps a matrix W takes W's own polar factor, and is wrong
    by max_norm / 8 where that has not converged, as for small singular values it never has.
    Here the iterations see W stacked on max_norm * I, with no small singular value.

    Example:
      >>> clip = clip_by_spectral_norm(2.0)
      >>> updates = jnp.diag(jnp.array([3.0, 1.0]))
      >>> clip.update(updates, clip.init(updates))[0]
      Array([[2., 0.],
             [0., 1.]], dtype=float32)

    References:
      Yukhimchuk, Kolar, Takáč, Choudhury, "Gradient clipping beyond vector norms: a
      spectral approach for matrix-valued parameters", 2026, https://arxiv.org/abs/2605.11838
      Jiang, Semenov, Stich, "Enhancing LLM training via spectral clipping" (SPECTRA), 2026,
      https://arxiv.org/abs/2603.14315
      Newhouse, Hess, Cesista, Zahorodnii, Bernstein, Isola, "Training transformers with
      enforced Lipschitz constants", 2025, https://arxiv.org/abs/2507.13338
      Chen, Chow, "A stable scaling of Newton-Schulz for improving the sign function
      computation of a Hermitian matrix", 2014, https://www.mcs.anl.gov/papers/P5059-0114.pdf
    """
    _checks.function(coefficient=coefficient)
    if iterations is not None:
        _checks.positive_integer(iterations=iterations)
        if coefficient not in (hard, square_root):
            raise ValueError(
                f"coefficient must be hard or square_root with iterations={iterations}, since"
                f" matrix products give no other, got {coefficient!r}."
            )
    _checks.axes(unit_axis=unit_axis, stack_axis=stack_axis)
    _checks.static(mask=mask)
    norm = functools.partial(leaf_norm, stack_axis=stack_axis)
    # It remembers what happened, and scales the vectors.
    recorder = clip_by(
        functools.partial(norm, mask=mask),
        max_norm,
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
        matrices = {row: view.matrices(leaves[row]) for row, view in views.items()}
        measured = {row: _spectral.measure(x, iterations) for row, x in matrices.items()}

        are_vectors = [one and row not in views for row, one in enumerate(wanted)]
        vectors = jax.tree.unflatten(treedef, are_vectors)
        norms = _by_leaf(norm(updates, mask=vectors, axis_name=axis_name), updates)
        for row, view in views.items():
            norms[row] = view.as_norm(measured[row].norm)
        known = {position.path: None for position in _paths.positions(updates)}
        known |= dict(zip(_paths.of_leaves(updates), norms, strict=True))
        own = known.get("", known)
        is_own = isinstance(getattr(state, "norm", own), dict) == isinstance(own, dict)
        scaled, state = recorder.update(updates, state if is_own else None, norm=own)

        clipped = jax.tree.leaves(scaled)
        bounds, factors = (_by_leaf(each, updates) for each in (state.max_norm, state.coefficient))
        for row, view in views.items():
            bound = view.per_matrix(bounds[row])
            x = _spectral.clip(matrices[row], measured[row], bound, coefficient, iterations)
            # Chosen in the shape of the leaf, so that what comes out is sharded as it is.
            clipped[row] = jnp.where(factors[row] == 1, leaves[row], view.leaf(x, leaves[row]))
        return jax.tree.unflatten(treedef, clipped), state

    return transformation(recorder.init, update_fn)


def _by_leaf(norms: Norms, updates: Updates) -> list[Any]:
    """What norms that are flat by path, or in a tree, have for each leaf; None where nothing."""
    by_path = _paths.flat(norms)
    return [
        by_path.get(path) if isinstance(by_path, dict) else by_path
        for path in _paths.of_leaves(updates)
    ]
