"""Studies of their own on top of the library: run from the repository, not installed with it."""
