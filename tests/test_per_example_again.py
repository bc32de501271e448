"""Norms of products that nearly cancel are measured again, and others are not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees

import clipax
from clipax.per_example import _in_passing, _norms

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)
ROWS = RNG.normal(size=(4, 1, 64))
APART = jnp.asarray(np.concatenate([ROWS, RNG.normal(size=ROWS.shape)], 1), jnp.float32)
CLOSE = jnp.asarray(
    np.concatenate([ROWS, ROWS * (1 + 1e-4 * RNG.normal(size=ROWS.shape))], 1), jnp.float32
)
WAYS = ["kept", "twice"]


def difference(w: jax.Array, x: jax.Array) -> jax.Array:
    """Two rows that are nearly equal have gradients that nearly cancel."""
    above, below = jnp.tanh(1e-3 * (x @ w))
    return jnp.sum(above) - jnp.sum(below)


def norms_of(memory: Any, batch: jax.Array, **given: Any) -> jax.Array:
    grad_fn = clipax.clipped_grad(difference, 1.0, memory=memory)
    norms: jax.Array = grad_fn(W, batch, **given)[1].norms
    return norms


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records how often norms are measured again, outside of `jax.jit`."""
    found: list[str] = []
    for module in (_norms, _in_passing):

        def watched(*args: Any, original: Any = module._norms_of_made) -> Any:
            found.append("again")
            return original(*args)

        monkeypatch.setattr(module, "_norms_of_made", watched)
    return found


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("memory", WAYS)
def test_only_counted_examples_are_measured_again(memory: Any, counted: list[str]) -> None:
    norms_of(memory, APART)
    mixed = APART.at[1].set(CLOSE[1])
    found = norms_of(memory, mixed, mask=np.arange(4) != 1)
    assert not counted
    zoo.assert_near(found[2:], norms_of(memory, APART)[2:])
    found = norms_of(memory, mixed, mask=np.arange(4) != 2)
    assert counted == ["again"]
    zoo.assert_near(found, oracle.norms(oracle.gradients(difference, W, mixed)), 1e-4)


@pytest.mark.parametrize("memory", WAYS)
def test_an_ensemble_measures_again_where_one_member_has_to(memory: Any) -> None:
    batches = jnp.stack([APART, CLOSE])
    found = trees.quick_jit(jax.vmap(lambda batch: norms_of(memory, batch)))(batches)
    for norms, batch in zip(found, batches, strict=True):
        wanted = oracle.norms(oracle.gradients(difference, W, batch))
        zoo.assert_near(norms, wanted, tolerance=1e-4)


@pytest.mark.parametrize("memory", WAYS)
def test_an_ensemble_branches_as_one(memory: Any) -> None:
    """Under `vmap`, JAX computes both branches of a condition that differs between members."""
    mapped = jax.vmap(jax.vmap(lambda batch: norms_of(memory, batch)))
    program = jax.make_jaxpr(mapped)(jnp.stack([APART, CLOSE])[None]).jaxpr
    loops = [path for path in paths_to("scan", program) if "cond" not in path]
    assert not loops
    assert paths_to("scan", program)


def paths_to(primitive: str, program: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The names of the equations around each equation of some primitive."""
    found = []
    for equation in program.eqns:
        here = (*path, equation.primitive.name)
        found += [path] if equation.primitive.name == primitive else []
        for inside in jax.tree.leaves(list(equation.params.values())):
            inside = getattr(inside, "jaxpr", inside)
            found += paths_to(primitive, inside, here) if hasattr(inside, "eqns") else []
    return found
