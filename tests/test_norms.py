"""Norms against NumPy in float64: any order, width, range and grouping."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from hypothesis import given, settings
from hypothesis import strategies as st

import clipax
from clipax._core import _compat, _range, _stacks

ORDERS = [0.5, 1, 2, 3, math.inf]


def p_norm(values: Any, ord: float, axis: Any = None) -> np.ndarray:
    """The textbook p-norm in float64, scaled by the largest modulus."""
    modulus = np.abs(np.asarray(values).astype(np.complex128))
    if ord == math.inf:
        return modulus.max(axis=axis, keepdims=axis is not None)
    largest = max(modulus.max(initial=0.0), 1e-300)
    sums = ((modulus / largest) ** ord).sum(axis=axis, keepdims=axis is not None)
    return largest * sums ** (1 / ord)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate(
        [np.asarray(x).astype(np.complex128).ravel() for x in jax.tree.leaves(tree)]
    )


@pytest.mark.slow_but(10)
@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_global_norm_of_any_order_and_dtype(ord: float, dtype: str) -> None:
    _, updates = trees.params_and_updates(dtype)
    norm = clipax.global_norm(updates, ord)
    assert (norm.shape, norm.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(norm, p_norm(flat(updates), ord), rtol=3e-6)


@pytest.mark.slow_but(70)
@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("size", [1e-30, 1.2e-38, 1e-12, 1.0, 1e12, 1e20, 1e37])
@pytest.mark.parametrize("jit", ["eager", "jit", "constant", "vmap"])
def test_any_representable_norm_is_measured(ord: float, size: float, jit: str) -> None:
    values = np.array([[3.0, -4.0], [1.0, 0.0]], np.float32) * np.float32(size)
    if ord == 0.5 and size > 1:
        values = values / 16  # else the norm leaves the range at 1e37
    measure = {
        "eager": clipax.global_norm,
        "jit": jax.jit(clipax.global_norm, static_argnums=1),
        # XLA moves a scale that it knows out of a sum of constants, if one lets it.
        "constant": lambda x, p: jax.jit(lambda: clipax.global_norm(x, p))(),
        "vmap": lambda x, p: jax.vmap(lambda y: clipax.global_norm(y, p))(x[None])[0],
    }[jit]
    kept = values.astype(np.float64)
    kept[np.abs(kept) < np.finfo(np.float32).tiny] = 0  # XLA flushes subnormal numbers
    np.testing.assert_allclose(measure(jnp.asarray(values), ord), p_norm(kept, ord), rtol=1e-5)


def test_range_in_float64() -> None:
    with trees.double_precision(True):
        for size in (1e-300, 1e-200, 1.0, 1e200, 1e300):
            norm = clipax.global_norm(jnp.array([3.0, 4.0]) * size)
            assert norm.dtype == jnp.float64
            np.testing.assert_allclose(norm, 5 * size, rtol=1e-14)


def test_a_wide_leaf_makes_the_norm_wide_and_loses_no_narrow_one() -> None:
    with trees.double_precision(True):
        for small, large in ((1e-30, 1e-300), (3.0, 4.0), (1e30, 1e300)):
            updates = {"a": jnp.full((2,), small, jnp.float32), "b": jnp.full((2,), large)}
            assert clipax.global_norm(updates).dtype == jnp.float64
            np.testing.assert_allclose(
                clipax.global_norm(updates), p_norm(flat(updates), 2), rtol=1e-6
            )


@pytest.mark.parametrize(("bad", "norm"), [(np.nan, np.nan), (np.inf, np.inf), (-np.inf, np.inf)])
@pytest.mark.parametrize("ord", ORDERS)
def test_nan_and_inf_reach_their_norm_and_no_other(bad: float, norm: float, ord: Any) -> None:
    updates = {"bad": jnp.array([1.0, bad]), "good": jnp.array([3.0, 4.0])}
    np.testing.assert_equal(np.asarray(clipax.global_norm(updates, ord)), np.float32(norm))
    leaves = clipax.leaf_norm(updates, ord)
    np.testing.assert_equal(np.asarray(leaves["bad"]), np.float32(norm))
    np.testing.assert_allclose(leaves["good"], p_norm([3.0, 4.0], ord), rtol=1e-6)


@pytest.mark.parametrize("ord", [20, 64, 100, 1000])
def test_a_high_order_is_nearly_the_largest_entry(ord: float) -> None:
    values = np.array([3.0, -4.0, 4.0, 1e-3] * 8)
    np.testing.assert_allclose(
        clipax.global_norm(jnp.asarray(values, jnp.float32), ord), p_norm(values, ord), rtol=1e-5
    )
    assert bool(jnp.isfinite(jax.grad(clipax.global_norm)(jnp.asarray(values), ord)).all())


def test_nan_beats_inf() -> None:
    assert bool(jnp.isnan(clipax.global_norm(jnp.array([jnp.inf, jnp.nan]))))


@pytest.mark.parametrize("updates", [{}, None, {"n": jnp.arange(3)}, {"e": jnp.zeros((0, 3))}])
@pytest.mark.parametrize("ord", ORDERS)
def test_nothing_to_measure_is_zero(updates: Any, ord: float) -> None:
    assert float(clipax.global_norm(updates, ord)) == 0


@pytest.mark.slow
def test_thousands_of_small_leaves_are_summed_wide() -> None:
    leaves = [jnp.ones((16,), jnp.bfloat16)] * 2000
    np.testing.assert_allclose(clipax.global_norm(leaves), math.sqrt(32000), rtol=1e-6)


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("axes", [0, -1, (0, 2), (), (0, 1, 2)])
def test_leaf_norm_over_axes(ord: float, axes: Any) -> None:
    _, updates = trees.params_and_updates()
    leaf = updates["attention"]
    norm = clipax.leaf_norm(leaf, ord, axes=axes)
    expected = np.abs(np.asarray(leaf)) if axes == () else p_norm(leaf, ord, axis=axes)
    assert norm.shape == (() if axes == (0, 1, 2) else expected.shape)
    np.testing.assert_allclose(norm, expected.reshape(norm.shape), rtol=3e-6)


def test_stack_axis_is_every_other_axis() -> None:
    _, updates = trees.params_and_updates()
    rule = {"attention": 0, "conv": None, "dense": {"kernel": 1, "bias": None}, "scale": None}
    norms = clipax.leaf_norm(updates, stack_axis=rule)
    assert norms["attention"].shape == (4, 1, 1)
    assert norms["dense"]["kernel"].shape == (1, 16)
    assert norms["conv"].shape == ()
    np.testing.assert_allclose(
        norms["attention"], p_norm(updates["attention"], 2, axis=(1, 2)), rtol=2e-6
    )
    by_function = clipax.leaf_norm(
        updates, stack_axis=lambda path, leaf: {"attention": 0, "dense/kernel": 1}.get(path)
    )
    trees.assert_bitwise(by_function, norms)


@pytest.mark.parametrize(
    ("rule", "summed"),
    [
        (
            clipax.units.output_last,
            {0: (), 1: (0,), 2: (0,), 3: (0, 1), 4: (0, 1, 2), 6: (0, 1, 2, 3, 4)},
        ),
        (clipax.units.output_first, {0: (), 1: (0,), 2: (1,), 3: (1, 2), 4: (1, 2, 3)}),
        (clipax.units.nfnets, {0: (), 1: (0,), 2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}),
        (clipax.units.whole_leaf, {0: (), 1: (0,), 2: (0, 1), 3: (0, 1, 2)}),
    ],
)
def test_what_a_unit_is(rule: Any, summed: dict[int, tuple[int, ...]]) -> None:
    for rank, axes in summed.items():
        leaf = np.random.default_rng(rank).normal(size=(2, 3, 2, 3, 2, 3)[:rank])
        norm = clipax.unit_norm(jnp.asarray(leaf, jnp.float32), unit_axis=rule)
        expected = np.sqrt((leaf**2).sum(axis=axes, keepdims=True))
        np.testing.assert_allclose(np.broadcast_to(norm, expected.shape), expected, rtol=3e-6)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1), (1, 1, 8), (1, 1, 1, 8)])
def test_nfnets_takes_a_leaf_with_one_long_axis_for_one_unit(shape: tuple[int, ...]) -> None:
    assert clipax.unit_norm(jnp.ones(shape), unit_axis=clipax.units.nfnets).shape == ()


def test_an_integer_unit_axis_leaves_vectors_whole() -> None:
    norms = clipax.unit_norm({"w": jnp.ones((2, 3)), "b": jnp.ones(3), "s": 1.0}, unit_axis=0)
    assert {name: norm.shape for name, norm in norms.items()} == {"w": (2, 1), "b": (), "s": ()}


def test_rms_and_average_norm_divide_by_the_size() -> None:
    _, updates = trees.params_and_updates()
    kernel = np.asarray(updates["dense"]["kernel"]).astype(np.float64)
    rms, average = (
        norm(updates)["dense"]["kernel"]
        for norm in (clipax.norms.block_rms, clipax.norms.average_norm)
    )
    np.testing.assert_allclose(rms, np.sqrt((kernel**2).mean()), rtol=2e-6)
    np.testing.assert_allclose(average, np.sqrt((kernel**2).sum()) / kernel.size, rtol=2e-6)
    assert float(clipax.norms.block_rms(jnp.zeros((0,)))) == 0
    # The sum of these squares leaves the range, their mean does not.
    np.testing.assert_allclose(clipax.norms.block_rms(jnp.full((64,), 3e38)), 3e38, rtol=1e-6)


def test_a_tuple_of_booleans_is_a_prefix() -> None:
    x = jnp.array([3.0, 4.0])
    first, second = clipax.leaf_norm((x, x), mask=(True, False))
    assert (float(first), second) == (5, None)


def test_rules_are_asked_of_measured_and_unmasked_leaves_alone() -> None:
    updates = {"w": jnp.ones((2, 2)), "n": jnp.array(7), "b": jnp.ones(2), "f": "text"}
    mask = {"w": True, "n": True, "b": False, "f": True}
    norms = clipax.leaf_norm(updates, axes=1, mask=mask)
    assert {name for name, norm in norms.items() if norm is not None} == {"w"}

    def only_w(path: str, leaf: Any) -> int:
        assert path in ("w", "b")
        return -1

    clipax.unit_norm(updates, unit_axis=only_w)


def test_a_callable_tree_of_booleans_is_a_prefix() -> None:
    @jax.tree_util.register_pytree_node_class
    class Module:
        def __init__(self, *weights: Any):
            self.weights = weights

        def __call__(self, x: Any) -> Any:
            return x

        def tree_flatten(self) -> Any:
            return self.weights, None

        @classmethod
        def tree_unflatten(cls, _: None, weights: Any) -> Any:
            return cls(*weights)

    norms = clipax.leaf_norm(Module(jnp.ones(4), jnp.ones(4)), mask=Module(True, False))
    assert (float(norms.weights[0]), norms.weights[1]) == (2, None)


@pytest.mark.parametrize("mask", ["x", None, {"w": 1}, lambda path, leaf: None])
def test_a_mask_must_be_of_booleans(mask: Any) -> None:
    with pytest.raises(ValueError, match="mask must say True or False"):
        clipax.leaf_norm({"w": jnp.ones(2)}, mask=mask)


def test_mask_leaves_out_what_it_says() -> None:
    _, updates = trees.params_and_updates()
    norms = clipax.leaf_norm(updates, mask=lambda path, leaf: not path.startswith("dense"))
    assert norms["dense"] == {"kernel": None, "bias": None}
    assert norms["conv"] is not None
    masked = {"attention": True, "conv": True, "dense": False, "scale": True}
    trees.assert_bitwise(clipax.leaf_norm(updates, mask=masked), norms)


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e25])
def test_derivative_is_the_unit_vector_and_zero_at_zero(ord: float, size: float) -> None:
    x = jnp.array([3.0, -4.0, 0.0]) * size
    gradient = jax.jit(jax.grad(lambda x: clipax.global_norm(x, ord)))(x)
    unit = np.array([3.0, -4.0, 0.0])
    if ord == math.inf:
        expected = np.array([0.0, -1.0, 0.0])
    else:
        expected = np.sign(unit) * np.abs(unit) ** (ord - 1) / p_norm(unit, ord) ** (ord - 1)
    expected = expected if size else np.zeros(3)
    assert bool(jnp.isfinite(gradient).all())
    if size or ord == 2:  # at a kink, any subgradient will do
        np.testing.assert_allclose(gradient[:2], expected[:2], atol=1e-5)


@given(
    st.lists(
        st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False), min_size=4, max_size=4
    ),
    st.floats(2.0**-40, 2.0**40, width=32),
)
@settings(derandomize=True, max_examples=50, deadline=None)
def test_norm_facts(values: list[float], factor: float) -> None:
    x, y = np.array(values, np.float32), np.array(values[::-1], np.float32) / 2
    norm = jax.jit(clipax.global_norm)
    of_x, of_y, of_sum = (float(norm(jnp.asarray(v))) for v in (x, y, x + y))
    assert of_x >= 0
    assert (of_x == 0) == (not x.any())
    assert of_sum <= (of_x + of_y) * (1 + 1e-6)
    scaled = x * np.float32(factor)
    tiny = (np.abs(scaled) < np.finfo(np.float32).tiny) & (x != 0)
    if not tiny.any():
        np.testing.assert_allclose(float(norm(jnp.asarray(scaled))), of_x * factor, rtol=1e-5)


_WAYS = [
    _range._at_the_right_scale,
    _range._at_every_scale,
    pytest.param(
        _range._in_doubles,
        marks=pytest.mark.skipif(not _compat.HAS_DOUBLES, reason="jax < 0.10 has no such form"),
    ),
]


@pytest.mark.slow_but(17)
@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize(
    "entries",
    [
        [3.0, 4.0],
        [1e20, 2e20],
        [2e38, 1e38],
        [1e-30, 2e-30],
        [2e-38, 2e-38],
        [1e-20, 1e-21],
        [1e20, 1e-30],
        [0.0, 0.0],
        [math.nan, 1.0],
        [math.inf, 1.0],
        [math.nan, math.inf],
    ],
)
def test_the_way_of_accelerators_is_as_safe_as_that_of_cpus(way: Any, entries: Any) -> None:
    def norm(x: Any) -> Any:
        reduction = _stacks.Separate(_stacks.one_by_one([_stacks.Layout((0,), ())]), 2)
        (root,) = way(reduction, [x])
        return root

    x = np.array(entries, np.float32)
    expected = np.hypot(*x.astype(np.float64)) if not np.isnan(x).any() else math.nan
    value, derivative = jax.jit(jax.value_and_grad(norm))(x)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    if np.isfinite(expected):
        direction = x / expected if expected else np.zeros(2)
        np.testing.assert_allclose(derivative, direction, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_accelerators_read_once(platform: str) -> None:
    def program(platform: str) -> str:
        traced = jax.jit(clipax.global_norm).trace(jnp.ones((300, 300)))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    # A platform chooses by a constant; that values choose shows as a truth turned into an index.
    by_values = "(tensor<i1>) -> tensor<i32>"
    assert [program(each).count(by_values) for each in (platform, "cpu")] == [0, 1]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("norm", [clipax.unit_norm, clipax.leaf_norm])
def test_gpus_sum_units_in_doubles(platform: str, norm: Any) -> None:
    def total(x: Any) -> Any:
        return jnp.sum(norm({"x": x})["x"])

    def program(function: Any) -> str:
        # Leaves of this size are not little, see the next test.
        traced = jax.jit(function).trace(jnp.ones((300, 400)))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    is_expected = platform in ("cuda", "rocm") and norm is clipax.unit_norm and _compat.HAS_DOUBLES
    assert ("xf64>" in program(total)) == is_expected
    # JAX verifies what it lowers: its derivatives must be of one width too.
    assert "tensor<300x400xf32>" in program(jax.grad(total))


@pytest.mark.parametrize("norm", [clipax.unit_norm, clipax.leaf_norm])
def test_cpus_sum_little_leaves_in_doubles(norm: Any) -> None:
    def total(x: Any) -> Any:
        return jnp.sum(norm({"x": x})["x"])

    for function in (total, jax.grad(total)):
        traced = jax.jit(function).trace(jnp.ones((30, 40)))
        program = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert ("xf64>" in program) == _compat.HAS_DOUBLES
        assert ("(tensor<i1>) -> tensor<i32>" in program) != _compat.HAS_DOUBLES


@pytest.mark.parametrize("shape", [(512, 130), (3, 16, 40, 50), (257, 300), (16, 4096)])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_columns_of_large_leaves(shape: tuple[int, ...], size: float) -> None:
    x = (size * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    axes = tuple(range(len(shape) - 1))
    measured = jax.jit(functools.partial(clipax.leaf_norm, axes=axes))(x)
    np.testing.assert_allclose(measured, p_norm(x, 2, axes), rtol=1e-6)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA before jax 0.10 has no other loop for columns"
)
def test_cpus_sum_columns_in_two_steps() -> None:
    columns = jax.jit(functools.partial(clipax.leaf_norm, axes=0))
    program = columns.lower(jnp.ones((512, 256))).compile().as_text()
    assert "f32[32,256]" in program


@pytest.fixture
def the_form_of_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU is needed to see that its form gives the same."""

    def by_platform(arrays: Any, *, default: Any, cpu: Any, gpu: Any) -> Any:
        return (gpu or default)(list(arrays))

    monkeypatch.setattr(_range, "by_platform", by_platform)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("the_form_of_gpus")
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("bfloat16", "complex64")),
    ],
)
def test_each_of_the_small_leaves_that_share_a_sum_has_its_own_norm(dtype: str) -> None:
    def leaf(scale: float, *shape: int) -> Any:
        return jnp.asarray(scale * np.arange(1, 1 + math.prod(shape)).reshape(shape), dtype)

    scales = (1.0, 1e20, 1e-30, 0.0, math.nan, math.inf, 3.0)
    # Stacks of leaves that do not follow each other, one alone, and one that is too large.
    tree = [leaf(scale, *shape) for scale in scales for shape in ((2, 3), (5,), (3, 2))]
    tree += [leaf(2.0, 4, 4), leaf(1.0, 150, 150)]
    rows = [np.asarray(each, np.complex128) for each in tree]

    def compare(norms: Any, expected: Any) -> None:
        for norm, value in zip(norms, expected, strict=True):
            np.testing.assert_allclose(np.asarray(norm), value, rtol=3e-6)

    with np.errstate(invalid="ignore"):
        sizes = [np.linalg.norm(row) for row in rows]
        roots = [math.sqrt(row.size) for row in rows]
        compare(clipax.leaf_norm(tree), sizes)
        compare(clipax.norms.block_rms(tree), np.divide(sizes, roots))
        compare(clipax.leaf_norm(tree, ord=math.inf), [np.max(abs(row)) for row in rows])
        units = [np.linalg.norm(row, axis=0, keepdims=row.ndim > 1) for row in rows]
        compare(clipax.unit_norm(tree), units)


@pytest.mark.parametrize("ord", [0, -1, math.nan, True, "2", 1j])
def test_a_bad_order_is_named(ord: Any) -> None:
    for norm in (clipax.global_norm, clipax.leaf_norm, clipax.unit_norm):
        with pytest.raises(ValueError, match="ord must be a number > 0"):
            norm(jnp.ones(2), ord)


def test_bad_axes_are_named() -> None:
    leaf = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has no axis 2"):
        clipax.leaf_norm(leaf, axes=2)
    with pytest.raises(ValueError, match=r"must be an integer, got 0\.5"):
        clipax.unit_norm(leaf, unit_axis=0.5)
    with pytest.raises(ValueError, match="either axes or stack_axis"):
        clipax.leaf_norm(leaf, axes=0, stack_axis=1)
    with pytest.raises(ValueError, match="axes must be one value or a tree prefix"):
        clipax.leaf_norm(leaf, axes={"v": 0})
    with pytest.raises(ValueError, match=r"static_args=\('unit_axis',\)"):
        clipax.unit_norm(leaf, unit_axis=jnp.array(0))


@pytest.mark.parametrize("p", [1.3, 2.0, 2.5])
def test_derivatives_where_entries_are_zero(p: float) -> None:
    x, direction = jnp.array([3.0, 0.0, -4.0, 0.0]), jnp.array([1.0, 5.0, 2.0, -7.0])
    norm = functools.partial(clipax.global_norm, ord=p)
    powers = np.array([3.0, 0, 4, 0]) ** (p - 1) * np.sign(x)
    slope = powers * float(norm(x)) ** (1 - p)
    np.testing.assert_allclose(jax.grad(norm)(x), slope, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(norm, (x,), (direction,))[1], slope @ direction, rtol=1e-6)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("size", [1e20, 1e25, 1e-25, 1.0])
@pytest.mark.parametrize("length", [2, 20_000])
def test_second_derivatives_far_from_one(size: float, length: int) -> None:
    @jax.hessian
    def curvature(pair: Any) -> Any:
        return clipax.leaf_norm(jnp.zeros(length).at[:2].set(pair))

    expected = np.array([[1, -1], [-1, 1]]) / 8**0.5
    found = curvature(jnp.full(2, size))
    np.testing.assert_allclose(found * size, expected, rtol=1e-5)
