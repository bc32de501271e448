"""Bad arguments, of every factory and in every place: a ValueError that names the argument."""

import decimal
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax

FACTORIES = trees.public_factories()
FUNCTIONS = {
    "fixed": clipax.thresholds.fixed,
    "relative_to_params": clipax.thresholds.relative_to_params,
    "per_norm": clipax.thresholds.per_norm,
    "auto_s": clipax.coefficients.auto_s,
    "psac": clipax.coefficients.psac,
}
REQUIRED = {"rule": optax.ema(0.9)}


def numbers() -> Any:
    yield 1.0


BAD: dict[str, Any] = {
    "None": None,
    "text": "text",
    "bytes": b"1",
    "object": object(),
    "key": jax.random.key(0),
    "generator": numbers(),
    "random generator": np.random.default_rng(0),
    "complex": 1j,
    "complex array": jnp.array(1j),
    "boolean array": jnp.array(True),
    "NumPy boolean": np.bool_(True),
    "NaN": math.nan,
    "array of NaN": jnp.array(jnp.nan),
    "minus infinity": -math.inf,
    "integer beyond floats": 10**400,
    "decimal": decimal.Decimal("1.5"),
    "shape": jax.ShapeDtypeStruct((), jnp.float32),
    "range": range(3),
    "set": {1.0},
    "text array": np.array("a"),
    "object array": np.array(None, dtype=object),
    "date": np.datetime64("2020-01-01"),
    "module": math,
    "text in a tree": {"w": "a"},
    "key in a tree": {"w": jax.random.key(0)},
}


@pytest.mark.parametrize("name", [*FACTORIES, *FUNCTIONS])
def test_bad_arguments_are_refused_by_name_or_taken(name: str) -> None:
    factory = {**FACTORIES, **FUNCTIONS}[name]
    given = trees.required(factory, {**trees.ACTIVE, **REQUIRED, "max_norm": 0.1})
    for argument, parameter in inspect.signature(factory).parameters.items():
        if argument in ("axis_name", "axes", "stack_axis", "unit_axis", "mask"):
            continue  # Any object can be a name, and trees of them are looked at with the updates.
        for kind, value in BAD.items():
            is_flag = isinstance(value, np.bool_) and isinstance(parameter.default, bool)
            is_good = is_flag or (argument, kind) == ("min_value", "minus infinity")
            try:
                factory(**{**given, argument: value})
            except ValueError as error:
                message = str(error)
            else:
                assert is_good or value is None or callable(value), (argument, value)
                continue
            assert re.search(rf"\b{argument}\b|max_norm", message), (argument, value, message)


KNOWN_NORMS = {
    "negative": -1.0,
    "negative array": jnp.array(-0.5),
    "text": "5",
    "boolean": True,
    "key": jax.random.key(0),
    "complex": 3j,
    "object": object(),
}


@pytest.mark.parametrize("norm", KNOWN_NORMS.values(), ids=KNOWN_NORMS)
def test_a_known_norm_that_is_none_is_refused(norm: Any) -> None:
    updates = jnp.array([3.0, 4.0])
    for build in (
        clipax.clip_by_global_norm,
        clipax.smooth_clip_by_global_norm,
        clipax.delta_gclip,
        lambda bound: clipax.autoclip(max_norm=bound),
        lambda bound: clipax.zclip(max_norm=bound),
        lambda bound: clipax.clip_by(clipax.global_norm, bound),
    ):
        clip = build(1.0)
        state = clip.init(updates)
        with pytest.raises(ValueError, match=r"^norm must be a norm, a number >= 0"):
            clip.update(updates, state, norm=norm)
        for good in (5.0, jnp.array(5.0), 5, np.float32(5), jnp.nan, jnp.inf):
            clip.update(updates, state, norm=good)


def test_a_schedule_must_give_numbers() -> None:
    for wrong in ("a", None, jax.random.key(0), 1j, [1.0]):
        for build in (clipax.clip_by_global_norm, clipax.clip_by_leaf_norm, clipax.clip_by_value):
            clip = build(lambda _, wrong=wrong: wrong)
            with pytest.raises(ValueError, match="must be a schedule that gives numbers, got"):
                clipax.clip_tree(jnp.ones(2), clip)


def test_a_norm_of_ones_own_must_give_numbers() -> None:
    for wrong in ("a", 1j, jax.random.key(0), jnp.array(True)):
        clip = clipax.clip_by(lambda _, wrong=wrong: wrong, 1.0)
        with pytest.raises(ValueError, match="norm must give real numbers, got"):
            clip.init(jnp.ones(2))


@pytest.mark.parametrize("rule", [None, 1.0, "ema", optax.ema, lambda norm: norm])
def test_what_is_no_rule_is_refused_at_once(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"rule must be an optax\.GradientTransformation, got"):
        clipax.thresholds.per_norm(rule)


def test_axes_are_refused_with_the_name_of_the_argument() -> None:
    updates = {"w": jnp.ones((2, 3))}
    for build, argument in (
        (clipax.clip_by_leaf_norm, "axes"),
        (clipax.clip_by_leaf_norm, "stack_axis"),
        (clipax.clip_by_unit_norm, "unit_axis"),
        (clipax.clip_by_spectral_norm, "unit_axis"),
        (clipax.clip_by_spectral_norm, "stack_axis"),
    ):
        for axis in (5, {"w": 5}, lambda path, leaf: 5):
            with pytest.raises(ValueError, match=rf"has no axis 5, got {argument}=5"):
                clipax.clip_tree(updates, build(1.0, **{argument: axis}))
        with pytest.raises(ValueError, match=rf"{argument} must be an integer, got 1.5"):
            clipax.clip_tree(updates, build(1.0, **{argument: {"w": 1.5}}))


def test_names_of_axes_are_no_function() -> None:
    for factory in FACTORIES.values():
        given = trees.required(factory, trees.ACTIVE)
        with pytest.raises(ValueError, match="axis_name must be a name, several names, or a tree"):
            factory(**given, axis_name=lambda path, leaf: "x")


def test_errors_name_the_argument_that_the_user_gave() -> None:
    for build in (
        lambda: clipax.clip_by(clipax.global_norm, "x"),
        lambda: clipax.thresholds.capped("x", 1.0),
    ):
        with pytest.raises(ValueError, match=r"^threshold must be a number >= 0, got 'x'"):
            build()
    for factory in (clipax.clip_by_leaf_norm, clipax.clip_by_spectral_norm):
        with pytest.raises(ValueError, match=r"^max_norm must be a number >= 0, got 'x'"):
            factory("x")


def test_a_known_norm_with_another_structure_is_refused_in_words() -> None:
    clip = clipax.clip_by_global_norm(1.0)
    wanted = r"with one norm, got the norms \['w'\]\.$"
    with pytest.raises(ValueError, match=wanted):
        clip.update(jnp.ones(2), clip.init(jnp.ones(2)), norm={"w": 1.0})


@pytest.mark.parametrize("given", [None, optax.EmptyState(), (1,)])
def test_a_missing_state_is_refused_with_what_was_given(given: object) -> None:
    clip = clipax.autoclip()
    shown = "None" if given is None else f"an object of type {type(given).__name__}"
    with pytest.raises(ValueError, match=rf"^state must be the ClipState .*, got {shown}\. Call"):
        clip.update(jnp.ones(2), given)


def test_the_state_of_another_method_is_named_as_that() -> None:
    state = clipax.clip_by_global_norm(1.0).init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"got the ClipState of another method, or of other"):
        clipax.zclip().update(jnp.ones(2), state)


def test_an_error_does_not_show_all_of_a_tree() -> None:
    tree = {f"layer{number}": jnp.ones((30, 30)) for number in range(20)}
    for call in (
        lambda: clipax.clip_by_global_norm(tree),
        lambda: clipax.observe(tree),
        lambda: clipax.advise([tree] * 30),
        lambda: clipax.as_floats({"x": tree}),
        lambda: clipax.clip_by(tree, 1.0),
        lambda: clipax.clip_by_leaf_norm(1.0, mask=tree).init(tree),
        lambda: clipax.skip_step(optax.sgd(0.1), skip_ranges=tree),
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            call()
        assert len(str(raised.value)) < 500
        assert "layer" in str(raised.value) or "Array" in str(raised.value)


def test_an_error_shows_a_short_array_whole_and_a_long_one_by_its_ends() -> None:
    with pytest.raises(ValueError, match=r"^info must be") as raised:
        clipax.track_quantile(1.0, np.arange(40))
    assert repr(np.arange(40)) in str(raised.value)
    with pytest.raises(ValueError, match=r"got array\(\[\[1\., 1\., 1\., \.\.\., 1\., 1\., 1\.\]"):
        clipax.track_quantile(1.0, np.ones((30, 30)))


def test_a_transformation_is_not_read_as_a_state() -> None:
    with pytest.raises(ValueError, match=r"^opt_state must be a state"):
        clipax.metrics(clipax.clip_by_global_norm(1.0))


def test_flags_that_are_no_booleans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^per_leaf must be True or False, got 3"):
        clipax.metrics({}, per_leaf=3)
    with pytest.raises(ValueError, match=r"^has_aux must be True or False, got 3"):
        clipax.explain_clipped_grad(jnp.dot, jnp.ones(2), jnp.ones((3, 2)), has_aux=3)


def test_only_the_record_of_clipped_grad_moves_a_bound() -> None:
    with pytest.raises(ValueError, match=r"^info must be the PerExampleInfo of clipped_grad, got"):
        clipax.track_quantile(1.0, None)


def test_an_axis_that_is_a_boolean_is_refused_once() -> None:
    with pytest.raises(ValueError, match=r"^axes must be an integer, got True\.$"):
        clipax.leaf_norm(jnp.ones(2), axes=True)
