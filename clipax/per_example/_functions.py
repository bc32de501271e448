"""Clips the gradient of each example, at about the price of one gradient of the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _checks, _compat, _leaves, _paths
from clipax._core._typing import Array, Bound, Coefficient, Norms
from clipax.coefficients import hard
from clipax.per_example._examples import ArgNums, Call
from clipax.per_example._examples import PerExampleInfo as PerExampleInfo
from clipax.per_example._plans import Plan


def clipped_grad(
    loss_fn: Callable[..., Any],
    max_norm: Bound,
    *,
    coefficient: Coefficient = hard,
    argnums: ArgNums = 0,
    batch_argnums: ArgNums = 1,
    has_aux: bool = False,
    mean: bool = True,
    skip_nonfinite: bool = False,
    microbatch_size: int | None = None,
) -> Callable[..., tuple[Any, PerExampleInfo]]:
    """Makes the gradient function whose every example is clipped by itself.

        grads = mean over b of coefficient(|g_b|, max_norm) * g_b,   g_b = grad loss_fn(., b)

    The gradients `g_b` are not made, wherever their norm can be read off what they are
    products of: see `explain_clipped_grad`.

    Args:
      loss_fn: `loss_fn(params, example) -> loss`, a scalar, for *one* example. Any function
        that JAX can differentiate; layers and frameworks play no part. What is neither
        differentiated nor of the examples, and what is passed by keyword, is one for all
        examples; what is no array in it (a flag, a function, None) reaches `loss_fn` as it is.
      max_norm: The bound, >= 0; `inf` never clips. With a tree prefix of the parameters,
        each part has a norm and a coefficient of its own.
      coefficient: `(norm, max_norm) -> factor`, as `hard`, `rational`, `normalized`,
        `auto_s` or `psac`.
      argnums: Which arguments are differentiated; one or several.
      batch_argnums: Which arguments have the examples along the first axis of every leaf;
        one or several. A key of the examples' own is one of them.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      mean: Whether the sum is divided by the number of counted examples.
      skip_nonfinite: Whether an example whose norm is NaN or inf is left out. By default it
        makes the gradients NaN.
      microbatch_size: How many examples are taken at once, one such part after another;
        all by default. It must divide the batch.

    Returns:
      `grad_fn(*args, mask=None, max_norm=None, **shared) -> (grads, info)` with the arguments
      of `loss_fn`, to be called under `jax.jit`. `grads` has the structure, shapes and dtypes of
      the parameters; `info` is a `PerExampleInfo`. `mask`, one boolean an example, leaves
      examples out: those that pad a batch. `max_norm` takes the place of the bound above,
      as one that `track_quantile` moves; an argument of `loss_fn` of one of these two names is
      passed by position. On a mesh the batch may be sharded along the examples; where its axes
      are explicit, `loss_fn` is called with automatic ones. In `shard_map`, `pmap` and `vmap`
      with a name, what comes out is of the examples of the device; no `axis_name=` is needed.

    Raises:
      ValueError: An argument is not as above; on a call, a parameter is no array of floats,
        the loss is not a scalar, the leading axes of the batch differ or there is none, the
        mask does not fit; in a mapped program, what `loss_fn` shares with other devices mixes
        the gradients of examples, or types do not say whether it does.

    | example | result |
    |---|---|
    | at or under the bound | as it is, to rounding |
    | gradient zero | zero |
    | `max_norm=0` | zeros |
    | NaN or inf | gradients NaN; with `skip_nonfinite`, as if it were not there |
    | masked out | as if it were not there, even if it is NaN |
    | none counted | zeros |

    This is clipping, and no claim of privacy: that needs noise, and an accountant.

    Example:
      >>> def loss_fn(w, example):
      ...     return jnp.sum(w * example)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> grads, info = clipped_grad(loss_fn, 1.0)(jnp.zeros(2), batch)
      >>> grads, info.norms
      (Array([0.3 , 0.65], dtype=float32), Array([5. , 0.5], dtype=float32))

    References:
      Abadi et al., Deep Learning with Differential Privacy, 2016, arXiv:1607.00133.
      Goodfellow, Efficient Per-Example Gradient Computations, 2015, arXiv:1510.01799.
      Li et al., Large Language Models Can Be Strong Differentially Private Learners, 2021,
      arXiv:2110.05679 (the Gram matrices). Bu et al., Differentially Private Optimization on
      Large Model at Small Cost, 2022, arXiv:2210.00038 (the factors kept for the sum).
    """
    _check_max_norm(max_norm)
    _checks.function(loss_fn=loss_fn, coefficient=coefficient)
    _checks.flag(has_aux=has_aux, mean=mean, skip_nonfinite=skip_nonfinite)
    if microbatch_size is not None:
        _checks.positive_integer(microbatch_size=microbatch_size)
    given = Call(loss_fn, argnums, batch_argnums, has_aux)
    static_bound = max_norm

    def clip_all(
        call: Call, args: Any, mask: Array | None, bound: Any
    ) -> tuple[Any, PerExampleInfo]:
        def clip_part(args: Any, mask: Array | None, bound: Any) -> tuple[Any, PerExampleInfo]:
            measured = call.measure(args)
            return measured.clipped(bound, coefficient, mask, skip_nonfinite)

        if microbatch_size is None:
            sums, info = clip_part(args, mask, bound)
        else:
            sums, info = call.in_parts(clip_part, args, mask, bound, microbatch_size)
        if mean:
            sums = jax.tree.map(lambda total: total / _number_counted(info, total.dtype), sums)
        clip_fraction = jax.tree.map(
            lambda size, limit: _share(info, size > limit), info.norms, info.max_norm
        )
        params = call.differentiated(args)
        grads = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, params)
        return grads, info._replace(clip_fraction=clip_fraction)

    def grad_fn(
        *args: Any, mask: Any = None, max_norm: Any = None, **shared: Any
    ) -> tuple[Any, PerExampleInfo]:
        bound = static_bound if max_norm is None else max_norm
        _check_max_norm(bound)
        call, arrays = given.of_arrays(args, shared, mask=mask, max_norm=max_norm)
        mask = _checked_mask(mask, call.check(arrays))
        return call.with_automatic_axes(
            functools.partial(clip_all, call),
            arrays,
            mask,
            bound,
            out=lambda grads, each, one: (
                grads,
                PerExampleInfo(each, each, each, each, clip_fraction=one, max_norm=one, aux=each),
            ),
        )

    return grad_fn


def per_example_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: ArgNums = 0,
    batch_argnums: ArgNums = 1,
    has_aux: bool = False,
    per_leaf: bool = False,
) -> Callable[..., Any]:
    """Makes the function of the norms of the examples' gradients, which are not made.

    Args:
      loss_fn: As in `clipped_grad`, and so `argnums`, `batch_argnums` and `has_aux`.
      argnums: Which arguments are differentiated.
      batch_argnums: Which have the examples along the first axis.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      per_leaf: Whether each leaf has norms of its own.

    Returns:
      `norm_fn(*args, **shared) -> norms` of shape (examples,), in float32 (float64 for float64
      parameters); with `per_leaf`, in the structure of the parameters.

    Raises:
      ValueError: As `clipped_grad`.

    Example:
      >>> def loss_fn(w, example):
      ...     return jnp.sum(w * example)
      >>> per_example_norms(loss_fn)(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]))
      Array([5. , 0.5], dtype=float32)
    """
    _checks.function(loss_fn=loss_fn)
    _checks.flag(has_aux=has_aux, per_leaf=per_leaf)
    given = Call(loss_fn, argnums, batch_argnums, has_aux)

    def norm_fn(*args: Any, **shared: Any) -> Any:
        call, arrays = given.of_arrays(args, shared)
        call.check(arrays)

        def measure(args: Any) -> Any:
            measured = call.measure(args)
            return measured.norms_of_leaves() if per_leaf else measured.norms()

        return call.with_automatic_axes(measure, arrays, out=lambda _, each, __: each)

    return norm_fn


def explain_clipped_grad(
    loss_fn: Callable[..., Any],
    *args: Any,
    argnums: ArgNums = 0,
    batch_argnums: ArgNums = 1,
    has_aux: bool = False,
    **shared: Any,
) -> None:
    """Prints how the norm of each leaf is found, and what that costs for one example.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      loss_fn: As in `clipped_grad`, and so the other arguments.
      *args: What the gradient function would be called with.
      argnums: Which arguments are differentiated.
      batch_argnums: Which have the examples along the first axis.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      **shared: What the gradient function would be called with by keyword.

    The columns: the leaf, its shape, the way to its norm and why, the products of numbers
    that it takes, and the numbers kept for the sum as a share of the leaf's size.

    Example:
      >>> def loss_fn(params, x):
      ...     return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
      >>> params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
      >>> explain_clipped_grad(loss_fn, params, jnp.zeros((32, 8)))
      leaf  shape   norm of one example   why                              products   kept
      b     (4,)    made for each example comes from mul                          4   100%
      w     (8, 4)  norms of two vectors  a product that sums over nothing       12    38%
    """
    own = {"argnums": argnums, "batch_argnums": batch_argnums, "has_aux": has_aux}
    usual = {"argnums": 0, "batch_argnums": 1, "has_aux": False}
    told = {name: value for name, value in own.items() if value != usual[name]}
    given = Call(loss_fn, argnums, batch_argnums, has_aux)
    call, arrays = given.of_arrays(args, shared, **told)
    call.check(arrays)
    # How arrays are sharded makes no difference to what is printed, but in a mapped program
    # their types say what the loss may do.
    plans = call.plans(arrays if _compat.bound_axes() else jax.tree.map(_shape, arrays)).plans
    rows: list[tuple[str, ...]] = [
        ("leaf", "shape", "norm of one example", "why", "products", "kept")
    ]
    rows += [_row(plan) for plan in plans]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        texts = [text.ljust(width) for text, width in zip(row[:4], widths[:4], strict=True)]
        numbers = [text.rjust(width + 2) for text, width in zip(row[4:], widths[4:], strict=True)]
        print(" ".join([*texts, *numbers]))  # noqa: T201


def _shape(leaf: Any) -> Any:
    return _compat.shape_dtype_struct(leaf.shape, leaf.dtype)


def _row(plan: Plan) -> tuple[str, ...]:
    size = max(1, int(np.prod(plan.shape)))
    way = plan.way.value
    return (
        plan.name,
        str(plan.shape),
        way,
        plan.why,
        f"{plan.cost:,}",
        f"{plan.entries / size:.0%}",
    )


def track_quantile(
    max_norm: Norms,
    info: PerExampleInfo,
    *,
    quantile: jax.typing.ArrayLike = 0.5,
    learning_rate: jax.typing.ArrayLike = 0.2,
) -> Norms:
    """Moves a bound towards the quantile of the examples' norms.

        max_norm <- max_norm * exp(-learning_rate * (share of norms <= max_norm - quantile))

    Args:
      max_norm: The bound that `clipped_grad` had, >= 0, in the structure of `info.norms`. It
        is all the state that there is; 0.1 is a usual start.
      info: What `clipped_grad` returned.
      quantile: The share of examples that are to stay as they are, in (0, 1).
      learning_rate: How fast, > 0: at 0.2 a bound moves by 10 % a step at most, at 0.5.

    Returns:
      The bound for the next batch, in the same structure and dtype. Where no example was
      counted it stays.

    Raises:
      ValueError: An argument is not as above.

    Differences from the paper: no noise is added to the share.

    Example:
      >>> def loss_fn(w, example):
      ...     return jnp.sum(w * example)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> bound = jnp.array(1.0)
      >>> grads, info = clipped_grad(loss_fn, 1.0)(jnp.zeros(2), batch, max_norm=bound)
      >>> track_quantile(bound, info, quantile=0.5)  # half of them are at or under it
      Array(1., dtype=float32)

    References:
      Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021,
      arXiv:1905.03871.
    """
    _check_max_norm(max_norm)
    _checks.scalar(_checks.inside_unit_interval, quantile=quantile)
    _checks.scalar(_checks.positive, learning_rate=learning_rate)

    values, structure = jax.tree.flatten(max_norm)
    norms = jax.tree.leaves(info.norms)
    covered = _paths.covered(max_norm, info.norms, name="max_norm")
    if len(norms) != len(values):
        raise ValueError(
            "max_norm must be in the structure of info.norms, got"
            f" {structure} for {jax.tree.structure(info.norms)}."
        )

    def move(bound: Any, sizes: Array) -> Array:
        wide = jnp.asarray(bound).astype(sizes.dtype)
        share, rate, wanted = _leaves.in_dtype_of(
            sizes, _share(info, sizes <= wide), learning_rate, quantile
        )
        moved = wide * jnp.exp(-rate * (share - wanted))
        return jnp.where(jnp.any(info.is_counted), moved, wide).astype(jnp.asarray(bound).dtype)

    rows = zip(values, covered, strict=True)
    return jax.tree.unflatten(structure, [move(value, norms[place]) for value, (place,) in rows])


def _check_max_norm(max_norm: Any) -> None:
    if max_norm is None:
        _checks.non_negative(max_norm=max_norm)
    # Parameters may be None in part, and so a tree of bounds in their structure.
    for path, leaf in jax.tree_util.tree_leaves_with_path(max_norm):
        if _checks.is_schedule(leaf):
            raise ValueError(
                f"max_norm must be a number or a tree of them, got the schedule {leaf!r}. Give"
                " its value at the call: grad_fn(..., max_norm=schedule(count))."
            )
        _checks.scalar(_checks.non_negative, **{"max_norm" + jax.tree_util.keystr(path): leaf})


def _number_counted(info: PerExampleInfo, dtype: Any) -> Array:
    return jnp.maximum(jnp.sum(info.is_counted), 1).astype(dtype)


def _share(info: PerExampleInfo, holds: Array) -> Array:
    """Of the counted examples."""
    number = jnp.sum(holds & info.is_counted)
    return number.astype(jnp.float32) / _number_counted(info, jnp.float32)


def _checked_mask(mask: Any, examples: int) -> Array | None:
    if mask is None:
        return None
    try:
        mask = jnp.asarray(mask)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"mask must be {examples} booleans, one an example, got {mask!r}."
        ) from error
    if mask.shape != (examples,) or mask.dtype != bool:
        raise ValueError(
            f"mask must be {examples} booleans, one an example,"
            f" got {mask.dtype}{list(mask.shape)}."
        )
    return mask
