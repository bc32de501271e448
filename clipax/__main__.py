"""`python -m clipax`: trains a recurrent network with and without clipping."""

from clipax._demo._command import main

if __name__ == "__main__":
    main()
