"""Clips the gradient of each example, at about the price of one gradient of the batch.

The way from a loss to a sum of clipped gradients. Data goes down, one room after another:

    loss          call_of(...) -> Call                                        `_calls`
    program       trace(Call) -> ExampleProgram                               `_tracing`
    terms         terms_of(Scope, variable) -> tuple[Product | Whole, ...]    `_walk`, `_rules`
    plan          plans_of(ExampleProgram) -> list[Plan], one for each leaf   `_plans`
    factors       leaf_gradients(Plan, Values, ...) -> LeafGradients          `_gradients`
    norms         norms_of_leaves(list[LeafGradients]) -> list[Array]         `_norms`
    coefficients  clip(Call, mask, bound, ...) -> sums, OfExamples            `_clipping`
    sums          weighted_sum(LeafGradients, Weights, ...) -> Array          `_sums`

`_measured` runs the rooms from the loss to the norms, and `_clipping` those below. With
`memory="twice"` (`_memory`), nothing is kept between norms and sums, and two other rooms take
the place of those from the factors:

    norms         norms_in_passing(Call, ExampleProgram) -> values, norms     `_in_passing`
    sums          weighted_sums(Call, list[Group], ...) -> list[Array]        `_again`

They use

    `_arguments`, `_bounds`    checks of what the user gives
    `_keys`                    one random key for each example
    `_mapped`                  which mapped axes shard a gradient, and what is refused there
    `_programs`, `_scopes`     how to read a program of JAX
    `_dependence`              which of its values differ between examples
    `_schedules`               which parts of it are needed, in order
    `_evaluation`, `_values`   how to run them
    `_terms`, `_preparations`  what a gradient is a sum of
    `_boxes`, `_placing`       terms that fill only a part of a gradient
    `_pieces`                  the parts that do not overlap
    `_roles`, `_factors`       arrays for the products, in one form for all
    `_grams`                   norms from Gram matrices
    `_readings`                norms of leaves, each found where its factors are made

and around them are `_microbatches` (some examples after others), `_users` (the gradients of each
user's examples added up), `_meshes` (explicit mesh axes), `_overlooked` (products that a plan
does not use) and `_info` (`PerExampleInfo`). Each public function has a module of its name.
"""

from clipax.per_example._clipped_grad import clipped_grad as clipped_grad
from clipax.per_example._explain_clipped_grad import explain_clipped_grad as explain_clipped_grad
from clipax.per_example._info import PerExampleInfo as PerExampleInfo
from clipax.per_example._noise_scale import NoiseScale as NoiseScale
from clipax.per_example._noise_scale import noise_scale as noise_scale
from clipax.per_example._per_example_norms import per_example_norms as per_example_norms
from clipax.per_example._sensitivity import sensitivity as sensitivity
from clipax.per_example._split_max_norm import split_max_norm as split_max_norm
from clipax.per_example._track_quantile import track_quantile as track_quantile
