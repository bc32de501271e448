"""kauldron.

`kd.train.Trainer` takes an Optax chain as `optimizer`. A metric whose key is `opt_state` reads
the state in each step, before its update. `trainer.train()` logs it beside the losses, to
TensorBoard by default. The loop below is what it runs, and prints them.
"""

try:
    from kauldron import kd
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install kauldron") from None

import dataclasses

import flax
import numpy as np
import optax

import clipax

x = np.random.default_rng(0).uniform(-1, 1, (256, 2)).astype(np.float32)
y = 10 * np.sin(3 * x[:, :1]) * x[:, 1:]


class Model(flax.linen.Module):
    x: kd.kontext.Key = "batch.x"

    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(1)(flax.linen.relu(flax.linen.Dense(32)(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm(kd.metrics.Metric):
    opt_state: kd.kontext.Key = "opt_state"

    @flax.struct.dataclass
    class State(kd.metrics.AverageState):
        pass

    def get_state(self, opt_state):
        return self.State.from_values(clipax.metrics(opt_state)["norm"])


trainer = kd.train.Trainer(
    train_ds=kd.data.InMemoryPipeline(loader=lambda: {"x": x, "y": y}, batch_size=256),
    model=Model(),
    train_losses={"l2": kd.losses.L2(preds="preds", targets="batch.y")},
    train_metrics={"norm": Norm()},
    optimizer=optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-2)),
)
state = trainer.init_state()
for step, batch in zip(range(301), trainer.train_ds, strict=False):
    state, aux = trainer.trainstep.step(state, batch, return_losses=True, return_metrics=True)
    if step % 100 == 1:
        values = aux.compute()
        loss, norm = values.loss_values["losses/l2"], values.metric_values["metrics/norm"]
        print(f"step {step}: loss {loss:.3f}, norm {norm:.3f}")
