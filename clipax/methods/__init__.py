"""One file per published method, with the name of its function."""
