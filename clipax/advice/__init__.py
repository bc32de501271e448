"""A run's own log of norms: what a method would have done with it.

`_replay` runs the code of a method over logged norms, step by step.
"""
