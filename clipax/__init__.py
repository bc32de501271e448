"""Gradient clipping for JAX and Optax.

Every method is one equation, `u <- c * u` with `c = coefficient(norm(u), max_norm)`, and
an `optax.GradientTransformation` that chains with any optimizer:

    optimizer = optax.chain(clipax.clip_by_global_norm(1.0), optax.adam(1e-3))

* methods: `clip_by_global_norm`, `clip_by_leaf_norm`, `clip_by_unit_norm`,
  `clip_by_block_rms`, `clip_by_average_norm`, `clip_by_spectral_norm`, `clip_by_value`
  (`clip`), `adaptive_grad_clip`, `clippy`, and `measure`, which only records
* without a corner, or with a floor: `smooth_clip_by_global_norm`, `smooth_clip_by_value`,
  `delta_gclip`
* methods whose bound sets itself: `autoclip`, `clip_by_quantile`, `clip_by_mean_std`, `adagc`,
  `zclip`
* with a memory of each entry or leaf: `spam_clip`, `stable_spam`, `acclip`,
  `scale_by_stable_adam`
* around a clip, to feed back what it takes off: `u_clip`, `clip21`
* around a whole optimizer, to leave out bad steps: `skip_step`
* what happened: `metrics`, `as_floats` for loggers, `observe`, `track` and `reset_tracking`; an
  error between steps: `check_finite`, `check_not_stuck`
* which bound: `advise` recommends one from the norms that a run logged (`clipax.advice` reads
  the logs of trainers), and `replay` runs a method over them
* `plot` draws what a run recorded, or what `replay` returns
* each example's gradient by itself: `clipped_grad`, `per_example_norms`, `explain_clipped_grad`,
  `track_quantile`
* without an optimizer: `global_norm`, `clip_tree`, `clip_cotangent`
* to build your own: `clip_by` over a norm (`clipax.norms`: `global_norm`, `leaf_norm`,
  `unit_norm`, ...), a threshold (`clipax.thresholds`: `fixed`, `relative_to_params`,
  `per_norm`, or a `Threshold` of your own) and a coefficient (`clipax.coefficients`: `hard`,
  `unclipped`, the smooth `rational`, `square_root` and `tanh`, `normalized`, `auto_s`,
  `psac`); `clipax.coefficients.scale_updates` for what does not decompose
* what counts as a unit is in `clipax.units`, the states that docstrings name in
  `clipax.states`
"""

from clipax import advice as advice
from clipax import coefficients as coefficients
from clipax import norms as norms
from clipax import per_example as per_example
from clipax import states as states
from clipax import thresholds as thresholds
from clipax import units as units
from clipax._core._clip_by import clip_by as clip_by
from clipax.advice._advise import advise as advise
from clipax.advice._replay import replay as replay
from clipax.apply import clip_cotangent as clip_cotangent
from clipax.apply import clip_tree as clip_tree
from clipax.checks import check_finite as check_finite
from clipax.checks import check_not_stuck as check_not_stuck
from clipax.methods.acclip import acclip as acclip
from clipax.methods.adagc import adagc as adagc
from clipax.methods.adaptive_grad_clip import adaptive_grad_clip as adaptive_grad_clip
from clipax.methods.autoclip import autoclip as autoclip
from clipax.methods.clip21 import clip21 as clip21
from clipax.methods.clip_by_average_norm import clip_by_average_norm as clip_by_average_norm
from clipax.methods.clip_by_block_rms import clip_by_block_rms as clip_by_block_rms
from clipax.methods.clip_by_global_norm import clip_by_global_norm as clip_by_global_norm
from clipax.methods.clip_by_leaf_norm import clip_by_leaf_norm as clip_by_leaf_norm
from clipax.methods.clip_by_mean_std import clip_by_mean_std as clip_by_mean_std
from clipax.methods.clip_by_quantile import clip_by_quantile as clip_by_quantile
from clipax.methods.clip_by_spectral_norm import clip_by_spectral_norm as clip_by_spectral_norm
from clipax.methods.clip_by_unit_norm import clip_by_unit_norm as clip_by_unit_norm
from clipax.methods.clip_by_value import clip as clip
from clipax.methods.clip_by_value import clip_by_value as clip_by_value
from clipax.methods.clippy import clippy as clippy
from clipax.methods.delta_gclip import delta_gclip as delta_gclip
from clipax.methods.measure import measure as measure
from clipax.methods.observe import observe as observe
from clipax.methods.scale_by_stable_adam import scale_by_stable_adam as scale_by_stable_adam
from clipax.methods.skip_step import skip_step as skip_step
from clipax.methods.smooth_clip_by_global_norm import (
    smooth_clip_by_global_norm as smooth_clip_by_global_norm,
)
from clipax.methods.smooth_clip_by_value import smooth_clip_by_value as smooth_clip_by_value
from clipax.methods.spam_clip import spam_clip as spam_clip
from clipax.methods.stable_spam import stable_spam as stable_spam
from clipax.methods.track import reset_tracking as reset_tracking
from clipax.methods.track import track as track
from clipax.methods.u_clip import u_clip as u_clip
from clipax.methods.zclip import zclip as zclip
from clipax.metrics import as_floats as as_floats
from clipax.metrics import metrics as metrics
from clipax.norms import global_norm as global_norm
from clipax.norms import leaf_norm as leaf_norm
from clipax.norms import unit_norm as unit_norm
from clipax.per_example import clipped_grad as clipped_grad
from clipax.per_example import explain_clipped_grad as explain_clipped_grad
from clipax.per_example import per_example_norms as per_example_norms
from clipax.per_example import track_quantile as track_quantile
from clipax.plot import plot as plot

__version__ = "0.2.0"
