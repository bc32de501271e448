"""Trains a recurrent network unclipped, then under several methods, to compare them.

The network reads scikit-learn's handwritten digits pixel by pixel, in 64 steps, and learns
by back-propagation through time. Its recurrent matrix starts as an orthogonal one times
1.4, so that gradients explode on their way back. Initial weights, batches and learning
rate are the same for every method, and nothing is tuned for any of them: the bounds and
settings are the usual ones, 1.0 or the paper's.
"""
