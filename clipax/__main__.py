"""`python -m clipax`: trains a network clipped or not; with `advise`, reads a log."""

import sys

from clipax._demo import _command as _demonstration
from clipax.advice import _command as _advice


def main() -> None:
    """Runs the command that the first argument names, or else the demonstration."""
    if sys.argv[1:2] == ["advise"]:
        _advice.main(sys.argv[2:])
    else:
        _demonstration.main()


if __name__ == "__main__":
    main()
