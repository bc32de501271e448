"""NetKet, complex parameters.

Parameters and gradients are complex here. clipax measures their moduli, and its real factor
keeps their direction in the complex plane. The driver `netket.driver.VMC` takes the same chain,
but offers no way to its state. The loop below reads the metrics.
"""

try:
    import netket as nk
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import optax

import clipax

hilbert = nk.hilbert.Spin(0.5, 10)
hamiltonian = nk.operator.IsingJax(hilbert, nk.graph.Chain(10), h=1.0)
model = nk.models.RBM(alpha=1, param_dtype=complex)
sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=16)
state = nk.vqs.MCState(sampler, model, n_samples=512, seed=0, sampler_seed=1)

optimizer = optax.chain(clipax.clip_by_global_norm(0.5), optax.sgd(0.05))
opt_state = optimizer.init(state.parameters)
update = jax.jit(optimizer.update)
for step in range(101):
    energy, grads = state.expect_and_grad(hamiltonian)
    updates, opt_state = update(grads, opt_state, state.parameters)
    state.parameters = optax.apply_updates(state.parameters, updates)
    if step % 25 == 0:
        metrics = clipax.metrics(opt_state)
        print(f"step {step}: loss {energy.mean.real:.3f}, norm {metrics['norm']:.3f}")
