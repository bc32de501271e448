"""Trains a recurrent network unclipped and under each method, and shows what happened.

The network reads scikit-learn's handwritten digits pixel by pixel, in 64 steps, and learns
by back-propagation through time. Its recurrent matrix starts as an orthogonal one times
1.4, so that gradients explode on their way back. Initial weights, batches and learning
rate are the same for every method, and nothing is tuned for any of them: the bounds and
settings are the usual ones, 1.0 or the paper's.
"""

import argparse
import functools
import importlib
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipax

BATCH_SIZE, HIDDEN_SIZE, TEST_SIZE = 32, 64, 360
RECURRENT_GAIN, INPUT_SCALE = 1.4, 0.2
FINAL_STEPS, CHUNK_STEPS = 20, 10
ADAM_LEARNING_RATE = 1e-3

METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "none": clipax.measure,
    "clip_by_global_norm": functools.partial(clipax.clip_by_global_norm, 1.0),
    "clip_by_leaf_norm": functools.partial(clipax.clip_by_leaf_norm, 1.0),
    "clip_by_unit_norm": functools.partial(clipax.clip_by_unit_norm, 1.0),
    "clip_by_block_rms": functools.partial(clipax.clip_by_block_rms, 1.0),
    "clip_by_average_norm": functools.partial(clipax.clip_by_average_norm, 1.0),
    "clip_by_value": functools.partial(clipax.clip_by_value, 1.0),
    "adaptive_grad_clip": functools.partial(clipax.adaptive_grad_clip, 0.01),
    "clip_by_spectral_norm": functools.partial(clipax.clip_by_spectral_norm, 1.0),
    "smooth_clip_by_global_norm": functools.partial(clipax.smooth_clip_by_global_norm, 1.0),
    "smooth_clip_by_value": functools.partial(clipax.smooth_clip_by_value, 1.0),
    "delta_gclip": functools.partial(clipax.delta_gclip, 1.0),
    "u_clip": lambda: clipax.u_clip(clipax.clip_by_global_norm(1.0)),
    "clip21": lambda: clipax.clip21(clipax.clip_by_global_norm(1.0)),
    "autoclip": clipax.autoclip,
    "clip_by_quantile": clipax.clip_by_quantile,
    "zclip": clipax.zclip,
    "adagc": clipax.adagc,
    "clip_by_mean_std": clipax.clip_by_mean_std,
    "skip_step": functools.partial(clipax.skip_step, z_max=6.0),
    "spam_clip": clipax.spam_clip,
    "stable_spam": clipax.stable_spam,
    "acclip": clipax.acclip,
    "scale_by_stable_adam": clipax.scale_by_stable_adam,
    # It clips what flows back from step to step of a sequence. The loss is the mean over a
    # batch, so that this is 1.0 for a sequence.
    "clip_cotangent": functools.partial(clipax.clip_by_global_norm, 1.0 / BATCH_SIZE),
}

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": functools.partial(optax.sgd, 0.01, momentum=0.9),
    "adam": functools.partial(optax.adam, ADAM_LEARNING_RATE),
    "adamw": functools.partial(optax.adamw, ADAM_LEARNING_RATE),
    "rmsprop": functools.partial(optax.rmsprop, 1e-3),
    "lion": functools.partial(optax.lion, 1e-4),
}

Params = dict[str, Any]
Batch = tuple[Any, Any]
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parse(argv)
    datasets, figures, tqdm = map(_require, ("sklearn.datasets", "matplotlib.figure", "tqdm"))
    train_set, test_set = _digits(datasets)
    runs = {}
    with tqdm.tqdm(total=len(args.methods) * args.steps, unit="step") as bar:
        for name in args.methods:
            bar.set_description(name)
            params, history, seconds = _train(name, args, train_set, bar.update)
            accuracy = np.asarray(_accuracies(params, test_set))
            speed = {"milliseconds_per_step_of_all_seeds": 1e3 * seconds}
            runs[name] = {"test_accuracy": accuracy} | _summary(name, history) | speed
    print(_table(runs, args))
    print(_write_png(runs, args, figures))
    print(_write_json(runs, args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m clipax", description=__doc__)
    add = functools.partial(parser.add_argument, help="default: %(default)s")
    methods, optimizers = (
        f"default: {', '.join(METHODS)}",
        f"{', '.join(OPTIMIZERS)}; default: %(default)s",
    )
    add("--methods", metavar="A,B", default=list(METHODS), type=_methods, help=methods)
    add("--optimizer", metavar="NAME", default="sgd", choices=OPTIMIZERS, help=optimizers)
    add("--steps", metavar="N", default=300, type=_count)
    add("--seeds", metavar="N", default=3, type=_count)
    add("--output", metavar="DIR", default="runs/clipax", type=pathlib.Path)
    args = parser.parse_args(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    return args


def _methods(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in METHODS]:
        message = f"unknown method {unknown[0]!r} (choose from {', '.join(METHODS)})"
        raise argparse.ArgumentTypeError(message)
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, not {text!r}")
    return int(text)


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"python -m clipax needs {error.name}, which is not installed:"
            " pip install 'clipax[demo]'"
        ) from error


def _digits(datasets: Any) -> tuple[Batch, Batch]:
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    train, test = slice(TEST_SIZE, None), slice(TEST_SIZE)
    return (images[train], labels[train]), (images[test], labels[test])


def _initial_params(seed: int) -> Params:
    rng = np.random.default_rng(seed)
    orthogonal, _ = np.linalg.qr(rng.normal(size=(HIDDEN_SIZE, HIDDEN_SIZE)))
    params = {
        "input": INPUT_SCALE * rng.normal(size=(1, HIDDEN_SIZE)),
        "recurrent": RECURRENT_GAIN * orthogonal,
        "bias": np.zeros(HIDDEN_SIZE),
        "output": rng.normal(size=(HIDDEN_SIZE, 10)) / math.sqrt(HIDDEN_SIZE),
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def _batches(train_set: Batch, seeds: int) -> Iterator[Batch]:
    images, labels = train_set
    rngs = [np.random.default_rng([seed, 1]) for seed in range(seeds)]
    while True:
        chosen = np.stack([rng.integers(len(labels), size=BATCH_SIZE) for rng in rngs])
        yield images[chosen], labels[chosen]


def _logits(
    params: Params, images: jax.Array, inner: optax.GradientTransformation | None = None
) -> jax.Array:
    """Of a batch; `inner` clips what flows back through the network."""

    def read(hidden: jax.Array, pixels: jax.Array) -> tuple[jax.Array, None]:
        if inner is not None:
            hidden = jax.vmap(lambda sequence: clipax.clip_cotangent(sequence, inner))(hidden)
        inputs = pixels[:, None] @ params["input"] + params["bias"][None]
        return jnp.tanh(inputs + hidden @ params["recurrent"]), None

    hidden, _ = jax.lax.scan(read, jnp.zeros((len(images), HIDDEN_SIZE)), images.T)
    return hidden @ params["output"]


# Apart from `_update`, so that all methods share one compiled program.
@functools.partial(jax.jit, static_argnums=2)
def _losses_and_grads(
    params: Params, batch: Batch, inner: optax.GradientTransformation | None
) -> tuple[jax.Array, Params]:
    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = _logits(params, images, inner)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.vmap(jax.value_and_grad(loss))(params, *batch)


@functools.partial(jax.jit, static_argnums=0)
def _update(
    optimizer: optax.GradientTransformation, grads: Params, state: Any, params: Params
) -> tuple[Params, Any, Record]:
    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any, Record]:
        updates, state = optimizer.update(grads, state, params)
        metrics = clipax.metrics(state)
        seen = {key: metrics[key] for key in ("norm", "max_norm", "clip_fraction")}
        seen["clip_fraction"] = metrics.get("is_skipped", seen["clip_fraction"])
        seen["global_norm"] = clipax.global_norm(grads)
        return optax.apply_updates(params, updates), state, seen

    return jax.vmap(update)(grads, state, params)


@jax.jit
def _accuracies(params: Params, test_set: Batch) -> jax.Array:
    images, labels = test_set
    predictions = jax.vmap(lambda params: _logits(params, images).argmax(axis=1))(params)
    return (predictions == labels[None]).mean(axis=1)


def _optimizer(name: str, optimizer: optax.GradientTransformation) -> Any:
    if name == "skip_step":
        return METHODS[name](optax.chain(clipax.measure(), optimizer))
    if name == "scale_by_stable_adam":
        # It is an Adam itself, and stands in the optimizer's place.
        optimizer = optax.scale_by_learning_rate(ADAM_LEARNING_RATE)
    return optax.chain(METHODS["none" if name == "clip_cotangent" else name](), optimizer)


def _train(
    name: str, args: argparse.Namespace, train_set: Batch, report: Callable[[int], Any]
) -> tuple[Params, Record, float]:
    """The parameters, what was seen in arrays of (steps, seeds), the seconds of a step."""
    inner = METHODS[name]() if name == "clip_cotangent" else None
    optimizer = _optimizer(name, OPTIMIZERS[args.optimizer]())

    def step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any, Record]:
        losses, grads = _losses_and_grads(params, batch, inner)
        params, state, seen = _update(optimizer, grads, state, params)
        return params, state, seen | {"loss": losses}

    params = jax.tree.map(lambda *each: np.stack(each), *map(_initial_params, range(args.seeds)))
    state = jax.jit(jax.vmap(optimizer.init))(params)
    batches = _batches(train_set, args.seeds)
    # Compiles, so that no step that is timed has to.
    step(params, state, next(_batches(train_set, args.seeds)))[0]["output"].block_until_ready()
    history, seconds = [], []
    for done in range(0, args.steps, CHUNK_STEPS):
        chunk, start = min(CHUNK_STEPS, args.steps - done), time.perf_counter()
        for batch in itertools.islice(batches, chunk):
            params, state, seen = step(params, state, batch)
            history.append(seen)
        params["output"].block_until_ready()
        seconds.append((time.perf_counter() - start) / chunk)
        report(chunk)
    arrays = {key: np.stack([seen[key] for seen in history]) for key in history[0]}
    return params, arrays, statistics.median(seconds)


def _summary(name: str, history: Record) -> Record:
    loss, norm, max_norm = history["loss"], history["global_norm"], history["max_norm"]
    clipped = history["clip_fraction"] > 0
    # Among global norms a bound has a place only if it is them that it bounds.
    is_global = np.allclose(norm, history["norm"], rtol=1e-3, equal_nan=True)
    return {
        "final_loss": loss[-FINAL_STEPS:].mean(axis=0),
        "largest_norm": np.where(np.isnan(norm), np.inf, norm).max(axis=0),
        "share_of_steps_clipped": None if name == "clip_cotangent" else clipped.mean(axis=0),
        "loss": loss,
        "norm": norm,
        "max_norm": max_norm if is_global and np.isfinite(max_norm).any() else None,
    }


def _table(runs: dict[str, Record], args: argparse.Namespace) -> str:
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


def _write_json(runs: dict[str, Record], args: argparse.Namespace) -> pathlib.Path:
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


def _write_png(runs: dict[str, Record], args: argparse.Namespace, figures: Any) -> pathlib.Path:
    columns = min(len(runs), 3 if len(runs) <= 9 else 4)
    rows = math.ceil(len(runs) / columns)
    size = (min(9, 2 + 3 * columns), 1 + 2.4 * rows)
    figure = figures.Figure(size, dpi=160, layout="constrained")
    grid = figure.subplots(2 * rows, columns, sharex=True, squeeze=False)
    # A method has two axes, its loss above its norm.
    panels = grid.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    for axes in panels[len(runs) :].flat:
        axes.remove()
    for index, (name, panel) in enumerate(zip(runs, panels, strict=False)):
        _trim(panel, panels[0], index % columns == 0, index + columns >= len(runs))
        _plot_method(name, runs, panel)
    figure.suptitle(
        f"Recurrent network on digits, {args.optimizer}\n"
        f"median and range of {args.seeds} seeds; test accuracy at the right",
        fontsize="medium",
    )
    drawn = [axes.get_legend_handles_labels() for axes in panels[: len(runs)].flat]
    labels = {label: line for pair in drawn for line, label in zip(*pair, strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3, frameon=False)
    path = args.output / "training.png"
    figure.savefig(path)
    return path


def _plot_method(name: str, runs: dict[str, Record], panel: Sequence[Any]) -> None:
    run = runs[name]
    panel[0].set_title(name, loc="left", fontsize="small" if len(name) <= 22 else "x-small")
    panel[0].set_title(f"{run['test_accuracy'].mean():.0%}", loc="right", fontsize="small")
    for axes, key in zip(panel, ("loss", "norm"), strict=True):
        if "none" in runs:
            _plot_curves(axes, runs["none"][key], "0.55", "unclipped")
        if name != "none":
            _plot_curves(axes, run[key], "#0072B2", "with this method")
    if run["max_norm"] is not None:
        bound = np.median(_finite(run["max_norm"]), axis=1)
        panel[1].plot(bound, "--", color="#D55E00", linewidth=1.2, label="bound on the norm")


def _plot_curves(axes: Any, curves: np.ndarray, color: str, label: str) -> None:
    curves, steps = _finite(curves), np.arange(len(curves))
    # The range is of the seeds that are left; the median ends where one diverges.
    low, high = np.fmin.reduce(curves, axis=1), np.fmax.reduce(curves, axis=1)
    axes.fill_between(steps, low, high, color=color, alpha=0.35, linewidth=0.6)
    axes.plot(steps, np.median(curves, axis=1), color=color, linewidth=1.2, label=label)


def _finite(curves: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(curves), curves, np.nan)


def _trim(panel: Sequence[Any], first: Sequence[Any], is_left: bool, is_lowest: bool) -> None:
    for axes, other, label in zip(panel, first, ("loss", "gradient norm"), strict=True):
        if axes is not other:
            axes.sharey(other)
        axes.set_yscale("log")
        axes.set_ylabel(label if is_left else "")
        axes.tick_params(labelleft=is_left, labelsize="small")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.minorticks_off()
    panel[0].yaxis.get_major_locator().set_params(subs=(1, 3))
    panel[1].tick_params(labelbottom=is_lowest)
    panel[1].set_xlabel("step" if is_lowest else "")


if __name__ == "__main__":
    main()
