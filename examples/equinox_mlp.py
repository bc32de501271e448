"""Equinox.

The model is a pytree, and its arrays are the parameters: `eqx.filter(model, eqx.is_array)`.
Methods that look at parameters, such as `adaptive_grad_clip`, get them the same way. In
Equinox the first axis of a kernel numbers the outputs, which `unit_axis` says.
"""

try:
    import equinox as eqx
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]

model = eqx.nn.MLP(in_size=2, out_size=1, width_size=32, depth=1, key=jax.random.key(1))
clip = clipax.adaptive_grad_clip(0.1, unit_axis=clipax.units.output_first)
optimizer = optax.chain(clip, optax.adam(1e-2))
opt_state = optimizer.init(eqx.filter(model, eqx.is_array))


@eqx.filter_jit
def train_step(model, opt_state, x, y):
    def loss_fn(model):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    params = eqx.filter(model, eqx.is_array)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss, clipax.metrics(opt_state)


for step in range(301):
    model, opt_state, loss, metrics = train_step(model, opt_state, x, y)
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}, clip_fraction {metrics['clip_fraction']:.3f}")
