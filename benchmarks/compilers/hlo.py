"""Reads an optimized program as its compiler prints it."""

import functools
import math
import re
from typing import NamedTuple


class Operation(NamedTuple):
    """A line of a program: `%name = type kind(%operand, ...), calls=%called`."""

    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    called: str | None


Computations = dict[str, list[Operation]]

# A type is `f32[8,128]{1,0:T(8,128)}`, or several in parentheses: a kind comes after a space.
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
_HEADER = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_NO_KERNELS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


@functools.lru_cache(maxsize=8)
def computations(program: str) -> Computations:
    """The operations of each computation by its name; the main one is "ENTRY"."""
    bodies: Computations = {}
    for line in program.splitlines():
        if header := _HEADER.match(line):
            body = bodies.setdefault("ENTRY" if header[1] else header[2], [])
        elif found := _LINE.match(line):
            name, type_, kind, operands, rest = found.groups()
            called = re.search(r"calls=%([\w.-]+)", rest)
            names = tuple(re.findall(r"%([\w.-]+)", operands))
            body.append(Operation(name, type_, kind, names, called and called[1]))
    return bodies


def all_reduces(program: str) -> int:
    """How many the whole program has."""
    return count(program, "all-reduce")


def count(program: str, collective: str) -> int:
    """How many of these the whole program has; an asynchronous one counts once."""
    kinds = [operation.kind for body in computations(program).values() for operation in body]
    return kinds.count(collective) + kinds.count(f"{collective}-start")


def kernels(program: str) -> int:
    """How many the main computation launches."""
    return sum(each.kind not in _NO_KERNELS for each in computations(program)["ENTRY"])


def passes_for_a_reduction(program: str, sizes: set[int]) -> list[str]:
    """What reads an array with one of these numbers of elements only to reduce it.

    A matrix product that also sums the squares of what it makes is none of them, and
    neither is an update that reads a gradient and writes parameters. Branches are left
    out: they are not taken in every step.
    """
    bodies = computations(program)
    size_of = {operation.name: _sizes(operation.type) for operation in bodies["ENTRY"]}
    return [
        operation.name
        for operation in bodies["ENTRY"]
        if any(len(size_of[name]) == 1 and size_of[name] <= sizes for name in operation.operands)
        and not _sizes(operation.type) & sizes
        and _is_a_mere_reduction(_kinds(operation, bodies))
    ]


def _is_a_mere_reduction(kinds: set[str]) -> bool:
    return "reduce" in kinds and not kinds & {"dot", "convolution", "custom-call"}


def _kinds(operation: Operation, bodies: Computations) -> set[str]:
    """What an operation does, with what is fused into it."""
    inner = bodies[operation.called] if operation.called else []
    return {operation.kind}.union(*(_kinds(each, bodies) for each in inner))


def _sizes(type_: str) -> set[int]:
    """The numbers of elements of the arrays of a type."""
    shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", type_)
    return {math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes}
