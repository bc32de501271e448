"""What the tests of `skip_step` share: runs, and the rule in NumPy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sequences
import trees

import clipax

GRADS = {"w": jnp.array([3.0, 4.0])}


def run_losses(method: Any, sequence: Any, losses: Any = None) -> tuple[Any, Any]:
    """What comes out of every step, and the states, with the losses if there are any."""
    extra = {} if losses is None else {"loss": jnp.asarray(losses, jnp.float32)}
    state = method.init(sequences.at(sequence, 0))
    return jax.tree.map(np.asarray, compiled_run(method)(state, (sequence, extra)))


@functools.cache
def compiled_run(method: Any) -> Callable[..., Any]:
    def step(state: Any, now: Any) -> Any:
        updates, extra = now
        out, state = method.update(updates, state, None, **extra)
        return state, (out, state)

    return jax.jit(lambda state, xs: jax.lax.scan(step, state, xs)[1])


@functools.cache
def guarded_sgd(**rules: Any) -> Any:
    return clipax.skip_step(optax.sgd(1.0), **rules)


def skipped_at(norms: Any, losses: Any = None, **rules: Any) -> list[int]:
    """The steps that are skipped, counted from zero."""
    column = np.asarray(norms, np.float32)[:, None]
    _, states = run_losses(guarded_sgd(**rules), column, losses)
    return np.flatnonzero(states.is_skipped).tolist()


def is_spike(value: float, past: Any, z_max: float, floor: float = 1e-6) -> bool:
    """OLMo-core's comparison, with a least deviation; 0 is theirs."""
    with np.errstate(all="ignore"):
        mean, std = np.mean(past), np.std(past, ddof=1) if len(past) > 1 else np.nan
    # Written so that NaN skips, as there.
    return not value - mean <= z_max * np.fmax(std, floor * abs(mean))


def naive_rule(norms: Any, z_max: float = 6.0, window_size: int = 128) -> list[int]:
    """OLMo-core's rule to the letter, for norms alone: everything enters the window."""
    skipped = []
    for step, norm in enumerate(norms):
        past = norms[max(0, step - window_size) : step]
        if step + 1 >= max(2, window_size // 2) and is_spike(norm, past, z_max, floor=0.0):
            skipped.append(step)
    return skipped


def losses_of_a_run() -> np.ndarray:
    """Falling losses with noise, spikes, a plateau and a NaN."""
    rng = np.random.default_rng(5)
    count = sequences.LONG_COUNT
    losses = 4.0 * np.exp(-np.arange(count) / 80) - 0.5 + 0.1 * rng.normal(size=count)
    losses[[70, 140, 141, 305]] += 30.0
    losses[170:215] = losses[170]
    losses[230] = np.nan
    losses[235] = np.inf
    return losses.astype(np.float32)


promotes = pytest.mark.usefixtures("_promotes")


def unkeyed(tree: Any) -> Any:
    """Keys as integers, which NumPy can compare."""

    def convert(leaf: Any) -> Any:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(convert, tree)


def assert_bitwise(one: Any, other: Any) -> None:
    trees.assert_bitwise(unkeyed(one), unkeyed(other))


def once(method: Any, updates: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    return method.update(updates, method.init(updates), params, **extra)
