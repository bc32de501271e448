"""What the library must reach, held against what was measured."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from benchmarks import timing, torch_peer, work_compile
from benchmarks.limits import READ_ONCE
from benchmarks.methods import (
    ALONE,
    GLOBAL,
    GROUPS,
    NOTHING_ABOVE,
    OBSERVED,
    OPTAX_GLOBAL,
    READ,
    SCALED,
    SKIPPED,
    SPECTRAL,
    STABLE_ADAM,
)
from benchmarks.timing import Table
from benchmarks.work_clip import LIMIT
from benchmarks.workloads import BIG, SMALL

Results = dict[str, list[Table]]
OPTAX_RMS, AGC = "optax.clip_by_block_rms", "adaptive_grad_clip"
DTYPES = ("float32", "bfloat16")


class Goal(NamedTuple):
    work: str
    where: str
    ratio: float | None
    bar: float
    limit: float | None = None
    """What the least that can be done comes to, in the same run."""
    why_not: str = ""
    """Why there is no ratio."""
    is_strict: bool = False

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return f"not measured: {self.why_not or 'not run'}"
        under = self.ratio < self.bar if self.is_strict else self.ratio <= self.bar
        return "reached" if under else "not reached"


def goals(results: Results, is_gpu: bool) -> list[Goal]:
    """Those of the works that ran."""
    parts = {
        "step": (partial(_adam, is_gpu=is_gpu), _histories, _metrics, _own_limits, _over_peers),
        "clip": (partial(_torch, is_gpu=is_gpu), partial(_leaves, is_gpu=is_gpu), _small),
        "compile": (_compilation, _compilation_of_many),
        "memory": (_memory, _memory_of_wrappers),
    }
    ran = (part for work, each in parts.items() if work in results for part in each)
    return [goal for part in ran for goal in part(results)]


def _adam(results: Results, is_gpu: bool) -> Iterator[Goal]:
    on, off = ("GPU", "CPU") if is_gpu else ("CPU", "GPU")
    for table in _big(results, "step", optimizer="adam", group="global"):
        ratio = timing.ratio_of(table, GLOBAL, ALONE)
        limit = timing.ratio_of(table, READ_ONCE, ALONE)
        yield Goal(f"Adam + {GLOBAL} over Adam alone, {on}", _where(table), ratio, 1.15, limit)
        if is_gpu:
            ratio = timing.ratio_of(table, GLOBAL, OPTAX_GLOBAL)
            yield Goal(f"the same over optax's, {on}", _where(table), ratio, 1.0)
    yield Goal(
        f"Adam + {GLOBAL} over Adam alone, {off}", "big trees", None, 1.15, why_not=_without(off)
    )
    if not is_gpu:
        yield Goal(f"the same over optax's, {off}", "big trees", None, 1.0, why_not=_without(off))


def _without(device: str) -> str:
    read = "; tests/test_cuda.py reads the compiled programs" if device == "GPU" else ""
    return f"no {device}{read}"


def _torch(results: Results, is_gpu: bool) -> Iterator[Goal]:
    on, off = ("GPU", "CPU") if is_gpu else ("CPU", "GPU")
    work = "clip over torch's clip_grad_norm_"
    for table in _find(results, "clip", group="global", donated=True):
        ratio = timing.ratio_of(table, GLOBAL, torch_peer.NAME)
        limit = timing.ratio_of(table, LIMIT, torch_peer.NAME)
        why_not = torch_peer.why_not()
        yield Goal(f"{work}, {on}", _where(table), ratio, 0.8, limit, why_not)
    yield Goal(f"{work}, {off}", "all trees", None, 0.8, why_not=_without(off))


def _leaves(results: Results, is_gpu: bool) -> Iterator[Goal]:
    pairs = {
        ("leaf", "clip_by_leaf_norm"): OPTAX_RMS,
        ("leaf", "clip_by_block_rms"): OPTAX_RMS,
        ("unit", AGC): f"optax.{AGC}",
    }
    for (group, ours), theirs in pairs.items():
        for table in _find(results, "clip", group=group, donated=True):
            ratio, limit = (timing.ratio_of(table, name, theirs) for name in (ours, LIMIT))
            bar = 1.0 if is_gpu else 0.8
            yield Goal(f"{ours} over {theirs}", _where(table), ratio, bar, limit)


def _histories(results: Results) -> Iterator[Goal]:
    for table in _find(results, "step", optimizer="adam", group="scalar history"):
        methods = [name for name in GROUPS["scalar history"].rows if name not in (ALONE, GLOBAL)]
        ratios = {name: timing.ratio_of(table, name, GLOBAL) for name in methods}
        slowest = max(ratios, key=lambda name: ratios[name] or 0.0)
        work = f"scalar history ({slowest}, the slowest of {len(ratios)}) over {GLOBAL}, with Adam"
        yield Goal(work, _where(table), ratios[slowest], 1.05)


def _metrics(results: Results) -> Iterator[Goal]:
    for table in _find(results, "step", optimizer="adam", group="metrics"):
        ratio = timing.ratio_of(table, READ, "clip_by_leaf_norm")
        yield Goal("Adam with metrics(per_leaf=True) over without", _where(table), ratio, 1.02)


def _own_limits(results: Results) -> Iterator[Goal]:
    """The slowest of each group; singular values are no matter of what is moved."""
    for table in results["step"]:
        group = table["about"]["group"]
        is_adam = table["about"]["optimizer"] in GROUPS[group].optimizers[:1]
        ratios = {
            row["name"]: row["over_limit"]
            for row in table["rows"]
            if "limit" in row and not row["name"].startswith("optax.")
        }
        if ratios and is_adam and group != SPECTRAL:
            slowest = max(ratios, key=ratios.__getitem__)
            work = f"a step over its own limit ({slowest}, the slowest of {len(ratios)})"
            yield Goal(work, _where(table), ratios[slowest], 1.3)


_OVER_PEERS = (
    ("wrappers", SKIPPED, GLOBAL, 1.15),
    ("wrappers", OBSERVED, GLOBAL, 1.25),
    ("moments", STABLE_ADAM, ALONE, 1.35),
    (SPECTRAL, NOTHING_ABOVE, ALONE, 2.0),
)


def _over_peers(results: Results) -> Iterator[Goal]:
    names = {ALONE: "Adam alone", GLOBAL: f"{GLOBAL}, with Adam"}
    for group, ours, theirs, bar in _OVER_PEERS:
        work = f"{ours} over {names[theirs]}"
        tables = _find(results, "step", optimizer="adam", group=group)
        for table in tables:
            yield Goal(work, _where(table), timing.ratio_of(table, ours, theirs), bar)
        if not tables:
            yield Goal(work, "", None, bar)


def _small(results: Results) -> Iterator[Goal]:
    for table in _find(results, "clip", group="global", donated=True, tree=SMALL):
        ratio, limit = (timing.ratio_of(table, name, OPTAX_GLOBAL) for name in (GLOBAL, LIMIT))
        yield Goal(f"{GLOBAL} over optax's", _where(table), ratio, 0.7, limit)


def _compilation(results: Results) -> Iterator[Goal]:
    tables = [t for t in _find(results, "compile", group="global") if t["baseline"] == "optax"]
    if tables:
        table = max(tables, key=lambda each: each["about"]["leaves"])
        table = next((t for t in tables if t["about"]["leaves"] == 1000), table)
        ratio = timing.ratio_of(table, "clipax", "optax")
        where = f"{table['about']['leaves']} leaves, {table['about']['dtype']}"
        yield Goal("compile time over optax's", where, ratio, 0.2)


def _compilation_of_many(results: Results) -> Iterator[Goal]:
    """The slowest of those with a norm for each leaf, and with a memory for each entry."""
    for group, peer, bar in (("leaf", work_compile.OPTAX_RMS, 1.0), ("entry", "optax.adam", 3.0)):
        for table in _find(results, "compile", group=group):
            ratios = {row["name"]: row["ratio"] for row in table["rows"] if row["name"] != peer}
            slowest = max(ratios, key=ratios.__getitem__)
            work = f"init, trace, compile ({slowest}, the slowest of {len(ratios)}) over {peer}"
            is_there = table["baseline"] == peer
            where = f"{table['about']['leaves']} leaves, {table['about']['dtype']}"
            why_not = f"{peer} takes minutes"
            yield Goal(work, where, ratios[slowest] if is_there else None, bar, why_not=why_not)


def _memory_of_wrappers(results: Results) -> Iterator[Goal]:
    for table in _find(results, "memory", group="wrappers"):
        for name in (SKIPPED, OBSERVED):
            row = next(row for row in table["rows"] if row["name"] == name)
            work = f"temp memory of {name} over {GLOBAL}, share of the tree"
            yield Goal(work, _where(table), row["temp_share"], 0.01, is_strict=True)


def _memory(results: Results) -> Iterator[Goal]:
    for table in _find(results, "memory", group="global"):
        rows = {row["name"]: row for row in table["rows"]}
        for kind in ("temp", "peak"):
            if kind == "temp" or "peak_bytes" in rows[GLOBAL]:
                share, limit = (rows[name][f"{kind}_share"] for name in (GLOBAL, SCALED))
                work = f"{kind} memory over Adam alone, share of the tree"
                yield Goal(work, _where(table), share, 0.01, limit, is_strict=True)


def _big(results: Results, work: str, **about: Any) -> list[Table]:
    return [t for t in _find(results, work, **about) if t["about"]["tree"] in BIG]


def _find(results: Results, work: str, **about: Any) -> list[Table]:
    return [t for t in results.get(work, []) if about.items() <= t["about"].items()]


def _where(table: Table) -> str:
    return f"{table['about']['tree']}, {table['about']['dtype']}"


def text(rows: list[Goal]) -> str:
    def number(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.3f}"

    header = ("What it must reach", "where", "ratio", "limit", "bar", "verdict")
    cells = [
        (
            goal.work,
            goal.where,
            number(goal.ratio),
            number(goal.limit),
            f"{'<' if goal.is_strict else '<='} {goal.bar:g}",
            goal.verdict,
        )
        for goal in rows
    ]
    return timing.columns([header, *cells], left=2)
