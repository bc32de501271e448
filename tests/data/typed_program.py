"""A user's program with types, which `tests/test_types.py` checks and runs."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import clipax
from clipax import coefficients, norms, states, thresholds, units

Params = dict[str, jax.Array]


def half_of_leaf(path: str, leaf: jax.Array) -> bool:
    return leaf.ndim > 1 and not path.startswith("head")


def gentle(norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    return coefficients.hard(norm, 2 * max_norm)


def loss_fn(params: Params, example: jax.Array) -> jax.Array:
    return jnp.sum(params["w"] @ example)


def methods() -> list[optax.GradientTransformationExtraArgs]:
    return [
        clipax.clip_by_global_norm(1.0, mask=half_of_leaf),
        clipax.clip_by_leaf_norm({"w": 1.0}),
        clipax.clip_by_unit_norm(optax.constant_schedule(1.0), unit_axis=units.output_last),
        clipax.adaptive_grad_clip(0.01),
        clipax.autoclip(0.9, norm=clipax.leaf_norm),
        clipax.zclip(max_norm=None, spike_bound=thresholds.mean_bound),
        clipax.clip_by(norms.global_norm, optax.chain(optax.ema(0.9), optax.scale(1.5)), gentle),
        clipax.clip_by(clipax.leaf_norm, thresholds.fixed(1.0)),
        clipax.track(clipax.clip_by_value(0.5), groups=["w"]),
        clipax.observe(clipax.u_clip(clipax.clip(1.0), max_carry=1.0)),
    ]


def train(params: Params, batch: jax.Array) -> Params:
    optimizer = clipax.skip_step(optax.chain(*methods(), optax.sgd(1e-3)), z_max=6.0)
    opt_state = optimizer.init(params)

    def mean_loss(params: Params) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch))

    for _ in range(3):
        grads = jax.grad(mean_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        clipax.check_finite(params, "params")
        clipax.check_not_stuck(opt_state, max_consecutive=2)
    metrics = clipax.metrics(opt_state, per_leaf=True)
    assert_type(metrics, dict[str, jax.Array])
    assert_type(clipax.as_floats(metrics, prefix="train/"), dict[str, float])
    return params


def clip_each_example(params: Params, batch: jax.Array) -> jax.Array:
    grad_fn = clipax.clipped_grad(loss_fn, 1.0, coefficient=coefficients.auto_s())
    grads, info = grad_fn(params, batch)
    assert_type(info, clipax.per_example.PerExampleInfo)
    assert_type(info.losses, jax.Array)
    clipped, metrics = clipax.clip_tree(grads, clipax.clip_by_global_norm(1.0))
    assert_type(metrics["norm"], jax.Array)
    assert_type(clipax.global_norm(clipped), jax.Array)
    return info.losses


def ask(logged: npt.NDArray[np.float64]) -> str:
    advice = clipax.advise(logged, max_norm=1.0)
    assert_type(advice, clipax.advice.Advice)
    replay = clipax.replay(clipax.autoclip(0.9), logged)
    assert_type(replay.is_skipped, jax.Array)
    return advice.recommendations[0].code


def bound(state: states.ClipState) -> float:
    return float(state.max_norm)


if __name__ == "__main__":
    start = {"w": jnp.ones((2, 3))}
    trained = train(start, jnp.ones((4, 3)))
    assert trained["w"].shape == (2, 3)
    assert clip_each_example(trained, jnp.ones((4, 3))).shape == (4,)
    assert ask(np.linspace(1.0, 2.0, 50)).startswith("optimizer = ")
