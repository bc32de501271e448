"""Clipping singular values in NumPy, and matrices with given ones."""

from typing import Any

import numpy as np
import pytest

import clipax
from clipax.coefficients import hard, rational, square_root, tanh

either_way = pytest.mark.parametrize("iterations", [None, 12])


def clipped_by(max_norm: Any, updates: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    method = clipax.clip_by_spectral_norm(max_norm, *args, **kwargs)
    return method.update(updates, method.init(updates))


FORMULAS = {
    hard: lambda s, c: np.minimum(s, c),
    square_root: lambda s, c: s / np.sqrt(1 + (s / c) ** 2),
    rational: lambda s, c: s / (1 + s / c),
    tanh: lambda s, c: c * np.tanh(s / c),
}


def clip_matrix(x: Any, c: float, formula: Any = FORMULAS[hard]) -> np.ndarray:
    wide = np.asarray(x).astype(np.result_type(np.asarray(x).dtype, np.float64))
    u, s, vh = np.linalg.svd(wide, full_matrices=False)
    return (u * formula(s, c)) @ vh


def spectral_norm(x: Any) -> float:
    wide = np.asarray(x).astype(np.result_type(np.asarray(x).dtype, np.float64))
    return float(np.linalg.norm(wide, 2))


def with_singular_values(s: Any, rows: int, seed: int = 0) -> np.ndarray:
    rng, n = np.random.default_rng(seed), len(s)
    u = np.linalg.qr(rng.normal(size=(rows, n)))[0]
    v = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return (u * np.asarray(s)) @ v.T
