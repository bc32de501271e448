"""Scopes, which say where each variable of a program comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from clipax.per_example import _programs
from clipax.per_example._dependence import depending, inputs_of_body
from clipax.per_example._programs import Body, Equation, Program, Ref, is_variable, shape_of
from clipax.per_example._terms import Axis, Operand, Terms, Whole


class Scope:
    """A program, or the body of one of its equations inside the scope that encloses it."""

    def __init__(
        self,
        program: Program,
        depends: Sequence[bool] | None,
        path: tuple[Any, ...] = (),
        outer: Scope | None = None,
        *,
        is_step: bool = False,
        is_branch: bool = False,
    ):
        """Reads the program.

        Args:
          program: The program.
          depends: Which of its inputs depend on the example; None if every variable does.
          path: As that of a `Ref`.
          outer: The enclosing scope.
          is_step: Whether the program is the body of a scan.
          is_branch: Whether it is a branch, whose values are zero where it is not chosen.
        """
        self.program, self.path, self.outer = program, path, outer
        self.is_step, self.is_branch = is_step, is_branch
        self.is_in_steps: bool = is_step or (outer is not None and outer.is_in_steps)
        self.inputs = {variable: index for index, variable in enumerate(program.invars)}
        self.made_by: dict[Any, tuple[Equation, int]] = {}
        self.terms: dict[Any, Terms] = {}
        """The terms of the variables that the walk has visited."""
        self._bodies: dict[Any, Scope] = {}
        self._origins: dict[Any, Origin] = {}
        self._numbers: dict[Any, Origin] = {}
        for equation in program.eqns:
            for position, variable in enumerate(equation.outvars):
                self.made_by[variable] = (equation, position)
        self.is_mutable = outer is None and _programs.has_mutable_arrays(program)
        # An example can write to a mutable array at one place and read it at any other.
        self.is_all_depending = self.is_mutable or depends is None
        everything = {*program.constvars, *self.inputs, *self.made_by}
        self.depending = everything if self.is_all_depending else depending(program, depends or ())

    def maker(self, atom: Any) -> tuple[Equation | None, int]:
        """The equation that makes a variable, with the position among its outputs."""
        return self.made_by.get(atom, (None, 0)) if is_variable(atom) else (None, 0)

    def caller(self, atom: Any) -> Origin | None:
        """The operand of a call that is an input of its body; None for other variables."""
        is_call = self.outer is not None and not self.is_step and not self.is_branch
        if self.outer is None or not is_call or atom not in self.inputs:
            return None
        return self.outer, self.path[-1].invars[self.inputs[atom]]

    def origin(self, atom: Any) -> Origin:
        """Follows a value back through calls and changes of type."""
        return _followed((self, atom), _passed_on, lambda scope: scope._origins)

    def number(self, atom: Any) -> Origin | None:
        """The scalar that fills an array, or None if its entries may differ."""
        place = _followed((self, atom), _repeated, lambda scope: scope._numbers)
        return None if place[1].aval.ndim else place

    def vector(self, atom: Any) -> tuple[Origin, int] | None:
        """The vector that makes an array, repeated or not, with its axis there."""
        scope, atom = self.origin(atom)
        places = list(range(len(shape_of(atom))))
        equation, _ = scope.maker(atom)
        while equation is not None and equation.primitive.name == "broadcast_in_dim":
            places = [places[axis] for axis in equation.params["broadcast_dimensions"]]
            scope, atom = scope.origin(equation.invars[0])
            equation, _ = scope.maker(atom)
        longer = [place for place, size in zip(places, shape_of(atom), strict=True) if size != 1]
        return ((scope, atom), longer[0]) if len(longer) == 1 else None

    def depends_on_example(self, variable: Any) -> bool:
        return is_variable(variable) and variable in self.depending

    def inside(self, equation: Equation, body: Body) -> Scope:
        if id(equation) not in self._bodies:
            flags = list(map(self.depends_on_example, equation.invars))
            depends = None if self.is_all_depending else inputs_of_body(equation, body, flags)
            path = (*self.path, equation)
            inside = Scope(body.program, depends, path, self, is_step=body.is_scan)
            self._bodies[id(equation)] = inside
        return self._bodies[id(equation)]

    def branch(self, equation: Equation, number: int, body: Body) -> Scope:
        """One branch of a `cond`."""
        key = id(equation), number
        if key not in self._bodies:
            index, *operands = map(self.depends_on_example, equation.invars)
            # An example that chooses another branch has zeros here.
            depends = None if index else operands
            path = (*self.path, equation, number)
            self._bodies[key] = Scope(body.program, depends, path, self, is_branch=True)
        return self._bodies[key]

    def whole(self, variable: Any, why: str) -> tuple[Whole]:
        return (Whole(self.ref(variable), self.depends_on_example(variable), why),)

    def ref(self, atom: Any) -> Ref:
        return _programs.ref(self.path, atom)

    def operand(self, atom: Any, axes: Sequence[Axis], *preparations: Any) -> Operand:
        return self.naming(Operand(self.ref(atom), False, (), tuple(axes), preparations), atom)

    def naming(self, operand: Operand, atom: Any) -> Operand:
        """Refers an operand to a value of this scope, or to the outer value that was passed in."""
        here: Scope = self
        while is_variable(atom) and (outside := here.caller(atom)):
            here, atom = outside
        return operand._replace(ref=here.ref(atom), depends=here.depends_on_example(atom))


Origin: TypeAlias = tuple[Scope, Any]
"""A variable or a constant in its scope."""


def _followed(
    place: Origin,
    link: Callable[[Scope, Any], Origin | None],
    known: Callable[[Scope], dict[Any, Origin]],
) -> Origin:
    """The end of a chain of links. Every variable on the chain remembers it."""
    passed = []
    following: Origin | None = place
    while following is not None:
        place = following
        scope, atom = place
        if not is_variable(atom):
            place = scope, _programs.constant(atom)
            break
        if atom in known(scope):
            place = known(scope)[atom]
            break
        passed.append(place)
        following = link(scope, atom)
    for scope, atom in passed:
        known(scope)[atom] = place
    return place


def _passed_on(scope: Scope, variable: Any) -> Origin | None:
    equation, position = scope.maker(variable)
    if equation is None:
        return scope.caller(variable)
    body = _programs.body_of(equation)
    if body is not None:
        inside = (scope.inside(equation, body), body.program.outvars[position])
        return None if body.is_scan else inside
    return (scope, equation.invars[position]) if _programs.passes_on(equation) else None


# They turn an array that is filled with one number into another such array.
_REPEATING = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "rev", "slice"}


def _repeated(scope: Scope, variable: Any) -> Origin | None:
    before = _passed_on(scope, variable)
    equation, _ = scope.maker(variable)
    if before is not None or not variable.aval.ndim or equation is None:
        return before
    is_repeating = equation.primitive.name in _REPEATING
    return (scope, equation.invars[0]) if is_repeating else None
