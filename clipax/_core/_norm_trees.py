"""Norms of the updates or the parameters, in the structure that a state has."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _checks, _leaves, _paths
from clipax._core._shown import shown
from clipax._core._typing import Array, Norm, Norms, Updates


def conformed(norms: Norms, template: Norms, *, name: str = "updates since `init`") -> Norms:
    """Brings norms into the structure and dtypes of the template; a frozen leaf has norm zero."""
    kept, given = _paths.by_path(template), _paths.by_path(norms)
    # A node without leaves can replace all leaves below it, if they are frozen together.
    hollow = [path for path, norm in given.items() if norm is None]

    def is_there(path: str) -> bool:
        return path in given or any(not up or path.startswith(f"{up}/") for up in hollow)

    added = [path for path in given if given[path] is not None and kept.get(path) is None]
    if added or not all(map(is_there, kept)):
        raise ValueError(
            f"{name} must have the structure that `init` saw, with {_named(kept)}, got"
            f" {_named(given)}."
        )

    def conform(path: str, zero: Array | None) -> Array | None:
        norm = given.get(path)
        if zero is None or norm is None:
            return None if zero is None else jnp.zeros_like(zero)
        if not jax.tree_util.all_leaves([norm]) or jnp.shape(norm) != zero.shape:
            raise ValueError(
                f"{name} must give norms of shape {zero.shape}, as in the state, got"
                f" {shown(norm)}."
            )
        return jnp.asarray(norm).astype(zero.dtype)

    result = {path: conform(path, zero) for path, zero in kept.items()}
    return result if isinstance(template, dict) else result[""]


def known(norms: Any, template: Norms) -> Norms:
    """Checks norms that a caller measured; None if they are for another method in the chain."""
    is_whole = jax.tree_util.all_leaves([norms]) and norms is not None
    if is_whole and isinstance(template, dict):
        return None
    _checks.known_norm(norm=norms)
    return conformed(_paths.flat(jax.tree.map(jnp.asarray, norms)), template, name="norm")


def of_params(
    measure: Norm, updates: Updates, params: Updates | None, template: Norms
) -> Norms | None:
    """Norms of the parameters whose updates are measured; under jit, unused ones cost nothing."""
    if params is None:
        return None
    by_path = _paths.leaves(params)
    leaves, treedef = jax.tree.flatten(updates)
    matching = [
        by_path.get(path) if _leaves.is_measured(leaf) else None
        for path, leaf in zip(_paths.of_leaves(updates), leaves, strict=True)
    ]
    found = zip(leaves, matching, strict=True)
    if any(_leaves.is_measured(leaf) and param is None for leaf, param in found):
        return None  # Only a threshold that needs them can decide whether this is an error.
    return conformed(_paths.flat(measure(jax.tree.unflatten(treedef, matching))), template)


def _named(by_path: Mapping[str, Any]) -> str:
    return "one norm" if set(by_path) == {""} else f"the norms {sorted(by_path)}"
