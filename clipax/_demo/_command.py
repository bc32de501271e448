"""The command line."""

import argparse
import functools
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipax import _demo
from clipax._demo import _picture, _report, _training
from clipax._demo._methods import DEFAULT, METHODS, OPTIMIZERS


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parse(argv)
    datasets, figures, tqdm = map(require, ("sklearn.datasets", "matplotlib.figure", "tqdm"))
    train_set, test_set = _training.digits(datasets)
    runs = {}
    with tqdm.tqdm(total=len(args.methods) * args.steps, unit="step") as bar:
        for name in args.methods:
            bar.set_description(name)
            params, history, seconds = _training.train(name, args, train_set, bar.update)
            accuracy = np.asarray(_training.accuracies(params, test_set))
            speed = {"milliseconds_per_step_of_all_seeds": 1e3 * seconds}
            runs[name] = {"test_accuracy": accuracy} | _training.summary(name, history) | speed
    print(_report.table(runs, args))
    print(_picture.write_png(runs, args, figures))
    print(_report.write_json(runs, args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m clipax",
        description="There are two commands. `clipax advise LOG` reads the log of a run and"
        " recommends a clip: see `clipax advise --help`. `clipax` alone is this demonstration, as"
        f" is `python -m clipax`. {_demo.__doc__}",
    )
    add = functools.partial(parser.add_argument, help="default: %(default)s")
    methods, optimizers = (
        f"all, or some of {', '.join(METHODS)}; default: {', '.join(DEFAULT)}",
        f"{', '.join(OPTIMIZERS)}; default: %(default)s",
    )
    add("--methods", metavar="A,B", default=DEFAULT, type=_methods, help=methods)
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
    if text.strip() == "all":
        return list(METHODS)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in METHODS]:
        message = f"unknown method {unknown[0]!r} (choose all, or from {', '.join(METHODS)})"
        raise argparse.ArgumentTypeError(message)
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, not {text!r}")
    return int(text)


def require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"python -m clipax needs {error.name}, which is not installed:"
            " pip install 'clipax[demo]'"
        ) from error
