"""Trees and transformations that many tests share."""

import functools
import inspect
from collections.abc import Callable, Container, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipax

# The program matters, not how fast it is.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # Later ones have no such option.
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)

# Arguments by name: those without a default, for a method that acts on `params_and_updates()`,
# and the bounds that keep it from acting on anything.
ACTIVE: dict[str, Any] = {
    "max_norm": 0.1,
    "max_rms": 0.1,
    "max_value": 0.2,
    "ratio": 0.01,
    "threshold": 0.1,
    "norm": clipax.global_norm,
    "inner": clipax.clip_by_global_norm(0.5),
}
HUGE: dict[str, Any] = {
    **dict.fromkeys(
        (
            "max_norm",
            "max_rms",
            "max_value",
            "ratio",
            "skip_above",
            "square_ratio",
            "threshold",
            "warmup_max_norm",
        ),
        1e30,
    ),
    "inner": clipax.clip_by_global_norm(1e30),
}


def double_precision(enabled: bool) -> Any:
    """A context in which float64 exists."""
    if hasattr(jax, "enable_x64"):  # jax >= 0.8
        return jax.enable_x64(enabled)
    from jax import experimental

    return experimental.enable_x64(enabled)


def public_factories() -> dict[str, Callable[..., Any]]:
    """Every public function that is annotated to return a transformation."""
    return {
        name: value
        for name, value in vars(clipax).items()
        if inspect.isfunction(value)
        and inspect.signature(value).return_annotation is optax.GradientTransformationExtraArgs
    }


# One of each kind: a fixed bound on all, each leaf, each unit, each entry and by values; bounds
# that are learned; moments; and what is put round another method.
ONE_OF_EACH_KIND = {
    "adagc",
    "adaptive_grad_clip",
    "clip_by_global_norm",
    "clip_by_spectral_norm",
    "clip_by_value",
    "scale_by_stable_adam",
    "spam_clip",
    "u_clip",
    "zclip",
}


def mostly_slow(names: Iterable[Any], plain: Container[Any] = ONE_OF_EACH_KIND) -> list[Any]:
    """The names as parameters of a test, those that are not plain in the slow group."""
    return [
        name if name in plain else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


def required(factory: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a factory cannot do without."""
    return {
        name: values[name]
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }


def build(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    factory = public_factories()[name]
    return factory(**required(factory, ACTIVE), **options)


def has_a_bound(name: str) -> bool:
    """Whether an argument can keep a method from acting: not where it sets its own bound."""
    return bool(set(inspect.signature(public_factories()[name]).parameters) & set(HUGE))


def build_huge(name: str) -> optax.GradientTransformationExtraArgs:
    """With every bound that the method takes out of reach, also those with a default."""
    factory = public_factories()[name]
    taken = inspect.signature(factory).parameters
    huge = {key: value for key, value in HUGE.items() if key in taken}
    return factory(**(required(factory, ACTIVE) | huge))


@functools.cache
def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_and_updates(dtype: Any = jnp.float32, seed: int = 0) -> tuple[Any, Any]:
    """A small network's parameters and their gradients: ranks 0 to 4."""
    shapes = {
        "conv": (3, 3, 2, 8),
        "attention": (4, 2, 8),
        "dense": {"kernel": (8, 16), "bias": (16,)},
        "scale": (),
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))

    def tree(offset: int) -> Any:
        arrays = [
            jnp.asarray(_normal(seed + offset + 2 * row, shape)).astype(dtype)
            for row, shape in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, arrays)

    return tree(0), tree(1)


def steps(count: int) -> list[Any]:
    """A sequence of updates of varied sizes."""
    return [
        jax.tree.map(lambda leaf, size=1.0 + step: leaf * size, params_and_updates(seed=step)[1])
        for step in range(count)
    ]


def without_skipped_counts(state: Any) -> Any:
    """The state with each field named `...skipped_count` at zero."""

    def reset(path: Any, leaf: Any) -> Any:
        is_count = path and getattr(path[-1], "name", "").endswith("skipped_count")
        return jnp.zeros_like(leaf) if is_count else leaf

    return jax.tree_util.tree_map_with_path(reset, state)


def _pairs(one: Any, other: Any) -> Iterable[tuple[Any, Any]]:
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def assert_same_type(one: Any, other: Any) -> None:
    """Same structure, shapes and dtypes."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in _pairs(one, other):
        assert (jnp.shape(left), jnp.result_type(left)) == (
            jnp.shape(right),
            jnp.result_type(right),
        )


def assert_close(one: Any, other: Any, rtol: float = 2e-6, atol: float = 0.0) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in _pairs(one, other):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=atol)


def assert_bitwise(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes()
