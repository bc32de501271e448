"""The rule of scans, whose body is walked once for all steps."""

from collections.abc import Callable

from clipax.per_example import _programs
from clipax.per_example._programs import ScanLayout, is_variable
from clipax.per_example._rules._recipes import Recipe, Site, rule
from clipax.per_example._rules._sums import total
from clipax.per_example._scopes import Scope
from clipax.per_example._terms import Axis, Move, Operand, Passed, Product, Terms


@rule("scan")
def _scan(site: Site) -> Recipe | None:
    body = _programs.body_of(site.equation)
    if body is None:
        return None
    layout = _programs.scan_layout(site.equation, body)
    inside = site.scope.inside(site.equation, body)
    step = Axis(site.params["length"])
    places = [inside.origin(body.program.outvars[site.position])]
    is_carried = site.position < layout.carries
    if is_carried:
        places.append(site.origin(layout.consts + site.position))

    def combine(terms: Terms, start: Terms = ()) -> Terms | None:
        passed = [term.position for term in terms if isinstance(term, Passed)]
        products = [term for term in terms if isinstance(term, Product)]
        if len(products) + len(passed) < len(terms):
            return None
        # It sums over the steps only if each step adds to the carry and does nothing else to it.
        if passed != ([layout.consts + site.position] if is_carried else []):
            return None
        lift = _lifted(site, inside, layout, step)
        lifted = tuple(_with_operands(term, lift) for term in products)
        if any(_differs_in_steps(operand) for term in lifted for operand in term.operands):
            return None
        if is_carried:
            return total(site, [(start, 1.0), (lifted, 1.0)])
        return tuple(
            term._replace(
                out=(step, *term.out),
                moves=tuple(Move("mapped", move) for move in term.moves),
                box=term.box and term.box.stacked(step.size),
            )
            for term in lifted
        )

    return Recipe(places, combine)


def _lifted(
    site: Site, inside: Scope, layout: ScanLayout, step: Axis
) -> Callable[[Operand], Operand]:
    """Returns a function that turns an operand of one step into the operand of all steps."""

    def lift(operand: Operand) -> Operand:
        lifted = lift_value(operand)
        times = (factor._replace(by=lift(factor.by)) for factor in lifted.times)
        return lifted._replace(times=tuple(times))

    def lift_value(operand: Operand) -> Operand:
        path, variable = operand.ref
        if not is_variable(variable):
            return operand
        index = inside.inputs.get(variable) if path == inside.path else None
        if index is None or layout.consts <= index < layout.first_scanned:
            return operand._replace(stacked=(step, *operand.stacked))
        operand = site.scope.naming(operand, site.operands[index])
        return (
            operand
            if index < layout.consts
            else operand._replace(stacked=(step, *operand.stacked))
        )

    return lift


def _differs_in_steps(operand: Operand) -> bool:
    """Whether a factor of an operand has steps that the operand itself lacks."""
    return any(not {*factor.by.stacked} <= {*operand.stacked} for factor in operand.times)


def _with_operands(term: Product, change: Callable[[Operand], Operand]) -> Product:
    return term._replace(
        lhs=change(term.lhs), rhs=change(term.rhs), scalars=tuple(map(change, term.scalars))
    )
