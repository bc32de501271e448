"""Clips the gradient of each example, at about the price of one gradient of the batch.

A loss becomes a sum of clipped gradients in steps. Data goes down this map, one room after
another, and every room is a module:

    loss          `Call`: a loss of arrays, with its arguments             `_calls`
    program       `ExampleProgram`: the gradient of one example            `_tracing`
    terms         `tuple[Product | Whole, ...]` that add up to a leaf      `_walk`, by `_rules`
    plan          `Plan`: the cheapest exact way to the norms of a leaf    `_plans`
    factors       `LeafGradients`: products of `Factors`, all examples     `_gradients`
    norms         `[examples]` for each leaf, by Gram matrices or not      `_norms`
    coefficients  `[examples]` for each bound                              `_clipping`
    sums          arrays in the shapes of the parameters                   `_sums`

`_measured` runs the rooms from the loss to the norms, `_clipping` those that follow. Below them:

    of a call     `_arguments`, `_bounds`, and `_mapped`, with a table of what devices may share
    of programs   `_programs` and `_scopes` to read them, `_evaluation` to run them
    of terms      `_terms`, with `_preparations` of their operands
    of numbers    `_roles` of axes, `_factors`, `_grams`

`_microbatches` takes some examples after others, `_meshes` takes care of explicit mesh axes,
`_info` has the record of what happened. Each public function is in a module of its name.
"""

from clipax.per_example._clipped_grad import clipped_grad as clipped_grad
from clipax.per_example._explain_clipped_grad import explain_clipped_grad as explain_clipped_grad
from clipax.per_example._info import PerExampleInfo as PerExampleInfo
from clipax.per_example._per_example_norms import per_example_norms as per_example_norms
from clipax.per_example._track_quantile import track_quantile as track_quantile
