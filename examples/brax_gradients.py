"""Brax.

No agent of Brax takes an optimizer. `brax.training.agents.ppo.train.train` makes its Adam itself,
with `optax.clip_by_global_norm` before it if `max_grad_norm` is given; `apg` has a clip of 1.0
for each entry; `sac` and `es` clip nothing. To put another clip there, change the line
`optimizer = ...` in a copy of that `train.py`. A loop of your own hands any Optax chain to
`brax.training.gradients.gradient_update_fn`. Below, a policy learns to hold a pole by gradients
through the simulation, which can explode.
"""

try:
    from brax import envs
    from brax.training import gradients
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install brax") from None

import jax
import jax.numpy as jnp
import optax

import clipax

env = envs.create("inverted_pendulum", backend="spring", auto_reset=False)


def loss_fn(params, key):
    """How far the pole and the cart move in the first steps."""

    def step(state, _):
        hidden = jnp.tanh(state.obs @ params["hidden"])
        state = env.step(state, hidden @ params["out"])
        return state, jnp.sum(state.obs**2)

    return jnp.mean(jax.lax.scan(step, env.reset(key), length=10)[1])


optimizer = optax.chain(clipax.clip_by_global_norm(0.1), optax.adam(1e-2))
update = jax.jit(gradients.gradient_update_fn(loss_fn, optimizer, pmap_axis_name=None))
keys = jax.random.split(jax.random.key(0))
params = {
    "hidden": jax.random.normal(keys[0], (env.observation_size, 16)),
    "out": jax.random.normal(keys[1], (16, env.action_size)),
}
opt_state = optimizer.init(params)
for step in range(61):
    loss, params, opt_state = update(params, keys[0], optimizer_state=opt_state)
    if step % 20 == 0:
        print(f"step {step}: loss {loss:.4f}, norm {clipax.metrics(opt_state)['norm']:.4f}")
