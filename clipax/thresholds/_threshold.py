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
    """
