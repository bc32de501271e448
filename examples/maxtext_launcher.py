"""MaxText.

MaxText has no plug-in for a clip. Its training step clips by `gradient_clipping_threshold` in
`maxtext_utils.apply_gradient_clipping`, which keeps no state, and 0 turns this off. Then it takes
the Optax optimizer that `optimizers.get_optimizer` made. The launcher below wraps that function
and takes the arguments of MaxText's own `train`. The metrics come out by a callback, because the
training loop keeps the state to itself.
"""

try:
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train
except ModuleNotFoundError as missing:
    raise SystemExit(f"needs {missing.name}: pip install 'maxtext[tpu]'") from None

import sys

import jax
import optax
from absl import app

import clipax


def reporting(clip):
    def update(updates, state, params=None):
        updates, state = clip.update(updates, state, params)
        metrics = clipax.metrics(state)
        jax.debug.print("norm {}, max_norm {}", metrics["norm"], metrics["max_norm"])
        return updates, state

    return optax.GradientTransformation(clip.init, update)


make_optimizer = optimizers.get_optimizer


def get_clipped_optimizer(*args, **kwargs):
    clip = reporting(clipax.zclip(max_norm=None))
    return optax.chain(clip, make_optimizer(*args, **kwargs))


optimizers.get_optimizer = get_clipped_optimizer
app.run(train.main, argv=[*sys.argv, "gradient_clipping_threshold=0"])
