"""jax_privacy's own noise, accountant, sampling and trainers on clipax, step by step as before."""

import importlib.util
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax_privacy = pytest.importorskip("jax_privacy", reason="needs the package jax-privacy")
datasets = pytest.importorskip("sklearn.datasets", reason="needs the package scikit-learn")

PATH = (
    pathlib.Path(__file__).resolve().parent.parent
    / "examples/adapters/jax_privacy_clipped_grad.py"
)
TASKS = ("digits", "breast_cancer")
# Some of what their code calls is deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _users_settings() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PATH.stem] = module
    spec.loader.exec_module(module)
    return module


def assert_near(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        atol = tolerance * np.max(np.abs(other), initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("task", TASKS)
def test_every_step_of_private_training_is_the_same(example: Any, task: str) -> None:
    inputs, labels = example.load(task)
    config = example.make_config(len(labels), iterations=30, batch_size=128)
    # Both plans draw the same batches and the same noise.
    params, ours = example.train(example.plan_with_clipax(config), inputs, labels)
    _, theirs = example.train(config.plan, inputs, labels)
    assert len(ours) == len(theirs) == 30
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other)
    predicted = example.predict(params, inputs).argmax(1)
    assert np.mean(predicted == labels) > 0.7


@pytest.mark.parametrize("task", TASKS)
def test_their_privatizer_takes_the_sensitivity(example: Any, task: str) -> None:
    inputs, labels = example.load(task)
    params = example.init_params(inputs.shape[1], int(labels.max()) + 1)
    options = {"l2_clip_norm": 0.5, "normalize_by": 64.0}
    for neighbours in type(example.make_config(100, 10, 10).accountant.neighboring_relation):
        ours, theirs = (
            make(example.mean_loss, **options)
            for make in (example.clipped_grad, jax_privacy.clipped_grad)
        )
        assert ours.sensitivity(neighbours) == theirs.sensitivity(neighbours)
    privatizer = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=1.1 * ours.sensitivity(), prng_key=jax.random.key(0)
    )
    grads = ours(params, (inputs[:64], labels[:64]))
    wanted = theirs(params, (inputs[:64], labels[:64]))
    noisy, _ = privatizer.update(grads, privatizer.init(params))
    noisy_too, _ = privatizer.update(wanted, privatizer.init(params))
    assert_near(noisy, noisy_too)


def loss(params: Any, x: jax.Array, y: jax.Array, key: Any = None, *, size: Any = None) -> Any:
    """A loss of a batch of one, or of one example."""
    hidden = jnp.tanh(x @ params["w"])
    if key is not None:
        hidden *= jax.random.bernoulli(key, 0.5, hidden.shape)
    value = jnp.mean((hidden @ params["v"] - y) ** 2)
    return value if size is None else value * size


def with_aux(*args: Any) -> Any:
    return loss(*args), {"x": args[1], "square": jnp.sum(args[1] ** 2)}


RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(12, 6)) * RNG.lognormal(size=(12, 1)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(12, 2)), jnp.float32)
IS_PADDING = np.arange(12) >= 8
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rescaled": {"rescale_to_unit_norm": True},
    "rescaled to a bound of zero": {"rescale_to_unit_norm": True, "l2_clip_norm": 0.0},
    "rescaled without a bound": {"rescale_to_unit_norm": True, "l2_clip_norm": math.inf},
    "bound of zero": {"l2_clip_norm": 0.0},
    "divided": {"normalize_by": 5.0},
    "one example": {"keep_batch_dim": False},
    "microbatches": {"microbatch_size": 4},
    "values and norms": {"return_values": True, "return_grad_norms": True},
    "two arguments": {"argnums": (0,)},
    "not safe": {"nan_safe": False},
    "dtype": {"dtype": jnp.float32},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("padding", [False, True])
def test_every_option_gives_what_theirs_gives(example: Any, name: str, padding: bool) -> None:
    options = {"l2_clip_norm": 0.5, "batch_argnums": (1, 2)} | OPTIONS[name]
    named = {"is_padding_example": IS_PADDING} if padding else {}
    ours = example.clipped_grad(loss, **options)
    theirs = jax_privacy.clipped_grad(loss, **options)
    assert_near(ours(PARAMS, X, Y, **named), theirs(PARAMS, X, Y, **named))
    assert ours.has_aux == theirs.has_aux
    assert ours.l2_norm_bound == pytest.approx(theirs.l2_norm_bound)


@pytest.mark.parametrize("keep_batch_dim", [True, False])
def test_aux_keys_and_keywords_are_as_theirs(example: Any, keep_batch_dim: bool) -> None:
    both = example.clipped_grad, jax_privacy.clipped_grad
    options = {"l2_clip_norm": 0.5, "batch_argnums": (1, 2), "keep_batch_dim": keep_batch_dim}
    assert_near(*(make(with_aux, has_aux=True, **options)(PARAMS, X, Y) for make in both))
    key = jax.random.key(7)
    assert_near(*(make(loss, prng_argnum=3, **options)(PARAMS, X, Y, key) for make in both))
    sizes = jnp.arange(12.0)
    assert_near(*(make(loss, **options)(PARAMS, X, Y, size=sizes) for make in both))


def test_an_example_with_a_nan_is_left_out_whole(example: Any) -> None:
    options = {"l2_clip_norm": 0.5, "batch_argnums": (1, 2)}
    grad_fn = example.clipped_grad(loss, **options)
    without = grad_fn(PARAMS, X, Y, is_padding_example=np.arange(12) == 3)
    assert_near(grad_fn(PARAMS, X.at[3, 2].set(math.nan), Y), without)


@pytest.mark.parametrize("name", ["pre_clipping_transform", "spmd_axis_name"])
def test_what_clipax_does_not_have_is_refused(example: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be None, .* got 'data'"):
        example.clipped_grad(loss, l2_clip_norm=1.0, **{name: "data"})


@pytest.mark.parametrize("task", TASKS)
def test_their_keras_trainer_takes_the_same_steps(
    example: Any, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="needs the package keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend than jax")
    from jax_privacy import keras_api

    inputs, labels = example.load(task)
    inputs, labels = inputs[:512], labels[:512]
    config = keras_api.DPKerasConfig(
        epsilon=3.0,
        delta=1e-4,
        clipping_norm=1.0,
        batch_size=64,
        gradient_accumulation_steps=1,
        train_steps=8,
        train_size=512,
        poisson_sampling_in_fit=True,
        noise_multiplier=1.0,
        seed=0,
    )

    def weights_after_training() -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        layers = [
            keras.layers.Input((inputs.shape[1],)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(int(labels.max()) + 1),
        ]
        model = keras_api.make_private(keras.Sequential(layers), config)
        model.compile(
            optimizer=keras.optimizers.SGD(0.5),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(inputs, labels, batch_size=64, epochs=1, shuffle=False, verbose=0)
        return [np.asarray(weight) for weight in model.get_weights()]

    theirs = weights_after_training()
    calls = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return example.clipped_grad(*args, **options)

    monkeypatch.setattr(jax_privacy, "clipped_grad", counted)
    ours = weights_after_training()
    assert calls
    assert_near(ours[:4], theirs[:4])
