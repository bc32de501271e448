"""Haiku.

Parameters are a dict of dicts, so nothing is special: the optimizer is any Optax chain.
"""

try:
    import haiku as hk
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]

model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 1])(x)))
params = model.init(jax.random.key(1), x)
optimizer = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2))
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, opt_state, x, y):
    def loss_fn(params):
        return jnp.mean((model.apply(params, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, clipax.metrics(opt_state)


for step in range(301):
    params, opt_state, loss, metrics = train_step(params, opt_state, x, y)
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")
