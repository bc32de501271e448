"""Orbax.

The state of a clip is part of the optimizer's state. If a checkpoint holds both, a run that is
resumed goes on bit for bit, its bound included. `zclip` remembers the norms that it has seen.
"""

import pathlib
import tempfile

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]
optimizer = optax.chain(clipax.zclip(max_norm=None, warmup_steps=10), optax.adam(1e-2))


@jax.jit
def train_step(params, opt_state):
    def loss_fn(params):
        return jnp.mean((jax.nn.relu(x @ params["hidden"]) @ params["out"] - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def train(params, opt_state, steps):
    for step in steps:
        params, opt_state, loss = train_step(params, opt_state)
        if step % 100 == 0:
            bound = clipax.metrics(opt_state)["max_norm"]
            print(f"step {step}: loss {loss:.3f}, max_norm {bound:.4f}")
    return params, opt_state


params = {"hidden": jax.random.normal(jax.random.key(1), (2, 32)), "out": jnp.zeros((32, 1))}
params, opt_state = train(params, optimizer.init(params), range(150))
path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {"params": params, "opt_state": opt_state})

through = train(params, opt_state, range(150, 301))
with ocp.StandardCheckpointer() as checkpointer:
    like = jax.eval_shape(lambda: {"params": params, "opt_state": opt_state})
    saved = checkpointer.restore(path, like)
resumed = train(saved["params"], saved["opt_state"], range(150, 301))
is_same = jax.tree.map(lambda one, other: bool((one == other).all()), through, resumed)
print(f"resumed bit for bit: {all(jax.tree.leaves(is_same))}")
