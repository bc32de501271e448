"""The interface of a threshold."""

import optax


class Threshold(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """A rule that sees all norms at once and keeps its own history.

    `init(norms) -> state` and `update(norms, state, param_norms, max_norm=last_bounds) ->
    (max_norms, state)`, where `max_norms` has the structure, shapes and dtypes of `norms`. A
    norm that is not finite should leave the state as it was. `per_norm` makes a threshold from
    a rule for one norm and takes care of that.

    The rule in the example lets each leaf be at most twice as long as the leaves are on average.

    Example:
      >>> def init(norms):
      ...     return optax.EmptyState()
      >>> def update(norms, state, param_norms=None, **extra_args):
      ...     sizes = jax.tree.leaves(norms)
      ...     mean = sum(sizes) / len(sizes)
      ...     return jax.tree.map(lambda norm: 2 * mean, norms), state
      >>> clip = clip_by(leaf_norm, Threshold(init, update))
      >>> updates = {"a": jnp.array([1.0]), "b": jnp.array([1.0]), "c": jnp.array([7.0])}
      >>> clip.update(updates, clip.init(updates))[0]["c"]
      Array([6.], dtype=float32)

    Example (a history like that of AdaGC: each leaf is bounded by 1.5 times the average of its
    own clipped norms, and its first norm by one factor for all leaves):
      >>> def init(norms):
      ...     return jax.tree.map(jnp.zeros_like, norms)
      >>> def update(norms, averages, param_norms=None, **extra_args):
      ...     total = global_norm(norms)
      ...     factor = jnp.minimum(1.0, 10.0 / total)
      ...     def bound(norm, average):
      ...         return jnp.where(average > 0, 1.5 * average, factor * norm)
      ...     def learn(norm, average, max_norm):
      ...         new = jnp.minimum(norm, max_norm)
      ...         moved = jnp.where(average > 0, 0.5 * average + 0.5 * new, new)
      ...         return jnp.where(jnp.isfinite(total), moved, average)
      ...     bounds = jax.tree.map(bound, norms, averages)
      ...     return bounds, jax.tree.map(learn, norms, averages, bounds)
      >>> clip = clip_by(leaf_norm, Threshold(init, update))
      >>> state = clip.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
      >>> for a, b in ((2.0, 4.0), (9.0, 5.0)):  # the second bounds are 3 and 6
      ...     clipped, state = clip.update({"a": jnp.array([a]), "b": jnp.array([b])}, state)
      >>> clipped
      {'a': Array([3.], dtype=float32), 'b': Array([5.], dtype=float32)}
    """
