"""Rules of primitives that add up terms."""

from collections.abc import Iterable
from typing import Any

from clipax.per_example._programs import shape_of
from clipax.per_example._rules._products import axes_of, contracted
from clipax.per_example._rules._recipes import Recipe, Site, changed, rule, term_by_term
from clipax.per_example._scopes import Origin
from clipax.per_example._terms import Axis, Operand, Product, Term, Terms, Whole


@rule("reduce_sum")
def _reduce_sum(site: Site) -> Recipe:
    summed = site.params["axes"]

    def change(term: Product) -> Product | None:
        if term.moves or term.one_hot in [term.out[axis] for axis in summed]:
            return None
        kept = [axis for index, axis in enumerate(term.out) if index not in summed]
        return term._replace(out=tuple(kept), box=term.box and term.box.without(summed))

    scope, atom = site.origin(0)
    equation, _ = scope.maker(atom)
    operands = equation.invars if equation and equation.primitive.name == "mul" else []
    flags = list(map(scope.depends_on_example, operands))
    if sum(flags) != 1 or len(set(map(shape_of, operands))) != 1:
        return term_by_term(site.origin(0), change)
    # It can be the gradient of what scales the rows of a weight, from that of the weight.
    index = flags.index(True)
    one, other = operands[index], operands[1 - index]
    axes = axes_of(one)
    factor = scope.operand(other, axes)
    out = [axis for place, axis in enumerate(axes) if place not in summed]

    def combine(terms: Terms, inside: Terms) -> Terms | None:
        found = changed(terms, change)
        if found is not None:
            return found
        return changed(inside, lambda term: contracted(term, axes, factor, out))

    return Recipe([site.origin(0), scope.origin(one)], combine)


@rule("add", "add_any")
def _add(site: Site) -> Recipe | None:
    origin = (site.scope, site.variable)
    if not _parts(origin):
        return None
    times = _summands(origin)

    def combine(*terms: Terms) -> Terms:
        return total(site, zip(terms, times.values(), strict=True))

    return Recipe(list(times), combine)


def _summands(origin: Origin) -> dict[Origin, float]:
    """The operands of a sum of sums, with the number of times that each is added."""
    order: list[Origin] = []
    seen: set[Origin] = set()
    pending = [(origin, False)]
    while pending:
        here, is_after_its_parts = pending.pop()
        if is_after_its_parts:
            order.append(here)
        elif here not in seen:
            seen.add(here)
            pending.append((here, True))
            pending += [(part, False) for part in _parts(here)]
    # Floats, because each `w + w` doubles the number, which can have to become infinite.
    times = dict.fromkeys(order, 0.0) | {origin: 1.0}
    for here in reversed(order):
        for part in _parts(here):
            times[part] += times[here]
    return {here: times[here] for here in order if not _parts(here)}


def _parts(origin: Origin) -> list[Origin]:
    scope, atom = origin
    equation, _ = scope.maker(atom)
    if equation is None or equation.primitive.name not in ("add", "add_any"):
        return []
    if any(shape_of(operand) != shape_of(atom) for operand in equation.invars):
        return []  # No term can be repeated.
    return [scope.origin(operand) for operand in equation.invars]


def total(site: Site, parts: Iterable[tuple[Terms, float]]) -> Terms:
    """Adds up terms. Products that differ only in their scale become one."""
    products: dict[Any, Product] = {}
    others: list[Term] = []
    is_repeated = False
    constants = 0
    for terms, times in parts:
        constants += bool(terms) and all(map(_is_constant, terms))
        for term in terms:
            if isinstance(term, Product):
                kind = _kind(term)
                scale = products[kind].scale if kind in products else 0.0
                products[kind] = term._replace(scale=scale + times * term.scale)
            else:
                others.append(term)
                is_repeated |= times != 1
    whole = [term for term in others if isinstance(term, Whole)]
    is_alone = len(others) + len(products) == 1
    # The program makes these for each example anyway, so it may as well add them up.
    is_made_anyway = any(term.depends and term.box is None for term in whole)
    if is_repeated or constants > 1 or (is_made_anyway and not is_alone):
        reasons = dict.fromkeys(term.why for term in whole)
        return site.scope.whole(site.variable, "; ".join(reasons) or "a sum")
    return (*products.values(), *others)


def _is_constant(term: Term) -> bool:
    return isinstance(term, Whole) and not term.depends


def _kind(term: Product) -> Any:
    """A key that two products share if they differ only in their scale."""
    places: dict[Axis, int] = {}

    def placed(axes: Iterable[Axis]) -> tuple[int, ...]:
        return tuple(places.setdefault(axis, len(places)) for axis in axes)

    def named(operand: Operand) -> Any:
        axes = placed(operand.stacked), placed(operand.axes)
        times = tuple((placed(factor.axes), named(factor.by)) for factor in operand.times)
        return (operand.ref, operand.preparations, *axes, times)

    operands = tuple(map(named, (term.lhs, term.rhs, *term.scalars)))
    out = placed(term.out), term.one_hot and placed([term.one_hot])
    sizes = tuple(axis.size for axis in places)
    return operands, out, term.moves, term.precision, sizes, term.box
