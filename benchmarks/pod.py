# ruff: noqa: T201
"""What clipping adds to the training of a large decoder on a TPU pod, by its compiler.

    python -m benchmarks.pod [--quick] [--chips v5e v5p] [--only ROW ...] [--output FILE.json]

It needs the extra `tpu` and no TPU: its figures are those of the compiler, and no measurements.
The decoder has 7.5 billion parameters: 32 layers of width 4096 in one scan, each recomputed on
the way back. It is trained by AdamW. Parameters and batch are split over one mesh axis (FSDP),
heads and hidden entries over the other (tensor parallel). A program takes minutes to compile.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# A plug-in that finds no chip of its own would else stop the run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

import clipax
from benchmarks import timing
from benchmarks.compilers import hlo
from benchmarks.compilers.accelerators import tpu_slice, why_not

PODS = {"v5e": "v5e:16x16", "v5p": "v5p:8x8x4"}
_SMALL_PODS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
Shapes = dict[str, tuple[int, ...]]


class Size(NamedTuple):
    layers: int
    width: int
    heads: int
    words: int
    length: int
    batch: int
    side: int
    """How many chips each of the two mesh axes has."""


SIZE = Size(layers=32, width=4096, heads=32, words=131072, length=2048, batch=32, side=16)
QUICK = Size(layers=2, width=128, heads=2, words=256, length=64, batch=4, side=2)


class Row(NamedTuple):
    """A way to train: the optimizer, and where each example is clipped, its bound."""

    optimizer: optax.GradientTransformation
    max_norm: float | None = None
    microbatch_size: int | None = None


ALONE = "no clip"
_ADAMW = optax.adamw(1e-4)
_GLOBAL = optax.chain(clipax.clip_by_global_norm(1.0), _ADAMW)


def _layers(path: str, leaf: Any) -> int | None:
    """The axis along which layers are stacked; each has norms of its own."""
    del leaf
    return 0 if path.startswith("layers") else None


def _units(path: str, leaf: Any) -> Any:
    """The columns of the matrices of each layer."""
    return (0, -1) if path.startswith("layers") and leaf.ndim == 3 else _layers(path, leaf)


def rows(size: Size) -> dict[str, Row]:
    clips = {
        "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
        "clip_by_global_norm": clipax.clip_by_global_norm(1.0),
        "clip_by_leaf_norm": clipax.clip_by_leaf_norm(1.0, stack_axis=_layers),
        "adaptive_grad_clip": clipax.adaptive_grad_clip(0.01, unit_axis=_units),
        "adagc": clipax.adagc(stack_axis=_layers),
    }
    return {
        ALONE: Row(_ADAMW),
        **{name: Row(optax.chain(clip, _ADAMW)) for name, clip in clips.items()},
        "skip_step(clip_by_global_norm)": Row(clipax.skip_step(_GLOBAL, z_max=6.0)),
        "clipped_grad": Row(_ADAMW, max_norm=1.0),
        "clipped_grad, in parts": Row(_ADAMW, max_norm=1.0, microbatch_size=size.side),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pod", description=__doc__[:88])
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, to see that it runs")
    add("--chips", nargs="+", choices=PODS, default=list(PODS))
    add("--only", nargs="+", choices=rows(SIZE), default=list(rows(SIZE)), metavar="ROW")
    add("--output", type=Path, help="a JSON file; rows that it has already are not made again")
    arguments = parser.parse_args()
    if reason := why_not("tpu"):
        parser.error(reason)

    size = QUICK if arguments.quick else SIZE
    is_there = arguments.output is not None and arguments.output.exists()
    result = json.loads(arguments.output.read_text()) if is_there else {}
    about = {"jax": jax.__version__, "optax": optax.__version__, "size": size._asdict()}
    result = about | {"parameters": _parameter_count(size), "chips": result.get("chips", {})}
    for chip in arguments.chips:
        topology = (_SMALL_PODS if arguments.quick else PODS)[chip]
        table = result["chips"].setdefault(chip, {"topology": topology, "rows": {}})
        for name in arguments.only:
            if name in table["rows"]:
                continue
            table["rows"][name] = figures(rows(size)[name], size, topology)
            print(f"{chip}, {name}: {table['rows'][name]}", flush=True)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for table in result["chips"].values():
        print(f"\n{text(table, result)}")


# -- The decoder ----------------------------------------------------------------------------------

_DATA, _MODEL = "data", "model"


def shapes(size: Size) -> tuple[dict[str, Shapes], dict[str, dict[str, PartitionSpec]]]:
    """What the parameters are like, and how they are split."""
    layers, width = size.layers, size.width
    into, out_of = PartitionSpec(None, _DATA, _MODEL), PartitionSpec(None, _MODEL, _DATA)
    square, whole = (layers, width, width), PartitionSpec()
    matrices = {
        "query": (square, into),
        "key": (square, into),
        "value": (square, into),
        "output": (square, out_of),
        "up": ((layers, width, 4 * width), into),
        "down": ((layers, 4 * width, width), out_of),
    }
    parts = {
        "ends": {
            "embedding": ((size.words, width), PartitionSpec(_MODEL, _DATA)),
            "scale": ((width,), whole),
            "head": ((width, size.words), PartitionSpec(_DATA, _MODEL)),
        },
        "layers": {
            **matrices,
            "attention_scale": ((layers, width), whole),
            "mlp_scale": ((layers, width), whole),
        },
    }
    first, second = (
        {part: {name: each[which] for name, each in parts[part].items()} for part in parts}
        for which in (0, 1)
    )
    return first, second


def _parameter_count(size: Size) -> int:
    return sum(int(np.prod(shape)) for part in shapes(size)[0].values() for shape in part.values())


def example_loss(params: Any, tokens: jax.Array, size: Size, mesh: Mesh) -> jax.Array:
    """The loss of one text, in bfloat16 but for sums and logarithms."""
    # Under `vmap`, the axis of the examples is left to the compiler.
    whole = NamedSharding(mesh, PartitionSpec(None, None))

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        x = x + _attention(_normalized(x, weights["attention_scale"]), weights, size)
        hidden = jax.nn.gelu(_product(_normalized(x, weights["mlp_scale"]), weights["up"]))
        x = x + _product(hidden, weights["down"])
        return jax.lax.with_sharding_constraint(x, whole), None

    ends = params["ends"]
    x = ends["embedding"].astype(jnp.bfloat16)[tokens[:-1]]
    x = jax.lax.with_sharding_constraint(x, whole)
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    logits = _product(_normalized(x, ends["scale"]), ends["head"]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]))


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return x @ matrix.astype(jnp.bfloat16)


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide / size * scale).astype(jnp.bfloat16)


def _attention(x: jax.Array, weights: Any, size: Size) -> jax.Array:
    query, key, value = (
        _product(x, weights[name]).reshape(size.length, size.heads, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1]).astype(np.float32)
    causal = jnp.tril(jnp.ones((size.length, size.length), bool))
    weighed = jax.nn.softmax(jnp.where(causal, scores.astype(jnp.float32), -1e9))
    mixed = jnp.einsum("hqk,khd->qhd", weighed.astype(jnp.bfloat16), value)
    return _product(mixed.reshape(size.length, -1), weights["output"])


# -- Its step -------------------------------------------------------------------------------------


def compiled_step(row: Row, size: Size, mesh: Mesh) -> jax.stages.Compiled:
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return example_loss(params, tokens, size, mesh)

    def plain(params: Any, batch: jax.Array) -> Any:
        return jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, batch).mean())(params)

    def each_clipped(params: Any, batch: jax.Array) -> Any:
        clipped = clipax.clipped_grad(loss, row.max_norm, microbatch_size=row.microbatch_size)
        return clipped(params, batch)[0]

    gradient: Callable[[Any, Any], Any] = plain if row.max_norm is None else each_clipped
    params, batch = _placed(size, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        # As the parameters are: each chip reduces and clips its own part of a gradient.
        updates = jax.lax.with_sharding_constraint(gradient(params, batch), shardings)
        updates, state = row.optimizer.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    state = _placed_state(row.optimizer, params)
    # The new parameters and state are placed as the old, whose memory they take.
    out = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
    return jitted.lower(params, state, batch).compile()


def _placed(size: Size, mesh: Mesh) -> tuple[Any, jax.ShapeDtypeStruct]:
    def on_mesh(shape: tuple[int, ...], spec: PartitionSpec, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    of_shape, split = shapes(size)
    params = {
        part: {
            name: on_mesh(shape, split[part][name], jnp.float32) for name, shape in each.items()
        }
        for part, each in of_shape.items()
    }
    return params, on_mesh((size.batch, size.length + 1), PartitionSpec(_DATA), jnp.int32)


def _placed_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Moments are split as their leaf is, and the rest as `init` makes it."""
    of_params = {tuple(path): leaf for path, leaf in tree_flatten_with_path(params)[0]}

    def of_moment(path: Any, leaf: Any) -> Any:
        like = next((of_params[end] for end in _ends(path) if end in of_params), None)
        return like.sharding if like is not None and like.shape == leaf.shape else None

    moments = tree_map_with_path(of_moment, jax.eval_shape(optimizer.init, params))
    # Without the parameters, `init` would be compiled for a CPU.
    init = jax.jit(optimizer.init, keep_unused=True, out_shardings=moments).lower(params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        init.out_info,
        init.compile().output_shardings,
    )


def _ends(path: Any) -> list[Any]:
    return [tuple(path[start:]) for start in range(len(path))]


# -- Its figures ----------------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


def figures(row: Row, size: Size, topology: str) -> dict[str, Any]:
    mesh = Mesh(np.array(tpu_slice(topology)).reshape(size.side, size.side), (_DATA, _MODEL))
    start = time.perf_counter()
    try:
        compiled = compiled_step(row, size, mesh)
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses what does not fit into a chip.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error).splitlines()[0], "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    memory, program = compiled.memory_analysis(), compiled.as_text()
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "collectives": {kind: hlo.count(program, kind) for kind in COLLECTIVES},
        "seconds": round(seconds, 1),
    }


def text(table: dict[str, Any], about: dict[str, Any]) -> str:
    """Per chip, and what is added to a step without a clip."""
    made = table["rows"]
    base = made.get(ALONE)
    header = ("", "temp MiB", "added", "of tree", "all-reduces", "added", "seconds to compile")
    tree = 4 * about["parameters"] / about["size"]["side"] ** 2
    cells = [_cells(name, row, base, tree) for name, row in made.items()]
    count = about["parameters"] / 1e9
    title = f"A step of AdamW with {count:.3g} billion parameters, {table['topology']}, per chip"
    note = (
        f"Added: to {ALONE}. Of tree: of a chip's part of the parameters, {tree / 2**20:.1f} MiB."
    )
    return f"{title}\n{timing.columns([header, *cells])}\n{note}"


def _cells(
    name: str, row: dict[str, Any], base: dict[str, Any] | None, tree: float
) -> tuple[str, ...]:
    seconds = f"{row['seconds']:.0f}"
    if "refused" in row:
        return (name, "does not fit", "", "", "", "", seconds)
    temp, reduces = row["temporary_bytes"], row["collectives"]["all-reduce"]
    added, share, more = "", "", ""
    if base is not None and "refused" not in base:
        added = f"{(temp - base['temporary_bytes']) / 2**20:.1f}"
        share = f"{100 * (temp - base['temporary_bytes']) / tree:.1f} %"
        more = str(reduces - base["collectives"]["all-reduce"])
    return (name, f"{temp / 2**20:.1f}", added, share, str(reduces), more, seconds)


if __name__ == "__main__":
    main()
