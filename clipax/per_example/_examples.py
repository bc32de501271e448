"""A loss function and a batch: what is measured of each example, and clipped."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from clipax._core import _compat, _leaves, _paths
from clipax._core._reduction import Layout, total_norm
from clipax._core._typing import Array, Coefficient, Norms
from clipax.coefficients import Factors, in_two
from clipax.per_example import _arguments, _mapped, _plans, _programs
from clipax.per_example._plans import Plan
from clipax.per_example._programs import Ref
from clipax.per_example._terms import Scope

ArgNums = int | Sequence[int]
Outputs = Callable[[Any, Any, Any], Any]
"""What comes out, by how parameters, what there is one of for each example, and the rest lie."""
# JAX gives it no type.
_automatic: Callable[..., Any] = jax.sharding.auto_axes


class PerExampleInfo(NamedTuple):
    """What happened to each example."""

    losses: Array
    """The loss of each example, before clipping."""
    norms: Norms
    """The norm of each example's gradient; with a tree of bounds, a tree of them."""
    coefficients: Norms
    """What each gradient was multiplied by, in the structure of `norms`; 0 if left out."""
    is_counted: Array
    """Which examples are in the sum: not masked out, and not skipped."""
    clip_fraction: Norms
    """The share of the counted examples whose norm is above the bound."""
    max_norm: Norms
    """The bound, in the structure of `norms`."""
    aux: Any
    """What `loss_fn` returned besides, stacked; None without `has_aux`."""


class Call:
    """A loss function, and which of its arguments are what."""

    def __init__(
        self, loss_fn: Callable[..., Any], argnums: ArgNums, batch_argnums: ArgNums, has_aux: bool
    ):
        self._loss_fn, self._has_aux = loss_fn, has_aux
        self._positions = _arguments.positions(argnums=argnums)
        is_one = isinstance(argnums, int | np.integer)
        self._argnums = self._positions[0] if is_one else self._positions
        self._batched = _arguments.positions(batch_argnums=batch_argnums)
        both = set(self._positions) & set(self._batched)
        if both:
            raise ValueError(
                f"argnums and batch_argnums must differ, and both have {sorted(both)}: an"
                " argument is either differentiated or has the examples."
            )

    def of_arrays(
        self, args: Sequence[Any], shared: Mapping[str, Any], **own: Any
    ) -> tuple["Call", list[Any]]:
        """The same call, whose arguments have arrays alone. All others reach the loss as they are.

        As they do under `jax.grad`: a flag stays one, and what is no array may be anything.

        Args:
          args: What is passed by position.
          shared: What is passed by keyword: to the loss.
          own: What is passed by keyword to clipax; None if it is not.
        """
        _arguments.refuse_two_meanings(self._loss_fn, len(args), own)
        chosen = {*self._positions, *self._batched}
        for name, positions in (("argnums", self._positions), ("batch_argnums", self._batched)):
            for position in positions:
                if position >= len(args):
                    raise ValueError(
                        f"{name} has {position}, and there are {len(args)} arguments that are"
                        " passed by position. What is passed by keyword is not differentiated,"
                        " and one for all examples."
                    )
        loss_fn, arrays = _arguments.arrays_apart(self._loss_fn, chosen, args, shared)
        return Call(loss_fn, self._argnums, self._batched, self._has_aux), arrays

    def differentiated(self, args: Sequence[Any]) -> Any:
        if isinstance(self._argnums, int):
            return args[self._argnums]
        return tuple(args[position] for position in self._argnums)

    def check(self, args: Sequence[Any]) -> int:
        """Refuses what cannot be clipped; the number of examples."""
        parameters = _with_paths(self.differentiated(args))
        if not parameters:
            raise ValueError("There are no parameters: what argnums tells has no array.")
        for path, leaf in parameters:
            if not _leaves.is_measured(leaf) or not hasattr(leaf, "dtype"):
                kind = getattr(leaf, "dtype", type(leaf).__name__)
                raise ValueError(
                    f"The parameter {path or 'itself'} must be an array of"
                    f" floats, got {kind}. Pass what is not differentiated as another argument."
                )
        examples = self._examples(args)
        self._refuse_summed_gradients(args)
        return examples

    def _refuse_summed_gradients(self, args: Sequence[Any]) -> None:
        """Of what is the same on all devices, JAX sums the gradients of their examples."""
        if not _compat.bound_axes():
            return
        batch = jax.tree.leaves([args[position] for position in self._batched])
        of_examples = {axis for leaf in batch for axis in _compat.varying_axes(leaf)}
        for path, leaf in _with_paths(self.differentiated(args)):
            shards = of_examples - _compat.varying_axes(leaf)
            if shards:
                raise ValueError(
                    f"The examples vary over the mesh axes {sorted(map(str, shards))}, and the"
                    f" parameter {path or 'itself'} does not: the gradient"
                    " of one example would be summed with those on other devices. Let all"
                    " parameters vary, by jax.lax.pcast(params, axes, to='varying') or, before"
                    " jax 0.8.3, jax.lax.pvary, and sum what comes out."
                )

    def _examples(self, args: Sequence[Any]) -> int:
        sizes: dict[int, str] = {}
        for position in self._batched:
            for path, leaf in jax.tree_util.tree_leaves_with_path(args[position]):
                name = f"argument {position}" + jax.tree_util.keystr(path)
                if not _arguments.is_value(leaf):
                    raise ValueError(
                        f"{name} must be an array with the examples along its first axis, got"
                        f" {leaf!r}. What is one for all examples is another argument."
                    )
                if not jnp.ndim(leaf):
                    raise ValueError(f"{name} has no axis of examples: its shape is ().")
                sizes.setdefault(leaf.shape[0], name)
        if len(sizes) != 1 or not next(iter(sizes)):
            found = ", ".join(f"{size} in {name}" for size, name in sizes.items()) or "no array"
            raise ValueError(
                "The leaves of the batch must have one leading axis of at least one example,"
                f" got {found}."
            )
        return next(iter(sizes))

    def plans(self, args: Sequence[Any]) -> "Planned":
        in_axes = [0 if position in self._batched else None for position in range(len(args))]
        checked = _scalar_loss(self._loss_fn, self._has_aux)
        differentiate = jax.value_and_grad(checked, self._argnums, self._has_aux)
        program, shapes = _programs.of_example(differentiate, args, in_axes)
        (_, aux), grads = shapes if self._has_aux else ((shapes[0], None), shapes[1])
        leaves = _with_paths(grads)
        depends = [
            axis == 0
            for axis, arg in zip(in_axes, args, strict=True)
            for _ in jax.tree.leaves(arg)
        ]
        scope = Scope(program.jaxpr, depends)
        outputs = program.jaxpr.outvars
        gradients = outputs[len(outputs) - len(leaves) :]
        plans = [
            _plans.plan(path, leaf, scope, variable)
            for (path, leaf), variable in zip(leaves, gradients, strict=True)
        ]
        matters = [
            position in (*self._positions, *self._batched)
            for position, arg in enumerate(args)
            for _ in jax.tree.leaves(arg)
        ]
        shards = _mapped.sharding_axes(program.jaxpr, matters, depends, len(leaves))
        reported = [
            (scope.ref(each), scope.depends_on_example(each))
            for each in outputs[: -len(leaves) or None]
        ]
        aux_structure = jax.tree.structure(aux)
        return Planned(program, in_axes, plans, shards, grads, reported, aux_structure)

    def measure(self, args: Sequence[Any]) -> "Measured":
        planned, examples = self.plans(args), self._examples(args)
        flags: dict[Ref, bool] = dict(planned.reported)
        for plan in planned.plans:
            flags.update(plan.refs)
        refs = list(flags)

        def evaluate(*example: Any) -> list[Any]:
            return _programs.evaluate(planned.program, jax.tree.leaves(example), refs)

        out_axes = [0 if flags[ref] else None for ref in refs]
        found = jax.vmap(evaluate, tuple(planned.in_axes), out_axes)(*args)
        values = dict(zip(refs, found, strict=True))
        reported = [
            value if flags[ref] else jnp.broadcast_to(value, (examples, *jnp.shape(value)))
            for ref, value in ((ref, values[ref]) for ref, _ in planned.reported)
        ]
        leaves = [_plans.measured(plan, values, examples) for plan in planned.plans]
        aux = jax.tree.unflatten(planned.aux, reported[1:]) if self._has_aux else None
        return Measured(
            planned.plans,
            planned.shards,
            planned.gradient,
            # That of an unused leaf is zero everywhere, and must be of the type of the others.
            [_compat.varying_like(norm, reported[0]) for norm in _plans.exact_norms(leaves)],
            [leaf.kept for leaf in leaves],
            reported[0],
            aux,
        )

    def in_parts(
        self, clip_part: Callable[..., Any], args: Sequence[Any], mask: Any, bound: Any, size: int
    ) -> tuple[Any, PerExampleInfo]:
        """Some examples after others: the sum of the sums, and all that was told."""
        examples = self._examples(args)
        if examples % size:
            raise ValueError(f"microbatch_size must divide the {examples} examples, got {size}.")

        def split(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)

        batches = split([args[position] for position in self._batched])
        params = self.differentiated(args)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, _leaves.widened(leaf).dtype), params
        )

        def step(total: Any, part: Any) -> Any:
            batch, part_mask = part
            here = list(args)
            for position, value in zip(self._batched, batch, strict=True):
                here[position] = value
            sums, info = clip_part(here, part_mask, bound)
            return jax.tree.map(jnp.add, total, sums), info

        parts = (batches, split(mask))
        if _compat.bound_axes():
            # What a scan carries must have the type of what comes out of its steps.
            first = jax.tree.map(lambda leaf: leaf[0], parts)
            types = jax.make_jaxpr(step)(zeros, first).out_avals
            leaves, structure = jax.tree.flatten(zeros)
            zeros = jax.tree.unflatten(
                structure,
                [
                    _compat.varying_over(leaf, _compat.varying_axes_of(each))
                    for leaf, each in zip(leaves, types, strict=False)
                ],
            )
        total, infos = jax.lax.scan(step, zeros, parts)
        joined = jax.tree.map(
            lambda leaf: leaf.reshape(examples, *leaf.shape[2:]),
            infos._replace(max_norm=None, clip_fraction=None),
        )
        last = jax.tree.map(lambda leaf: leaf[-1], infos.max_norm)
        return total, joined._replace(max_norm=last)

    def with_automatic_axes(
        self, function: Callable[..., Any], args: Sequence[Any], *others: Any, out: Outputs
    ) -> Any:
        """Calls `function(args, *others)` where no mesh axis is explicit.

        There, every sum and every shape of the program would have to be told how it is sharded.
        """
        meshes = [_mesh_of(leaf) for leaf in jax.tree.leaves((args, others))]
        mesh = next((each for each in meshes if AxisType.Explicit in each.axis_types), None)
        if mesh is None:
            return function(args, *others)

        def on_mesh(*axes: Any) -> NamedSharding:
            return NamedSharding(mesh, _compat.partition_spec(*axes))

        batch = jax.tree.leaves([args[position] for position in self._batched])
        spread = {_spec_on(mesh, leaf)[:1] for leaf in batch} - {(None,), ()}
        params = jax.tree.map(
            lambda leaf: on_mesh(*_spec_on(mesh, leaf)), self.differentiated(args)
        )
        shardings = out(params, on_mesh(*next(iter(spread), ())), on_mesh())
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        # In `shard_map` other axes may be manual, and stay so.
        explicit = tuple(axis for axis, kind in kinds if kind is AxisType.Explicit)
        return jax.jit(_automatic(function, axes=explicit, out_sharding=shardings))(args, *others)


def _mesh_of(leaf: Any) -> Any:
    return jax.typeof(leaf).sharding.mesh


def _spec_on(mesh: Any, leaf: Any) -> tuple[Any, ...]:
    return tuple(jax.typeof(leaf).sharding.spec) if _mesh_of(leaf) == mesh else ()


class Planned(NamedTuple):
    program: Any
    in_axes: list[int | None]
    plans: list[Plan]
    shards: list[tuple[Hashable, ...]]
    gradient: Any
    """The shapes and dtypes of that of one example."""
    reported: list[tuple[Ref, bool]]
    aux: Any


class Measured(NamedTuple):
    plans: list[Plan]
    shards: list[tuple[Hashable, ...]]
    """The mapped axes over which each leaf's gradient lies in parts."""
    gradient: Any
    """The shapes and dtypes of that of one example."""
    leaf_norms: list[Array]
    kept: list[_plans.Kept]
    losses: Array
    aux: Any

    def clipped(
        self, bound: Any, coefficient: Coefficient, mask: Array | None, skip_nonfinite: bool
    ) -> tuple[Any, PerExampleInfo]:
        """The sums of the clipped gradients, in the width of norms."""
        self._refuse_different_shares(mask=mask, max_norm=bound)
        values, structure = jax.tree.flatten(bound)
        covered = _paths.covered(bound, self.gradient, name="max_norm")
        sizes = [self.norms_over(places) for places in covered]
        rows = zip(values, sizes, strict=True)
        bounds = [jnp.asarray(value).astype(size.dtype) for value, size in rows]
        counted = jnp.ones(self.losses.shape[0], bool) if mask is None else mask
        if skip_nonfinite:
            counted = jnp.all(jnp.stack([counted, *map(jnp.isfinite, sizes)]), 0)

        rows = zip(sizes, bounds, strict=True)
        limits = [jnp.broadcast_to(limit, size.shape) for size, limit in rows]
        weights = in_two(coefficient, sizes, limits)
        second = [jnp.where(counted, factor, 0) for factor in weights.second]
        sums = self._weighted_sums(
            covered,
            [Factors(*row) for row in zip(weights.first, second, strict=True)],
            None if mask is None and not skip_nonfinite else ~counted,
        )
        factors = weights._replace(second=second).product
        like_bound = functools.partial(jax.tree.unflatten, structure)
        return sums, PerExampleInfo(
            self.losses,
            like_bound(sizes),
            like_bound(factors),
            counted,
            clip_fraction=None,
            max_norm=like_bound(bounds),
            aux=self.aux,
        )

    def norms(self) -> Array:
        """One norm an example over all leaves."""
        return self.norms_over(range(len(self.plans)))

    def norms_of_leaves(self) -> Any:
        """One norm an example and leaf, in the structure of the parameters."""
        return _paths.rebuilt(
            self.gradient, [self.norms_over([place]) for place in range(len(self.plans))]
        )

    def norms_over(self, places: Sequence[int]) -> Array:
        """One norm an example over some leaves, with all of their shards.

        Over the mapped axes that hold other examples nothing is summed.
        """
        parts = [self.leaf_norms[place] for place in places]
        if not parts:
            return jnp.zeros(self.losses.shape, jnp.float32)
        layouts = tuple(Layout((), self.shards[place]) for place in places)
        if len(parts) == 1 and not layouts[0].shards:
            return parts[0]
        rows = zip(parts, layouts, strict=True)
        varying = [_compat.varying_over(part, layout.shards) for part, layout in rows]
        return jax.vmap(functools.partial(total_norm, layouts=layouts, ord=2.0))(varying)

    def _refuse_different_shares(self, **arguments: Any) -> None:
        """The shards of one gradient must have one weight."""
        axes = {axis for shards in self.shards for axis in shards}
        for name, value in arguments.items():
            varying = [_compat.varying_axes(leaf) for leaf in jax.tree.leaves(value)]
            if different := axes.intersection(*[frozenset().union(*varying)]):
                raise ValueError(
                    f"{name} must be the same over the mesh axes {sorted(map(str, different))},"
                    " along which the gradient of each example lies in shards, and its type says"
                    f" that it varies. Let {name} depend on nothing that varies there, or make"
                    " it the same by jax.lax.pmax, of a mask as integers."
                )

    def _weighted_sums(
        self, covered: list[list[int]], weights: list[Factors], is_kept_out: Array | None
    ) -> Any:
        of_leaves = {
            place: weight
            for places, weight in zip(covered, weights, strict=True)
            for place in places
        }
        rows = enumerate(zip(self.plans, self.kept, strict=True))
        sums = [
            _plans.weighted_sum(plan, kept, of_leaves[place], is_kept_out)
            for place, (plan, kept) in rows
        ]
        return jax.tree.unflatten(jax.tree.structure(self.gradient), sums)


def _with_paths(tree: Any) -> list[tuple[str, Any]]:
    return list(zip(_paths.of_leaves(tree), jax.tree.leaves(tree), strict=True))


def _scalar_loss(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        returned = loss_fn(*args)
        if has_aux and not (isinstance(returned, tuple) and len(returned) == 2):
            raise ValueError("With has_aux, loss_fn must return a pair (loss, aux).")
        loss = returned[0] if has_aux else returned
        aux = returned[1] if has_aux else None
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
            if not _arguments.is_value(leaf):
                raise ValueError(
                    f"What loss_fn returns besides must be arrays, got {leaf!r} in"
                    f" aux{jax.tree_util.keystr(path)}."
                )
        if not isinstance(loss, jax.Array | np.ndarray | np.generic | int | float):
            raise ValueError(
                f"loss_fn must return one real number for one example, got a"
                f" {type(loss).__name__}. What it returns besides needs has_aux=True."
            )
        if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), np.floating):
            kind = f"{jnp.result_type(loss)}{list(jnp.shape(loss))}"
            raise ValueError(
                f"loss_fn must return one real number for one example, got {kind}. It is called"
                " without the axis of examples."
            )
        return returned

    return checked
