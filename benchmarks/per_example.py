# ruff: noqa: T201
"""What clipping each example costs, next to the gradient of the batch and to other ways.

    python -m benchmarks.per_example [--quick] [--only mlp transformer decoder resnet]
                                     [--output FILE.json]

The ways are compiled before, run interleaved in one process, and have to give the same. Those
of packages that are not installed (jax_privacy, and Opacus with torch) are left out.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipax
from benchmarks import opacus_peer, reached, timing
from benchmarks.machine import is_gpu, line, machine
from benchmarks.per_example_models import MODELS, Model
from benchmarks.reached import Goal
from benchmarks.reproduce_shared import json_ready
from benchmarks.timing import Table, Work

# With the factors kept, as by default for all models but the decoder.
PLAIN, OURS, NORMS = "plain, not clipped", "clipax.clipped_grad", "clipax.per_example_norms"
IN_PARTS = "clipax.clipped_grad, in 4 parts"
TWICE = "clipax.clipped_grad, factors twice"
EACH = "vmap(grad), optax's clip"
PRIVACY = "jax_privacy.clipped_grad"
# The first are cheap and get many rounds, to tell small ratios apart.
CHEAP = (PLAIN, OURS, NORMS)
Gradient = Callable[[Any, Any], Any]


class Rounds(NamedTuple):
    cheap: int
    all: int


ROUNDS = {
    "mlp": Rounds(40, 4),
    "transformer": Rounds(6, 4),
    "decoder": Rounds(6, 4),
    "resnet": Rounds(20, 8),
}


def main() -> None:
    arguments = _arguments()
    # The load is read before anything here adds to it.
    result: dict[str, Any] = {"machine": machine() | _peers()}
    result["settings"] = {"quick": arguments.quick}
    print(line(result["machine"]), flush=True)
    for name in arguments.only:
        start = time.perf_counter()
        result[name] = run(name, arguments.quick)
        print(f"\n{name}: {time.perf_counter() - start:.0f} s, compilation too.", flush=True)
    found = [goal for name in arguments.only for goal in goals(name, result[name])]
    if arguments.quick:
        print("\nWhat follows is computed as ever, but of sizes that show nothing.")
    print(f"\n{reached.text(found)}")
    result["reached"] = [goal._asdict() | {"verdict": goal.verdict} for goal in found]
    if arguments.output is not None:
        text = json.dumps(json_ready(result), indent=1, allow_nan=False)
        arguments.output.write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.per_example", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, to see that it runs")
    add("--only", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    add("--output", type=Path, metavar="FILE", help="a JSON file for the figures")
    return parser.parse_args()


def _peers() -> dict[str, str]:
    installed = [name for name in ("jax_privacy", "opacus") if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in installed}


def run(name: str, is_quick: bool) -> list[Table]:
    """Shows and gives the tables of one model."""
    model = MODELS[name](is_quick)
    rounds = Rounds(2, 2) if is_quick else ROUNDS[name]
    norms = _compiled(clipax.per_example_norms(model.loss_fn), model)
    # A bound that half of the examples exceed.
    max_norm = float(jnp.median(norms(model.params, model.batch)))
    ways = {way: _compiled(each, model) for way, each in _ways(model, max_norm).items()}
    programs = {PLAIN: ways.pop(PLAIN), OURS: ways.pop(OURS), NORMS: norms} | ways
    notes = []
    if importlib.util.find_spec("jax_privacy"):
        programs[PRIVACY], note = _best_of_jax_privacy(model, max_norm)
        notes.append(note)
    else:
        notes.append(f"Without {PRIVACY}: jax_privacy is not installed.")
    differences = {way: _difference(way, programs, model) for way in programs if way != NORMS}
    tables = []
    for chosen, number in ((CHEAP, rounds.cheap), (tuple(programs), rounds.all)):
        works = {way: _work(programs[way], model) for way in chosen}
        seconds = timing.interleaved(works, number)
        made = timing.table(str(model), seconds, PLAIN, model=name, max_norm=max_norm)
        for row in made["rows"]:
            row["temp_bytes"] = _temp_bytes(programs[row["name"]])
            row["difference"] = differences.get(row["name"])
        tables.append(made | {"notes": []})
    tables[-1]["notes"] = notes
    if name == "mlp":
        tables += _torch_table(model, max_norm, programs, rounds.cheap)
    for table in tables:
        print(f"\n{text(table)}", flush=True)
    return tables


def _ways(model: Model, max_norm: float) -> dict[str, Gradient]:
    losses = jax.vmap(model.loss_fn, (None, 0))

    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda params: losses(params, batch).mean())(params)

    def each(params: Any, batch: Any) -> Any:
        gradients = jax.vmap(jax.grad(model.loss_fn), (None, 0))(params, batch)
        leaves, structure = jax.tree.flatten(gradients)
        sums, _ = optax.per_example_global_norm_clip(leaves, max_norm)
        return jax.tree.unflatten(structure, [leaf / model.examples for leaf in sums])

    clipped = clipax.clipped_grad(model.loss_fn, max_norm, memory="kept")
    in_parts = clipax.clipped_grad(model.loss_fn, max_norm, microbatch_size=model.examples // 4)
    twice = clipax.clipped_grad(model.loss_fn, max_norm, memory="twice")
    return {
        PLAIN: plain,
        OURS: lambda params, batch: clipped(params, batch)[0],
        IN_PARTS: lambda params, batch: in_parts(params, batch)[0],
        TWICE: lambda params, batch: twice(params, batch)[0],
        EACH: each,
    }


def _best_of_jax_privacy(model: Model, max_norm: float) -> tuple[Any, str]:
    """The fastest of its microbatch sizes, by two runs of each, and what the others took."""
    import jax_privacy

    sizes: list[int | None] = [4**power for power in range(10) if 4**power < model.examples]
    programs, seconds = {}, {}
    for size in [*sizes, None]:
        gradient = jax_privacy.clipped_grad(
            model.loss_fn,
            l2_clip_norm=max_norm,
            normalize_by=model.examples,
            keep_batch_dim=False,
            microbatch_size=size,
        )
        programs[size] = _compiled(gradient, model)
        run = _work(programs[size], model).run
        seconds[size] = min(timeit.repeat(lambda run=run: run(None), number=1, repeat=2))
        # Larger ones would take minutes a run, and are never the best then.
        if seconds[size] > 4 * min(seconds.values()):
            break
    best = min(seconds, key=seconds.__getitem__)
    taken = ", ".join(f"{size or 'unset'} {1e3 * took:.0f}" for size, took in seconds.items())
    note = f"{PRIVACY}: microbatch_size {best or 'unset'}; in ms, those tried: {taken}."
    return programs[best], note


def _compiled(function: Gradient, model: Model) -> Any:
    return jax.jit(function).lower(model.params, model.batch).compile()


def _work(program: Any, model: Model) -> Work:
    return Work(lambda _: jax.block_until_ready(program(model.params, model.batch)))


def _temp_bytes(program: Any) -> int | None:
    """As the compiler counts them."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _difference(way: str, programs: dict[str, Any], model: Model) -> float | None:
    """From the clipped gradients of `EACH`; that of the unclipped ones would say nothing."""
    if way in (PLAIN, EACH):
        return None
    wanted, got = (programs[each](model.params, model.batch) for each in (EACH, way))
    return _required_difference(got, wanted, way)


def _required_difference(got: Any, wanted: Any, way: str) -> float:
    """The largest, as a share of the leaf's largest entry."""
    shares = [
        np.abs(np.asarray(one) - other).max() / max(np.abs(other).max(), 1e-30)
        for one, other in zip(jax.tree.leaves(got), _arrays(wanted), strict=True)
    ]
    largest = float(max(shares))
    # A GPU rounds the inputs of its products to TensorFloat-32.
    if not largest < (2e-2 if is_gpu() else 1e-4):
        raise AssertionError(f"{way} gives other gradients: {largest:.1e} of the largest entry.")
    return largest


def _arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _torch_table(
    model: Model, max_norm: float, programs: dict[str, Any], rounds: int
) -> list[Table]:
    """Opacus, and how far from plain torch it is."""
    missing = opacus_peer.why_not()
    if missing:
        print(f"\nWithout Opacus: {missing}.")
        return []
    peers = opacus_peer.works(model, max_norm)
    # It divides the sum of the examples later, in its optimizer.
    sums = opacus_peer.gradients(peers[opacus_peer.GHOST], model)
    wanted = programs[EACH](model.params, model.batch)
    got = jax.tree.map(lambda leaf: leaf / model.examples, sums)
    difference = _required_difference(got, wanted, opacus_peer.GHOST)
    # By themselves: threads of one library spin for a while, when the other's would run.
    seconds = timing.interleaved(peers, rounds)
    about = {"model": "mlp", "max_norm": max_norm}
    made = timing.table(f"{model}, by torch", seconds, opacus_peer.PLAIN, **about)
    for row in made["rows"]:
        row["temp_bytes"] = None
        row["difference"] = difference if row["name"] == opacus_peer.GHOST else None
    return [made | {"notes": []}]


def text(table: Table) -> str:
    base = table["rows"][0]["temp_bytes"]
    header = ("", "median ms", "q1", "q3", "ratio", "temp MiB", "ratio", "difference", "runs")
    cells = []
    for row in table["rows"]:
        temp, difference = row["temp_bytes"], row["difference"]
        cells.append(
            (
                row["name"],
                *(f"{1e3 * row[f'{key}_s']:.2f}" for key in ("median", "q1", "q3")),
                f"{row['ratio']:.2f}",
                "" if temp is None else f"{temp / 2**20:.2f}",
                f"{temp / base:.2f}" if temp is not None and base else "",
                "" if difference is None else f"{difference:.0e}",
                str(row["runs"]),
            )
        )
    about = table["about"]
    notes = [
        f"Ratio: to {table['baseline']}. Bound: {about['max_norm']:.3g}, the median of the norms.",
        *table["notes"],
    ]
    return "\n".join([table["title"], timing.columns([header, *cells]), *notes])


def goals(name: str, tables: list[Table]) -> Iterator[Goal]:
    """What the library must reach, held against the tables of one model."""
    cheap, all_ways = tables[:2]
    missing = "" if timing.median_of(all_ways, PRIVACY) else "jax_privacy is not installed"

    def time_over(
        table: Table, other: str, bar: float, why_not: str = "", one: str = OURS, **kind: bool
    ) -> Goal:
        ratio = timing.ratio_of(table, one, other)
        return Goal(f"{one} over {other}, time", name, ratio, bar, why_not=why_not, **kind)

    def memory_over(other: str, bar: float, one: str = OURS, **kind: bool) -> Goal:
        sizes = {row["name"]: row["temp_bytes"] for row in all_ways["rows"]}
        known = sizes[one] is not None and sizes[other]
        ratio = sizes[one] / sizes[other] if known else None
        return Goal(f"{one} over {other}, temp memory", name, ratio, bar, **kind)

    if name == "mlp":
        yield time_over(cheap, PLAIN, 1.15)
        yield memory_over(PLAIN, 2.0)
        yield time_over(all_ways, EACH, 1 / 50)
        yield memory_over(EACH, 1 / 100)
        yield time_over(all_ways, PRIVACY, 1 / 10, missing)
    elif name == "transformer":
        for one in (OURS, IN_PARTS):
            yield time_over(all_ways, EACH, 1.0, one=one, is_strict=True)
            yield memory_over(EACH, 1 / 4, one, is_strict=True)
    elif name == "decoder":
        yield time_over(all_ways, PLAIN, 2.2, one=TWICE)
        yield memory_over(PLAIN, 1.5, TWICE)
    else:
        yield time_over(all_ways, EACH, 1.0)


if __name__ == "__main__":
    main()
