"""The noise scale of the gradient, from the norms of examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _leaves
from clipax._core._shown import shown
from clipax._core._typing import Array, Updates
from clipax.norms import global_norm
from clipax.per_example._info import PerExampleInfo


class NoiseScale(NamedTuple):
    """How much the gradients of examples differ, and what batch size that suggests."""

    scale: Array
    """`variance / square_norm`, in examples; inf where `square_norm` is not above zero."""
    variance: Array
    """The variance of an example's gradient around the mean, summed over all entries."""
    square_norm: Array
    """The square of the norm of the mean, without what chance adds to it; can be negative."""


def noise_scale(grads: Updates, info: PerExampleInfo) -> NoiseScale:
    """Estimates the simple noise scale, the batch size at which noise and signal are equal.

        scale = tr(Sigma) / |G|^2

    G is the mean gradient over all data and Sigma the covariance of the gradients of examples.
    Batches much smaller than `scale` average too few examples to be worth more than their
    examples one after another; doubling a much larger batch hardly improves a step.

    Both are estimated without bias from what `clipped_grad` returns, with B counted examples:

        tr(Sigma) ~ (mean_b |g_b|^2 - |grads|^2) * B / (B - 1)
        |G|^2     ~ |grads|^2 - tr(Sigma) / B

    Clipped gradients give the noise scale of clipped gradients. A bound of `inf` clips nothing.

    Args:
      grads: The mean that `clipped_grad` returned. With `mean=False` or `normalize_by`, make it
        one first.
      info: What `clipped_grad` returned beside it.

    Returns:
      Scalars for this batch. One batch gives a rough value, so average `variance` and
      `square_norm` over steps and divide the averages.

    Raises:
      ValueError: `info` is not the `PerExampleInfo` of `clipped_grad`.

    | batch | result |
    |---|---|
    | equal gradients | `variance` and `scale` are 0, to rounding |
    | a mean that chance explains | `square_norm <= 0`, and `scale` is inf |
    | fewer than two counted examples | `variance` and `square_norm` are 0, and `scale` is inf |

    Example:
      >>> def loss_fn(w, example):
      ...     return jnp.sum(w * example)
      >>> batch = jnp.array([[3.0], [5.0]])
      >>> noise_scale(*clipped_grad(loss_fn, jnp.inf)(jnp.zeros(1), batch))
      NoiseScale(scale=Array(0.13333334, dtype=float32),
                 variance=Array(2., dtype=float32), square_norm=Array(15., dtype=float32))

    References:
      McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162.
    """
    if not isinstance(info, PerExampleInfo):
        raise ValueError(f"info must be the PerExampleInfo of clipped_grad, got {shown(info)}.")
    # Squares of large norms overflow, so they are in units of about the largest: a power of two,
    # because the difference of two squares loses whatever digits a quotient would round.
    clipped = jax.tree.map(_clipped, info.norms, info.coefficients)
    sizes = jax.vmap(lambda norms: global_norm(norms, axis_name=()))(clipped)
    sizes = jnp.where(info.is_counted, sizes, 0)
    largest = jnp.max(sizes, initial=0)
    unit = jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1] - 1)
    number, of_mean = _leaves.in_dtype_of(
        sizes, jnp.sum(info.is_counted), global_norm(grads, axis_name=())
    )
    others = jnp.maximum(number - 1, 1)
    mean_square = jnp.sum((sizes / unit) ** 2) / jnp.maximum(number, 1)
    square = (of_mean / unit) ** 2
    has_two = number > 1
    variance = jnp.where(has_two, jnp.maximum(mean_square - square, 0) * number / others, 0)
    square_norm = jnp.where(has_two, square - variance / jnp.maximum(number, 1), 0)
    is_signal = square_norm > 0
    scale = jnp.where(is_signal, variance / jnp.where(is_signal, square_norm, 1), jnp.inf)
    return NoiseScale(scale, variance * unit**2, square_norm * unit**2)


def _clipped(norm: Array, coefficient: Array) -> Array:
    # The coefficient of an example that is left out is zero, and its norm can be NaN.
    return jnp.where(coefficient == 0, 0, norm) * coefficient
