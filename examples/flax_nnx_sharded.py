"""Flax NNX, sharded.

`nnx.with_partitioning` names the mesh axis that shards a parameter, and the state of the
optimizer follows. The norms of clipax are scalars and stay on all devices. Under `nnx.jit`,
the norm is that of the whole gradient, wherever its pieces are.
"""

try:
    from flax import nnx
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

import clipax

jax.config.update("jax_num_cpu_devices", 8)  # to try it on a CPU
mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(AxisType.Auto,))
x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]


def sharded(*axes):
    return nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss, clipax.metrics(nnx.as_pure(optimizer.opt_state))


with jax.set_mesh(mesh):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(2, 64, kernel_init=sharded(None, "model"), rngs=rngs),
        nnx.relu,
        nnx.Linear(64, 1, kernel_init=sharded("model", None), rngs=rngs),
    )
    clipped_adam = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, clipped_adam, wrt=nnx.Param)
    print(f"kernel: {model.layers[0].kernel.sharding.spec} on {jax.device_count()} devices")
    for step in range(301):
        loss, metrics = train_step(model, optimizer, x, y)
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")
