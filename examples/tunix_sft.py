"""Tunix.

`PeftTrainer` takes an Optax chain and keeps it as an `nnx.Optimizer`. A training hook reads its
metrics after each step. The trainer logs a norm of its own, which is the one before clipping.
"""

try:
    from tunix.sft import hooks, peft_trainer
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install google-tunix") from None

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import clipax

x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]


class Report(hooks.TrainingHooks):
    def on_train_step_end(self, trainer, step, loss):
        if step % 50 == 1:
            metrics = clipax.metrics(nnx.as_pure(trainer.optimizer.opt_state))
            print(f"step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")

    def nothing(self, *args):
        pass

    on_train_start = on_train_end = on_train_step_start = nothing
    on_eval_step_start = on_eval_step_end = nothing


rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(2, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 1, rngs=rngs))
optimizer = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2))
config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, pbar_description=None)
trainer = peft_trainer.PeftTrainer(model, optimizer, config)
trainer = trainer.with_loss_fn(lambda model, x, y: jnp.mean((model(x) - y) ** 2))
trainer.with_training_hooks(Report())
trainer.train([{"x": x, "y": y}] * 201)
