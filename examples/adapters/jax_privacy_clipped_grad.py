"""`clipped_grad` with the signature of jax_privacy 2.0, and clipax behind it.

Where a program has `jax_privacy.clipped_grad`, this function gives the same sums, and makes a
gradient for each example only where it has to. Noise, accountant, sampling and training loop stay
those of jax_privacy:

    pip install clipax jax-privacy scikit-learn
    python examples/adapters/jax_privacy_clipped_grad.py

Three things differ. With `nan_safe`, an example with a NaN is left out whole, where jax_privacy
sets its NaNs to zero and keeps the rest. A sum over parameters in bfloat16 is in float32, unless
`dtype` says otherwise. `pre_clipping_transform` and `spmd_axis_name` are refused.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy import batch_selection
from jax_privacy.clipping import AuxiliaryOutput, BoundedSensitivityCallable
from jax_privacy.experimental import execution_plan
from sklearn import datasets

import clipax


def clipped_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: float,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[Any], Any] | None = None,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: str | None = None,
) -> BoundedSensitivityCallable:
    """As `jax_privacy.clipped_grad`, whose arguments and results it has."""
    for name, value in {
        "pre_clipping_transform": pre_clipping_transform,
        "spmd_axis_name": spmd_axis_name,
    }.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None, because clipax has no such step, got {value!r}."
            )
    batched = {batch_argnums} if isinstance(batch_argnums, int) else set(batch_argnums)

    def loss_fn(*args: Any, **named: Any) -> Any:
        def one_batch(place: int, arg: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[None], arg) if place in batched else arg

        if keep_batch_dim:
            args = tuple(one_batch(place, arg) for place, arg in enumerate(args))
        returned = fun(*args, **named)
        loss, aux = returned if has_aux else (returned, None)
        return loss, _without_batch_axis(aux) if keep_batch_dim else aux

    options = {
        "argnums": argnums,
        "batch_argnums": tuple(batched),
        "has_aux": True,
        "normalize_by": normalize_by,
        "dtype": dtype,
        "prng_argnum": prng_argnum,
        "skip_nonfinite": nan_safe,
        "microbatch_size": microbatch_size,
        "coefficient": _to_unit_norm if rescale_to_unit_norm else clipax.coefficients.hard,
    }

    def grad_fn(*args: Any, is_padding_example: Any = None, **named: Any) -> Any:
        # jax_privacy has examples along the first axis of every keyword argument.
        find = clipax.clipped_grad(loss_fn, l2_clip_norm, batch_argnames=tuple(named), **options)
        mask = None if is_padding_example is None else ~jnp.asarray(is_padding_example)
        grads, info = find(*args, mask=mask, **named)
        if not (has_aux or return_values or return_grad_norms):
            return grads
        return grads, AuxiliaryOutput(
            values=info.losses if return_values else None,
            grad_norms=info.norms if return_grad_norms else None,
            aux=info.aux if has_aux else None,
        )

    bound = 1.0 if rescale_to_unit_norm else l2_clip_norm
    limit = clipax.per_example.sensitivity(bound, normalize_by=normalize_by)
    has_more = has_aux or return_values or return_grad_norms
    return BoundedSensitivityCallable(grad_fn, limit, has_more)


def _to_unit_norm(norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    inverse = 1 / jnp.where(max_norm > 0, max_norm, 1)
    clipped = clipax.coefficients.hard(norm, max_norm) * inverse
    normalized = clipax.coefficients.normalized(norm, jnp.ones_like(max_norm))
    return jnp.where(max_norm > 0, clipped, normalized)


def _without_batch_axis(aux: Any) -> Any:
    """Drops the axis of the one example that `fun` saw, where a leaf of aux begins with it."""
    return jax.tree.map(lambda leaf: leaf[0] if jnp.shape(leaf)[:1] == (1,) else leaf, aux)


# A training run with the parts of jax_privacy, on data that ships with scikit-learn.


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Standardized inputs, and labels."""
    inputs, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    inputs = (inputs - inputs.mean(0)) / np.maximum(inputs.std(0), 1e-6)
    return inputs.astype(np.float32), labels.astype(np.int32)


def init_params(inputs: int, classes: int, hidden: int = 32) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    normal = jax.nn.initializers.lecun_normal()
    return {
        "hidden": normal(keys[0], (inputs, hidden)),
        "bias": jnp.zeros(hidden),
        "out": normal(keys[1], (hidden, classes)),
    }


def predict(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    return jnp.tanh(inputs @ params["hidden"] + params["bias"]) @ params["out"]


def mean_loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The loss of a batch. jax_privacy calls it with batches of one example."""
    inputs, labels = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, inputs), labels)
    return losses.mean()


def make_config(examples: int, iterations: int, batch_size: int) -> Any:
    """DP-SGD of jax_privacy: its sampling, noise and accountant for one epsilon and delta."""
    return execution_plan.BandMFExecutionPlanConfig(
        iterations=iterations,
        strategy=np.ones(1),
        epsilon=3.0,
        delta=1e-4,
        sampling_prob=batch_size / examples,
        l2_clip_norm=1.0,
        rescale_to_unit_norm=False,
        normalize_by=float(batch_size),
        noise_seed=0,
    )


def plan_with_clipax(config: Any) -> Any:
    """The plan of a configuration, with the `clipped_grad` above in place of its own."""
    ours = functools.partial(
        clipped_grad,
        l2_clip_norm=config.l2_clip_norm,
        rescale_to_unit_norm=config.rescale_to_unit_norm,
        normalize_by=config.normalize_by,
        dtype=config.dtype,
    )
    return dataclasses.replace(config.plan, clipped_grad=ours)


def train(plan: Any, inputs: np.ndarray, labels: np.ndarray) -> tuple[Any, list[Any]]:
    """Trains on Poisson batches with padding, and keeps the parameters after each step."""
    noise, optimizer = plan.noise_addition_transform, optax.sgd(0.5, momentum=0.9)
    params = init_params(inputs.shape[1], int(labels.max()) + 1)
    states = noise.init(params), optimizer.init(params)
    grad_fn = plan.clipped_grad(mean_loss)

    @jax.jit
    def step(params: Any, states: Any, batch: Any, is_padding: jax.Array) -> Any:
        grads = grad_fn(params, batch, is_padding_example=is_padding)
        noisy, noise_state = noise.update(grads, states[0])
        updates, opt_state = optimizer.update(noisy, states[1], params)
        return optax.apply_updates(params, updates), (noise_state, opt_state)

    history = []
    for drawn in plan.batch_selection_strategy.batch_iterator(len(labels), rng=0):
        padded = batch_selection.pad_to_multiple_of(drawn, 64)
        params, states = step(params, states, (inputs[padded], labels[padded]), padded == -1)
        history.append(params)
    return params, history


def main() -> None:
    for name in ("digits", "breast_cancer"):
        inputs, labels = load(name)
        config = make_config(len(labels) * 4 // 5, iterations=100, batch_size=128)
        train_part, test_part = np.split(np.arange(len(labels)), [len(labels) * 4 // 5])
        params, _ = train(plan_with_clipax(config), inputs[train_part], labels[train_part])
        predicted = predict(params, inputs[test_part]).argmax(1)
        accuracy = np.mean(predicted == labels[test_part])
        print(f"{name}: epsilon {config.epsilon:g}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
