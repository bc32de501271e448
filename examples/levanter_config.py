"""Levanter.

Levanter builds its optimizer from a registered `OptimizerConfig`. The one below is Levanter's
Adam with its own clip turned off and `zclip` before it; in a config file of a run it is
`optimizer: {type: clipped_adam}`. The `TrainerState` that Levanter's `Trainer` trains with
keeps the state.
"""

import dataclasses

try:
    import haliax as hax
    from levanter.optim import AdamConfig, OptimizerConfig
    from levanter.trainer_state import TrainerState
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install --pre marin-levanter gitpython") from None

import equinox as eqx
import jax
import optax

import clipax


@OptimizerConfig.register_subclass("clipped_adam")
@dataclasses.dataclass(frozen=True)
class ClippedAdam(AdamConfig):
    max_grad_norm: float | None = None
    z_max: float = 2.5

    def build(self, num_train_steps):
        clip = clipax.zclip(max_norm=None, z_max=self.z_max)
        return optax.chain(clip, super().build(num_train_steps))


Batch, In, Out = hax.Axis("batch", 256), hax.Axis("in", 2), hax.Axis("out", 1)
x = hax.random.uniform(jax.random.key(0), (Batch, In), minval=-1, maxval=1)
y = 10 * hax.sin(3 * x["in", 0]) * x["in", 1]

model = hax.nn.MLP.init(In, Out, 32, 2, key=jax.random.key(1))
optimizer = ClippedAdam(learning_rate=1e-2, weight_decay=0.0, warmup=0).build(301)
state = TrainerState.init(optimizer, model, key=jax.random.key(2))


@eqx.filter_jit
def train_step(state):
    def loss_fn(model):
        return hax.mean((model(x)["out", 0] - y) ** 2).scalar()

    loss, grads = eqx.filter_value_and_grad(loss_fn)(state.model)
    state, _ = state.take_step(grads, loss=loss, key=state.training_key)
    return state, loss, clipax.metrics(state.opt_state)


for step in range(301):
    state, loss, metrics = train_step(state)
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}, norm {metrics['norm']:.3f}")
