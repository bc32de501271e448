"""What private training takes: sums, constants, users, keys and bounds of leaves, in float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from per_example_cases import COEFFICIENTS, EXAMPLES, PAIRS, every_way, total

import clipax
from clipax import per_example

EXACT = 1e-6
USERS = 4
# The user 2 has no example; the last example is of nobody.
USER_IDS = np.array([1, 0, 1, 3, -1])
MASK = np.array([True, True, True, False, True])
# Each option by itself and with others: arguments of `clipped_grad`, and of the call.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constant": ({"normalize_by": 7.0}, {}),
    "constant, not a mean": ({"normalize_by": 7.0, "mean": False}, {}),
    "dtype": ({"mean": False, "dtype": jnp.float64}, {}),
    "mask": ({"normalize_by": 7.0}, {"mask": MASK}),
    "microbatches": ({"normalize_by": 7.0, "microbatch_size": 1}, {"mask": MASK}),
    "users": ({"num_users": USERS}, {"user_ids": USER_IDS}),
    "users, sums": ({"num_users": USERS, "user_mean": False}, {"user_ids": USER_IDS}),
    "users, masked": (
        {"num_users": USERS, "normalize_by": 3.0},
        {"user_ids": USER_IDS, "mask": MASK},
    ),
    "users, microbatches": (
        {"num_users": USERS, "mean": False, "microbatch_size": 1},
        {"user_ids": USER_IDS, "mask": MASK},
    ),
}
MODELS = [
    "mlp",
    "dense_over_time",
    "look_ups",
    "small_conv_net",
    "layers_under_scan",
    "recurrent",
    "weight_decay",
    "unused_empty_and_alike",
    "complex_numbers",
    "mixture_of_experts",
    "tied_embedding",
    "transformer_block",
]


def of_users(each: Any, user_ids: np.ndarray, is_counted: np.ndarray, mean: bool) -> Any:
    """The gradients of users, and which users have an example."""
    belongs = (user_ids == np.arange(USERS)[:, None]) & is_counted
    number = belongs.sum(1)
    weights = belongs / np.maximum(number, 1)[:, None] if mean else belongs.astype(float)
    return jax.tree.map(lambda leaf: np.einsum("ub,b...->u...", weights, leaf), each), number > 0


def wanted(each: Any, bounds: Any, options: Any, at_call: Any) -> Any:
    """What NumPy makes of every gradient; with a tree of bounds, leaf by leaf."""
    is_counted = np.asarray(at_call.get("mask", np.ones(zoo.EXAMPLES, bool)))
    if "num_users" in options:
        mean = options.get("user_mean", True)
        each, is_counted = of_users(each, at_call["user_ids"], is_counted, mean)
    divisor = options.get("normalize_by", is_counted.sum() if options.get("mean", True) else 1)

    def clipped(leaf: np.ndarray, norm: np.ndarray, bound: float) -> np.ndarray:
        return oracle.weighted_sum(leaf, is_counted * oracle.hard(norm, bound) / divisor)

    if isinstance(bounds, float):
        norms = oracle.norms(each)
        return jax.tree.map(lambda leaf: clipped(leaf, norms, bounds), each)
    return jax.tree.map(clipped, each, oracle.norms_of_leaves(each), bounds)


def wide_model(name: str) -> tuple[Any, Any, Any]:
    def widened(leaf: Any) -> Any:
        kinds = {np.dtype("float32"): jnp.float64, np.dtype("complex64"): jnp.complex128}
        return jnp.asarray(leaf, kinds.get(np.dtype(leaf.dtype), leaf.dtype))

    loss_fn, params, batch = zoo.ZOO[name].build()
    return loss_fn, *jax.tree.map(widened, (params, batch))


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("name", trees.mostly_slow(MODELS, ["mlp", "dense_over_time"]))
def test_every_option_equals_numpy(name: str) -> None:
    # Some models hold a constant in float32.
    with trees.double_precision(True), jax.numpy_dtype_promotion("standard"):
        loss_fn, params, batch = wide_model(name)
        each = oracle.gradients(loss_fn, params, batch)
        bound = float(np.median(oracle.norms(each)))
        bounds = {
            "one": bound,
            "equal": per_example.split_max_norm(bound, params),
            "by size": per_example.split_max_norm(bound, params, by_size=True),
        }

        @trees.quick_jit
        def run(params: Any, batch: Any) -> Any:
            return {
                (case, split): clipax.clipped_grad(loss_fn, bounds[split], **options)(
                    params, batch, **at_call
                )[0]
                for case, (options, at_call) in CASES.items()
                for split in (bounds if case in ("constant", "users, masked") else ("one",))
            }

        found = run(params, batch)
        for (case, split), grads in found.items():
            zoo.assert_near(grads, wanted(each, bounds[split], *CASES[case]), EXACT)
            trees.assert_same_type(grads, params)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("case", CASES)
def test_an_ensemble_is_clipped_member_by_member(case: str) -> None:
    options, at_call = CASES[case]
    with trees.double_precision(True):
        loss_fn, params, batch = wide_model("dense_over_time")
        members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2, -leaf]), params)
        grad_fn = clipax.clipped_grad(loss_fn, 0.05, **options)
        run = jax.vmap(lambda params, batch: grad_fn(params, batch, **at_call)[0], (0, None))
        found = trees.quick_jit(run)(members, batch)
        for index in range(3):
            member = jax.tree.map(lambda leaf, index=index: leaf[index], members)
            each = oracle.gradients(loss_fn, member, batch)
            one = jax.tree.map(lambda leaf, index=index: leaf[index], found)
            zoo.assert_near(one, wanted(each, 0.05, options, at_call), EXACT)


def test_users_are_clipped_as_by_hand() -> None:
    batch = jnp.array([[3.0, 0.0], [0.0, 0.25], [3.0, 8.0], [0.0, 0.25]])
    user_ids = jnp.array([0, 1, 0, 1])
    grad_fn = clipax.clipped_grad(total, 1.0, num_users=3, mean=False)
    grads, info = grad_fn(jnp.zeros(2), batch, user_ids=user_ids)
    zoo.assert_near(info.norms, np.array([5.0, 0.25, 0.0]))  # of (3, 4) and (0, 1/4)
    zoo.assert_near(info.coefficients, np.array([0.2, 1.0, 0.0]))
    assert info.is_counted.tolist() == [True, True, False]
    assert info.losses.shape == (4,)
    assert info.clip_fraction == 0.5
    zoo.assert_near(grads, np.array([0.6, 1.05]))
    bound = per_example.track_quantile(1.0, info, quantile=0.25, learning_rate=0.2)
    zoo.assert_near(bound, np.asarray(math.exp(-0.2 * 0.25)))


def test_users_of_equal_size_can_be_examples_of_their_own() -> None:
    loss_fn, params, batch = every_way()
    in_pairs = jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), batch)

    def mean_of_user(params: Any, user: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, user))

    wanted, of_wanted = trees.quick_jit(clipax.clipped_grad(mean_of_user, 0.1))(params, in_pairs)
    grad_fn = trees.quick_jit(clipax.clipped_grad(loss_fn, 0.1, num_users=EXAMPLES // 2))
    grads, info = grad_fn(params, batch, user_ids=np.arange(EXAMPLES) // 2)
    zoo.assert_near(info.norms, of_wanted.norms)
    zoo.assert_near(grads, wanted)


def test_a_user_with_a_nan_is_skipped_and_what_is_left_out_may_be_nan() -> None:
    batch = jnp.array([[3.0, 4.0], [math.nan, 1.0], [0.0, 0.5]])
    grad_fn = clipax.clipped_grad(total, 1.0, num_users=2, mean=False, skip_nonfinite=True)
    grads, info = grad_fn(jnp.zeros(2), batch, user_ids=jnp.array([0, 0, 1]))
    assert info.is_counted.tolist() == [False, True]
    assert grads.tolist() == [0, 0.5]
    for nobody in (-1, 2, 7):
        grads, _ = grad_fn(jnp.zeros(2), batch, user_ids=jnp.array([0, nobody, 1]))
        zoo.assert_near(grads, np.array([0.6, 1.3]))
    mask = jnp.array([True, False, True])
    grads, _ = grad_fn(jnp.zeros(2), batch, mask=mask, user_ids=jnp.array([0, 0, 1]))
    zoo.assert_near(grads, np.array([0.6, 1.3]))


@pytest.mark.parametrize(
    "user_ids",
    [
        np.array([0, 255], np.uint8),
        jnp.array([0, 255], jnp.uint8),
        np.array([0, 255], np.int64),
        [0, 255],
    ],
)
def test_ids_can_be_integers_of_any_width(user_ids: Any) -> None:
    grads, info = clipax.clipped_grad(total, 1.0, num_users=300)(
        jnp.zeros(2), PAIRS, user_ids=user_ids
    )
    zoo.assert_near(grads, np.array([0.3, 0.65]))
    assert np.flatnonzero(info.is_counted).tolist() == [0, 255]


def test_an_id_of_64_bits_is_no_other_user() -> None:
    for far in (2**32, -(2**32), 2**63 - 1):
        grads, _ = clipax.clipped_grad(total, 1.0, num_users=3, mean=False)(
            jnp.zeros(2), PAIRS, user_ids=np.array([far, 1])
        )
        assert grads.tolist() == [0, 0.5]


def test_user_ids_of_the_loss_are_not_taken_for_those_of_the_batch() -> None:
    def loss_fn(w: jax.Array, x: jax.Array, *, user_ids: Any = None) -> jax.Array:
        return total(w, x)

    with pytest.raises(ValueError, match="user_ids is an argument of this function and one of"):
        clipax.clipped_grad(loss_fn, 1.0, num_users=2)(jnp.zeros(2), PAIRS, user_ids=[0, 1])


def key_loss(w: jax.Array, x: jax.Array, keys: Any) -> jax.Array:
    is_kept = jax.random.bernoulli(keys["dropout"], 0.5, x.shape)
    return zoo.mean_square(jnp.where(is_kept, 2 * x, 0.0) @ w)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("size", [None, 1])
def test_a_key_is_split_for_the_examples(make: Any, size: int | None) -> None:
    source = zoo.Source(2)
    args = (source.weight(12, 6), source.batch(12))
    key = make(3)
    split = {"dropout": jax.random.split(key, zoo.EXAMPLES)}
    options = {"mean": False, "microbatch_size": size}
    by_hand, of_hand = clipax.clipped_grad(key_loss, 0.1, batch_argnums=(1, 2), **options)(
        *args, split
    )
    grads, info = trees.quick_jit(clipax.clipped_grad(key_loss, 0.1, prng_argnum=2, **options))(
        *args, {"dropout": key}
    )
    zoo.assert_near(grads, by_hand, EXACT)
    zoo.assert_near(info.norms, of_hand.norms, EXACT)
    norms = clipax.per_example_norms(key_loss, prng_argnum=2)(*args, {"dropout": key})
    zoo.assert_near(norms, of_hand.norms, EXACT)


def test_keyword_arguments_can_have_examples(capsys: pytest.CaptureFixture[str]) -> None:
    def loss_fn(w: jax.Array, x: jax.Array, *, y: jax.Array, scale: float) -> jax.Array:
        return zoo.mean_square((x @ w - y) * scale)

    source = zoo.Source(4)
    w, x, y = source.weight(12, 6), source.batch(12), source.batch(6)
    each = oracle.gradients(
        lambda w, x, y: loss_fn(w, x, y=y, scale=0.5), w, x, y, batch_argnums=(1, 2)
    )
    norms = oracle.norms(each)
    options = {"batch_argnames": "y"}
    for size in (None, 1):
        grad_fn = clipax.clipped_grad(loss_fn, 0.1, **options, microbatch_size=size)
        grads, info = grad_fn(w, x, y=y, scale=0.5)
        zoo.assert_near(info.norms, norms)
        weights = oracle.hard(norms, 0.1) / zoo.EXAMPLES
        zoo.assert_near(grads, oracle.weighted_sum(each, weights))
    zoo.assert_near(clipax.per_example_norms(loss_fn, **options)(w, x, y=y, scale=0.5), norms)
    clipax.explain_clipped_grad(loss_fn, w, x, y=y, scale=0.5, batch_argnames=["y"])
    clipax.explain_clipped_grad(key_loss, w, x, {"dropout": jax.random.key(0)}, prng_argnum=2)
    assert capsys.readouterr().out.count(zoo.OUTER) == 2


def test_numbers_of_python_are_parameters() -> None:
    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return params["scale"] * jnp.sum(params["w"] * x)

    params = {"scale": 2.0, "w": jnp.array([1.0, 0.0])}
    grads, info = clipax.clipped_grad(loss_fn, math.inf, mean=False)(params, PAIRS)
    assert grads["scale"] == 3.0  # the sum of the first entries
    assert grads["scale"].dtype == jnp.float32
    assert grads["w"].tolist() == [6.0, 9.0]
    assert info.norms.shape == (2,)
    alone, _ = clipax.clipped_grad(lambda w, x: w * jnp.sum(x), 1.0)(0.0, PAIRS)
    assert alone == 0.75
    turned, _ = clipax.clipped_grad(lambda w, x: jnp.abs(w) * jnp.sum(x), 1.0)(3 + 4j, PAIRS)
    assert turned.dtype == jnp.complex64


NO_EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "a constant": ({"normalize_by": 7.0}, {"mask": np.zeros(0, bool)}),
    "microbatches": ({"microbatch_size": 4, "skip_nonfinite": True}, {}),
    "users": ({"num_users": 2}, {"user_ids": np.zeros(0, int)}),
}


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("name", NO_EXAMPLES)
@pytest.mark.parametrize("way", ["eager", "jit"])
def test_the_sum_of_an_empty_batch_is_zero(name: str, way: str) -> None:
    loss_fn, params, batch = every_way()
    options, at_call = NO_EXAMPLES[name]
    nothing = jax.tree.map(lambda leaf: leaf[:0], batch)
    grad_fn = clipax.clipped_grad(
        lambda *args: (loss_fn(*args), args[1]["x"]), 0.1, has_aux=True, **options
    )
    grad_fn = trees.quick_jit(grad_fn) if way == "jit" else grad_fn
    grads, info = grad_fn(params, nothing, **at_call)
    trees.assert_same_type(grads, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert info.losses.shape == (0,)
    assert info.aux.shape == (0, 2, 16)
    assert info.norms.shape == info.is_counted.shape == (options.get("num_users", 0),)
    assert info.clip_fraction == 0
    assert not np.any(info.is_counted)


def test_an_empty_batch_has_no_norms_and_splits_no_key() -> None:
    norms = clipax.per_example_norms(total, per_leaf=True)(jnp.zeros(2), PAIRS[:0])
    assert norms.shape == (0,)
    args = (jnp.ones((12, 6)), jnp.zeros((0, 12)), {"dropout": jax.random.key(0)})
    grads, _ = clipax.clipped_grad(key_loss, 1.0, prng_argnum=2)(*args)
    assert not np.any(grads)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, jnp.bfloat16),
        ({"mean": False}, jnp.float32),
        ({"normalize_by": 4.0}, jnp.float32),
        ({"dtype": jnp.float32}, jnp.float32),
        ({"dtype": "float16"}, jnp.float16),
        ({"mean": False, "dtype": jnp.bfloat16}, jnp.bfloat16),
    ],
)
def test_a_sum_is_at_least_as_wide_as_float32(options: Any, dtype: Any) -> None:
    params = jnp.zeros(2, jnp.bfloat16)
    grads, _ = clipax.clipped_grad(total, 1.0, **options)(params, PAIRS.astype(jnp.bfloat16))
    assert grads.dtype == dtype


def test_a_dtype_keeps_complex_parameters_complex() -> None:
    grad_fn = clipax.clipped_grad(lambda w, x: jnp.abs(w) * jnp.sum(x), 1.0, dtype=jnp.float32)
    assert grad_fn(jnp.asarray(3 + 4j), PAIRS)[0].dtype == jnp.complex64


# Sensitivity: what one example, or one user, can move.


def moved(one: Any, other: Any) -> float:
    differences = jax.tree.map(lambda a, b: zoo.wide(a) - zoo.wide(b), one, other)
    return math.sqrt(sum(np.sum(np.abs(leaf) ** 2) for leaf in jax.tree.leaves(differences)))


@functools.cache
def neighbours(coefficient: str) -> tuple[Any, Any, Any]:
    """A batch whose last example is by far the largest, a mask that removes it, its opposite."""
    batch = every_way()[2]
    large = batch | {"size": batch["size"].at[-1].set(1e6)}
    opposite = large | {"size": large["size"].at[-1].set(-1e6)}
    return large, np.arange(EXAMPLES) < EXAMPLES - 1, opposite


@pytest.mark.slow_but(10)
@pytest.mark.parametrize("split", ["one", "equal", "by size"])
@pytest.mark.parametrize("name", sorted(set(COEFFICIENTS) - {"unclipped", "of one's own"}))
def test_one_example_moves_the_gradients_by_the_sensitivity(name: str, split: str) -> None:
    loss_fn, params, _ = every_way()
    bounds = {
        "one": 0.5,
        "equal": per_example.split_max_norm(0.5, params),
        "by size": per_example.split_max_norm(0.5, params, by_size=True),
    }[split]
    large, mask, opposite = neighbours(name)
    rule = COEFFICIENTS[name][0]
    grad_fn = trees.quick_jit(
        clipax.clipped_grad(
            loss_fn, bounds, coefficient=rule, normalize_by=8.0, skip_nonfinite=True
        )
    )
    grads, _ = grad_fn(params, large, mask=np.ones(EXAMPLES, bool))
    removed, _ = grad_fn(params, large, mask=mask)
    replaced, _ = grad_fn(params, opposite, mask=np.ones(EXAMPLES, bool))
    limit = float(per_example.sensitivity(bounds, normalize_by=8.0))
    assert abs(limit - 0.5 / 8) < 1e-7
    # The bound of the leaf that the loss does not use has no gradient to limit.
    used = limit if split == "one" else math.sqrt(limit**2 - (of_unused(bounds) / 8) ** 2)
    assert 0.98 * used < moved(grads, removed) < limit * (1 + 1e-5)
    twice = float(per_example.sensitivity(bounds, normalize_by=8.0, replace=True))
    assert twice == 2 * limit
    assert 1.96 * used < moved(grads, replaced) < twice * (1 + 1e-5)


def of_unused(bounds: Any) -> float:
    return float(bounds["unused"])


def test_one_user_moves_the_gradients_by_the_sensitivity() -> None:
    loss_fn, params, batch = every_way()
    batch = batch | {"size": batch["size"] * 1e6}
    user_ids = np.array([0, 1, 2, 2, 1, 0, 2, 1])
    for user_mean in (True, False):
        grad_fn = clipax.clipped_grad(
            loss_fn, 0.5, normalize_by=2.0, num_users=3, user_mean=user_mean
        )
        run = trees.quick_jit(
            lambda mask, grad_fn=grad_fn: grad_fn(params, batch, mask=mask, user_ids=user_ids)[0]
        )
        grads = run(np.ones(EXAMPLES, bool))
        limit = float(per_example.sensitivity(0.5, normalize_by=2.0))
        assert 0.999 * limit < moved(grads, run(user_ids != 2)) < limit * (1 + 1e-5)


def test_one_example_of_many_moves_a_sum_of_bfloat16_by_the_sensitivity() -> None:
    # In bfloat16, 256 + 1 is 256 or 258.
    batch = jnp.ones((257, 1), jnp.bfloat16)
    params = jnp.zeros(1, jnp.bfloat16)
    for options in ({"mean": False}, {"normalize_by": 1.0}):
        grad_fn = clipax.clipped_grad(total, 1.0, **options)
        grads, _ = grad_fn(params, batch)
        removed, _ = grad_fn(params, batch, mask=np.arange(257) < 256)
        assert moved(grads, removed) == 1.0


def test_products_that_cancel_in_bfloat16_stay_within_the_sensitivity() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2, 16))
    x[:, 1] = x[:, 0] * (1 + 1e-2 * rng.normal(size=(4, 16)))  # Two rows that nearly cancel.
    y = np.repeat(rng.normal(size=(4, 1, 16)), 2, 1) * np.array([[1], [-1]])

    def loss_fn(w: jax.Array, example: Any) -> jax.Array:
        x, y = example
        return jnp.sum((x @ w) * y)

    params = jnp.zeros((16, 16), jnp.bfloat16)
    batch = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    grad_fn = clipax.clipped_grad(loss_fn, 0.01, mean=False)
    for index in range(4):
        grads, info = grad_fn(params, batch, mask=np.arange(4) == index)
        assert info.norms[index] > 0.01
        assert moved(grads, jax.tree.map(jnp.zeros_like, grads)) < 0.01 * (1 + 1e-3)


def test_a_skipped_example_moves_nothing() -> None:
    grad_fn = clipax.clipped_grad(total, 1.0, normalize_by=2.0, skip_nonfinite=True)
    grads, _ = grad_fn(jnp.zeros(2), PAIRS.at[0, 0].set(math.nan))
    without, _ = grad_fn(jnp.zeros(2), PAIRS, mask=np.array([False, True]))
    assert grads.tolist() == without.tolist() == [0, 0.25]


def test_a_sensitivity_may_be_traced() -> None:
    bounds = {"a": jnp.asarray(3.0), "b": jnp.asarray(4)}
    found = jax.jit(per_example.sensitivity)(bounds, normalize_by=jnp.asarray(2))
    assert found == 2.5
    known = []
    jax.jit(lambda: known.append(per_example.sensitivity({"a": 3, "b": 4.0}, normalize_by=2)))()
    assert known == [2.5]
    assert isinstance(known[0], float)
    assert per_example.sensitivity({"a": math.inf}) == math.inf


def test_a_constant_may_be_traced() -> None:
    @jax.jit
    def run(number: jax.Array) -> Any:
        return clipax.clipped_grad(total, 1.0, normalize_by=number)(jnp.zeros(2), PAIRS)[0]

    for number in (jnp.asarray(4), jnp.asarray(4.0)):
        zoo.assert_near(run(number), np.array([0.15, 0.325]))


# Bounds of leaves, as others split them.


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("uniform", [True, False])
def test_bounds_of_leaves_are_those_of_optax(uniform: bool) -> None:
    loss_fn, params, batch = every_way()
    each = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch)
    leaves, structure = jax.tree.flatten(each)

    @trees.quick_jit
    def clip(leaves: Any) -> Any:
        return optax.per_example_layer_norm_clip(leaves, 0.3, uniform=uniform)

    sums, number = clip(leaves)
    bounds = per_example.split_max_norm(0.3, params, by_size=not uniform)
    grads, info = clipax.clipped_grad(loss_fn, bounds, mean=False)(params, batch)
    zoo.assert_near(grads, jax.tree.unflatten(structure, sums))
    clipped = jax.tree.map(lambda share: round(EXAMPLES * float(share)), info.clip_fraction)
    assert jax.tree.leaves(clipped) == [int(each) for each in number]


def test_bounds_of_leaves_are_those_of_opacus() -> None:
    loss_fn, params, batch = every_way()
    each = oracle.gradients(loss_fn, params, batch)
    bound = 0.3 / math.sqrt(len(params))  # Its `max_grad_norm` is a list of these.
    factors = jax.tree.map(
        lambda norm: np.minimum(1, bound / (norm + 1e-6)), oracle.norms_of_leaves(each)
    )
    opacus = functools.partial(clipax.coefficients.hard, eps=1e-6)
    bounds = per_example.split_max_norm(0.3, params)
    grad_fn = clipax.clipped_grad(loss_fn, bounds, coefficient=opacus, mean=False)
    zoo.assert_near(
        trees.quick_jit(grad_fn)(params, batch)[0],
        jax.tree.map(oracle.weighted_sum, each, factors),
    )


def test_bounds_of_leaves_need_shapes_alone_and_may_be_traced() -> None:
    params = {"bias": jnp.zeros(9), "kernel": jnp.zeros((4, 4))}
    shapes = jax.eval_shape(lambda: params)
    assert per_example.split_max_norm(10.0, shapes, by_size=True) == {"bias": 6, "kernel": 8}
    found = jax.jit(lambda bound: per_example.split_max_norm(bound, params))(jnp.asarray(2.0))
    zoo.assert_near(found, {"bias": np.sqrt(np.float64(2)), "kernel": np.sqrt(np.float64(2))})


# Bad arguments.

REFUSED: list[tuple[dict[str, Any], str]] = [
    *[
        ({"normalize_by": bad}, f"normalize_by must be a finite number > 0, got {bad}")
        for bad in (0, -1.0, math.nan, math.inf, True)
    ],
    ({"normalize_by": "128"}, "normalize_by must be a finite number > 0, got '128'"),
    ({"normalize_by": jnp.ones(2)}, "normalize_by must be one number, got an array of shape"),
    *[
        ({"dtype": bad}, r"dtype must be a dtype of real numbers, such as jnp.float32, got ")
        for bad in (jnp.int32, bool, jnp.complex64, "float31", 3, "key<fry>")
    ],
    *[
        ({"num_users": bad}, f"num_users must be an integer >= 1, got {bad}")
        for bad in (0, -2, 1.5, True)
    ],
    ({"user_mean": None}, "user_mean must be True or False, got None"),
    *[
        ({"prng_argnum": bad}, f"prng_argnum must be a position >= 0, got {bad}")
        for bad in (-1, 1.5, True)
    ],
    ({"prng_argnum": (2,)}, r"prng_argnum must be a position >= 0, got \(2,\)"),
    *[
        ({"prng_argnum": bad}, f"prng_argnum must differ .*, and they have {bad}")
        for bad in (0, 1)
    ],
    *[
        ({"batch_argnames": bad}, "batch_argnames must be a name or several different ones, got")
        for bad in (1, None, ("y", "y"), ("y", 2))
    ],
]


@pytest.mark.parametrize(("bad", "message"), REFUSED)
def test_every_bad_argument_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.clipped_grad(total, 1.0, **bad)
    if set(bad) <= {"prng_argnum", "batch_argnames"}:
        with pytest.raises(ValueError, match=message):
            clipax.per_example_norms(total, **bad)


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (np.zeros(2), r"float64\[2\]|float32\[2\]"),
        (np.zeros(2, bool), r"bool\[2\]"),
        (np.zeros(3, int), r"int(32|64)\[3\]"),
        (1, r"int32\[\]"),
        (["ann", "bob"], r"\['ann', 'bob'\]"),
        ([2**40, 0], r"\[1099511627776, 0\]"),
    ],
)
def test_every_bad_user_id_is_refused(bad: Any, found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"user_ids must be 2 integers, one an example, got ({found})"
    ):
        clipax.clipped_grad(total, 1.0, num_users=2)(jnp.zeros(2), PAIRS, user_ids=bad)


def test_users_must_be_given_in_both_places() -> None:
    message = "user_ids must be given where clipped_grad has num_users, and only there, got"
    with pytest.raises(ValueError, match=rf"{message} user_ids=None for num_users=2"):
        clipax.clipped_grad(total, 1.0, num_users=2)(jnp.zeros(2), PAIRS)
    with pytest.raises(ValueError, match=rf"{message} user_ids=\[0, 1\] for num_users=None"):
        clipax.clipped_grad(total, 1.0)(jnp.zeros(2), PAIRS, user_ids=[0, 1])


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (jnp.zeros(2), r"float32\[2\]"),
        (jax.random.split(jax.random.key(0), 2), r"key<fry>\[2\]"),
        ("seed", "'seed'"),
    ],
)
def test_what_is_no_key_is_refused(bad: Any, found: str) -> None:
    grad_fn = clipax.clipped_grad(lambda w, x, key: total(w, x), 1.0, prng_argnum=2)
    message = f"prng_argnum is 2, so argument 2 must be one PRNG key, .* got {found}"
    with pytest.raises(ValueError, match=message):
        grad_fn(jnp.zeros(2), PAIRS, bad)


def test_missing_keys_and_keywords_are_refused() -> None:
    with pytest.raises(ValueError, match="prng_argnum has 2, and there are 2 arguments"):
        clipax.clipped_grad(total, 1.0, prng_argnum=2)(jnp.zeros(2), PAIRS)
    with pytest.raises(ValueError, match=r"batch_argnames has 'y', .* keyword are \['z'\]"):
        clipax.clipped_grad(total, 1.0, batch_argnames="y")(jnp.zeros(2), PAIRS, z=1)
    grad_fn = clipax.clipped_grad(lambda w, x, y: total(w, x), 1.0, batch_argnames="y")
    with pytest.raises(ValueError, match=r"argument 'y' has no axis of examples"):
        grad_fn(jnp.zeros(2), PAIRS, y=2.0)


def test_every_bad_argument_of_the_functions_is_refused() -> None:
    for bad in (-1.0, math.nan, None, {"w": -1.0}, "1"):
        with pytest.raises(ValueError, match="max_norm"):
            per_example.sensitivity(bad)
    for bad in (0, -1, math.inf, None):
        with pytest.raises(ValueError, match="normalize_by must be a finite number > 0"):
            per_example.sensitivity(1.0, normalize_by=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replace must be True or False, got 'one'"):
        per_example.sensitivity(1.0, replace="one")  # type: ignore[arg-type]
    for bad in (-1.0, math.nan, None, jnp.ones(2)):
        with pytest.raises(ValueError, match="max_norm must be"):
            per_example.split_max_norm(bad, PAIRS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by_size must be True or False, got 1"):
        per_example.split_max_norm(1.0, PAIRS, by_size=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"params must have leaves with entries, got \{\}"):
        per_example.split_max_norm(1.0, {})
