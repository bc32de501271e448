"""Diffrax.

Gradients through the solution of a differential equation grow with the time that it covers.
Here the two numbers of a damped oscillator are found from its path, and `skip_step` leaves out
steps whose gradients are not finite, as after a solve that diverged.
"""

try:
    import diffrax
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

times = jnp.linspace(0.0, 10.0, 50)


def path(params):
    def field(_, state, params):
        position, speed = state
        return speed, -params["stiffness"] * position - params["damping"] * speed

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=0.1,
        y0=(jnp.array(1.0), jnp.array(0.0)),
        args=params,
        saveat=diffrax.SaveAt(ts=times),
    )
    return solution.ys[0]


seen = path({"stiffness": jnp.array(2.0), "damping": jnp.array(0.3)})
params = {"stiffness": jnp.array(1.0), "damping": jnp.array(1.0)}
clip = clipax.clip_by_global_norm(1.0)
optimizer = clipax.skip_step(optax.chain(clip, optax.adam(1e-2)))
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, opt_state):
    loss, grads = jax.value_and_grad(lambda p: jnp.sum((path(p) - seen) ** 2))(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, clipax.metrics(opt_state)


for step in range(201):
    params, opt_state, loss, metrics = train_step(params, opt_state)
    if step % 50 == 0:
        skipped = metrics["skipped"]
        print(f"step {step}: loss {loss:.5f}, norm {metrics['norm']:.3f}, skipped {skipped}")
