"""Keras 3, a custom loop.

On JAX, `stateless_call` makes a Keras model a function of its variables. The gradients are then
a list of arrays, which an Optax chain takes as it takes any tree.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
try:
    import keras
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1)])
model.build(x.shape)
optimizer = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2))
params = [variable.value for variable in model.trainable_variables]
others = [variable.value for variable in model.non_trainable_variables]
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, others, opt_state, x, y):
    def loss_fn(params):
        predicted, new_others = model.stateless_call(params, others, x, training=True)
        return jnp.mean((predicted - y) ** 2), new_others

    (loss, others), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, others, opt_state, loss, clipax.metrics(opt_state)


for step in range(301):
    params, others, opt_state, loss, metrics = train_step(params, others, opt_state, x, y)
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")
for variable, value in zip(model.trainable_variables, params, strict=True):
    variable.assign(value)
