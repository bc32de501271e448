"""`optax.inject_hyperparams` of every factory: what it may leave out, and what helps if not."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import trees

import clipax

FACTORIES = trees.public_factories()
factories = pytest.mark.parametrize("name", sorted(FACTORIES))


PARAMS = {"w": jnp.array([[3.0, -4.0], [0.5, 12.0]]), "b": jnp.array([0.1, -0.2])}
UPDATES = {"w": jnp.array([[0.3, 4.0], [-1.5, 0.2]]), "b": jnp.array([-2.0, 0.4])}


pytestmark = pytest.mark.usefixtures("_promotes")


def injected(name: str, static: tuple[str, ...] = (), **given: Any) -> Any:
    return optax.inject_hyperparams(FACTORIES[name], static_args=static)(**given)


def assert_keeps_its_state(name: str, static: tuple[str, ...], **given: Any) -> None:
    """Injected, a method has its own state, and every step keeps the type of it all."""
    method = injected(name, static, **given)
    state = method.init(PARAMS)
    trees.assert_same_type(state.inner_state, FACTORIES[name](**given).init(PARAMS))
    stepped = jax.eval_shape(method.update, UPDATES, state, PARAMS)
    trees.assert_same_type(stepped, (UPDATES, state))


def advised(build: Callable[[], Any]) -> tuple[str, ...]:
    """The `static_args` that an error advises."""
    with pytest.raises(ValueError, match=r"Under `optax\.inject_hyperparams`, pass") as caught:
        build()
    (names,) = re.findall(r"static_args=\((.*?),?\)`", str(caught.value))
    return tuple(re.findall(r"\w+", names))


def required(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments without a default, and those of them that are functions: the norm of `clip_by`."""
    given = trees.required(FACTORIES[name], trees.ACTIVE)
    return given, tuple(key for key, value in given.items() if inspect.isfunction(value))


@factories
def test_every_factory_can_be_injected_with_its_defaults(name: str) -> None:
    """Without `static_args`, unless a function must be given."""
    given, static = required(name)
    if static:
        assert advised(lambda: injected(name, **given).init(PARAMS)) == static
    assert_keeps_its_state(name, static, **given)


@pytest.mark.slow
@factories
def test_a_method_does_the_same_if_it_is_injected(name: str) -> None:
    given, static = required(name)
    methods = FACTORIES[name](**given), injected(name, static, **given)
    states = [method.init(PARAMS) for method in methods]
    steps = [trees.quick_jit(method.update) for method in methods]
    for _ in range(3):
        results = [step(UPDATES, state, PARAMS) for step, state in zip(steps, states, strict=True)]
        states = [state for _, state in results]
        trees.assert_close(results[1][0], results[0][0], rtol=1e-5)


def integers(name: str) -> dict[str, int]:
    """Arguments of integers that must be known while tracing, in one call."""
    given = {"window_size": 4, "warmup_steps": 2, "iterations": 3, "reset_every": 9}
    taken = inspect.signature(FACTORIES[name]).parameters
    return {key: value for key, value in given.items() if key in taken}


@pytest.mark.parametrize("name", [name for name in sorted(FACTORIES) if integers(name)])
def test_integers_that_are_given_need_the_static_arguments_that_the_error_names(name: str) -> None:
    given = required(name)[0] | integers(name)
    static: tuple[str, ...] = ()
    while set(static) != set(integers(name)):
        more = advised(lambda static=static: injected(name, static, **given).init(PARAMS))
        assert more
        assert not set(more) & set(static)
        static += more
    assert_keeps_its_state(name, static, **given)


@pytest.mark.parametrize("norm", ["global_norm", "leaf_norm", "unit_norm", "block_rms"])
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in sorted(FACTORIES)
        if "norm" in inspect.signature(FACTORIES[name]).parameters
    ],
)
def test_a_norm_that_is_given_is_never_lost(name: str, norm: str) -> None:
    """Called as a schedule, `leaf_norm` gives None, which must not stand for a default."""
    given = required(name)[0] | {"norm": getattr(clipax.norms, norm)}
    assert advised(lambda: injected(name, **given).init(PARAMS)) == ("norm",)
    assert_keeps_its_state(name, ("norm",), **given)


def test_numbers_can_still_be_changed_from_step_to_step() -> None:
    params = {"w": jnp.array([3.0, 4.0])}
    method = injected("zclip", max_norm=lambda count: 3.0 - count, decay=0.5)
    state = method.init(params)
    assert set(state.hyperparams) == {"z_max", "decay", "max_norm", "factor", "min_std", "eps"}
    for bound in (3.0, 2.0):
        _, state = method.update(params, state, params)
        assert float(state.inner_state.max_norm) == bound


@factories
def test_signatures_show_the_defaults_as_they_are(name: str) -> None:
    wrapped = inspect.signature(FACTORIES[name])
    written = inspect.signature(inspect.unwrap(FACTORIES[name]))
    assert list(wrapped.parameters) == list(written.parameters)
    for key, parameter in written.parameters.items():
        shown = wrapped.parameters[key].default
        is_function = inspect.isfunction(parameter.default)
        plain = parameter.default.__name__ if is_function else repr(parameter.default)
        assert repr(shown) == plain
    # And a default that is read there can be given.
    given = trees.required(FACTORIES[name], trees.ACTIVE)
    defaults = {
        key: parameter.default
        for key, parameter in wrapped.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    method = FACTORIES[name](**given, **defaults)
    trees.assert_same_type(method.init(PARAMS), FACTORIES[name](**given).init(PARAMS))
