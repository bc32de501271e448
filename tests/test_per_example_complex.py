"""Products of complex numbers, whose Gram matrices have conjugates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from per_example_programs import X, normal

import clipax

Params = dict[str, jax.Array]


def size(y: jax.Array) -> jax.Array:
    """Its derivatives differ between real and imaginary parts."""
    return zoo.mean_square(jnp.tanh(y.real) + jnp.sin(2 * y.imag))


def as_complex(x: jax.Array) -> jax.Array:
    return x.astype(np.result_type(x.dtype, np.complex64))


def of(weight: Callable[[Params], jax.Array]) -> Callable[..., jax.Array]:
    def loss_fn(params: Params, x: jax.Array) -> jax.Array:
        w = weight(params)
        return size(lax.complex(x, 0.5 * x + 0.3 * x[:, ::-1]) @ w)

    return loss_fn


def layers(params: Params, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> Any:
        x = x @ w
        return x * lax.complex(jnp.cos(x.real), x.imag), None

    return size(lax.scan(layer, lax.complex(x, 0.2 * x), params["stack"])[0])


def modes(params: Params, x: jax.Array) -> jax.Array:
    """A product for each frequency, as in a Fourier neural operator."""
    spectrum = jnp.fft.rfft(x, axis=0)[:, :4]
    weights = params["modes"][: len(spectrum)]
    return zoo.mean_square(
        jnp.tanh(jnp.fft.irfft(jnp.einsum("ki,kio->ko", spectrum, weights), 3, 0))
    )


def look_up(params: Params, x: jax.Array) -> jax.Array:
    tokens = jnp.asarray([3, 1, 3, -2], jnp.int32)
    rows = params["w"][tokens[:3] + jnp.int32(x[0, 0] > 0)]
    return size(rows * as_complex(x) + params["w"][tokens][:3])


CASES: dict[str, Callable[..., jax.Array]] = {
    "complex": of(lambda p: p["w"]),
    "one row": lambda p, x: of(lambda p: p["w"])(p, x[:1]),
    "conjugated": of(lambda p: jnp.conj(p["w"]).T + p["w"]),
    "of two parts": of(lambda p: as_complex(p["a"]) + 1j * as_complex(p["b"])),
    "of two parts, joined": of(lambda p: lax.complex(p["a"], p["b"])),
    "of two parts in rows": lambda p, x: of(lambda p: lax.complex(p["a"], p["b"]))(p, x[:1]),
    "scaled": of(lambda p: p["w"] * (0.5 - 2j) / (1 + 1j)),
    "scaled by the example": lambda p, x: of(
        lambda p: as_complex(x[0, 0]) * p["w"] * lax.complex(x[1, 1], x[2, 1])
    )(p, x),
    "with a penalty": lambda p, x: (
        of(lambda p: p["w"])(p, x) + 0.1 * jnp.sum(jnp.abs(p["w"]) ** 2) + jnp.sum(p["w"].imag)
    ),
    "low-rank": of(lambda p: p["w"][:, :2] @ p["w"][:2]),
    "real": of(lambda p: as_complex(p["a"])),
    "real part": lambda p, x: zoo.mean_square(jnp.tanh(x @ p["w"].real) + x @ p["w"].imag),
    "layers": layers,
    "modes": modes,
    "look-up": look_up,
    "slices": lambda p, x: size(lax.complex(x[:, :8], x[:, 8:]) @ p["w"][3:11]),
}
COMMON = {"complex", "of two parts"}


def arguments(dtype: Any) -> Any:
    def parts(*shape: int, seed: int) -> jax.Array:
        return 0.25 * lax.complex(normal(*shape, seed=seed), normal(*shape, seed=seed + 10))

    params = {
        "w": parts(16, 16, seed=0),
        "stack": parts(3, 16, 16, seed=1),
        "modes": parts(3, 4, 5, seed=2),
        "a": 0.25 * normal(16, 16, seed=3),
        "b": 0.25 * normal(16, 16, seed=4),
    }
    of_complex = np.result_type(dtype, np.complex64)

    def cast(leaf: jax.Array) -> Any:
        return leaf.astype(of_complex if jnp.iscomplexobj(leaf) else dtype)

    return jax.tree.map(cast, params), X.astype(dtype)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("name", trees.mostly_slow(CASES, COMMON))
@pytest.mark.parametrize("memory", ["kept", "twice"])
def test_complex_gradients_equal_those_made_one_by_one(name: str, memory: Any) -> None:
    with trees.double_precision(True):
        oracle.assert_leaves_the_same(CASES[name], *arguments(jnp.float64), memory=memory)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_so_do_those_in_single_precision(name: str) -> None:
    params, batch = arguments(jnp.float32)
    oracle.assert_clipped(CASES[name], params, batch)


@pytest.mark.parametrize("name", ["complex", "of two parts", "scaled", "layers"])
def test_complex_weights_have_factors(name: str) -> None:
    lines = zoo.lines_of_leaves(zoo.explanation(CASES[name], *arguments(jnp.float32)))
    used = [line for line in lines if zoo.ZERO not in line]
    assert used
    assert all(zoo.GRAM in line for line in used), lines


@pytest.mark.parametrize("name", ["complex", "of two parts"])
def test_no_complex_weight_is_made_for_each_example(name: str) -> None:
    w = jax.ShapeDtypeStruct((128, 128), jnp.complex64)
    part = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    batch = jax.ShapeDtypeStruct((16, 2, 128), jnp.float32)
    clip = jax.jit(clipax.clipped_grad(CASES[name], 1.0))
    compiled = clip.lower({"w": w, "a": part, "b": part}, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 128 * 128 * 16 / 2
