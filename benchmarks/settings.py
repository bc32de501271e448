"""What of the benchmark is run."""

from typing import NamedTuple, Protocol, TypeVar


class OfTree(Protocol):
    """A plan for a tree."""

    tree: str
    dtype: str


P = TypeVar("P", bound=OfTree)


class Settings(NamedTuple):
    is_quick: bool = False
    is_full: bool = False
    trees: tuple[str, ...] = ()
    """Those that are left of the plans' trees; all, where this is empty."""
    dtypes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()

    def chosen(self, plans: list[P]) -> list[P]:
        return [
            plan
            for plan in plans
            if plan.tree in (self.trees or (plan.tree,))
            and plan.dtype in (self.dtypes or (plan.dtype,))
        ]

    def of_groups(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name in (self.groups or names))
