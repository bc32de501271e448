"""What happened, as a table or as JSON."""

import argparse
import json
import pathlib
from typing import Any

import jax
import numpy as np

from clipax._demo._training import FINAL_STEPS, Record


def table(runs: dict[str, Record], args: argparse.Namespace) -> str:
    header = ("method", "test accuracy", "final loss", "largest norm", "steps clipped", "ms/step")
    rows = [header, *(_row(name, run) for name, run in runs.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    notes = f"""
{args.optimizer}, {args.steps} steps on {jax.devices()[0].device_kind}.
Mean ± standard deviation over {args.seeds} seeds; the largest norm of all of them.
Final loss: of the last {FINAL_STEPS} batches. Norm: global L2, before the method.
clip_cotangent clips on the way to the gradient: nothing counts how often, and its norm is after.
skip_step leaves steps out, and those are counted. scale_by_stable_adam is its own optimizer.
ms/step: median time of a step of all seeds together, compilation left out.
To learn from it: a bound helps where the loss ends lower than without one, though the largest
norm is far above the bound; and how often it acted says whether the bound was the right size.
"""
    return "\n".join([*lines, notes])


def _row(name: str, run: Record) -> tuple[str, ...]:
    share, largest = run["share_of_steps_clipped"], run["largest_norm"].max()
    clipped = "-" if share is None else f"{100 * share.mean():.1f} %"
    accuracy, loss = _spread(run["test_accuracy"]), _spread(run["final_loss"])
    milliseconds = f"{run['milliseconds_per_step_of_all_seeds']:.2f}"
    return name, accuracy, loss, f"{largest:.1f}", clipped, milliseconds


def _spread(values: np.ndarray) -> str:
    diverged = np.sum(~np.isfinite(values))
    if diverged:
        return f"diverged in {diverged} of {len(values)}"
    return f"{values.mean():.3f} ± {values.std():.3f}"


def write_json(runs: dict[str, Record], args: argparse.Namespace) -> pathlib.Path:
    settings = {"optimizer": args.optimizer, "steps": args.steps, "seeds": args.seeds}
    place = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    document = settings | place | {"methods": runs}
    path = args.output / "training.json"
    path.write_text(json.dumps(document, default=_lists, allow_nan=False) + "\n")
    return path


def _lists(array: np.ndarray) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    numbers = array.astype(float).round(6).astype(object)
    numbers[~np.isfinite(array)] = None
    return numbers.tolist()
