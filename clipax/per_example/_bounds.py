"""Checks of a bound on the norms of examples."""

from typing import Any

import jax

from clipax._core import _checks
from clipax._core._shown import shown


def check_max_norm(max_norm: Any) -> None:
    """Refuses anything but a number >= 0 or a tree of such numbers."""
    if max_norm is None:
        _checks.non_negative(max_norm=max_norm)
    if _checks.is_transformation(max_norm):
        raise ValueError(
            "max_norm must be a number or a tree of numbers, got a transformation: pass the"
            " gradients that grad_fn returns to its update instead."
        )
    # None may be a part of the parameters, and so of a tree of bounds in their structure.
    for path, leaf in jax.tree_util.tree_leaves_with_path(max_norm):
        if _checks.is_schedule(leaf):
            raise ValueError(
                "max_norm must be a number or a tree of numbers, got the schedule"
                f" {shown(leaf)}. Pass its value at each call: grad_fn(...,"
                " max_norm=schedule(count))."
            )
        _checks.scalar(_checks.non_negative, **{"max_norm" + jax.tree_util.keystr(path): leaf})
