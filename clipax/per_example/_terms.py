"""What a gradient is made of: terms, and where they stand in its program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from clipax._core._typing import Array
from clipax.per_example import _programs
from clipax.per_example._preparations import padded
from clipax.per_example._programs import Body, Equation, Program, Ref, is_variable


class Axis:
    """An axis of an operand. Operands of a product that share it are multiplied along it."""

    def __init__(self, size: int):
        self.size = size


class Operand(NamedTuple):
    """A factor of a product: a value of the program, and what is done to it first."""

    ref: Ref
    depends: bool
    """Whether it differs from example to example."""
    stacked: tuple[Axis, ...]
    """Its leading axes, of the scans round it."""
    axes: tuple[Axis, ...]
    """The others, after the preparations."""
    preparations: tuple[Callable[[Array], Array], ...] = ()
    """Functions of the value without its stacked axes."""

    @property
    def all_axes(self) -> tuple[Axis, ...]:
        return self.stacked + self.axes

    def prepared(self, value: Array) -> Array:
        for preparation in self.preparations:
            value = mapped(preparation, len(self.stacked))(value)
        return value


class Product(NamedTuple):
    """`sum over the axes that are not in out of lhs * rhs`, its entries then moved."""

    lhs: Operand
    rhs: Operand
    out: tuple[Axis, ...]
    moves: tuple["Move", ...] = ()
    """What keeps the entries, and so the norm."""
    one_hot: Axis | None = None
    """The axis along which `lhs`, of integers, tells the place of a one among zeros."""
    scale: float = 1.0
    factors: tuple[Operand, ...] = ()
    """Scalars that it is multiplied by, too: one, or one a step of a scan."""
    precision: Any = None


class Whole(NamedTuple):
    """A value of the program as it is."""

    ref: Ref
    depends: bool
    why: str


class Passed(NamedTuple):
    """In a body, the operand at a position as it is."""

    position: int


Term: TypeAlias = Product | Whole | Passed
Terms: TypeAlias = tuple[Term, ...]


class Move(NamedTuple):
    """A function that moves entries; two are equal if they do the same."""

    name: str
    arguments: Any

    def __call__(self, value: Array) -> Array:
        if self.name == "mapped":
            return jax.vmap(self.arguments)(value)
        if self.name == "pad":
            return padded(value, self.arguments)
        return getattr(jax.lax, self.name)(value, *self.arguments)

    def after(self, moves: tuple["Move", ...]) -> tuple["Move", ...]:
        """Appends this move to others, and joins it with the last one if both are of a kind."""
        if not moves or moves[-1].name != self.name:
            return (*moves, self)
        (*before, last) = moves
        if self.name == "reshape":
            return (*before, self)
        if self.name == "rev":
            (dimensions,), (others,) = self.arguments, last.arguments
            both = tuple(sorted({*dimensions} ^ {*others}))
            return (*before, Move("rev", (both,))) if both else tuple(before)
        if self.name == "transpose":
            (permutation,), (first,) = self.arguments, last.arguments
            both = tuple(first[axis] for axis in permutation)
            is_nothing = both == tuple(range(len(both)))
            return tuple(before) if is_nothing else (*before, Move("transpose", (both,)))
        return (*moves, self)


def mapped(function: Callable[[Array], Array], times: int) -> Callable[[Array], Array]:
    """The function over some leading axes."""
    for _ in range(times):
        function = jax.vmap(function)
    return function


class Scope:
    """A program, or the body of one of its equations, and what is round it."""

    def __init__(
        self,
        program: Program,
        depends: Sequence[bool],
        path: tuple[Equation, ...] = (),
        outer: "Scope | None" = None,
        is_step: bool = False,
    ):
        self.program, self.path, self.outer, self.is_step = program, path, outer, is_step
        self.inputs = {variable: index for index, variable in enumerate(program.invars)}
        self.made_by: dict[Any, tuple[Equation, int]] = {}
        self.terms: dict[Any, Terms] = {}
        """The terms of variables that a walk has visited."""
        self._bodies: dict[int, Scope] = {}
        self._origins: dict[Any, Origin] = {}
        self._numbers: dict[Any, Origin] = {}
        for equation in program.eqns:
            for position, variable in enumerate(equation.outvars):
                self.made_by[variable] = (equation, position)
        self.is_mutable = outer is None and _programs.has_mutable_arrays(program)
        self.depending = self._depending(depends)

    def _depending(self, depends: Sequence[bool]) -> set[Any]:
        if self.is_mutable:
            # An example can write to an array here, and read from it anywhere.
            return {*self.inputs, *self.made_by}
        found = {
            variable for variable, flag in zip(self.program.invars, depends, strict=True) if flag
        }
        for equation in self.program.eqns:
            if any(is_variable(operand) and operand in found for operand in equation.invars):
                found.update(equation.outvars)
        return found

    def maker(self, atom: Any) -> tuple[Equation | None, int]:
        """The equation that makes a variable, and at which of its outputs."""
        return self.made_by.get(atom, (None, 0)) if is_variable(atom) else (None, 0)

    def caller(self, atom: Any) -> "Origin | None":
        """Returns the argument that a call gets for an input of its body."""
        if self.outer is None or self.is_step or atom not in self.inputs:
            return None
        return self.outer, self.path[-1].invars[self.inputs[atom]]

    def origin(self, atom: Any) -> "Origin":
        """Returns the variable that a value comes from, behind calls and changes of type."""
        return _followed((self, atom), _passed_on, lambda scope: scope._origins)

    def number(self, atom: Any) -> "Origin | None":
        """Returns the scalar that fills an array, or None if its entries may differ."""
        place = _followed((self, atom), _repeated, lambda scope: scope._numbers)
        return None if place[1].aval.ndim else place

    def depends_on_example(self, variable: Any) -> bool:
        return is_variable(variable) and variable in self.depending

    def inside(self, equation: Equation, body: Body) -> "Scope":
        if id(equation) not in self._bodies:
            # A scan passes what one step makes of an example on to all others.
            anything = any(map(self.depends_on_example, equation.invars))
            each = [self.depends_on_example(operand) for operand in equation.invars]
            depends = [anything] * len(each) if body.is_scan else each
            path = (*self.path, equation)
            inside = Scope(body.program, depends, path, self, body.is_scan)
            self._bodies[id(equation)] = inside
        return self._bodies[id(equation)]

    def whole(self, variable: Any, why: str) -> tuple[Whole]:
        return (Whole(self.ref(variable), self.depends_on_example(variable), why),)

    def ref(self, atom: Any) -> Ref:
        return _programs.ref(self.path, atom)

    def operand(self, atom: Any, axes: Sequence[Axis], *preparations: Any) -> Operand:
        return self.naming(Operand(self.ref(atom), False, (), tuple(axes), preparations), atom)

    def naming(self, operand: Operand, atom: Any) -> Operand:
        """Names an operand by a value of this scope, or of the scope that passed it in."""
        here: Scope = self
        while is_variable(atom) and (outside := here.caller(atom)):
            here, atom = outside
        return operand._replace(ref=here.ref(atom), depends=here.depends_on_example(atom))


Origin: TypeAlias = tuple[Scope, Any]
"""A variable or a constant, and its scope."""


def _followed(
    place: Origin,
    link: Callable[[Scope, Any], Origin | None],
    known: Callable[[Scope], dict[Any, Origin]],
) -> Origin:
    """Returns the end of a chain of links. Every variable on it remembers that end."""
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


# Primitives that turn an array filled with one number into another such array.
_REPEATING = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "rev", "slice"}


def _repeated(scope: Scope, variable: Any) -> Origin | None:
    before = _passed_on(scope, variable)
    equation, _ = scope.maker(variable)
    if before is not None or not variable.aval.ndim or equation is None:
        return before
    is_repeating = equation.primitive.name in _REPEATING
    return (scope, equation.invars[0]) if is_repeating else None
