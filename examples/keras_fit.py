"""Keras 3, model.fit.

`model.fit` takes a Keras optimizer. The mixin below puts any method of clipax before one: it
keeps the state of the method in variables of the optimizer, so that Keras compiles them into
its step and saves them with the model.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
try:
    import keras
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'clipax[examples]'") from None

import jax
import jax.numpy as jnp

import clipax


class Clipped:
    def __init__(self, clip, **kwargs):
        super().__init__(**kwargs)
        self.clip = clip

    def build(self, variables):
        super().build(variables)
        state = self.clip.init([variable.value for variable in variables])
        leaves, self._structure = jax.tree.flatten(state)
        self._leaves = [self.add_variable(leaf.shape, dtype=str(leaf.dtype)) for leaf in leaves]
        self._write(leaves)

    def _write(self, leaves):
        for variable, leaf in zip(self._leaves, leaves, strict=True):
            variable.assign(leaf)

    @property
    def clip_state(self):
        leaves = [variable.value for variable in self._leaves]
        return jax.tree.unflatten(self._structure, leaves)

    def apply(self, grads, trainable_variables=None):
        params = [variable.value for variable in trainable_variables or self._trainable_variables]
        grads, state = self.clip.update(list(grads), self.clip_state, params)
        self._write(jax.tree.leaves(state))
        return super().apply(grads, trainable_variables)


class ClippedAdam(Clipped, keras.optimizers.Adam):
    pass


class Report(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs):
        metrics = clipax.metrics(self.model.optimizer.clip_state)
        print(f"epoch {epoch}: loss {logs['loss']:.3f}, norm {metrics['norm']:.3f}")


x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
y = 10 * jnp.sin(3 * x[:, :1]) * x[:, 1:]

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1)])
model.compile(ClippedAdam(clipax.clip_by_global_norm(1.0), learning_rate=1e-2), loss="mse")
model.fit(x, y, batch_size=64, epochs=20, verbose=0, callbacks=[Report()])
