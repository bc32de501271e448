"""Clips the gradient of each example, at about the price of one gradient of the batch.

The way from a loss to a sum of clipped gradients, room by room:

    loss          `(params, example) -> scalar`, with whatever else it is called with
      | _arguments    arrays apart from what is no array
      | _programs     the equations of `grad(loss)` for one example, and their evaluation
    program       `Program`
      | _walk         one walk back from the gradient of a leaf
      | _products     one rule for each primitive of JAX
      | _mapped       over which mapped axes a gradient lies in shards
    terms         `tuple[Product | Whole, ...]` (`_terms`), each operand with its `_preparations`
      | _plans        the cheapest exact way, by the numbers of operations
    plan          `Plan`
      | _grams        factors of all examples; norms and weighted sums from them
    norms         `[examples]` for each leaf, then over leaves that share a bound
      | _examples     coefficients, and the sums that they weight
    sums          the structure of the parameters, with a `PerExampleInfo`

`_functions` has what users call.
"""

from clipax.per_example._functions import PerExampleInfo as PerExampleInfo
from clipax.per_example._functions import clipped_grad as clipped_grad
from clipax.per_example._functions import explain_clipped_grad as explain_clipped_grad
from clipax.per_example._functions import per_example_norms as per_example_norms
from clipax.per_example._functions import track_quantile as track_quantile
