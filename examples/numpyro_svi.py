"""NumPyro, stochastic variational inference.

`SVI` takes an Optax chain as its optimizer. The gradients of an ELBO are estimates, and a few of
them are far larger than the others, so a bound that follows their quantile fits here.
"""

try:
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp
import optax

import clipax

x = jax.random.normal(jax.random.key(0), (200, 3))
y = x @ jnp.array([1.0, -2.0, 0.5]) + 0.1 * jax.random.normal(jax.random.key(1), (200,))


def model(x, y):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, scale), obs=y)


optimizer = optax.chain(clipax.clip_by_quantile(0.9), optax.adam(5e-2))
svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())
state = svi.init(jax.random.key(2), x, y)
update = jax.jit(svi.update)
for step in range(1001):
    state, loss = update(state, x, y)
    if step % 250 == 0:
        metrics = clipax.metrics(state.optim_state)
        norm, bound = metrics["norm"], metrics["max_norm"]
        print(f"step {step}: loss {loss:.1f}, norm {norm:.1f}, max_norm {bound:.1f}")
print("weights:", svi.get_params(state)["weights_auto_loc"])
