"""The command line of `clipax advise`."""

import argparse
import functools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from clipax.advice import _advise, _picture, _read
from clipax.advice._advise import Advice
from clipax.advice._candidates import Progress
from clipax.advice._log import Log, LogError, rows

_DESCRIPTION = """
Recommends a clip from the gradient norms in the log of a training run. It reads Hugging Face's
trainer_state.json, JSON lines, CSV, TSV, exports and offline runs of Weights & Biases, TensorBoard
events, MLflow's metric files, and what torchtitan, Megatron, llm.c, LeRobot and others print.
"""
_MANY = 200_000


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; a log that cannot be read ends it with status 2 and one line."""
    args = _parse(argv)
    try:
        log = _read.read(args.logs, args.column)
        advice = _advise.advise(
            log.norms,
            log.losses,
            steps=log.steps,
            max_norm=log.bound if args.bound is None else args.bound,
            every=args.every,
            raw=args.raw,
            progress=_progress(log),
        )
    except LogError as error:
        _end(str(error))
    except ValueError as error:
        _end(f"{log.source}: {error}")
    advice = advice._replace(limits=(*log.notes, *advice.limits))
    print(_taken(log))
    print(f"\n{advice}\n")
    for line in _write(advice, log, args.output):
        print(line)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("clipax advise", description=_DESCRIPTION)
    add = functools.partial(parser.add_argument)
    several = "a file, several files of a resumed run (the later one counts), or - for stdin"
    add("logs", metavar="LOG", nargs="+", help=several)
    add("--column", metavar="NAME", help="the column of the norms; default: found by its name")
    bound = "the bound that the run had; default: max_norm in a log of clipax's metrics"
    add("--bound", metavar="NORM", type=_positive, help=bound)
    every = "how many steps there are from one norm to the next, >= 1; default: found in the log"
    add("--every", metavar="N", type=_positive, help=every)
    raw = "the norms are from before the clip, though they pile up at their largest value"
    add("--raw", action="store_true", help=raw)
    output = "where advice.png and advice.json go; default: %(default)s"
    add("--output", metavar="DIR", type=pathlib.Path, default="runs/advice", help=output)
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0, not {text!r}")
    return value


def _end(message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"clipax advise: {line}", file=sys.stderr)
    raise SystemExit(2)


def _progress(log: Log) -> Progress | None:
    """Lines on what is replayed, where that takes long."""
    if log.norms.size < _MANY:
        return None

    def show(text: str) -> None:
        print(f"{rows(log.norms.size)}: {text} ...", file=sys.stderr, flush=True)

    return show


def _taken(log: Log) -> str:
    """What was read, by its names."""
    parts = [f"norms from {log.column!r}"]
    parts.append(f"losses from {log.loss_column!r}" if log.loss_column else "no losses")
    if log.bound is not None:
        parts.append(f"the bound {log.bound:g}")
    parts.append(f"steps from {log.step_column!r}" if log.step_column else "rows for steps")
    return f"{log.source} ({log.kind}): {', '.join(parts)}"


def _write(advice: Advice, log: Log, output: pathlib.Path) -> list[str]:
    """Writes the files, and gives a line for each."""
    taken = ("source", "kind", "column", "loss_column", "step_column")
    document = {"log": {name: getattr(log, name) for name in taken}} | advice.as_dict()
    picture, data = output / "advice.png", output / "advice.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        _picture.write_png(advice, picture)
    except ModuleNotFoundError as error:
        return [str(data), f"no picture without {error.name}: pip install 'clipax[plot]'"]
    except OSError as error:
        _end(f"{output}: {error.strerror or error}.")
    return [str(data), str(picture)]
