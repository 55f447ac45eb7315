"""FUSE: a node as a regular file that any program can open."""
