"""Clipping the gradient of each example, at about the price of one gradient of the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _checks
from clipax._core._typing import Array, Bound, Coefficient
from clipax.coefficients import hard
from clipax.per_example import _arguments
from clipax.per_example._bounds import check_max_norm
from clipax.per_example._calls import ArgNames, ArgNums, Call, call_of, loss_of
from clipax.per_example._clipping import Options, as_bound, clip, clip_measured
from clipax.per_example._info import (
    OfBatch,
    OfExamples,
    PerExampleInfo,
    number_counted,
    share_of_counted,
)
from clipax.per_example._memory import Memory, check_memory
from clipax.per_example._meshes import with_automatic_axes
from clipax.per_example._microbatches import in_parts
from clipax.per_example._users import checked_users, measure_users


def clipped_grad(
    loss_fn: Callable[..., Any],
    max_norm: Bound,
    *,
    coefficient: Coefficient = hard,
    argnums: ArgNums = 0,
    batch_argnums: ArgNums = 1,
    batch_argnames: ArgNames = (),
    prng_argnum: int | None = None,
    has_aux: bool = False,
    mean: bool = True,
    normalize_by: jax.typing.ArrayLike | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    num_users: int | None = None,
    user_mean: bool = True,
    skip_nonfinite: bool = False,
    microbatch_size: int | None = None,
    memory: Memory = "auto",
) -> Callable[..., tuple[Any, PerExampleInfo]]:
    """Makes a gradient function that clips the gradient of each example.

        grads = mean over b of coefficient(|g_b|, max_norm) * g_b,   g_b = grad loss_fn(., b)

    Args:
      loss_fn: `loss_fn(params, example) -> loss`, the scalar loss of *one* example. Nothing can
        detect a loss that looks at other examples too, for example in a shared argument.
      max_norm: The bound, >= 0, or a tree prefix of the parameters with a bound for each part.
      coefficient: `(norm, max_norm) -> factor`, such as `hard`, `normalized` or `auto_s`.
      argnums: The position or positions of the parameters.
      batch_argnums: The position or positions of the arguments with the examples along the
        first axis of every leaf, such as (1, 2) for `loss_fn(params, x, y)`. All other arguments
        are the same for all examples. An array among them with a row for each example is warned
        of, unless it is passed by keyword.
      batch_argnames: The names of keyword arguments that have the examples too.
      prng_argnum: The position of a PRNG key, or of a tree of them. It is split, so that each
        example has a key of its own.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      mean: Whether to divide the sum by the number of counted examples.
      normalize_by: A constant > 0 to divide the sum by instead, whatever `mean` says.
      dtype: The dtype of `grads`. By default, a mean has the dtypes of the parameters, and a sum
        or a sum divided by a constant at least float32, because noise is added to it.
      num_users: How many users a batch can have. The gradients of each user's examples are
        combined before the clip, and everything below that is said of examples holds for users.
      user_mean: Whether to average the gradients of a user's examples, or to sum them.
      skip_nonfinite: Whether to leave out examples whose norm is NaN or inf.
      microbatch_size: How many examples to process at once; all by default.
      memory: "kept" keeps activations until the norms are known; "twice" makes them a second time
        for the sum. "auto" is "twice" if the loss uses `jax.checkpoint`, there is one bound, and
        the activations of the batch are larger than the parameters, unless "twice" is refused: it
        is where the loss has a `jax.custom_vjp`, whose way back may not be linear, or `grads` are
        wider than the parameters.

    Returns:
      `grad_fn(*args, mask=None, max_norm=None, user_ids=None, **shared) -> (grads,
      PerExampleInfo)`, which takes the arguments of `loss_fn`. `mask`, one boolean per example,
      says which examples count; `max_norm` replaces the bound above; `user_ids`, one integer in
      [0, num_users) per example, says whose it is. `grads` are like the parameters.

    Raises:
      ValueError: An argument is not as above, or `loss_fn` may mix examples of several devices.

    | example | result |
    |---|---|
    | at or under the bound | as it is, to rounding |
    | gradient zero | zero |
    | `max_norm=0` | zeros |
    | NaN or inf | gradients NaN; with `skip_nonfinite`, as if it were not there |
    | masked out, or of no known user | as if it were not there, even if it is NaN |
    | none counted, or none in the batch | zeros |

    Clipping alone gives no privacy, which also needs noise and an accountant. For privacy, set
    `mean=False` or `normalize_by`, and `skip_nonfinite=True`. One example then changes `grads` by
    at most `clipax.per_example.sensitivity`. A mean has no such bound, because its divisor
    depends on the examples.

    Example:
      >>> def loss_fn(w, example):
      ...     return jnp.sum(w * example)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> grads, info = clipped_grad(loss_fn, 1.0)(jnp.zeros(2), batch)
      >>> grads, info.norms
      (Array([0.3 , 0.65], dtype=float32), Array([5. , 0.5], dtype=float32))

    References:
      Abadi et al., Deep Learning with Differential Privacy, 2016, arXiv:1607.00133.
    """
    check_max_norm(max_norm)
    _checks.function(loss_fn=loss_fn, coefficient=coefficient)
    _checks.flag(has_aux=has_aux, mean=mean, user_mean=user_mean, skip_nonfinite=skip_nonfinite)
    if normalize_by is not None:
        _checks.scalar(_checks.finite_positive, normalize_by=normalize_by)
    for name, value in {"num_users": num_users, "microbatch_size": microbatch_size}.items():
        if value is not None:
            _checks.positive_integer(**{name: value})
    check_memory(memory)
    loss = loss_of(loss_fn, argnums, batch_argnums, has_aux, batch_argnames, prng_argnum)
    options = Options(
        coefficient,
        mean,
        normalize_by,
        _arguments.float_dtype(dtype=dtype),
        num_users,
        user_mean,
        skip_nonfinite,
        microbatch_size,
        memory,
    )
    usual_bound = max_norm
    rows = "examples" if num_users is None else "replicated"
    placements = OfExamples("examples", rows, rows, rows, "examples")  # type: ignore[arg-type]

    def grad_fn(
        *args: Any, mask: Any = None, max_norm: Any = None, user_ids: Any = None, **shared: Any
    ) -> tuple[Any, PerExampleInfo]:
        bound = usual_bound if max_norm is None else max_norm
        check_max_norm(bound)
        call = call_of(loss, args, shared, mask=mask, max_norm=max_norm, user_ids=user_ids)
        grads, of_examples, of_batch = with_automatic_axes(
            functools.partial(_clip_batch, options=options),
            call,
            _arguments.of_examples(call.examples, np.bool_, mask=mask),
            checked_users(user_ids, call.examples, num_users),
            bound,
            out=("params", placements, "replicated"),
        )
        return grads, PerExampleInfo(**of_examples._asdict(), **of_batch._asdict())

    return grad_fn


def _clip_batch(
    call: Call, mask: Array | None, user_ids: Array | None, bound: Any, options: Options
) -> tuple[Any, OfExamples, OfBatch]:
    if user_ids is not None:
        measured, mask = measure_users(call, mask, user_ids, options)
        sums, each = clip_measured(call, measured, mask, bound, options)
    else:
        sums, each = _clip_examples(call, mask, bound, options)
    divisor = _divisor(each, options)
    if divisor is not None:
        sums = jax.tree.map(lambda leaf: leaf / jnp.asarray(divisor).astype(leaf.dtype), sums)
    max_norm = jax.tree.map(as_bound, bound, each.norms)
    clip_fraction = jax.tree.map(
        lambda norm, limit: share_of_counted(each.is_counted, norm > limit), each.norms, max_norm
    )
    grads = jax.tree.map(
        lambda total, leaf: total.astype(options.dtype_of(leaf)), sums, call.params
    )
    return grads, each, OfBatch(clip_fraction, max_norm)


def _clip_examples(
    call: Call, mask: Array | None, bound: Any, options: Options
) -> tuple[Any, OfExamples]:
    if options.microbatch_size is None and call.examples:
        return clip(call, mask, bound, options)

    def step(part: Call, mask: Array | None) -> tuple[Any, OfExamples]:
        return clip(part, mask, bound, options)

    return in_parts(step, call, (mask,), options.microbatch_size or 1, call.wide_zeros())


def _divisor(each: OfExamples, options: Options) -> jax.typing.ArrayLike | None:
    if options.normalize_by is not None:
        return options.normalize_by
    return number_counted(each.is_counted, jnp.float32) if options.mean else None
