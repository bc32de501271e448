"""The rules of the walk, one for each primitive of JAX.

A rule reads one equation on the way back from a gradient, as a `Site`, and returns a `Recipe`:
the operands to walk on to, and a function that makes the terms of this equation from theirs.

| module | primitives |
|---|---|
| `_products` | make products: `dot_general`, `conv_general_dilated` |
| `_lookups` | add rows to a table: `scatter_add`, `dynamic_update_slice` |
| `_sums` | add up terms: `add`, `reduce_sum` |
| `_moves` | move all entries: `transpose`, `reshape`, `rev`, `squeeze`, `broadcast_in_dim` |
| `_parts` | move some entries: `slice`, `split`, `pad`, `concatenate`, `stack` |
| `_scales` | scale entries: `mul`, `div`, `neg`, `convert_element_type` |
| `_complex` | take complex numbers apart: `real`, `imag`, `conj` |
| `_scans` | repeat a body: `scan` |
| `_branches` | choose a body: `cond` |

To add a primitive, write its rule in the module of its subject and enter it by
`@rule("its name")`. A primitive without a rule is no error: the gradient is then made there
for each example.
"""

from clipax.per_example._rules import _branches as _branches
from clipax.per_example._rules import _complex as _complex
from clipax.per_example._rules import _lookups as _lookups
from clipax.per_example._rules import _moves as _moves
from clipax.per_example._rules import _parts as _parts
from clipax.per_example._rules import _products as _products
from clipax.per_example._rules import _scales as _scales
from clipax.per_example._rules import _scans as _scans
from clipax.per_example._rules import _sums as _sums
from clipax.per_example._rules._recipes import RULES as RULES
