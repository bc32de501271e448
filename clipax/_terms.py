"""What a gradient is made of: terms, and where they stand in its program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from clipax import _programs
from clipax._preparations import padded
from clipax._programs import Body, Equation, Program, Ref, is_variable
from clipax._typing import Array


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
        self.depending = {
            variable for variable, flag in zip(program.invars, depends, strict=True) if flag
        }
        self.made_by: dict[Any, tuple[Equation, int]] = {}
        self._bodies: dict[int, Scope] = {}
        for equation in program.eqns:
            is_dependent = any(self.depends_on_example(operand) for operand in equation.invars)
            for position, variable in enumerate(equation.outvars):
                self.made_by[variable] = (equation, position)
                if is_dependent:
                    self.depending.add(variable)

    def maker(self, atom: Any) -> tuple[Equation | None, int]:
        """The equation that makes a variable, and at which of its outputs."""
        return self.made_by.get(atom, (None, 0)) if is_variable(atom) else (None, 0)

    def origin(self, atom: Any) -> tuple["Scope", Any]:
        """An operand of calls where it comes from: outside of them."""
        scope: Scope = self
        while scope.outer is not None and not scope.is_step:
            if not is_variable(atom) or atom not in scope.program.invars:
                break
            atom = scope.path[-1].invars[scope.program.invars.index(atom)]
            scope = scope.outer
        return scope, atom

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

    def naming(self, operand: Operand, atom: Any) -> Operand:
        """An operand by what it is in this scope."""
        return operand._replace(ref=self.ref(atom), depends=self.depends_on_example(atom))

    def operand(self, variable: Any, axes: Sequence[Axis], *preparations: Any) -> Operand:
        depends = self.depends_on_example(variable)
        return Operand(self.ref(variable), depends, (), tuple(axes), preparations)
