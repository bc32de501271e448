"""The states that `init` or `update` return, for `clipax.metrics` or a checkpoint."""

from clipax._core._clip_by import ClipState as ClipState
from clipax._core._window import WindowState as WindowState
from clipax.methods.acclip import AcclipState as AcclipState
from clipax.methods.adagc import AdaGCState as AdaGCState
from clipax.methods.clip21 import Clip21State as Clip21State
from clipax.methods.measure import Quantiles as Quantiles
from clipax.methods.observe import ObserveState as ObserveState
from clipax.methods.scale_by_stable_adam import StableAdamState as StableAdamState
from clipax.methods.skip_step import SkipState as SkipState
from clipax.methods.spam_clip import SpamClipState as SpamClipState
from clipax.methods.stable_spam import StableSpamState as StableSpamState
from clipax.methods.track import TrackState as TrackState
from clipax.methods.u_clip import UClipState as UClipState
from clipax.thresholds._fixed import FixedState as FixedState
from clipax.thresholds._quantile_tracker import QuantileState as QuantileState
from clipax.thresholds._z_score import ZClipState as ZClipState
