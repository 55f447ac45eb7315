"""For tests of blkferry and of what is built on it: scripted peers, a daemon in a thread, a node that fails on demand.

Nothing here is used by the daemon itself, and nothing here guesses: a peer does exactly what the test tells it.
"""
