"""Time per byte of the clip, and of one read, against the size of the tree."""

from collections.abc import Callable, Iterator

import jax

from benchmarks import machine, timing, workloads
from benchmarks.methods import CLIPS
from benchmarks.settings import Settings
from benchmarks.timing import Table, Work
from benchmarks.work_clip import PROGRAMS, READS, Clip
from benchmarks.workloads import Tree

CLIP, READ = "clip_by_global_norm", READS[0]
_LARGEST_LEAF = 2**26
# The gradients, the copy that is clipped, and as much again for what else runs.
_COPIES = 4
# Below, a processor's caches hold the tree from one pass to the next.
FLAT_FROM = 2**27


def sizes(is_quick: bool) -> list[int]:
    return [2**16, 2**17] if is_quick else [2**power for power in range(20, 33, 2)]


def run(settings: Settings, show: Callable[[str], None]) -> Iterator[Table]:
    is_quick = settings.is_quick
    tables, notes = [], []
    for size in sizes(is_quick):
        available = machine.available_bytes()
        if available is not None and _COPIES * size > available:
            free = f"{available / 2**30:.1f} GiB"
            notes = [
                f"Larger than {sizes(is_quick)[len(tables) - 1] / 2**20:g} MiB: not run, "
                f"{free} of memory are left."
            ]
            break
        tables.append(_table(size, is_quick))
    show(text(tables, notes))
    if tables:
        tables[-1]["notes"] = notes
    yield from tables


def _table(size: int, is_quick: bool) -> Table:
    tree = _tree(size)
    pristine = workloads.gradients(tree)
    clip = Clip(CLIPS["global"][CLIP], pristine, None, donates=True)
    read = Work(lambda updates: jax.block_until_ready(PROGRAMS[READ](updates)), clip.work.prepare)
    works = {CLIP: clip.work, READ: read}
    rounds = 2 if is_quick else 8 if size > 2**29 else 20 if size > 2**25 else 100
    seconds = timing.interleaved(works, rounds)
    title = f"Clip alone, donated: {tree}"
    about = {"bytes": tree.bytes, "leaves": len(tree.shapes)}
    made = timing.table(title, seconds, READ, work="scaling", **about)
    for row in made["rows"]:
        row["ps_per_byte"] = 1e12 * row["median_s"] / tree.bytes
    return made | {"notes": []}


def _tree(size: int) -> Tree:
    """Leaves of at most 64 MiB."""
    count = max(1, size // _LARGEST_LEAF)
    shape = (size // count // 4096, 1024)
    return Tree(f"{size / 2**20:g} MiB", {f"leaf_{row}": shape for row in range(count)}, "float32")


def flatness(tables: list[Table], name: str) -> float | None:
    """The largest time per byte over the smallest, where caches do not hold the tree."""
    big = [table for table in tables if table["about"]["bytes"] >= FLAT_FROM]
    times = [row["ps_per_byte"] for table in big for row in table["rows"] if row["name"] == name]
    return max(times) / min(times) if len(times) > 1 else None


def text(tables: list[Table], notes: list[str]) -> str:
    header = ("MiB", "leaves", "clip ps/byte", "read ps/byte", "ratio", "runs")
    cells = []
    for table in tables:
        clip, read = table["rows"]
        about = table["about"]
        cells.append(
            (
                f"{about['bytes'] / 2**20:g}",
                str(about["leaves"]),
                *(f"{row['ps_per_byte']:.1f}" for row in (clip, read)),
                f"{clip['ratio']:.2f}",
                str(clip["runs"]),
            )
        )
    flat = flatness(tables, CLIP), flatness(tables, READ)
    if None not in flat:
        notes = [
            f"From {FLAT_FROM / 2**20:g} MiB on, the largest time per byte over the smallest:"
            f" clip {flat[0]:.2f}, read {flat[1]:.2f}.",
            *notes,
        ]
    title = "Time per byte, float32, clip donated"
    return "\n".join([title, timing.columns([header, *cells]), "Ratio: to one read.", *notes])
