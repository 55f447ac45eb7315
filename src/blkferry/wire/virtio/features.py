"""Feature bits of rings and transports (virtio 1.3, section 6); those of a kind of device are in its own module."""

from __future__ import annotations

import enum


class Feature(enum.IntFlag):
    """Reserved feature bits, 24 to 41."""

    NOTIFY_ON_EMPTY = 1 << 24
    """Legacy: notify when nothing is left to do, whatever the driver suppresses."""
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41


RING = Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED | Feature.NOTIFY_ON_EMPTY
"""What the rings of this package understand."""
