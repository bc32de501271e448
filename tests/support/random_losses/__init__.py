"""Losses drawn at random, of what models do with their parameters.

A loss is a sum of terms. Each looks at a parameter through a few views, and uses what it sees in
one way. `@view` enters a view and `@use` a use: a function that draws what it needs, for an array
of some shape, and returns a function of an example and of such an array, or None where there is
nothing to do.
"""

from random_losses import uses as uses
from random_losses import views as views
from random_losses.drawing import Drawn as Drawn
from random_losses.drawing import batch as batch
from random_losses.drawing import loss as loss
from random_losses.drawing import params as params
