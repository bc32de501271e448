"""Skips the tests that need hypothesis where it is not installed, and keeps those beside them."""

import sys
from typing import Any
from unittest import mock

import pytest


def install() -> None:
    module = mock.MagicMock()
    module.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    module.settings = lambda *_, **__: _unchanged
    for name in ("", ".strategies", ".extra", ".extra.numpy"):
        sys.modules[f"hypothesis{name}"] = module


def _unchanged(test: Any) -> Any:
    return test
