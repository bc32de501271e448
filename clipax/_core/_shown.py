"""How an error shows what was given, which may be a whole tree of parameters."""

from typing import Any

import numpy as np

_LONGEST = 200
# An array of more entries is longer than that in any case, and takes long to format.
_MOST_ENTRIES = 70


def shown(value: Any) -> str:
    """The `repr` of a value, cut off where it is long."""
    with np.printoptions(threshold=_MOST_ENTRIES):
        text = repr(value)
    return text if len(text) <= _LONGEST else f"{' '.join(text.split())[:_LONGEST]}..."
