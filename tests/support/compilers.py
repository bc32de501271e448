"""Marks for tests that need a compiler which an extra of clipax installs."""

import pytest

from benchmarks.compilers import accelerators


def needs(extra: str) -> pytest.MarkDecorator:
    """Skips where the compiler is not installed that an extra installs."""
    reason = accelerators.why_not(extra)
    return pytest.mark.skipif(bool(reason), reason=reason)
