"""What fuzz targets find in the daemon's log."""

import logging


class Complaints(logging.Handler):
    """What the daemon logs as an error is a fault of its own: peers cannot cause more than warnings."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.texts = []

    def emit(self, record):
        self.texts.append(self.format(record))
