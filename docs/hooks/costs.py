"""What a step costs with each method, from the kept figures of the benchmark."""

import functools
import json
import pathlib
import re
from typing import NamedTuple

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TREES = {"one leaf": "one leaf", "GPT-2 small": "GPT-2 small", "matrices": "eight matrices"}


class Cost(NamedTuple):
    """Of a step with one method, on one tree in float32."""

    row: str
    tree: str
    optimizer: str
    ratio: float
    """To the optimizer alone."""
    more: str
    """What the least step for this method moves besides what the optimizer moves."""
    over_limit: float


def section(name: str) -> str:
    """The cost of a method as a section of its page, if it was measured."""
    costs = _of(name)
    if not costs:
        return ""
    return "\n\n".join(
        [
            "## Cost",
            f"Measured on two cores of a CPU, in float32. The limit is a step of "
            f"{costs[0].optimizer} that moves what this method must and computes next to nothing. "
            f"Besides the optimizer, it moves {costs[0].more}. [Benchmarks](../benchmarks.md)",
            "\n".join(
                [
                    f"| gradients | over {costs[0].optimizer} alone | over the limit |",
                    "|---|---:|---:|",
                    *(f"| {TREES[cost.tree]} | {_cells(cost)} |" for cost in costs),
                ]
            ),
        ]
    )


def table(names: list[str]) -> str:
    """The costs of all methods: over the optimizer alone, and over the limit."""
    lines = [
        "| method | must move | one leaf | over limit | GPT-2 small | over limit |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in names:
        by_tree = {cost.tree: cost for cost in _of(name)}
        if by_tree.keys() & {"one leaf", "GPT-2 small"}:
            first = next(iter(by_tree.values()))
            cells = [_cells(by_tree.get(tree)) for tree in ("one leaf", "GPT-2 small")]
            lines.append(f"| [`{name}`](methods/{name}.md) | {first.more} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(cost: Cost | None) -> str:
    """Over the optimizer alone, and over the limit."""
    return " | " if cost is None else f"{cost.ratio:.2f} | {cost.over_limit:.2f}"


def _of(name: str) -> list[Cost]:
    """The costs behind Adam, or behind SGD where a method is not for Adam."""
    found = [cost for cost in _costs() if re.match(rf"{name}\b", cost.row)]
    behind_adam = [cost for cost in found if cost.optimizer == "Adam"]
    costs: dict[str, Cost] = {}
    for cost in behind_adam or found:
        costs.setdefault(cost.tree, cost)  # The first row of a table is the plain method.
    return list(costs.values())


@functools.cache
def _costs() -> tuple[Cost, ...]:
    document = json.loads((RESULTS / "cpu_step.json").read_text())
    costs = []
    for step in document["step"]:
        about, rows = step["about"], step["rows"]
        alone = next(row["median_s"] for row in rows if row["name"] == "alone")
        if about["dtype"] != "float32" or about["tree"] not in TREES:
            continue
        optimizer = "Adam" if about["optimizer"] == "adam" else "SGD"
        if about["group"] == "momentum":
            optimizer = "SGD with momentum"
        for row in rows:
            if row.get("limit") and "metrics" not in row["name"]:
                ratio = row["median_s"] / alone
                more = row["limit"].partition(", and ")[2] or "nothing"
                costs.append(
                    Cost(row["name"], about["tree"], optimizer, ratio, more, row["over_limit"])
                )
    return tuple(costs)
