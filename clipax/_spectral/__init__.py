"""Singular values and functions of them, for `clip_by_spectral_norm`."""
