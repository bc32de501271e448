"""Small models of everything that losses are made of, and how their norms are to be found."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXAMPLES = 5
# What `clipax.explain_clipped_grad` says of a leaf.
ZERO, OUTER = "is zero", "norms of two vectors"
GRAM, EACH = "Gram matrices", "made for each example"
WAYS = (ZERO, OUTER, GRAM, EACH)


class Model(NamedTuple):
    build: Callable[[], tuple[Callable[..., Any], Any, Any]]
    """Makes the loss of one example, parameters and a batch."""
    ways: dict[str, str]
    """How the norms of its main leaves are found."""
    tolerance: float
    """Of the largest entry."""
    is_rare: bool


ZOO: dict[str, Model] = {}


def model(*, tolerance: float = 2e-5, is_rare: bool = False, **ways: str) -> Callable[[Any], Any]:
    """Enters a function that makes a model. It gets a source of arrays."""

    def enter(build: Any) -> Any:
        def seeded() -> Any:
            return build(Source(len(build.__name__)))

        ZOO[build.__name__] = Model(seeded, ways, tolerance, is_rare)
        return build

    return enter


class Source:
    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def weight(self, *shape: int) -> jax.Array:
        fan_in = max(1, int(np.prod(shape[:-1]))) if len(shape) > 1 else 1
        scaled = self._rng.normal(size=shape) / np.sqrt(fan_in)
        return jnp.asarray(scaled.astype(np.float32))

    def stacked(self, layers: int, *shape: int) -> jax.Array:
        return jnp.stack([self.weight(*shape) for _ in range(layers)])

    def batch(self, *shape: int) -> jax.Array:
        """Examples of different sizes."""
        sizes = self._rng.lognormal(size=(EXAMPLES, *[1] * len(shape)))
        return jnp.asarray((self._rng.normal(size=(EXAMPLES, *shape)) * sizes).astype(np.float32))

    def tokens(self, low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(low, high, size=(EXAMPLES, *shape), dtype=np.int32))


def wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def assert_near(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Leaf by leaf, to a share of the largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = wide(one), wide(other)
        assert one.shape == other.shape
        atol = tolerance * np.max(np.abs(other), initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x))


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logits, label[..., None], -1))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x * scale[None] + bias[None]


# -- Dense layers --------------------------------------------------------------------------------


@model(w0=OUTER, w1=OUTER, b0=EACH)
def mlp(source: Source) -> Any:
    params = {
        "w0": source.weight(12, 16),
        "b0": source.weight(16),
        "w1": source.weight(16, 5),
        "b1": source.weight(5),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        x = jnp.tanh(x @ params["w0"] + params["b0"])
        return cross_entropy(x @ params["w1"] + params["b1"], label)

    return loss_fn, params, (source.batch(12), source.tokens(0, 5))


@model(wide=GRAM, narrow=EACH)
def dense_over_time(source: Source) -> Any:
    params = {"wide": source.weight(32, 32), "narrow": source.weight(32, 2)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ params["wide"]) @ params["narrow"])

    return loss_fn, params, source.batch(4, 32)


@model(is_rare=True, short=GRAM, long=EACH)
def dense_over_two_axes(source: Source) -> Any:
    params = {"short": source.weight(24, 20), "long": source.weight(4, 3)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        return mean_square(x @ params["short"]) * (1 + mean_square(jnp.sin(y @ params["long"])))

    return loss_fn, params, (source.batch(2, 3, 24), source.batch(5, 6, 4))


@model(is_rare=True, into=GRAM, out=GRAM, back=GRAM, each=GRAM, inner=EACH)
def einsum_projections(source: Source) -> Any:
    params = {
        "into": source.weight(16, 3, 8),
        "out": source.weight(3, 8, 16),
        "back": source.weight(16, 3, 8),
        "each": source.weight(3, 16, 8),
        "inner": source.weight(3, 3),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        heads = jnp.tanh(jnp.einsum("td,dhk->thk", x, params["into"]))
        heads = jnp.tanh(jnp.einsum("thk,hg->tgk", heads, params["inner"]))
        x = jnp.einsum("thd,hdk->tk", heads, params["out"])
        y = jnp.tanh(jnp.einsum("thd,ehd->te", heads, params["back"]))
        z = jnp.einsum("td,hdk->htk", x * y, params["each"])
        return mean_square(z) + mean_square(x)

    return loss_fn, params, source.batch(4, 16)


@model(is_rare=True, scores=GRAM)
def bilinear(source: Source) -> Any:
    params = {"scores": source.weight(16, 16)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        return mean_square(jnp.einsum("td,de,se->ts", x, params["scores"], y))

    return loss_fn, params, (source.batch(3, 16), source.batch(4, 16))


@model(is_rare=True, heads=GRAM, lonely=OUTER)
def one_matrix_a_head(source: Source) -> Any:
    params = {"heads": source.weight(3, 16, 16), "lonely": source.weight(16, 4)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(jnp.einsum("htd,hdk->htk", x, params["heads"]))
        return mean_square(jnp.mean(x, (0, 1)) @ params["lonely"])

    return loss_fn, params, source.batch(3, 2, 16)


# -- Attention and embeddings --------------------------------------------------------------------


def attention(params: Any, x: jax.Array, groups: int = 1) -> jax.Array:
    """Causal, of several heads; some of them may share their keys and values."""
    q = jnp.einsum("td,dhk->htk", x, params["q"])
    k = jnp.repeat(jnp.einsum("td,dhk->htk", x, params["k"]), groups, 0)
    v = jnp.repeat(jnp.einsum("td,dhk->htk", x, params["v"]), groups, 0)
    scores = jnp.einsum("htk,hsk->hts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    time = jnp.arange(x.shape[0])
    is_seen = (time[:, None] >= time[None])[None]
    scores = jax.nn.softmax(jnp.where(is_seen, scores, -1e9), -1)
    return jnp.einsum("hts,hsk,hkd->td", scores, v, params["o"])


@model(embedding=GRAM, position=EACH, q=GRAM, k=GRAM, v=GRAM, o=GRAM, up=GRAM, scale=EACH)
def transformer_block(source: Source) -> Any:
    params = {
        "embedding": source.weight(20, 16),
        "position": source.weight(8, 16),
        **{name: source.weight(16, 2, 8) for name in "qkv"},
        "o": source.weight(2, 8, 16),
        "scale": jnp.ones(16),
        "bias": source.weight(16),
        "up": source.weight(16, 32),
        "down": source.weight(32, 20),
    }

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"][tokens[:-1]] + params["position"][: len(tokens) - 1]
        x = x + attention(params, layer_norm(x, params["scale"], params["bias"]))
        x = jax.nn.gelu(layer_norm(x, params["scale"], params["bias"]) @ params["up"])
        return cross_entropy(x @ params["down"], tokens[1:])

    return loss_fn, params, source.tokens(0, 20, 6)


@model(is_rare=True, q=GRAM, k=GRAM, v=GRAM, o=GRAM)
def grouped_query_attention(source: Source) -> Any:
    params = {
        "q": source.weight(16, 4, 6),
        "k": source.weight(16, 2, 6),
        "v": source.weight(16, 2, 6),
        "o": source.weight(4, 6, 16),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(attention(params, x, groups=2))

    return loss_fn, params, source.batch(4, 16)


@model(embedding=GRAM, mix=GRAM)
def tied_embedding(source: Source) -> Any:
    params = {"embedding": source.weight(40, 16), "mix": source.weight(16, 16)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(params["embedding"][tokens[:-1]] @ params["mix"])
        return cross_entropy(x @ params["embedding"].T, tokens[1:])

    return loss_fn, params, source.tokens(0, 6, 5)


@model(table=GRAM, rows=GRAM, one=OUTER, small=EACH)
def look_ups(source: Source) -> Any:
    params = {
        "table": source.weight(30, 4),
        "rows": source.weight(30, 4),
        "one": source.weight(30, 4),
        "small": source.weight(2, 4),
    }

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        # Repeated, negative and far outside, on both sides.
        x = params["table"][tokens] * jnp.cos(params["rows"].at[tokens].get(mode="clip"))
        x = x + jnp.take(params["rows"], tokens, axis=0, mode="wrap")
        x = x + params["table"].at[tokens].get(mode="fill", fill_value=0.0)
        x = x + params["small"][tokens % 2]
        return mean_square(x) + mean_square(params["one"][tokens[0]])

    return loss_fn, params, source.tokens(-40, 40, 6).at[:, 1].set(3).at[:, 4].set(3)


@model(is_rare=True, table=GRAM)
def look_up_of_columns_and_grids(source: Source) -> Any:
    params = {"table": source.weight(40, 6), "columns": source.weight(5, 12)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(params["table"][tokens]).sum((0, 1))
        y = params["columns"][:, tokens[0]]
        return (
            mean_square(x) + mean_square(y @ y.T) + params["columns"][tokens[0, 0], tokens[0, 1]]
        )

    return loss_fn, params, source.tokens(0, 5, 2, 3)


@model(is_rare=True, table=GRAM)
def one_hot_look_up(source: Source) -> Any:
    params = {"table": source.weight(16, 16)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(jax.nn.one_hot(tokens, 16) @ params["table"]))

    return loss_fn, params, source.tokens(0, 5, 4)


# -- Shared weights ------------------------------------------------------------------------------


@model(is_rare=True, w=GRAM)
def shared_and_transposed(source: Source) -> Any:
    params = {"w": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["w"])
        x = jnp.tanh(x @ params["w"].T + x)
        return mean_square(x @ params["w"])

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def unrolled(source: Source) -> Any:
    params = {"w": source.weight(64, 64)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        for _ in range(20):
            x = jnp.tanh(x @ params["w"])
        return mean_square(x)

    return loss_fn, params, source.batch(64)


@model(is_rare=True, w=GRAM)
def two_towers(source: Source) -> Any:
    params = {"w": source.weight(32, 16)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        one, other = (jnp.tanh(each @ params["w"]) for each in example)
        return jnp.sum(one * other) + mean_square(one - other)

    return loss_fn, params, (source.batch(32), source.batch(32))


@model(is_rare=True, a=OUTER, b=OUTER, frozen=ZERO)
def low_rank_adapters(source: Source) -> Any:
    params = {
        "a": source.weight(16, 2),
        "b": source.weight(2, 12),
        "frozen": source.weight(16, 12),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        frozen = lax.stop_gradient(params["frozen"])
        return mean_square(jnp.tanh(x @ frozen + 0.5 * (x @ params["a"]) @ params["b"]))

    return loss_fn, params, source.batch(16)


@model(is_rare=True)
def low_rank_sum(source: Source) -> Any:
    params = {"a": source.weight(16, 2), "b": source.weight(2, 12), "w": source.weight(16, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ (params["w"] + params["a"] @ params["b"])))

    return loss_fn, params, source.batch(2, 16)


# -- What is done to weights ---------------------------------------------------------------------


@model(left=OUTER, right=OUTER)
def concatenated(source: Source) -> Any:
    params = {"left": source.weight(12, 8), "right": source.weight(12, 6)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ jnp.concatenate([params["left"], params["right"]], 1)))

    return loss_fn, params, source.batch(12)


@model(w=GRAM)
def sliced(source: Source) -> Any:
    params = {"w": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        y = jnp.tanh(x[:, :10] @ params["w"][:10]) + jnp.sin(x[:, 8:] @ params["w"][8:])
        even, odd = (lax.slice_in_dim(params["w"], start, 24, 2, axis=1) for start in (0, 1))
        return mean_square(y[:, :12] @ even[:12] + y[:, 12:] @ odd[12:])

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True)
def split(source: Source) -> Any:
    params = {"qkv": source.weight(12, 36)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(params["qkv"], 3, 1)
        return mean_square(jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v))

    return loss_fn, params, source.batch(2, 12)


@model(w=GRAM, v=OUTER)
def padded(source: Source) -> Any:
    params = {"w": source.weight(20, 18), "v": source.weight(18, 6)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ jnp.pad(params["w"], ((1, 3), (2, 0))))
        zero = jnp.zeros(())
        return mean_square(x.sum(0) @ lax.pad(params["v"], zero, [(1, 1, 0), (0, 1, 1)]))

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def transposed_and_reshaped(source: Source) -> Any:
    params = {"w": source.weight(4, 16, 6)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"].transpose(1, 0, 2).reshape(16, 24)
        return mean_square(jnp.tanh(x @ w))

    return loss_fn, params, source.batch(3, 16)


@model(is_rare=True, flat=GRAM, reversed=GRAM)
def flat_and_reversed(source: Source) -> Any:
    params = {"flat": source.weight(16 * 12), "reversed": source.weight(12, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["flat"].reshape(16, 12))
        return mean_square(x @ jnp.flip(params["reversed"], (0, 1)))

    return loss_fn, params, source.batch(2, 16)


@model(w=EACH)
def masked(source: Source) -> Any:
    params = {"w": source.weight(12, 12)}
    is_kept = jnp.tri(12, dtype=bool)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ jnp.where(is_kept, params["w"], 0.0)))

    return loss_fn, params, source.batch(12)


@model(is_rare=True, w=GRAM, v=OUTER)
def scaled_by_scalars(source: Source) -> Any:
    params = {"w": source.weight(16, 16), "v": source.weight(16, 4), "by": jnp.asarray(0.7)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, size = example
        x = jnp.tanh(x @ (-3.0 * params["by"] * params["w"] * size)) @ (params["w"] / params["by"])
        return mean_square(x.sum(0) @ (params["v"] / size))

    return loss_fn, params, (source.batch(2, 16), jnp.linspace(-2.0, 3.0, EXAMPLES))


@model(is_rare=True, v=EACH, g=EACH)
def weight_normalized(source: Source) -> Any:
    params = {"v": source.weight(12, 12), "g": source.weight(12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        lengths = jnp.linalg.norm(params["v"], axis=0, keepdims=True)
        return mean_square(x @ (params["v"] / lengths * params["g"][None])) + mean_square(
            x @ params["v"]
        )

    return loss_fn, params, source.batch(12)


@model(w=GRAM, b=EACH, table=GRAM)
def weight_decay(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "b": source.weight(24), "table": source.weight(24, 8)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, tokens = example
        loss = mean_square(jnp.tanh(x @ params["w"] + params["b"][None]))
        loss = loss + mean_square(jnp.tanh(params["table"][tokens]))
        return loss + 0.1 * sum(jnp.sum(leaf**2) for leaf in params.values())

    return loss_fn, params, (source.batch(2, 24), source.tokens(-2, 30, 4))


# -- Convolutions --------------------------------------------------------------------------------


def convolution(
    source: Source,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    layout: tuple[str, str, str],
    padding: Any,
    **options: Any,
) -> Any:
    spatial = iter(size)
    channels = kernel[layout[1].index("I")] * options.get("feature_group_count", 1)
    shape = [
        1 if axis == "N" else channels if axis == "C" else next(spatial) for axis in layout[0]
    ]
    strides = options.pop("window_strides", (1,) * len(size))

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x, params["kernel"], strides, padding, dimension_numbers=layout, **options
        )
        return mean_square(jnp.tanh(y)) + mean_square(jnp.cos(y))

    return loss_fn, {"kernel": source.weight(*kernel)}, source.batch(*shape)


NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
NWC = ("NWC", "WIO", "NWC")


@model(is_rare=True, kernel=GRAM)
def conv_of_few_places(source: Source) -> Any:
    return convolution(source, (3, 3, 6, 8), (4, 4), NHWC, "VALID")


@model(is_rare=True, kernel=EACH)
def conv_of_many_places(source: Source) -> Any:
    return convolution(source, (3, 3, 2, 3), (8, 8), NHWC, "SAME")


@model(kernel=GRAM)
def conv_strided(source: Source) -> Any:
    options = {"window_strides": (2, 3)}
    return convolution(source, (3, 2, 8, 10), (5, 6), NHWC, "SAME", **options)


@model(is_rare=True, kernel=GRAM)
def conv_channels_first(source: Source) -> Any:
    padding = [(2, 0), (1, 3)]
    options = {"window_strides": (3, 2)}
    return convolution(source, (12, 8, 3, 3), (5, 4), NCHW, padding, **options)


@model(is_rare=True, kernel=GRAM)
def conv_dilated(source: Source) -> Any:
    return convolution(source, (3, 8, 8), (9,), NWC, "VALID", rhs_dilation=(3,))


@model(is_rare=True, kernel=GRAM)
def conv_transposed(source: Source) -> Any:
    return convolution(source, (3, 8, 8), (3,), NWC, [(1, 1)], lhs_dilation=(2,))


@model(is_rare=True)
def conv_groups(source: Source) -> Any:
    return convolution(source, (3, 3, 2, 8), (5, 5), NHWC, "SAME", feature_group_count=4)


@model()
def conv_depthwise(source: Source) -> Any:
    return convolution(source, (3, 3, 1, 6), (4, 5), NHWC, "SAME", feature_group_count=6)


@model(is_rare=True)
def conv_large_window(source: Source) -> Any:
    return convolution(source, (12, 12, 1, 2), (13, 12), NHWC, "VALID")


@model(kernel=OUTER)
def conv_of_one_place(source: Source) -> Any:
    return convolution(source, (3, 3, 2, 4), (3, 3), NHWC, "VALID")


@model(first=EACH, head=OUTER)
def small_conv_net(source: Source) -> Any:
    params = {
        "first": source.weight(3, 3, 1, 4),
        "second": source.weight(3, 3, 4, 8),
        "scale": jnp.ones(8),
        "bias": source.weight(8),
        "head": source.weight(8, 3),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        conv = functools.partial(lax.conv_general_dilated, padding="SAME", dimension_numbers=NHWC)
        x = jax.nn.relu(conv(x[None], params["first"], (1, 1)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = conv(x, params["second"], (2, 2)).reshape(-1, 4, 2)
        # A group norm of four groups.
        x = x - x.mean((0, 2), keepdims=True)
        x = (x * lax.rsqrt(jnp.mean(x * x, (0, 2), keepdims=True) + 1e-5)).reshape(-1, 8)
        x = jax.nn.relu(x * params["scale"][None] + params["bias"][None])
        return cross_entropy(x.mean(0) @ params["head"], label)

    return loss_fn, params, (source.batch(8, 8, 1), source.tokens(0, 3))


# -- Scans ---------------------------------------------------------------------------------------


@model(w=GRAM, b=EACH)
def layers_under_scan(source: Source) -> Any:
    params = {"w": source.stacked(3, 12, 12), "b": source.weight(3, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> Any:
            return jnp.tanh(x @ weights["w"] + weights["b"]), jnp.sum(x)

        x, sums = lax.scan(layer, x, params)
        return mean_square(x) + mean_square(sums)

    return loss_fn, params, source.batch(12)


@model(is_rare=True, w=GRAM)
def layers_under_scan_over_time(source: Source) -> Any:
    params = {"w": source.stacked(3, 16, 16), "v": source.stacked(3, 16, 4)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> Any:
            return jnp.tanh(x @ weights["w"]) @ weights["v"] @ weights["v"].T, None

        return mean_square(lax.scan(layer, x, params, reverse=True, unroll=2)[0])

    return loss_fn, params, source.batch(3, 16)


# Slices of different lengths are stacks of different lengths: these products do not compare.
@model(is_rare=True, one=GRAM, two=EACH)
def stack_sliced_for_scans(source: Source) -> Any:
    params = {"one": source.stacked(4, 16, 16), "two": source.stacked(5, 16, 16)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> Any:
            return jnp.tanh(x @ w), None

        for stack in (params["one"][1:3], params["two"][1:4], params["two"][3:]):
            x, _ = lax.scan(layer, x, stack)
        return mean_square(x)

    return loss_fn, params, source.batch(2, 16)


@model(is_rare=True, a=EACH, w=EACH)
def stack_concatenated_for_a_scan(source: Source) -> Any:
    params = {"a": source.stacked(2, 8, 8), "b": source.stacked(1, 8, 8), "w": source.weight(4, 8)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> Any:
            return x + jnp.tanh(x @ w), None

        padded = jnp.pad(params["w"][None], ((0, 1), (0, 4), (0, 0)))
        stack = jnp.concatenate([params["a"], params["b"], padded])
        return mean_square(lax.scan(layer, x, stack)[0] + 1.0)

    return loss_fn, params, source.batch(2, 8)


@model(is_rare=True)
def scaled_step_by_step(source: Source) -> Any:
    params = {"w": source.weight(16, 16), "stack": source.stacked(4, 16, 16)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, sizes = example

        def step(y: jax.Array, part: Any) -> Any:
            size, w = part
            return jnp.tanh(y + x @ (size * params["w"]) + x @ (size * w)), None

        return mean_square(lax.scan(step, x, (sizes, params["stack"]))[0])

    return loss_fn, params, (source.batch(16), source.batch(4))


@model(into=GRAM, w=GRAM)
def recurrent(source: Source) -> Any:
    params = {
        "into": source.weight(16, 24),
        "w": source.weight(24, 24),
        "b": source.weight(24),
    }

    def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> Any:
            state = jnp.tanh(x @ params["into"] + state @ params["w"] + params["b"])
            return state, state

        return mean_square(lax.scan(step, jnp.zeros(24), sequence)[1])

    return loss_fn, params, source.batch(4, 16)


@model(kernel=GRAM)
def long_short_term_memory(source: Source) -> Any:
    params = {"kernel": source.weight(8 + 12, 48), "bias": source.weight(48)}

    def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> Any:
            cell, hidden = carry
            gates = jnp.concatenate([x, hidden]) @ params["kernel"] + params["bias"]
            i, f, g, o = jnp.split(gates, 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (cell, hidden), None

        zeros = jnp.zeros(12)
        return mean_square(lax.scan(step, (zeros, zeros), sequence)[0][1])

    return loss_fn, params, source.batch(4, 8)


@model(is_rare=True, embedding=GRAM, w=GRAM)
def recurrent_with_look_ups(source: Source) -> Any:
    params = {"embedding": source.weight(40, 12), "w": source.weight(12, 12)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        def step(state: jax.Array, token: jax.Array) -> Any:
            state = jnp.tanh(params["embedding"][token] + state @ params["w"])
            return state, params["embedding"] @ state

        logits = lax.scan(step, jnp.zeros(12), tokens[:-1])[1]
        return cross_entropy(logits, tokens[1:])

    return loss_fn, params, source.tokens(0, 5, 4)


@model(is_rare=True, w=GRAM, deep=GRAM)
def scan_in_a_scan(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "deep": source.stacked(2, 24, 24)}

    def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
        def layer(x: jax.Array, deep: jax.Array) -> Any:
            return jnp.tanh(x @ deep + x @ params["w"]), None

        def step(state: jax.Array, x: jax.Array) -> Any:
            return lax.scan(layer, state + x, params["deep"])[0], None

        return mean_square(lax.scan(step, jnp.zeros(24), sequence)[0])

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def counted_loop(source: Source) -> Any:
    params = {"w": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = lax.fori_loop(0, 3, lambda index, x: jnp.tanh(x @ params["w"]), x)
        return mean_square(x)

    return loss_fn, params, source.batch(24)


# -- Calls and control flow ----------------------------------------------------------------------


@model(w0=GRAM, w1=GRAM)
def rematerialized(source: Source) -> Any:
    params = {"w0": source.weight(24, 24), "w1": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def block(x: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.tanh(jnp.sin(x @ w) @ w.T)

        x = block(block(x, params["w0"]), params["w1"])
        return mean_square(x)

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def rematerialized_in_a_scan(source: Source) -> Any:
    params = {"w": source.stacked(3, 16, 16)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
        )
        def layer(x: jax.Array, w: jax.Array) -> Any:
            return jnp.tanh(jnp.sin(x @ w)), None

        return mean_square(lax.scan(layer, x, params["w"])[0])

    return loss_fn, params, source.batch(2, 16)


@model(is_rare=True, w=OUTER, v=OUTER)
def custom_derivatives(source: Source) -> Any:
    params = {"w": source.weight(12, 12), "v": source.weight(12, 12), "u": source.weight(12, 4)}

    @jax.custom_jvp
    def square(x: jax.Array) -> jax.Array:
        return x * x

    square.defjvp(lambda primals, tangents: (square(*primals), 3.0 * primals[0] * tangents[0]))

    @jax.custom_vjp
    def project(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    def backward(kept: Any, ct: jax.Array) -> Any:
        x, w = kept
        return w @ jnp.clip(ct, -0.1, 0.1), x[:, None] * ct[None]

    project.defvjp(lambda x, w: (x @ w, (x, w)), backward)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = square(x @ params["w"]) @ params["v"]
        return mean_square(project(jax.nn.relu(x), params["u"]))

    return loss_fn, params, source.batch(12)


@model(w=GRAM, v=OUTER)
def nested_jit(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "v": source.weight(24, 4)}

    @jax.jit
    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w)

    @jax.jit
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return dense(dense(x, w), w)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(dense(twice(x, params["w"]), params["v"]))

    return loss_fn, params, source.batch(24)


@model(is_rare=True, w=OUTER, inside=EACH)
def branches(source: Source) -> Any:
    params = {"w": source.weight(12, 12), "inside": source.weight(12, 12)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, which = example
        x = x @ params["w"]
        x = lax.cond(x[0] > 0, lambda x: jnp.tanh(x @ params["inside"]), lambda x: x, x)
        x = lax.switch(which, [jnp.sin, lambda x: 2 * (x @ params["inside"]), jnp.cos], x)
        return mean_square(x)

    return loss_fn, params, (source.batch(12), source.tokens(0, 3))


@model(is_rare=True, w=OUTER)
def while_loop_of_constants(source: Source) -> Any:
    params = {"w": source.weight(12, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        length = lax.while_loop(
            lambda size: size > 1.0, lambda size: size / 2, lax.stop_gradient(jnp.sum(x * x))
        )
        return mean_square(jnp.tanh(x @ params["w"])) * length

    return loss_fn, params, source.batch(12)


@model(is_rare=True, w=GRAM, v=OUTER)
def mapped_inside(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "v": source.stacked(2, 24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.vmap(lambda row: jnp.tanh(params["w"] @ row))(x)
        x = jax.vmap(lambda row, v: jnp.tanh(v @ row), (None, 0))(x[0], params["v"]) + x
        return mean_square(x) + mean_square(lax.map(lambda row: params["w"] @ row, x))

    return loss_fn, params, source.batch(2, 24)


@model(gate=GRAM, experts=GRAM)
def mixture_of_experts(source: Source) -> Any:
    params = {"gate": source.weight(16, 3), "experts": source.stacked(3, 16, 16)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ params["gate"])
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 3)
        inside = jnp.einsum("te,td->etd", chosen, x)
        outside = jnp.tanh(jnp.einsum("etd,edk->etk", inside, params["experts"]))
        return mean_square(jnp.einsum("te,etk->tk", gates * chosen, outside))

    return loss_fn, params, source.batch(2, 16)


# -- Odd leaves ----------------------------------------------------------------------------------


@model(w=OUTER, scalar=EACH, one=EACH)
def scalars(source: Source) -> Any:
    params = {"w": source.weight(12, 4), "scalar": jnp.asarray(0.3), "one": source.weight(1, 1)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        y = jnp.exp(params["scalar"]) * (x @ params["w"]) + params["one"][0]
        return mean_square(jnp.tanh(y))

    return loss_fn, params, source.batch(12)


@model(w=OUTER, unused=ZERO, alike=EACH)
def unused_empty_and_alike(source: Source) -> Any:
    params = {
        "w": source.weight(12, 4),
        "unused": source.weight(3, 3),
        "empty": jnp.zeros((0, 4)),
        "alike": source.weight(5),
        "nothing": None,
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        # The gradient of `alike` is the same for all examples.
        x = jnp.concatenate([x @ params["w"], jnp.sum(params["empty"], 0)])
        return mean_square(x) + jnp.sum(params["alike"])

    return loss_fn, params, source.batch(12)


@model(is_rare=True, no_rows=GRAM, w=OUTER)
def nothing_summed(source: Source) -> Any:
    params = {"w": source.weight(6, 4), "no_rows": source.weight(6, 4)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, empty = example
        return mean_square(x @ params["w"]) + jnp.sum(empty @ params["no_rows"])

    return loss_fn, params, (source.batch(6), source.batch(0, 6))


@model(is_rare=True)
def complex_numbers(source: Source) -> Any:
    params = {
        "w": lax.complex(source.weight(8, 6), source.weight(8, 6)),
        "v": source.weight(6, 4),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.abs(x.astype(jnp.complex64) @ params["w"]) @ params["v"]
        return mean_square(jnp.abs(jnp.fft.rfft(x)))

    return loss_fn, params, source.batch(2, 8)


@model(is_rare=True)
def linear_algebra(source: Source) -> Any:
    params = {"w": source.weight(4, 4), "v": source.weight(4, 4)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        positive = params["w"] @ params["w"].T + 2 * jnp.eye(4)
        x = jnp.linalg.solve(positive, x)
        x = jnp.sort(jnp.cumsum(x @ params["v"]))
        return mean_square(lax.associative_scan(jnp.add, x)) + jnp.linalg.slogdet(positive)[1]

    return loss_fn, params, source.batch(4)


# -- Narrow numbers ------------------------------------------------------------------------------
# Products and sums are rounded to 8 or 11 bits on the way, and in another order than by `vmap`:
# the tolerance is a few of these steps.


def _narrow(source: Source, of_params: Any, of_compute: Any) -> Any:
    params = {"w": source.weight(32, 32), "v": source.weight(32, 8), "b": source.weight(8)}
    params = jax.tree.map(lambda leaf: leaf.astype(of_params), params)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        w, v, b = (params[name].astype(of_compute) for name in "wvb")
        x = jnp.tanh(x.astype(of_compute) @ w).sum(0) @ v + b
        return mean_square(x.astype(jnp.float32))

    return loss_fn, params, source.batch(3, 32)


@model(w=GRAM, v=OUTER, tolerance=0.02)
def bfloat16_compute(source: Source) -> Any:
    return _narrow(source, jnp.float32, jnp.bfloat16)


@model(w=GRAM, v=OUTER, tolerance=0.02)
def bfloat16_params(source: Source) -> Any:
    return _narrow(source, jnp.bfloat16, jnp.bfloat16)


@model(is_rare=True, w=GRAM, v=OUTER, tolerance=0.02)
def bfloat16_params_of_float32_compute(source: Source) -> Any:
    return _narrow(source, jnp.bfloat16, jnp.float32)


@model(is_rare=True, w=GRAM, v=OUTER, tolerance=0.003)
def float16_params(source: Source) -> Any:
    return _narrow(source, jnp.float16, jnp.float16)


@model(w=OUTER, tolerance=0.003)
def float16_of_scaled_weights(source: Source) -> Any:
    params = {"w": 1e6 * source.weight(12, 8)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        # What the gradient is multiplied by is too small for float16.
        w = (params["w"] * 1e-6).astype(jnp.float16)
        return mean_square((x.astype(jnp.float16) @ w).astype(jnp.float32))

    return loss_fn, params, source.batch(12)
