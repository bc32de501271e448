"""Functions of singular values, for `clip_by_spectral_norm`."""
