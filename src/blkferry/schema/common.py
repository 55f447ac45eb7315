"""Types that several subjects share."""

import enum


class OnOffAuto(enum.StrEnum):
    """Yes, no, or as it seems best."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"
