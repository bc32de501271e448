"""Flax NNX.

`nnx.Optimizer` takes any Optax chain. `nnx.as_pure` turns its state into plain arrays, which
`clipax.metrics` reads, under `nnx.jit` too.
"""

try:
    from flax import nnx
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]

rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(2, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 1, rngs=rngs))
clipped_adam = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2))
optimizer = nnx.Optimizer(model, clipped_adam, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss, clipax.metrics(nnx.as_pure(optimizer.opt_state))


for step in range(301):
    loss, metrics = train_step(model, optimizer, x, y)
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")
