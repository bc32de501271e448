"""Models as users write them, clipped in double precision as `vmap` and `grad` give it."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import one_by_one
import per_example_exact as exact
import per_example_models
import pytest
import trees

pytestmark = pytest.mark.slow

NAMES = sorted(per_example_models.MODELS)
# Their derivatives may not be linear, and nothing is made a second time.
KEPT = {"reversed_gradient"}


@pytest.fixture(autouse=True)
def _as_users_do() -> Iterator[None]:
    with (
        trees.double_precision(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def built(name: str) -> tuple[Any, per_example_models.Model]:
    model = per_example_models.MODELS[name]()
    memories = exact.BOTH[:1] if name in KEPT else exact.BOTH
    return functools.partial(exact.clip, model.loss_fn, memories=memories), model


@pytest.mark.parametrize("name", NAMES[::2])
def test_models_are_clipped_in_a_compiled_loop_over_steps(name: str) -> None:
    clip, model = built(name)

    @trees.quick_jit
    def run(params: Any, batches: Any) -> Any:
        def step(params: Any, batch: Any) -> Any:
            found = clip(params, batch)
            return jax.tree.map(lambda w, g: w - 0.1 * g, params, found.clipped["kept"][0]), found

        return jax.lax.scan(step, params, batches)[1]

    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(model.batch(4) for _ in range(2)))
    exact.assert_all_exact(run(model.params, batches), 2)


@pytest.mark.parametrize("name", NAMES)
def test_models_are_clipped_leaf_by_leaf_in_a_batch_of_one(name: str) -> None:
    clip, model = built(name)
    clip = functools.partial(clip, is_tree=True)
    exact.assert_exact(one_by_one.run(clip, model.params, model.batch(1)))


@pytest.mark.parametrize("name", NAMES[::6])
def test_models_are_clipped_in_a_batch_of_a_thousand(name: str) -> None:
    clip, model = built(name)
    exact.assert_exact(trees.quick_jit(clip)(model.params, model.batch(1000)))


@pytest.mark.parametrize("name", NAMES[3::6])
def test_models_are_clipped_in_an_ensemble(name: str) -> None:
    clip, model = built(name)
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), model.params)
    found = trees.quick_jit(jax.vmap(clip, (0, None)))(members, model.batch(4))
    exact.assert_all_exact(found, 2)
