# ruff: noqa: T201
"""What clipping costs: per step of Adam, for bounds that set themselves, and to compile.

    python -m benchmarks.adam_step [--quick] [--output FILE.json]

Everything that is compared runs interleaved in one process, so that a machine that slows
down slows all of it down; what counts are the ratios of medians.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipax

Clips = dict[str, Callable[[float], optax.GradientTransformation]]
_CLIPS: Clips = {"clipax": clipax.clip_by_global_norm, "optax": optax.clip_by_global_norm}
_FIXED = "clip_by_global_norm"
_HISTORIES = (clipax.autoclip, clipax.clip_by_quantile, clipax.zclip, clipax.clip_by_mean_std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()

    # The load is read before anything here adds to it.
    result: dict[str, Any] = {"machine": _machine()}
    print(" · ".join(f"{name}: {value}" for name, value in result["machine"].items()))
    for name, optimizers in (("step", _clipped_adams()), ("histories", _adams_with_a_history())):
        if arguments.quick:
            result[name] = _time_steps(optimizers, leaves=4, side=100, rounds=5)
        else:
            result[name] = _time_steps(optimizers, leaves=25, side=1000, rounds=60)
        _print_steps(result[name])
    if arguments.quick:
        result["compile"] = _time_compilation(leaves=20, rounds=1)
    else:
        result["compile"] = _time_compilation(leaves=1000, rounds=3)
    _print_compilation(result["compile"])
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device.device_kind,
        "processor": _processor(),
        "cores": cores,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "clipax": clipax.__version__,
    }


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# -- A step ------------------------------------------------------------------------------------


def _clipped_adams() -> dict[str, optax.GradientTransformation]:
    return {"adam alone": optax.adam(1e-3)} | {
        f"{name} clip + adam": optax.chain(clip(1.0), optax.adam(1e-3))
        for name, clip in _CLIPS.items()
    }


def _adams_with_a_history() -> dict[str, optax.GradientTransformation]:
    """Methods with one norm and its history, against a fixed bound on the same norm."""
    clips = {_FIXED: clipax.clip_by_global_norm(1.0)}
    clips |= {method.__name__: method() for method in _HISTORIES}
    return {name: optax.chain(clip, optax.adam(1e-3)) for name, clip in clips.items()}


def _time_steps(
    optimizers: dict[str, optax.GradientTransformation], leaves: int, side: int, rounds: int
) -> dict[str, Any]:
    gradients = _gradients(leaves, side)
    steps = {name: _jitted_step(optimizer) for name, optimizer in optimizers.items()}
    carries = {
        name: _start(optimizer, gradients, steps[name]) for name, optimizer in optimizers.items()
    }
    norm = float(clipax.global_norm(gradients))
    if not norm > 1.0:
        raise AssertionError(f"The gradients must be above the bound, and their norm is {norm}.")

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_number in range(rounds):
        # Each goes first, second and last equally often.
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](*carries[name], gradients))
            seconds[name].append(time.perf_counter() - start)

    _require_same_params([carries[name][0] for name in names if "clip + adam" in name])
    baseline = statistics.median(seconds[names[0]])
    return {
        "megabytes": leaves * side * side * 4 / 1e6,
        "leaves": leaves,
        "gradient_norm": norm,
        "max_norm": 1.0,
        "rounds": rounds,
        "rows": [
            {
                "name": name,
                "median_ms": 1e3 * statistics.median(values),
                "min_ms": 1e3 * min(values),
                "max_ms": 1e3 * max(values),
                "ratio": statistics.median(values) / baseline,
            }
            for name, values in seconds.items()
        ],
    }


def _gradients(leaves: int, side: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((side, side), dtype=np.float32)) for _ in range(leaves)
    ]


def _jitted_step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    # The parameters and the state are donated, as in training. The gradients are not: they
    # come from outside here, and are needed again for the next step.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, gradients: Any) -> Any:
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def _start(
    optimizer: optax.GradientTransformation, gradients: Any, step: Callable[..., Any]
) -> Any:
    """Parameters and state after a few steps, the first of which compiles."""
    params = jax.tree.map(jnp.zeros_like, gradients)
    carry = params, optimizer.init(params)
    for _ in range(3):
        carry = jax.block_until_ready(step(*carry, gradients))
    return carry


def _require_same_params(results: list[Any]) -> None:
    """Both clips do the same work: a faster one that is wrong would be no news."""
    for one, other in itertools.pairwise(results):
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-7)


def _print_steps(step: dict[str, Any]) -> None:
    print(
        f"\nA step on a float32 tree of {step['megabytes']:g} MB in {step['leaves']} leaves,"
        f" {step['rounds']} runs each, interleaved; params and state donated"
    )
    print(f"{'':20}{'median ms':>12}{'min ms':>12}{'max ms':>12}{'ratio':>12}")
    for row in step["rows"]:
        print(
            f"{row['name']:20}{row['median_ms']:12.2f}{row['min_ms']:12.2f}"
            f"{row['max_ms']:12.2f}{row['ratio']:11.2f}x"
        )


# -- Compilation -------------------------------------------------------------------------------


def _time_compilation(leaves: int, rounds: int) -> dict[str, Any]:
    shape, dtype = (16, 16), jnp.bfloat16
    updates = [jax.ShapeDtypeStruct(shape, dtype)] * leaves
    # What every first compilation in a process pays is no one's share.
    jax.jit(lambda x: jnp.sqrt(jnp.sum(x))).lower(updates[0]).compile()
    stages: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _CLIPS}
    for _ in range(rounds):
        for name, clip in _CLIPS.items():
            stages[name].append(_compilation_stages(clip(1.0), updates))
    totals = {name: statistics.median(map(sum, runs)) for name, runs in stages.items()}
    return {
        "leaves": leaves,
        "shape": list(shape),
        "dtype": jnp.dtype(dtype).name,
        "rounds": rounds,
        "rows": [
            {
                "name": name,
                **{
                    f"{stage}_s": statistics.median(column)
                    for stage, column in zip(
                        ("trace", "lower", "compile"), zip(*runs, strict=True), strict=True
                    )
                },
                "total_s": totals[name],
                "min_total_s": min(map(sum, runs)),
                "max_total_s": max(map(sum, runs)),
            }
            for name, runs in stages.items()
        ],
        "ratio": totals["clipax"] / totals["optax"],
    }


def _compilation_stages(
    clip: optax.GradientTransformation, updates: Any
) -> tuple[float, float, float]:
    """Seconds to trace, to lower and to compile an update, nothing of it cached."""
    jax.clear_caches()
    state = jax.eval_shape(clip.init, updates)
    times = [time.perf_counter()]
    traced = jax.jit(lambda updates, state: clip.update(updates, state)).trace(updates, state)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    trace, lower, compilation = (after - before for before, after in itertools.pairwise(times))
    return trace, lower, compilation


def _print_compilation(compilation: dict[str, Any]) -> None:
    print(
        f"\nTo compile the clip of {compilation['leaves']} {compilation['dtype']} leaves of"
        f" {tuple(compilation['shape'])}, medians of {compilation['rounds']}"
    )
    columns = ("trace_s", "lower_s", "compile_s", "total_s", "min_total_s", "max_total_s")
    print(f"{'':8}" + "".join(f"{column:>13}" for column in columns))
    for row in compilation["rows"]:
        print(f"{row['name']:8}" + "".join(f"{row[column]:13.2f}" for column in columns))
    print(f"clipax to optax: {compilation['ratio']:.2f}x")


if __name__ == "__main__":
    main()
