"""The loss can have whatever arguments `jax.grad` takes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees

import clipax

BATCH = jnp.array([[3.0, 4.0], [0.0, 0.5]])
PARAMS = {"w": jnp.zeros(2)}
NORMS = np.array([5.0, 0.5])
CLIPPED = np.array([0.6, 1.3])


def total(params: Any, x: jax.Array) -> jax.Array:
    """Its gradient is the example."""
    return jnp.sum(params["w"] * x)


def assert_clipped(
    loss_fn: Callable[..., Any], *args: Any, factor: float = 1.0, **keywords: Any
) -> None:
    """By all three functions, and by the first two where the call is compiled."""

    def clip(params: Any, batch: Any) -> Any:
        grad_fn = clipax.clipped_grad(loss_fn, factor, mean=False)
        norm_fn = clipax.per_example_norms(loss_fn)
        grads, info = grad_fn(params, batch, *args, **keywords)
        return grads["w"], info.norms, norm_fn(params, batch, *args, **keywords)

    for run in (clip, jax.jit(clip)):
        grads, *norms = run(PARAMS, BATCH)
        zoo.assert_near(grads, factor * CLIPPED)
        for each in norms:
            zoo.assert_near(each, factor * NORMS)
    clipax.explain_clipped_grad(loss_fn, PARAMS, BATCH, *args, **keywords)


# -- Arguments that are no arrays ----------------------------------------------------------------


class Settings:
    """What JAX knows nothing of."""

    def __init__(self, factor: float):
        self.factor = factor


def by_flag(params: Any, x: jax.Array, is_doubled: Any) -> jax.Array:
    # A traced flag would be no `bool`.
    return (2.0 if is_doubled else 1.0) * total(params, x)


def by_count(params: Any, x: jax.Array, count: Any) -> jax.Array:
    # Nor would a traced integer be a length.
    return sum((total(params, x) for _ in range(count)), start=jnp.zeros(()))


def by_name(params: Any, x: jax.Array, name: Any) -> jax.Array:
    return {"double": 2.0, "same": 1.0}[name] * total(params, x)


def by_tree(params: Any, x: jax.Array, tree: Any) -> jax.Array:
    scaled = tree["function"](x) if tree["nothing"] is None and tree["flag"] else x
    return total(params, scaled) * tree["array"] / tree["numbers"][1]


def by_table(params: Any, x: jax.Array, table: Any) -> jax.Array:
    # NumPy's, which has values while JAX traces.
    return total(params, x) * float(table.sum()) * len(np.unique(table))


def by_settings(params: Any, x: jax.Array, settings: Any) -> jax.Array:
    return settings.factor * total(params, x)


TREE = {
    "function": lambda x: 3.0 * x,
    "nothing": None,
    "flag": True,
    "array": jnp.asarray(2.0),
    "numbers": [1, 3.0],
}
AS_IT_IS: dict[str, tuple[Callable[..., Any], Any, float]] = {
    "True": (by_flag, True, 2.0),
    "False": (by_flag, False, 1.0),
    "a flag of NumPy": (by_flag, np.bool_(True), 2.0),
    "None": (by_flag, None, 1.0),
    "an integer": (by_count, 2, 2.0),
    "an integer of NumPy": (by_count, np.int64(2), 2.0),
    "a string": (by_name, "double", 2.0),
    "an array of NumPy": (by_table, np.array([0.5, 0.5, 0.25]), 2.5),
    "an object": (by_settings, Settings(2.0), 2.0),
    "a dtype": (lambda p, x, dtype: total(p, x.astype(dtype)), jnp.float32, 1.0),
    "a function": (lambda p, x, f: total(p, f(x)), lambda x: 2 * x, 2.0),
    "a float": (lambda p, x, factor: factor * total(p, x), 2.0, 2.0),
    "an array": (lambda p, x, factor: factor * total(p, x), jnp.asarray(2.0), 2.0),
    "a tree of all": (by_tree, TREE, 2.0),
    "an empty tree": (lambda p, x, tree: total(p, x), {}, 1.0),
}


@pytest.mark.slow_but(15)
@pytest.mark.parametrize("name", AS_IT_IS)
@pytest.mark.parametrize("is_keyword", [False, True])
def test_arguments_that_are_no_arrays_reach_the_loss_as_is(name: str, is_keyword: bool) -> None:
    loss_fn, value, factor = AS_IT_IS[name]
    if is_keyword:

        def with_keyword(params: Any, x: jax.Array, *, given: Any) -> Any:
            return loss_fn(params, x, given)

        assert_clipped(with_keyword, factor=factor, given=value)
    else:
        assert_clipped(loss_fn, value, factor=factor)


def test_static_arguments_of_jit_stay_static() -> None:
    norm_fn = clipax.per_example_norms(by_flag)
    run = jax.jit(norm_fn, static_argnums=2)
    zoo.assert_near(run(PARAMS, BATCH, True), 2 * NORMS)
    zoo.assert_near(run(PARAMS, BATCH, False), NORMS)
    by_keyword = jax.jit(norm_fn, static_argnames="is_doubled")
    zoo.assert_near(by_keyword(PARAMS, BATCH, is_doubled=True), 2 * NORMS)


def test_arguments_that_are_no_arrays_reach_every_microbatch() -> None:
    grad_fn = clipax.clipped_grad(by_tree, 2.0, mean=False, microbatch_size=1)
    grads, info = jax.jit(lambda params, batch: grad_fn(params, batch, TREE))(PARAMS, BATCH)
    zoo.assert_near(grads["w"], 2 * CLIPPED)
    zoo.assert_near(info.norms, 2 * NORMS)


def test_an_argument_that_is_no_array_can_come_first() -> None:
    def loss_fn(name: Any, x: jax.Array, scale: jax.Array, params: Any) -> jax.Array:
        return scale * by_name(params, x, name)

    options: dict[str, Any] = {"argnums": 3, "batch_argnums": 1}
    args = ("double", BATCH, jnp.asarray(0.5), PARAMS)
    zoo.assert_near(clipax.per_example_norms(loss_fn, **options)(*args), NORMS)
    clipax.explain_clipped_grad(loss_fn, *args, **options)


def test_the_static_part_of_a_model_can_be_an_argument() -> None:
    equinox = pytest.importorskip("equinox", reason="this library is not installed")
    model = equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)
    batch = zoo.Source(0).batch(3)

    def loss_fn(params: Any, x: jax.Array, static: Any) -> jax.Array:
        return zoo.mean_square(equinox.combine(params, static)(x))

    with pytest.raises(ValueError, match="Pass what is not differentiated as another argument"):
        clipax.clipped_grad(lambda model, x: zoo.mean_square(model(x)), 1.0)(model, batch)

    @trees.quick_jit
    def as_advised(params: Any, batch: Any) -> Any:
        each = jax.vmap(jax.grad(loss_fn), (None, 0, None))(params, batch, static)
        norms = clipax.per_example_norms(loss_fn)(params, batch, static)
        _, info = clipax.clipped_grad(loss_fn, 1.0)(params, batch, static)
        return jax.vmap(clipax.global_norm)(each), norms, info.norms

    wanted, *found = as_advised(params, batch)
    for norms in found:
        zoo.assert_near(norms, wanted)
    clipax.explain_clipped_grad(loss_fn, params, batch, static)


def test_a_part_without_parameters_can_have_a_bound() -> None:
    params = {"w": PARAMS["w"], "frozen": None}
    grad_fn = clipax.clipped_grad(total, {"w": 1.0, "frozen": 1.0}, mean=False)
    grads, info = grad_fn(params, BATCH)
    zoo.assert_near(grads["w"], CLIPPED)
    zoo.assert_near(info.norms, {"w": NORMS, "frozen": np.zeros(2)})


# -- Keywords ------------------------------------------------------------------------------------


def test_keyword_arguments_are_the_same_for_all_examples() -> None:
    """And not differentiated, even if it has as many rows as there are examples."""

    def loss_fn(params: Any, x: jax.Array, *, factors: jax.Array) -> jax.Array:
        assert factors.shape == (2,)
        return jnp.sum(factors) * total(params, x)

    assert_clipped(loss_fn, factor=3.0, factors=jnp.array([1.0, 2.0]))


def square_error(w: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.slow
def test_rows_that_every_example_gets_are_warned_of() -> None:
    w, x, y = jnp.ones(3), jnp.ones((4, 3)), jnp.arange(4.0)
    clip = clipax.clipped_grad(square_error, 1.0)
    with pytest.warns(UserWarning, match=r"^Argument 2 has 4 rows, .*, pass the argument by key"):
        clip(w, x, y)
    with pytest.warns(UserWarning, match=r"add the position to batch_argnums"):
        clipax.explain_clipped_grad(square_error, w, x, y)
    # Advice that can be followed.
    clipax.clipped_grad(square_error, 1.0, batch_argnums=(1, 2))(w, x, y)
    clip(w, x, y=y)
    # What is no row of labels: another length, a key, one example.
    clip(w, x, jnp.arange(5.0))
    clip(w, x[:1], y[:1])

    def noisy(w: Any, x: Any, key: Any) -> Any:
        return square_error(w, x + jax.random.normal(key, x.shape), 0.0)

    clipax.clipped_grad(noisy, 1.0)(w, x[:2], jax.random.PRNGKey(0))


def test_a_loss_of_a_whole_batch_is_refused_with_what_is_split() -> None:
    args = jnp.ones(3), jnp.ones((4, 3)), jnp.arange(5.0)
    with pytest.raises(ValueError, match=r"Only arguments in batch_argnums are split into ex"):
        clipax.clipped_grad(lambda w, x, y: x @ w - y, 1.0)(*args)


def test_keywords_can_be_any_that_the_loss_takes() -> None:
    def loss_fn(params: Any, x: jax.Array, **options: Any) -> jax.Array:
        return options["args"] * options["self"] * total(params, x)

    assert_clipped(loss_fn, factor=2.0, args=2.0, self=jnp.ones(()))


@pytest.mark.parametrize("function", ["clipped_grad", "per_example_norms", "explain"])
@pytest.mark.parametrize(("name", "args"), [("x", (PARAMS,)), ("params", ())])
def test_parameters_and_examples_must_be_passed_by_position(
    function: str, name: str, args: Any
) -> None:
    rest = {"params": PARAMS, "x": BATCH} if name == "params" else {"x": BATCH}
    calls: dict[str, Callable[..., Any]] = {
        "clipped_grad": clipax.clipped_grad(total, 1.0),
        "per_example_norms": clipax.per_example_norms(total),
        "explain": functools.partial(clipax.explain_clipped_grad, total),
    }
    with pytest.raises(ValueError, match=r"argnums has \d.*that are passed by position"):
        calls[function](*args, **rest)


def masked(params: Any, x: jax.Array, mask: Any = None) -> jax.Array:
    return total(params, x if mask is None else jnp.where(mask, x, 0.0))


def masked_by_keyword(params: Any, x: jax.Array, *, mask: Any = None) -> jax.Array:
    return masked(params, x, mask)


def bounded(params: Any, x: jax.Array, max_norm: Any = 1.0) -> jax.Array:
    return max_norm * total(params, x)


MASK = jnp.array([True, False])


@pytest.mark.parametrize("loss_fn", [masked, masked_by_keyword])
def test_a_keyword_with_two_meanings_is_refused(loss_fn: Any) -> None:
    grad_fn = clipax.clipped_grad(loss_fn, 1.0, mean=False)
    with pytest.raises(ValueError, match=r"mask is an argument of this function and one of loss"):
        grad_fn(PARAMS, BATCH, mask=MASK)
    # Without it, there is one meaning; and the norms have no mask of their own.
    zoo.assert_near(grad_fn(PARAMS, BATCH)[0]["w"], CLIPPED)
    norms = clipax.per_example_norms(loss_fn)(PARAMS, BATCH, mask=MASK)
    zoo.assert_near(norms, np.array([3.0, 0.0]))
    clipax.explain_clipped_grad(loss_fn, PARAMS, BATCH, mask=MASK)

    # As advised: under another name, beside a mask of the examples.
    renamed = clipax.clipped_grad(
        lambda *args, loss_mask=None: loss_fn(*args, mask=loss_mask), 1.0, mean=False
    )
    grads, info = renamed(PARAMS, BATCH, loss_mask=MASK, mask=jnp.array([False, True]))
    zoo.assert_near(info.norms, np.array([3.0, 0.0]))
    assert info.is_counted.tolist() == [False, True]
    assert grads["w"].tolist() == [0.0, 0.0]


# Its mask has as many rows as there are examples, and is theirs in common.
@pytest.mark.filterwarnings("ignore:Argument 2 has 2 rows")
def test_an_argument_with_two_meanings_can_be_passed_by_position() -> None:
    grads, info = clipax.clipped_grad(masked, 1.0, mean=False)(
        PARAMS, BATCH, MASK, mask=jnp.array([True, False])
    )
    zoo.assert_near(grads["w"], np.array([1.0, 0.0]))
    assert info.is_counted.tolist() == [True, False]
    grad_fn = clipax.clipped_grad(bounded, 1.0, mean=False)
    grads, info = grad_fn(PARAMS, BATCH, 2.0, max_norm=4.0)
    zoo.assert_near(info.norms, 2 * NORMS)
    zoo.assert_near(grads["w"], np.array([2.4, 4.2]))
    with pytest.raises(ValueError, match=r"max_norm is an argument of this function and one of"):
        grad_fn(PARAMS, BATCH, max_norm=4.0)


def test_a_keyword_of_explain_with_two_meanings_is_refused() -> None:
    def loss_fn(params: Any, x: jax.Array, *, has_aux: bool = False) -> Any:
        return (total(params, x), x) if has_aux else total(params, x)

    clipax.explain_clipped_grad(loss_fn, PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"has_aux is an argument of this function and one of"):
        clipax.explain_clipped_grad(loss_fn, PARAMS, BATCH, has_aux=True)


# -- What is refused -----------------------------------------------------------------------------


REFUSED: dict[str, tuple[Any, str]] = {
    "a string": ("text", "argument 1 must be an array with the examples.*got 'text'"),
    "a function": ({"x": BATCH, "f": jnp.sin}, r"argument 1\['f'\] must be an array with"),
    "an object": ([BATCH, Settings(1.0)], r"argument 1\[1\] must be an array with the examples"),
    "objects of NumPy": (np.array([None, "a"]), "argument 1 must be an array with the examples"),
    "strings of NumPy": (np.array(["a", "b"]), "argument 1 must be an array with the examples"),
    "a flag": ({"x": BATCH, "flag": True}, r"argument 1\['flag'\] has no axis of examples"),
    "numbers": ([1.0, 2.0], r"argument 1\[0\] has no axis of examples"),
    "a number of NumPy": (np.float32(1.0), "argument 1 has no axis of examples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_batch_that_is_no_array_is_refused(name: str) -> None:
    batch, message = REFUSED[name]
    loss_fn = lambda params, x: jnp.sum(params["w"])  # noqa: E731
    for call in (clipax.clipped_grad(loss_fn, 1.0), clipax.per_example_norms(loss_fn)):
        with pytest.raises(ValueError, match=message):
            call(PARAMS, batch)
    with pytest.raises(ValueError, match=message):
        clipax.explain_clipped_grad(loss_fn, PARAMS, batch)


@pytest.mark.parametrize("batch", [np.asarray(BATCH), [BATCH[:, 0], np.asarray(BATCH[:, 1])]])
def test_batches_can_be_arrays_of_numpy(batch: Any) -> None:
    def loss_fn(params: Any, x: Any) -> jax.Array:
        return total(params, jnp.stack(x) if isinstance(x, list) else x)

    zoo.assert_near(clipax.per_example_norms(loss_fn)(PARAMS, batch), NORMS)


@pytest.mark.parametrize("mask", ["yes", {"a": MASK}, [True, "no"], object()])
def test_every_mask_that_is_no_array_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match="mask must be 2 booleans, one an example, got"):
        clipax.clipped_grad(total, 1.0)(PARAMS, BATCH, mask=mask)


def test_aux_that_is_no_array_is_refused() -> None:
    def loss_fn(params: Any, x: jax.Array, aux: Any) -> Any:
        return total(params, x), aux

    grad_fn = clipax.clipped_grad(loss_fn, 1.0, has_aux=True)
    with pytest.raises(ValueError, match=r"returns besides must be arrays.*got 'a' in aux\['n'\]"):
        grad_fn(PARAMS, BATCH, {"n": "a"})
    assert grad_fn(PARAMS, BATCH, {"n": 2})[1].aux["n"].tolist() == [2, 2]
