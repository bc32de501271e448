"""`python -m clipax`: trains a network clipped or not; with `advise`, reads a log."""

import os
import sys

from clipax import __version__
from clipax._demo import _command as _demonstration
from clipax.advice import _command as _advice


def main() -> None:
    """Runs a command, whose output may end early, as in `clipax advise LOG | head`."""
    try:
        _run()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would write what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run() -> None:
    """Runs the command that the first argument names, or else the demonstration."""
    command = "".join(sys.argv[1:2])
    if command == "advise":
        _advice.main(sys.argv[2:])
    elif command == "--version":
        sys.stdout.write(f"clipax {__version__}\n")
    elif command and not command.startswith("-"):
        raise SystemExit(
            f"clipax has no command {command!r}: `clipax advise LOG` recommends a clip from the"
            " log of a run, and `clipax` alone trains the demonstration."
        )
    else:
        _demonstration.main()


if __name__ == "__main__":
    main()
