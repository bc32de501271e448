"""Draws each method on one and the same stream of norms, with a drift and spikes."""

import functools
import hashlib
import io
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import figure

import clipax
from clipax._demo import _methods

STEPS = 320
# Step to size: on all entries, on one leaf, on one entry, and a group of them.
SPIKES = {70: 12.0, 120: 8.0, 170: 15.0, 230: 6.0, 231: 9.0, 232: 9.0, 233: 6.0, 290: 20.0}
ON_ONE_LEAF, ON_ONE_ENTRY = {120}, {170}
SHAPES = {"kernel": (8, 4), "bias": (4,)}
# Bounds in other units than the norm of the whole, about as near to the stream as 1.0 is there.
OTHERS = {
    "clip_by_value": functools.partial(clipax.clip_by_value, 0.5),
    "smooth_clip_by_value": functools.partial(clipax.smooth_clip_by_value, 0.5),
    "clip_by_block_rms": functools.partial(clipax.clip_by_block_rms, 0.3),
    "clip_by_average_norm": functools.partial(clipax.clip_by_average_norm, 0.05),
    "observe": functools.partial(clipax.observe, clipax.clip_by_global_norm(1.0)),
    "measure": clipax.measure,
    "skip_step": functools.partial(clipax.skip_step, optax.identity(), z_max=6.0),
    "track": functools.partial(clipax.track, clipax.clip_by_global_norm(1.0)),
}


class Run(NamedTuple):
    raw: np.ndarray
    after: np.ndarray
    max_norm: np.ndarray | None
    """The bound, where it bounds the norm that is drawn."""


@functools.cache
def stream() -> dict[str, np.ndarray]:
    """Updates of a network that learns: norms that fall by half, with noise and spikes."""
    rng = np.random.default_rng(0)
    norms = np.exp(np.linspace(0.2, -0.6, STEPS) + rng.normal(0, 0.12, STEPS))
    norms[list(SPIKES)] *= list(SPIKES.values())
    updates = {name: rng.normal(size=(STEPS, *shape)) for name, shape in SHAPES.items()}
    for step in ON_ONE_LEAF:
        updates["kernel"][step] *= 0.01
    for step in ON_ONE_ENTRY:
        updates["kernel"][step, 2, 1] = 30.0
    squares = sum(np.sum(leaf.reshape(STEPS, -1) ** 2, axis=1) for leaf in updates.values())
    scales = norms / np.sqrt(squares)
    return {
        name: np.float32(scales.reshape(STEPS, *[1] * (leaf.ndim - 1)) * leaf)
        for name, leaf in updates.items()
    }


def undrawn(names: list[str]) -> list[str]:
    """The methods that nobody has said how to build."""
    return [name for name in names if name not in OTHERS and name not in _methods.METHODS]


def run(name: str) -> Run:
    method = (OTHERS.get(name) or _methods.METHODS[name])()
    params = {name: jnp.full(shape, 30.0) for name, shape in SHAPES.items()}

    def step(state: Any, updates: Any) -> Any:
        after, state = method.update(updates, state, params)
        info = clipax.metrics(state)
        told = [info[key] for key in ("norm", "max_norm") if key in info]
        return state, (optax.tree.norm(updates), optax.tree.norm(after), told)

    _, (raw, after, told) = jax.jit(lambda: jax.lax.scan(step, method.init(params), stream()))()
    raw, after = np.asarray(raw), np.asarray(after)
    is_drawn = len(told) == 2 and np.allclose(told[0], raw, rtol=1e-4)
    return Run(raw, after, np.asarray(told[1]) if is_drawn else None)


def _is_shorter(data: Run) -> np.ndarray:
    return data.after < data.raw * (1 - 1e-4)


def draw(axes: Any, data: Run, *, small: bool = False) -> None:
    is_left_out = data.after == 0
    series = {
        "norm": data.raw,
        "clipped_norm": data.after,
        "max_norm": data.max_norm,
        "clip_fraction": _is_shorter(data),
        "is_skipped": is_left_out,
    }
    clipax.plot(series, axes=axes)
    lowest = max(0.4 * min(data.raw.min(), data.after[~is_left_out].min()), 0.02)
    axes.set(xlim=(0, STEPS - 1), ylim=(lowest, 1.5 * data.raw.max()))
    axes.minorticks_off()
    ticks = [tick for tick in (0.1, 1, 10) if tick > lowest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.tick_params(labelsize=7 if small else 8)
    if small:
        axes.set(xlabel="", ylabel="")
        for line in axes.get_lines():
            line.set(linewidth=0.8, markersize=3)
    else:
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("global norm of the updates", fontsize=8)
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        axes.legend(frameon=False, fontsize=8, ncols=5, **place)


def picture(data: Run, *, small: bool) -> bytes:
    drawn = figure.Figure(figsize=(3.4, 1.9) if small else (6.2, 3), layout="constrained")
    draw(drawn.subplots(), data, small=small)
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=110 if small else 160)
    return out.getvalue()


def caption(data: Run) -> str:
    return f"{np.mean(_is_shorter(data)):.0%} of the steps end shorter than they came in."


def pictures(names: list[str], cache: pathlib.Path) -> dict[str, tuple[bytes, bytes, str]]:
    """For each method a picture, a small one and a caption; computed where code changed."""
    code = [pathlib.Path(__file__), *pathlib.Path(clipax.__file__).parent.rglob("*.py")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()[:16]
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        paths = [folder / f"{name}{end}" for end in (".png", ".small.png", ".txt")]
        if not all(path.exists() for path in paths):
            data = run(name)
            paths[0].write_bytes(picture(data, small=False))
            paths[1].write_bytes(picture(data, small=True))
            paths[2].write_text(caption(data))
        found[name] = (paths[0].read_bytes(), paths[1].read_bytes(), paths[2].read_text())
    return found
