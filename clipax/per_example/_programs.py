"""The inside of a JAX program: everything that clipax knows about it is in this module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from clipax._core._compat import CALLS, core
from clipax._core._typing import Array

Program: TypeAlias = "core.Jaxpr"
Equation: TypeAlias = "core.JaxprEqn"
Variable: TypeAlias = "core.Var"

# Like calls, rematerializations only wrap a program.
REMATS = {"checkpoint", "remat", "remat2"}

# These primitives return their operands. They change the mesh axes over which a type varies, the
# device of an array, or what a compiler may fuse.
_PASSING = {
    "copy",
    "copy_p",
    "layout_constraint",
    "optimization_barrier",
    "pvary",
    "reduced_vary_cast",
    "reduced_vary_cast_p",  # its name before jax 0.12
    "reshard",
    "sharding_constraint",
}


class Ref(NamedTuple):
    """A variable of a program, or of the body of one of its equations."""

    path: tuple[Any, ...]
    """The equations whose bodies enclose the variable, from the outermost. After a `cond` comes
    the number of the branch."""
    variable: Any


Values: TypeAlias = dict[Ref, Array]
"""Values of variables. Where a value differs between examples, they are its first axis."""


class Constant:
    """A literal of a program, which unlike JAX's own can be a key of a dict."""

    def __init__(self, literal: core.Literal):
        self.val, self.aval = literal.val, literal.aval


def is_variable(atom: Any) -> bool:
    return isinstance(atom, core.Var)


def shape_of(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def constant(atom: Any) -> Constant:
    return atom if isinstance(atom, Constant) else Constant(atom)


def ref(path: tuple[Equation, ...], atom: Any) -> Ref:
    """Refers to a variable by its path, and to a literal by none: it is the same everywhere."""
    return Ref(path, atom) if is_variable(atom) else Ref((), constant(atom))


def passes_on(equation: Equation) -> bool:
    """Whether an equation returns its operands unchanged, except for their types."""
    if equation.primitive.name == "convert_element_type":
        # Weak types matter only for promotion, and a program contains no promotions.
        before: Any = equation.invars[0].aval
        return bool(before.dtype == equation.params["new_dtype"])
    return equation.primitive.name in _PASSING


def has_mutable_arrays(program: Program) -> bool:
    """Whether a program, or a body that it calls, has a mutable array."""
    pending = [program]
    while pending:
        current = pending.pop()
        made = [variable for equation in current.eqns for variable in equation.outvars]
        if any(map(_is_mutable, (*current.constvars, *current.invars, *made))):
            return True
        bodies = map(body_of, current.eqns)
        pending += [body.program for body in bodies if body is not None]
    return False


def _is_mutable(variable: Any) -> bool:
    # This attribute marks the type of a mutable array, which has no public name in some of the
    # supported versions of JAX.
    return hasattr(variable.aval, "inner_aval")


class Body(NamedTuple):
    """The program inside an equation."""

    program: Program
    consts: tuple[Any, ...]
    is_scan: bool


def body_of(equation: Equation) -> Body | None:
    """The program inside a call or a scan; None for other equations."""
    name = equation.primitive.name
    if name not in CALLS | REMATS | {"scan"}:
        return None
    inside = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
    if isinstance(inside, core.ClosedJaxpr):
        return Body(inside.jaxpr, tuple(inside.consts), name == "scan")
    return Body(inside, (), name == "scan")


def branches_of(equation: Equation) -> list[Body]:
    """The programs of which a `cond` runs one; none for other equations."""
    # A platform, unlike an example, chooses before anything runs.
    if equation.primitive.name != "cond" or equation.params.get("branches_platforms"):
        return []
    closed = equation.params["branches"]
    return [Body(each.jaxpr, tuple(each.consts), False) for each in closed]


def bodies(equation: Equation) -> Iterator[Program]:
    """All programs inside an equation, of branches and loops too."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


class ScanLayout(NamedTuple):
    """The order of a scan's operands: constants, then carries, then stacks of its inputs."""

    consts: int
    carries: int

    @property
    def first_scanned(self) -> int:
        return self.consts + self.carries


def scan_layout(equation: Equation, body: Body) -> ScanLayout:
    """Reads the layout off the ranks: a stack has one axis less inside the scan."""

    def unscanned(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(outer, inner, strict=True)
        return sum(len(shape_of(one)) == len(shape_of(other)) for one, other in pairs)

    carries = unscanned(equation.outvars, body.program.outvars)
    return ScanLayout(unscanned(equation.invars, body.program.invars) - carries, carries)
