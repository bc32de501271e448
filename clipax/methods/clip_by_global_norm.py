"""Clipping by the global norm."""

import functools

import jax
import optax

from clipax._core import _checks
from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import AxisName, Bound, LeafRule
from clipax.coefficients import hard
from clipax.norms import global_norm
from clipax.thresholds import fixed


@injectable
def clip_by_global_norm(
    max_norm: Bound,
    ord: float = 2,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales all updates by one factor so that their global norm is bounded.

    `u <- u * min(1, max_norm / (norm + eps))` with `norm = (sum_i |u_i|^p)^(1/p)` over all entries
    of all leaves.

    Args:
      max_norm: The bound, >= 0: a number, a scalar array or a schedule `count -> value`. Typically
        1.0; `inf` only measures.
      ord: The order `p > 0` of the norm; `inf` is the largest modulus.
      eps: Added to the norm, >= 0. With 1e-6 the factor is that of
        `torch.nn.utils.clip_grad_norm_`, and a clipped norm ends just below the bound.
      mask: Which leaves are measured and clipped: True, a tree prefix of booleans, or a function
        `(path, leaf) -> bool`. Other leaves, such as frozen ones, pass unchanged.
      axis_name: The mapped axes that shard the leaves, where types do not say so: under `pmap`,
        `vmap(axis_name=...)` and `shard_map(check_vma=False)`. One name, several, or a tree prefix
        of them; `()` for replicated leaves.

    Returns:
      A transformation whose state is a `ClipState` of scalars. Its `update` accepts a known norm
      of the updates as the extra argument `norm=` instead of measuring it; in a chain, every
      method with one norm takes it.

    Raises:
      ValueError: `max_norm` or `eps` is not a number >= 0; `ord` <= 0; `axis_name` repeats a name.
        At `update`, `axis_name` does not fit or is not bound, or the program is mapped and neither
        `axis_name` nor types say what is sharded.

    | updates | max_norm | result |
    |---|---|---|
    | norm <= max_norm, eps = 0 | any | the updates, bit for bit |
    | zero | 0 | zeros |
    | any finite | 0 | zeros |
    | any finite | inf | the updates, bit for bit |
    | an inf entry | finite | NaN there, zero elsewhere |
    | a NaN entry | any | all NaN |
    | finite, but the norm overflows its dtype | finite | zeros |
    | masked out, None, integer, bool, float0 leaf | any | unchanged, not measured |

    "Bit for bit" holds for normal numbers; XLA's CPU and TPU backends flush subnormal ones (below
    1.2e-38) to zero. A coefficient below that is applied as two factors and may be recorded as 0.

    Example:
      >>> clip = clip_by_global_norm(6.5)
      >>> updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
      >>> clipped, state = clip.update(updates, clip.init(updates))
      >>> clipped
      {'b': Array([6.], dtype=float32), 'w': Array([1.5, 2. ], dtype=float32)}
      >>> state.norm, state.coefficient
      (Array(13., dtype=float32), Array(0.5, dtype=float32))

    References:
      Pascanu, Mikolov, Bengio, 2013, https://arxiv.org/abs/1211.5063
    """
    _checks.one_bound(_checks.non_negative, max_norm=max_norm)
    _checks.scalar(_checks.non_negative, eps=eps)
    norm = functools.partial(global_norm, ord=_checks.order(ord))
    coefficient = functools.partial(hard, eps=eps)
    return clip_by(norm, fixed(max_norm), coefficient, mask=mask, axis_name=axis_name)
