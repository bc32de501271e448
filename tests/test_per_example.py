"""The gradient of each example clipped: equal to the plain way on everything in the zoo."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees

import clipax

# Rules for a derivative that may not be linear, and parameters narrower than their sums.
REFUSED = {
    "custom_derivatives",
    "bfloat16_params",
    "bfloat16_params_of_float32_compute",
    "float16_params",
}


FIRST = {"mlp", "layers_under_scan", "tied_embedding"}


@pytest.mark.slow_but(14)
@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param(name, memory, marks=[pytest.mark.slow] if is_slow else [])
        for name, entry in zoo.ZOO.items()
        for memory, is_slow in (
            ("kept", entry.is_rare),
            ("twice", entry.is_rare or name not in FIRST),
        )
    ],
)
def test_clipped_gradients_equal_those_made_one_by_one(name: str, memory: Any) -> None:
    if memory == "twice" and name in REFUSED:
        memory = "auto"
    entry = zoo.ZOO[name]
    loss_fn, params, batch = entry.build()

    @trees.quick_jit
    def run(params: Any, batch: Any) -> Any:
        plain = jax.vmap(jax.value_and_grad(loss_fn), (None, 0))(params, batch)
        norms = clipax.per_example_norms(loss_fn, per_leaf=True, memory=memory)(params, batch)
        bound = jnp.mean(jax.vmap(clipax.global_norm)(norms))
        bounds = jax.tree.map(jnp.mean, norms)
        clip, clip_sum = (
            clipax.clipped_grad(loss_fn, 1.0, mean=mean, memory=memory) for mean in (True, False)
        )
        by_one = clip(params, batch, max_norm=bound)
        by_leaf, info = clip_sum(params, batch, max_norm=bounds)
        return plain, norms, by_one, by_leaf, info.max_norm

    (losses, each), norms, (grads, info), by_leaf, bounds = run(params, batch)
    each = jax.tree.map(zoo.wide, each)
    separate, total = oracle.norms_of_leaves(each), oracle.norms(each)
    clipped = jax.tree.map(
        lambda leaf, norm, bound: oracle.weighted_sum(leaf, oracle.hard(norm, float(bound))),
        each,
        separate,
        bounds,
    )
    assert 0 < info.clip_fraction < 1
    near = functools.partial(zoo.assert_near, tolerance=entry.tolerance)
    near(norms, separate)
    near(info.norms, total)
    near(info.losses, losses)
    near(grads, oracle.weighted_sum(each, oracle.hard(total, float(info.max_norm)) / zoo.EXAMPLES))
    near(by_leaf, clipped)
    trees.assert_same_type(grads, params)


@pytest.mark.slow_but(33)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_norms_are_found_the_cheapest_way(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    loss_fn, params, batch = zoo.ZOO[name].build()
    wanted = zoo.ZOO[name].ways
    clipax.explain_clipped_grad(loss_fn, params, batch)
    text = capsys.readouterr().out
    assert "norm of one example" in text.splitlines()[0]
    lines = zoo.lines_of_leaves(text)
    assert len(lines) == len(jax.tree.leaves(params))
    found = {
        line.split()[0]: next(way for way in zoo.WAYS if f" {way} " in line) for line in lines
    }
    assert {leaf: found[leaf] for leaf in wanted} == wanted
