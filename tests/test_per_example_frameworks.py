"""Models of other libraries, which are functions of trees too."""

from typing import Any

import jax
import jax.numpy as jnp
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees

import clipax

pytestmark = pytest.mark.slow

# They are no dependencies: where one is not installed there is nothing to test.
REASON = "this library is not installed"
TOKENS, WIDTH, LENGTH = 32, 16, 3


def sequences() -> Any:
    source = zoo.Source(0)
    return source.tokens(0, TOKENS, LENGTH), source.tokens(0, 4)


def images() -> Any:
    source = zoo.Source(0)
    return source.batch(6, 6, 2), source.tokens(0, 4)


def assert_plain(
    loss_fn: Any, params: Any, batch: Any, capsys: pytest.CaptureFixture[str], **ways: str
) -> None:
    """As `vmap` and clip give it, and the norms of these leaves in these ways."""

    @trees.quick_jit
    def run(params: Any, batch: Any) -> Any:
        each = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        norms = jax.vmap(clipax.global_norm)(each)
        bound = jnp.mean(norms)
        return each, bound, clipax.clipped_grad(loss_fn, 1.0)(params, batch, max_norm=bound)

    each, bound, (grads, info) = run(params, batch)
    each = jax.tree.map(zoo.wide, each)
    norms = oracle.norms(each)
    weights = oracle.hard(norms, float(bound)) / zoo.EXAMPLES
    zoo.assert_near(info.norms, norms)
    zoo.assert_near(grads, oracle.weighted_sum(each, weights))
    trees.assert_same_type(grads, params)
    assert 0 < info.clip_fraction < 1

    clipax.explain_clipped_grad(loss_fn, params, batch)
    lines = zoo.lines_of_leaves(capsys.readouterr().out)
    assert len(lines) == len(jax.tree.leaves(params))
    for part, way in ways.items():
        found = [line for line in lines if part in line.split()[0]]
        assert found, (part, lines)
        assert all(f" {way} " in line for line in found), found


def test_models_of_flax_linen_are_clipped(capsys: pytest.CaptureFixture[str]) -> None:
    linen = pytest.importorskip("flax.linen", reason=REASON)

    class Model(linen.Module):  # type: ignore[misc]
        @linen.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = linen.Embed(TOKENS, WIDTH, name="embed")(tokens)
            x = x + linen.MultiHeadDotProductAttention(2, name="attend")(linen.LayerNorm()(x))
            return linen.Dense(4, name="head")(x.mean(0))

    def loss_fn(params: Any, example: Any) -> jax.Array:
        tokens, label = example
        return zoo.cross_entropy(model.apply(params, tokens), label)

    model, batch = Model(), sequences()
    with jax.numpy_rank_promotion("allow"):  # Its layers add vectors to matrices.
        params = model.init(jax.random.key(0), batch[0][0])
        ways = {"embedding": zoo.GRAM, "query/kernel": zoo.GRAM, "head/kernel": zoo.OUTER}
        assert_plain(loss_fn, params, batch, capsys, **ways)


def test_models_of_flax_nnx_are_clipped(capsys: pytest.CaptureFixture[str]) -> None:
    nnx = pytest.importorskip("flax.nnx", reason=REASON)

    class Model(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any):
            self.conv = nnx.Conv(2, 8, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.head = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = jax.nn.relu(self.norm(self.conv(x[None])[0]))
            return self.head(x.mean((0, 1)))

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        return zoo.cross_entropy(nnx.merge(graph, params)(x), label)

    with jax.numpy_rank_promotion("allow"):
        graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
        assert_plain(loss_fn, params, images(), capsys, **{"head/kernel": zoo.OUTER})


def test_models_of_equinox_are_clipped(capsys: pytest.CaptureFixture[str]) -> None:
    equinox = pytest.importorskip("equinox", reason=REASON)
    keys = jax.random.split(jax.random.key(0), 4)
    model = equinox.nn.Sequential(
        [
            equinox.nn.Conv2d(2, 8, 3, stride=2, key=keys[0]),
            equinox.nn.Lambda(lambda x: jax.nn.gelu(x).reshape(-1)),
            equinox.nn.MLP(32, 16, 24, 2, key=keys[1]),
            equinox.nn.Linear(16, 4, key=keys[2]),
        ]
    )
    # What is no array of floats is None there, and stays so.
    params, rest = equinox.partition(model, equinox.is_inexact_array)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        return zoo.cross_entropy(equinox.combine(params, rest)(jnp.moveaxis(x, -1, 0)), label)

    ways = {"layers/2/layers/0/weight": zoo.OUTER, "layers/3/weight": zoo.OUTER}
    assert_plain(loss_fn, params, images(), capsys, **ways)


def test_models_of_haiku_are_clipped(capsys: pytest.CaptureFixture[str]) -> None:
    haiku = pytest.importorskip("haiku", reason=REASON)

    def forward(tokens: jax.Array) -> jax.Array:
        x = haiku.Embed(TOKENS, WIDTH)(tokens)
        cell = haiku.LSTM(WIDTH)
        x, _ = haiku.dynamic_unroll(cell, x, cell.initial_state(None))
        return haiku.Linear(4)(x[-1])

    def loss_fn(params: Any, example: Any) -> jax.Array:
        tokens, label = example
        return zoo.cross_entropy(model.apply(params, tokens), label)

    model, batch = haiku.without_apply_rng(haiku.transform(forward)), sequences()
    params = model.init(jax.random.key(0), batch[0][0])
    ways = {"embeddings": zoo.GRAM, "lstm/linear/w": zoo.GRAM}
    assert_plain(loss_fn, params, batch, capsys, **ways)
