"""The methods that are compared, and how figures are written."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import clipax

# What goes before an optimizer. A bound on a norm or a value is 1.0, AGC's ratio the paper's
# 0.01, and the rest defaults.
CLIPS: dict[str, optax.GradientTransformation] = {
    "none": clipax.measure(window_size=1),
    "clip_by_global_norm(1.0)": clipax.clip_by_global_norm(1.0),
    "clip_by_leaf_norm(1.0)": clipax.clip_by_leaf_norm(1.0),
    "clip_by_unit_norm(1.0)": clipax.clip_by_unit_norm(1.0),
    "clip_by_block_rms(1.0)": clipax.clip_by_block_rms(1.0),
    "clip_by_average_norm(1.0)": clipax.clip_by_average_norm(1.0),
    "clip_by_spectral_norm(1.0)": clipax.clip_by_spectral_norm(1.0),
    "clip_by_value(1.0)": clipax.clip_by_value(1.0),
    "adaptive_grad_clip(0.01)": clipax.adaptive_grad_clip(0.01),
    "smooth_clip_by_global_norm(1.0)": clipax.smooth_clip_by_global_norm(1.0),
    "smooth_clip_by_value(1.0)": clipax.smooth_clip_by_value(1.0),
    "delta_gclip(1.0)": clipax.delta_gclip(1.0),
    "u_clip(clip_by_global_norm(1.0))": clipax.u_clip(clipax.clip_by_global_norm(1.0)),
    "u_clip(..., max_carry=1.0)": clipax.u_clip(clipax.clip_by_global_norm(1.0), max_carry=1.0),
    "clip21(clip_by_global_norm(1.0))": clipax.clip21(clipax.clip_by_global_norm(1.0)),
    "autoclip()": clipax.autoclip(),
    "autoclip(0.9)": clipax.autoclip(0.9),
    "clip_by_quantile()": clipax.clip_by_quantile(),
    "clip_by_quantile(0.9)": clipax.clip_by_quantile(0.9),
    "zclip()": clipax.zclip(),
    "zclip(max_norm=None)": clipax.zclip(max_norm=None),
    "adagc()": clipax.adagc(),
    "clip_by_mean_std()": clipax.clip_by_mean_std(),
    "spam_clip()": clipax.spam_clip(),
    "stable_spam()": clipax.stable_spam(),
    "stable_spam(normalize=False)": clipax.stable_spam(normalize=False),
}


def clipped_optimizers(
    optimizer: optax.GradientTransformation,
) -> dict[str, optax.GradientTransformation]:
    """The optimizer behind every clip, and inside what goes round it."""
    behind = {name: optax.chain(clip, optimizer) for name, clip in CLIPS.items()}
    return behind | {"skip_step(z_max=6.0)": clipax.skip_step(optimizer, z_max=6.0)}


def is_clipped(opt_state: Any) -> jax.Array:
    """Whether the last step was changed in any of its parts, or skipped."""
    seen = clipax.metrics(opt_state)
    return seen["is_skipped" if "is_skipped" in seen else "clip_fraction"] > 0


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = zip(header, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    line = ["-" * width for width in widths]
    cells = [header, line, *rows]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def mean_and_std(values: np.ndarray) -> str:
    mean, std = values.mean(), values.std()
    return _diverged(values) or f"{_short(mean)} ± {_short(std)}"


def median_and_range(values: np.ndarray) -> str:
    middle, low, high = np.median(values), values.min(), values.max()
    return _diverged(values) or f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _diverged(values: np.ndarray) -> str:
    lost = np.sum(~np.isfinite(values))
    return f"diverged in {lost} of {values.size}" if lost else ""


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.2g}"


def percent(shares: np.ndarray) -> str:
    return f"{100 * np.mean(shares):.1f} %"


def json_ready(node: Any) -> Any:
    """Arrays as lists; JSON has no NaN and no infinity: they become null."""
    if isinstance(node, dict):
        return {key: json_ready(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [json_ready(value) for value in node]
    if isinstance(node, (np.ndarray, np.generic, jax.Array)):
        return json_ready(np.asarray(node).tolist())
    return None if isinstance(node, float) and not math.isfinite(node) else node
