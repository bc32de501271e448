"""How an error shows what was given, which may be a whole tree of parameters."""

from typing import Any

_LONGEST = 200


def shown(value: Any) -> str:
    """The `repr` of a value, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{' '.join(text.split())[:_LONGEST]}..."
