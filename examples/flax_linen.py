"""Flax Linen.

`TrainState` takes any Optax chain as `tx` and keeps its state in `opt_state`, where
`clipax.metrics` reads it.
"""

try:
    from flax import linen as nn
    from flax.training.train_state import TrainState
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]

model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(1)])
state = TrainState.create(
    apply_fn=model.apply,
    params=model.init(jax.random.key(1), x),
    tx=optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2)),
)


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        return jnp.mean((state.apply_fn(params, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads)
    return state, loss, clipax.metrics(state.opt_state)


for step in range(301):
    state, loss, metrics = train_step(state, x, y)
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")
