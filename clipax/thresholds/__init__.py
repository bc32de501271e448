"""The threshold axis: what bounds a norm.

A threshold is an `optax.GradientTransformation` over the tree of norms:
`init(norms)` and `update(norms, state, param_norms) -> (max_norms, state)`.

| threshold | bound | method with this rule |
|---|---|---|
| `fixed` | a number, a schedule, or a tree prefix of them | `clip_by_global_norm` |
| `relative_to_params` | a share of the norm of the parameters | `adaptive_grad_clip` |
| `window_quantile` | a quantile of the last norms | `autoclip` |
| `quantile_tracker` | a running estimate of a quantile | `clip_by_quantile` |
| `mean_and_deviation` | mean plus deviations of the last norms | `clip_by_mean_std` |
| `z_score` | mean plus deviations of a running average | `zclip` |
| `capped` | the smaller of another threshold's bound and a fixed one | |
| `per_norm` | that of a rule for one norm alone, such as `optax.ema(0.9)` | |
| `Threshold` | that of a rule of your own, which sees all norms at once | `adagc` |

`clip_by(norm, threshold)` lifts any other `optax.GradientTransformation`, such as
`optax.chain(optax.ema(0.9), optax.scale(1.5))`, by `per_norm`, so that every norm has a state
of its own.
"""

from clipax.thresholds._capped import capped as capped
from clipax.thresholds._fixed import fixed as fixed
from clipax.thresholds._mean_and_deviation import mean_and_deviation as mean_and_deviation
from clipax.thresholds._per_norm import per_norm as per_norm
from clipax.thresholds._quantile_tracker import quantile_tracker as quantile_tracker
from clipax.thresholds._relative_to_params import relative_to_params as relative_to_params
from clipax.thresholds._threshold import Threshold as Threshold
from clipax.thresholds._window_quantile import window_quantile as window_quantile
from clipax.thresholds._z_score import limit_bound as limit_bound
from clipax.thresholds._z_score import mean_bound as mean_bound
from clipax.thresholds._z_score import reciprocal_bound as reciprocal_bound
from clipax.thresholds._z_score import z_score as z_score
