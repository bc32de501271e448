"""Optax's contrib optimizers.

A clip goes before an optimizer in a chain. If the optimizer is a wrapper, such as
`schedule_free`, the clip goes inside the wrapper, before what it wraps. `metrics` finds the
state in both places.
"""

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import clipax

clip = clipax.clip_by_global_norm(1.0)
OPTIMIZERS = {
    "muon": optax.chain(clip, optax.contrib.muon(0.02)),
    "prodigy": optax.chain(clip, optax.contrib.prodigy()),
    "ademamix": optax.chain(clip, optax.contrib.ademamix(1e-2)),
    "schedule_free": optax.contrib.schedule_free(
        optax.chain(clip, optax.adam(2e-2, b1=0.0)), learning_rate=2e-2
    ),
}
x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]


def loss_fn(params):
    return jnp.mean((jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"] - y) ** 2)


def train(name, optimizer):
    keys = jax.random.split(jax.random.key(1))
    hidden, out = jax.random.normal(keys[0], (2, 32)), jax.random.normal(keys[1], (32, 1)) / 6
    params = {"hidden": hidden, "bias": jnp.zeros(32), "out": out}
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, clipax.metrics(opt_state)

    for step in range(301):
        params, opt_state, loss, metrics = train_step(params, opt_state)
        if step % 100 == 0:
            print(f"{name}, step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")


for name, optimizer in OPTIMIZERS.items():
    train(name, optimizer)
