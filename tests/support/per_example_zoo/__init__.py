"""Small models of everything that losses are made of, each with the way to its norms.

A module has the models of one kind. `@model(leaf=way)` enters a function that makes one.
"""

from per_example_zoo import attention as attention
from per_example_zoo import control_flow as control_flow
from per_example_zoo import convolutions as convolutions
from per_example_zoo import dense as dense
from per_example_zoo import narrow_numbers as narrow_numbers
from per_example_zoo import odd_leaves as odd_leaves
from per_example_zoo import scans as scans
from per_example_zoo import weights as weights
from per_example_zoo.models import EACH as EACH
from per_example_zoo.models import EXAMPLES as EXAMPLES
from per_example_zoo.models import GRAM as GRAM
from per_example_zoo.models import OUTER as OUTER
from per_example_zoo.models import WAYS as WAYS
from per_example_zoo.models import ZERO as ZERO
from per_example_zoo.models import ZOO as ZOO
from per_example_zoo.models import Model as Model
from per_example_zoo.models import Source as Source
from per_example_zoo.models import assert_near as assert_near
from per_example_zoo.models import cross_entropy as cross_entropy
from per_example_zoo.models import explanation as explanation
from per_example_zoo.models import layer_norm as layer_norm
from per_example_zoo.models import lines_of_leaves as lines_of_leaves
from per_example_zoo.models import mean_square as mean_square
from per_example_zoo.models import wide as wide
