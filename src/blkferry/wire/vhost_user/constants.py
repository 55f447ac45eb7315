"""The numbers of the vhost-user protocol: requests, flags, features, and our own limits.

Names are the specification's, without their VHOST_USER_ prefixes. Values that arrive may be outside these enums.
"""

from __future__ import annotations

import enum
from typing import Final

VERSION: Final = 1
"""Of the header; there is no other."""

MAX_PAYLOAD: Final = 4096
"""Far more than any message of a block device has, which is a configuration space or a table of memory regions."""

MAX_FDS: Final = 8
"""Descriptors with one message: those of a memory table ("Front-end message types", SET_MEM_TABLE)."""

MAX_TABLE_REGIONS: Final = 8
"""Regions in a SET_MEM_TABLE ("Memory regions description")."""

MAX_MEM_SLOTS: Final = 509
"""Regions that ADD_MEM_REG may make: what KVM can have on x86-64, and what QEMU's back ends say."""

MAX_VRINGS: Final = 256
"""A vring's index has eight bits where a descriptor comes with it."""

LOG_PAGE: Final = 4096
"""Bytes that one bit of the dirty log stands for ("Migration")."""


class HeaderFlag(enum.IntFlag):
    """Flags of a header; its two lowest bits are the version."""

    VERSION_MASK = 0x3
    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


class Request(enum.IntEnum):
    """What a front end may ask of the back end of a block device. Others are for other devices, or for extensions that
    we do not offer.
    """

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(enum.IntEnum):
    """What the back end may ask of the front end, over the socket of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE_MSG = 2


PROTOCOL_FEATURES: Final = 1 << 30
"""The feature bit that says that there are protocol features (F_PROTOCOL_FEATURES)."""

LOG_ALL: Final = 1 << 26
"""The feature bit that says, acknowledged, that written pages are to be logged (VHOST_F_LOG_ALL)."""


class ProtocolFeature(enum.IntFlag):
    """Extensions of the protocol (PROTOCOL_F_...)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class VringFlag(enum.IntFlag):
    """Flags of SET_VRING_ADDR."""

    LOG = 1 << 0


class ConfigFlag(enum.IntEnum):
    """Who sends a SET_CONFIG, and why."""

    FRONTEND = 0
    MIGRATION = 1
