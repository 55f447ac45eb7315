"""What is done with images as a whole: what `blkferry image` does, for Python programs too.

One module per piece of work. Each takes a running `Daemon`, whose secrets it may use, and `ImageName`s; opens what it
needs, and closes it again whatever happens. Progress is told by a callback: bytes (or L2 tables) done, and of how many.
Failures are Error; OSError where the storage fails.
"""
