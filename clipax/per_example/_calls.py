"""A loss function with the arrays that it is called with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves, _paths
from clipax._core._compat import core
from clipax._core._shown import shown
from clipax._core._typing import Array
from clipax.per_example import _arguments, _keys, _mapped

ArgNums: TypeAlias = int | Sequence[int]
ArgNames: TypeAlias = str | Sequence[str]


class Loss(NamedTuple):
    """A loss function with the positions of its parameters and examples."""

    function: Callable[..., Any]
    argnums: int | tuple[int, ...]
    """Which arguments are differentiated, as `jax.grad` takes it."""
    batch_argnums: tuple[int, ...]
    """Which arguments have the examples along the first axis of every leaf."""
    has_aux: bool
    batch_argnames: tuple[str, ...] = ()
    """Which keyword arguments have the examples."""
    prng_argnum: int | None = None
    """Which argument is a random key that is still to be split."""

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions of the parameters."""
        return (self.argnums,) if isinstance(self.argnums, int) else self.argnums

    def is_batched(self, position: int) -> bool:
        return position in self.batch_argnums

    def is_of_gradient(self, position: int) -> bool:
        """Whether an argument has parameters or examples."""
        return position in (*self.positions, *self.batch_argnums)


def loss_of(
    loss_fn: Callable[..., Any],
    argnums: ArgNums,
    batch_argnums: ArgNums,
    has_aux: bool,
    batch_argnames: ArgNames = (),
    prng_argnum: int | None = None,
) -> Loss:
    """Checks the positions and names."""
    positions = _arguments.positions(argnums=argnums)
    is_one = isinstance(argnums, int | np.integer)
    batched = _arguments.positions(batch_argnums=batch_argnums)
    both = set(positions) & set(batched)
    if both:
        raise ValueError(
            f"argnums and batch_argnums must differ, and both have {sorted(both)}. An argument is"
            " either differentiated or has the examples."
        )
    if prng_argnum is not None:
        prng_argnum = _arguments.position(prng_argnum=prng_argnum)
        if prng_argnum in (*positions, *batched):
            raise ValueError(
                "prng_argnum must differ from argnums and batch_argnums, and they have"
                f" {prng_argnum}. Keys that are split already belong into batch_argnums alone."
            )
    names = _arguments.names(batch_argnames=batch_argnames)
    argnums = positions[0] if is_one else positions
    return Loss(loss_fn, argnums, batched, has_aux, names, prng_argnum)


class Call(NamedTuple):
    """A loss function of arrays, with its arguments."""

    loss: Loss
    args: list[Any]

    @property
    def params(self) -> Any:
        """The parameters. They are a tuple if `argnums` is a tuple."""
        if isinstance(self.loss.argnums, int):
            return self.args[self.loss.argnums]
        return tuple(self.args[position] for position in self.loss.argnums)

    def with_params(self, params: Any) -> Call:
        """The same call with other parameters."""
        args = list(self.args)
        values = [params] if isinstance(self.loss.argnums, int) else params
        for position, value in zip(self.loss.positions, values, strict=True):
            args[position] = value
        return self._replace(args=args)

    def with_program(self, program: core.ClosedJaxpr) -> Call:
        """The same call of a loss function that is traced, without what it returns besides."""

        def losses(*args: Any) -> Any:
            return core.jaxpr_as_fun(program)(*jax.tree.leaves(args))[0]

        return self._replace(loss=self.loss._replace(function=losses, has_aux=False))

    @property
    def losses(self) -> Array:
        """The losses of all examples."""
        returned = jax.vmap(self.loss.function, self.in_axes)(*self.args)
        losses: Array = returned[0] if self.loss.has_aux else returned
        return losses

    @property
    def batch(self) -> list[Any]:
        """The arguments that have the examples."""
        return [self.args[position] for position in self.loss.batch_argnums]

    @property
    def examples(self) -> Any:
        """The number of examples, which may be symbolic."""
        return jax.tree.leaves(self.batch)[0].shape[0]

    def wide_zeros(self, *lead: int) -> Any:
        """Zeros like the parameters, in the width of norms, with these axes before theirs."""
        return jax.tree.map(
            lambda leaf: jnp.zeros((*lead, *leaf.shape), _leaves.widened_dtype(leaf.dtype)),
            self.params,
        )

    @property
    def in_axes(self) -> tuple[int | None, ...]:
        """Each argument's axis of examples, as `jax.vmap` takes it."""
        each = range(len(self.args))
        return tuple(0 if self.loss.is_batched(position) else None for position in each)

    def for_each_leaf(self, holds: Callable[[int], bool]) -> list[bool]:
        """What holds for the position of each leaf of the arguments."""
        rows = enumerate(self.args)
        return [holds(position) for position, arg in rows for _ in jax.tree.leaves(arg)]

    def with_batch(self, batch: Sequence[Any]) -> Call:
        """The same call with other examples."""
        args = list(self.args)
        for position, value in zip(self.loss.batch_argnums, batch, strict=True):
            args[position] = value
        return self._replace(args=args)


def call_of(loss: Loss, args: Sequence[Any], shared: Mapping[str, Any], **own: Any) -> Call:
    """Makes a call of arrays alone, and refuses whatever cannot be clipped.

    Args:
      loss: The loss function.
      args: What it gets by position.
      shared: What it gets by keyword.
      **own: Keywords of clipax's own, with None for those that are not given.
    """
    _arguments.refuse_two_meanings(loss.function, len(args), own)
    key = loss.prng_argnum
    keys = () if key is None else (key,)
    given = {"argnums": loss.positions, "batch_argnums": loss.batch_argnums, "prng_argnum": keys}
    for name, positions in given.items():
        for position in positions:
            if position >= len(args):
                raise ValueError(
                    f"{name} has {position}, and there are {len(args)} arguments that are passed"
                    " by position. Arguments that are passed by keyword are not differentiated,"
                    " and they are the same for all examples, unless batch_argnames names them."
                )
    if loss.batch_argnames:
        function, args, shared = _arguments.named_last(
            loss.function, loss.batch_argnames, args, shared
        )
        batched = (*loss.batch_argnums, len(args) - 1)
        loss = loss._replace(function=function, batch_argnums=batched)
    chosen = {*loss.positions, *loss.batch_argnums, *keys}
    function, arrays = _arguments.arrays_apart(loss.function, chosen, args, shared)
    for position in loss.positions:
        arrays[position] = jax.tree.map(_arguments.as_array, arrays[position])
    call = Call(loss._replace(function=function), arrays)
    _check_params(call)
    _check_batch(call)
    _warn_of_rows(args, chosen, call.examples)
    if key is not None:
        arrays[key] = _keys.split(arrays[key], call.examples, key)
        batched = (*call.loss.batch_argnums, key)
        call = Call(call.loss._replace(batch_argnums=batched), arrays)
    _mapped.refuse_summed_gradients(call.params, call.batch)
    return call


def _warn_of_rows(args: Sequence[Any], chosen: Collection[int], examples: int) -> None:
    """Warns of arrays that look like labels, which a loss may take whole without an error."""
    for position, arg in enumerate(args):
        is_array = isinstance(arg, jax.Array | np.ndarray) and np.ndim(arg) > 0
        is_like_one = is_array and 1 != np.shape(arg)[0] == examples
        if position in chosen or not is_like_one:
            continue
        if jnp.issubdtype(arg.dtype, np.unsignedinteger) or not _arguments.is_value(arg):
            continue  # a key
        warnings.warn(
            f"Argument {position} has {examples} rows, as many as there are examples, and every"
            " example gets all of them. If a row belongs to an example, add the position to"
            " batch_argnums. If not, pass the argument by keyword.",
            stacklevel=4,
        )


def _check_params(call: Call) -> None:
    leaves = jax.tree.leaves(call.params)
    if not leaves:
        raise ValueError(
            "argnums must select arguments with parameters, and there is no array in those at"
            f" {call.loss.positions}."
        )
    for path, leaf in zip(_paths.of_leaves(call.params), leaves, strict=True):
        if not _leaves.is_measured(leaf) or not hasattr(leaf, "dtype"):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(
                f"The parameter {path or 'itself'} must be an array of floats, got {kind}."
                " Pass what is not differentiated as another argument."
            )


def _check_batch(call: Call) -> None:
    sizes: dict[int, str] = {}
    for position, arg in zip(call.loss.batch_argnums, call.batch, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            name = f"argument {position}" + jax.tree_util.keystr(path)
            if call.loss.batch_argnames and arg is call.batch[-1]:
                name = f"argument {path[0].key!r}" + jax.tree_util.keystr(path[1:])
            if not _arguments.is_value(leaf):
                raise ValueError(
                    f"{name} must be an array with the examples along its first axis, got"
                    f" {shown(leaf)}. Pass what all examples share as another argument."
                )
            if not jnp.ndim(leaf):
                raise ValueError(f"{name} has no axis of examples: its shape is ().")
            sizes.setdefault(leaf.shape[0], name)
    if len(sizes) != 1:
        found = ", ".join(f"{size} in {name}" for size, name in sizes.items()) or "no array"
        raise ValueError(
            f"All leaves of the batch must have one leading axis of examples, got {found}."
        )
