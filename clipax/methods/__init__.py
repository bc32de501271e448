"""One file for each published method, named as its function."""
