"""Bad arguments and bad calls are refused with a message that names them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from per_example_cases import PAIRS, total

import clipax

FACTORY_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"loss_fn": 3}, "loss_fn must be a function, got 3"),
    ({"coefficient": "hard"}, "coefficient must be a function, got 'hard'"),
    ({"has_aux": 1}, "has_aux must be True or False, got 1"),
    ({"mean": None}, "mean must be True or False, got None"),
    ({"skip_nonfinite": "yes"}, "skip_nonfinite must be True or False, got 'yes'"),
    *[
        ({"microbatch_size": bad}, rf"microbatch_size must be an integer >= 1, got {bad}")
        for bad in (0, -2, 1.5, True)
    ],
    *[
        ({"max_norm": bad}, f"max_norm must be a number .*, got {bad}")
        for bad in (True, -1.0, math.nan, None)
    ],
    ({"max_norm": "1"}, "max_norm must be a number .*, got '1'"),
    ({"max_norm": lambda count: 1.0}, "max_norm"),
    ({"max_norm": jnp.ones(3)}, "max_norm"),
    ({"max_norm": jnp.asarray(-1.0)}, "max_norm"),
    ({"max_norm": {"w": -1.0}}, r"max_norm\['w'\] must be a number .*, got -1.0"),
    *[
        ({name: bad}, f"{name} must be a position >= 0 or several different ones, got")
        for name in ("argnums", "batch_argnums")
        for bad in (-1, 1.5, True, "0", (), (2, 2), None, (0, "1"))
    ],
    ({"argnums": (0, 1)}, r"argnums and batch_argnums must differ, and both have \[1\]"),
]


@pytest.mark.parametrize(("bad", "message"), FACTORY_ERRORS)
def test_every_bad_argument_of_the_factories_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.clipped_grad(**({"loss_fn": total, "max_norm": 1.0} | bad))
    if set(bad) <= {"loss_fn", "argnums", "batch_argnums", "has_aux"}:
        with pytest.raises(ValueError, match=message):
            clipax.per_example_norms(**({"loss_fn": total} | bad))


def test_every_bad_argument_of_the_other_functions_is_refused() -> None:
    with pytest.raises(ValueError, match="per_leaf must be True or False, got 1"):
        clipax.per_example_norms(total, per_leaf=1)  # type: ignore[arg-type]
    info = clipax.clipped_grad(total, 1.0)(jnp.zeros(2), PAIRS)[1]
    for bad in (0.0, 1.0, -0.5, math.nan, True, None):
        with pytest.raises(ValueError, match="quantile must be a number in"):
            clipax.track_quantile(1.0, info, quantile=bad)  # type: ignore[arg-type]
    for bad in (0.0, -1.0, math.nan, "fast"):
        with pytest.raises(ValueError, match="learning_rate must be a number > 0"):
            clipax.track_quantile(1.0, info, learning_rate=bad)  # type: ignore[arg-type]
    for bad in (-1.0, math.nan, None, {"w": 1.0}):
        with pytest.raises(ValueError, match="max_norm"):
            clipax.track_quantile(bad, info)


CALL_ERRORS: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "no second argument": ({}, (jnp.zeros(2),), "batch_argnums has 1, and there are 1 arguments"),
    "no third": ({"argnums": 2}, (jnp.zeros(2), PAIRS), "argnums has 2, and there are 2"),
    "integers": (
        {},
        ({"a": {"n": jnp.arange(2)}}, PAIRS),
        r"parameter .*n.* must be an array of floats, got int32",
    ),
    "one integer leaf": (
        {},
        (jnp.arange(2), PAIRS),
        "itself must be an array of floats, got int32",
    ),
    "booleans": ({}, (jnp.ones(2, bool), PAIRS), "array of floats, got bool"),
    "float0": ({}, (np.zeros(2, jax.dtypes.float0), PAIRS), "array of floats, got"),
    "a key": ({}, ({"key": jax.random.key(0)}, PAIRS), "parameter .*key.* must be an array"),
    "a Python integer": ({}, (1, PAIRS), "array of floats, got int"),
    "a string": ({}, ({"name": "w"}, PAIRS), "parameter .*name.* must be an array of floats"),
    "no parameters": ({}, ({}, PAIRS), "parameters"),
    "None alone": ({}, (None, PAIRS), "parameters"),
    "a loss for each": ({"loss_fn": lambda w, x: w * x}, (jnp.zeros(2), PAIRS), r"float32\[2\]"),
    "an integer loss": (
        {"loss_fn": lambda w, x: jnp.sum(w * x).astype(jnp.int32)},
        (jnp.zeros(2), PAIRS),
        r"loss_fn must return one real number for one example, got int32\[\]",
    ),
    "a complex loss": (
        {"loss_fn": lambda w, x: lax.complex(total(w, x), 0.0)},
        (jnp.zeros(2), PAIRS),
        r"loss_fn must return one real number for one example, got complex64\[\]",
    ),
    "a loss that is None": ({"loss_fn": lambda w, x: None}, (jnp.zeros(2), PAIRS), "loss_fn must"),
    "a pair": ({"loss_fn": lambda w, x: (total(w, x), 1)}, (jnp.zeros(2), PAIRS), "has_aux"),
    "no pair": ({"has_aux": True}, (jnp.zeros(2), PAIRS), "With has_aux, loss_fn must return a"),
    "a scalar in the batch": (
        {},
        (jnp.zeros(2), {"x": PAIRS, "size": 2.0}),
        r"argument 1\['size'\] has no axis of examples: its shape is \(\)",
    ),
    "other leading axes": (
        {},
        (jnp.zeros(2), {"x": PAIRS, "y": jnp.ones((3, 2))}),
        r"one leading axis .* 2 in argument 1\['x'\], 3 in argument 1\['y'\]",
    ),
    "no batch": ({}, (jnp.zeros(2), {}), "one leading axis of examples, got no array"),
}


@pytest.mark.parametrize("name", CALL_ERRORS)
def test_every_bad_call_is_refused(name: str) -> None:
    options, args, message = CALL_ERRORS[name]
    options = {"loss_fn": total} | options
    loss_fn = options.pop("loss_fn")
    with pytest.raises(ValueError, match=message):
        clipax.clipped_grad(loss_fn, 1.0, **options)(*args)
    with pytest.raises(ValueError, match=message):
        clipax.per_example_norms(loss_fn, **options)(*args)
    with pytest.raises(ValueError, match=message):
        clipax.explain_clipped_grad(loss_fn, *args, **options)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (jnp.ones(3, bool), r"bool\[3\]"),
        (jnp.ones((2, 1), bool), r"bool\[2, 1\]"),
        (True, r"bool\[\]"),
        (np.ones(2, np.float32), r"float32\[2\]"),
        (jnp.ones(2, jnp.int32), r"int32\[2\]"),
    ],
)
def test_every_bad_mask_is_refused(mask: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"mask must be 2 booleans, .* got {found}"):
        clipax.clipped_grad(total, 1.0)(jnp.zeros(2), PAIRS, mask=mask)


@pytest.mark.parametrize(
    "bad", [-1.0, True, math.nan, "1", {"v": 1.0}, jnp.ones(2), lambda count: 1.0]
)
def test_every_bad_bound_of_a_call_is_refused(bad: Any) -> None:
    params, batch = {"w": jnp.zeros(2)}, PAIRS
    grad_fn = clipax.clipped_grad(lambda params, x: total(params["w"], x), 1.0)
    with pytest.raises(ValueError, match="max_norm"):
        grad_fn(params, batch, max_norm=bad)


def test_bounds_of_another_structure_are_refused() -> None:
    grad_fn = clipax.clipped_grad(lambda params, x: total(params["w"], x), {"v": 1.0})
    with pytest.raises(ValueError, match="max_norm"):
        grad_fn({"w": jnp.zeros(2)}, PAIRS)


def test_an_optimizer_in_the_place_of_the_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="got a transformation: pass the gradients"):
        clipax.clipped_grad(total, optax.sgd(0.1))


def test_an_error_in_a_loss_of_a_whole_batch_says_what_the_loss_gets() -> None:
    def of_batch(params: Any, x: Any) -> Any:
        return jnp.mean((x @ params)[:, 0])

    with pytest.raises(IndexError) as raised:
        clipax.clipped_grad(of_batch, 1.0)(jnp.zeros((2, 1)), PAIRS)
    assert "one example, without the axis of examples" in raised.value.__notes__[0]
