"""Models as users write them, in double precision.

A module has the models of one kind. `@model` enters a function that makes a loss, parameters, and
a function that makes so many examples.
"""

from per_example_models import attention as attention
from per_example_models import equations as equations
from per_example_models import generative as generative
from per_example_models import graphs as graphs
from per_example_models import images as images
from per_example_models import libraries as libraries
from per_example_models import recurrent as recurrent
from per_example_models import weights as weights
from per_example_models.entering import MODELS as MODELS
from per_example_models.entering import Model as Model
