"""Clipping the gradient of each example, at about the price of one gradient of the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _checks
from clipax._core._typing import Array, Bound, Coefficient
from clipax.coefficients import hard
from clipax.per_example._bounds import check_max_norm
from clipax.per_example._calls import ArgNums, Call, call_of, loss_of
from clipax.per_example._clipping import Options, as_bound, clip
from clipax.per_example._info import (
    OfBatch,
    OfExamples,
    PerExampleInfo,
    number_counted,
    share_of_counted,
)
from clipax.per_example._memory import Memory, check_memory
from clipax.per_example._meshes import with_automatic_axes
from clipax.per_example._microbatches import clip_in_parts


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
    memory: Memory = "auto",
) -> Callable[..., tuple[Any, PerExampleInfo]]:
    """Makes a gradient function that clips the gradient of each example.

        grads = mean over b of coefficient(|g_b|, max_norm) * g_b,   g_b = grad loss_fn(., b)

    Args:
      loss_fn: `loss_fn(params, example) -> loss`, the scalar loss of *one* example.
      max_norm: The bound, >= 0, or a tree prefix of the parameters with a bound for each part.
      coefficient: `(norm, max_norm) -> factor`, such as `hard`, `normalized` or `auto_s`.
      argnums: The position or positions of the parameters.
      batch_argnums: The position or positions of the arguments with the examples along the
        first axis of every leaf. All other arguments are the same for all examples.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      mean: Whether to divide the sum by the number of counted examples.
      skip_nonfinite: Whether to leave out examples whose norm is NaN or inf.
      microbatch_size: How many examples to process at once; all by default.
      memory: "kept" keeps activations until the norms are known; "twice" makes them a second time
        for the sum, and needs each `jax.custom_vjp` to be linear. "auto" is "twice" if the loss
        uses `jax.checkpoint` and no `jax.custom_vjp`, there is one bound, and the activations of
        the batch are larger than the parameters.

    Returns:
      `grad_fn(*args, mask=None, max_norm=None, **shared) -> (grads, PerExampleInfo)`, which
      takes the arguments of `loss_fn`. `mask`, one boolean per example, says which examples
      count; `max_norm` replaces the bound above. `grads` are like the parameters.

    Raises:
      ValueError: An argument is not as above, or `loss_fn` may mix examples of several devices.

    | example | result |
    |---|---|
    | at or under the bound | as it is, to rounding |
    | gradient zero | zero |
    | `max_norm=0` | zeros |
    | NaN or inf | gradients NaN; with `skip_nonfinite`, as if it were not there |
    | masked out | as if it were not there, even if it is NaN |
    | none counted | zeros |

    Clipping alone gives no privacy, which also needs noise and an accountant.

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
    _checks.flag(has_aux=has_aux, mean=mean, skip_nonfinite=skip_nonfinite)
    if microbatch_size is not None:
        _checks.positive_integer(microbatch_size=microbatch_size)
    check_memory(memory)
    loss = loss_of(loss_fn, argnums, batch_argnums, has_aux)
    options = Options(coefficient, mean, skip_nonfinite, microbatch_size, memory)
    usual_bound = max_norm

    def grad_fn(
        *args: Any, mask: Any = None, max_norm: Any = None, **shared: Any
    ) -> tuple[Any, PerExampleInfo]:
        bound = usual_bound if max_norm is None else max_norm
        check_max_norm(bound)
        call = call_of(loss, args, shared, mask=mask, max_norm=max_norm)
        grads, of_examples, of_batch = with_automatic_axes(
            functools.partial(_clip_batch, options=options),
            call,
            _checked_mask(mask, call.examples),
            bound,
            out=("params", "examples", "replicated"),
        )
        return grads, PerExampleInfo(**of_examples._asdict(), **of_batch._asdict())

    return grad_fn


def _clip_batch(
    call: Call, mask: Array | None, bound: Any, options: Options
) -> tuple[Any, OfExamples, OfBatch]:
    if options.microbatch_size is None:
        sums, each = clip(call, mask, bound, options)
    else:
        sums, each = clip_in_parts(call, mask, bound, options, options.microbatch_size)
    if options.mean:
        sums = jax.tree.map(lambda leaf: leaf / number_counted(each.is_counted, leaf.dtype), sums)
    max_norm = jax.tree.map(as_bound, bound, each.norms)
    clip_fraction = jax.tree.map(
        lambda norm, limit: share_of_counted(each.is_counted, norm > limit), each.norms, max_norm
    )
    grads = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, call.params)
    return grads, each, OfBatch(clip_fraction, max_norm)


def _checked_mask(mask: Any, examples: int) -> Array | None:
    if mask is None:
        return None
    wanted = f"mask must be {examples} booleans, one an example"
    try:
        mask = jnp.asarray(mask)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wanted}, got {mask!r}.") from error
    if mask.shape != (examples,) or mask.dtype != bool:
        raise ValueError(f"{wanted}, got {mask.dtype}{list(mask.shape)}.")
    return mask
