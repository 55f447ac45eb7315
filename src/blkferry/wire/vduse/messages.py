"""What the kernel asks of a device by read(2), and the answers by write(2) (Linux include/uapi/linux/vduse.h).

Every request is to be answered, with its id, within the device's `msg_timeout` (30 seconds unless the administrator
has changed it): otherwise the kernel gives the device up for good.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

REQUEST_SIZE: Final = 152
RESPONSE_SIZE: Final = 152

_HEAD = struct.Struct("=II16x")
_INDEX = struct.Struct("=I")
_STATUS = struct.Struct("=B")
_RANGE = struct.Struct("=QQ")
_RESPONSE = struct.Struct("=II16xIH122x")


class RequestType(enum.IntEnum):
    """The kinds of requests that version 0 has (enum vduse_req_type)."""

    GET_VQ_STATE = 0
    SET_STATUS = 1
    UPDATE_IOTLB = 2


class Result(enum.IntEnum):
    """How a request ended."""

    OK = 0
    FAILED = 1


class DeviceStatus(enum.IntFlag):
    """What driver and device have come to (virtio specification, "Device Status Field"); 0 is a reset."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


@dataclass(frozen=True, slots=True)
class GetVqState:
    """Where is this virtqueue?"""

    request_id: int
    index: int


@dataclass(frozen=True, slots=True)
class SetStatus:
    """This is the device's status now."""

    request_id: int
    status: DeviceStatus


@dataclass(frozen=True, slots=True)
class UpdateIotlb:
    """What was known of these addresses, both ends inclusive, is void."""

    request_id: int
    start: int
    last: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """A request of a version that was not agreed on."""

    request_id: int
    type: int


Request = GetVqState | SetStatus | UpdateIotlb | Unknown


def parse_request(data: bytes) -> Request:
    """What the kernel wants. Raises ValueError when these are not the bytes of one request."""
    if len(data) != REQUEST_SIZE:
        raise ValueError(f"a request of {len(data)} bytes instead of {REQUEST_SIZE}")
    kind, request_id = _HEAD.unpack_from(data)
    at = _HEAD.size
    match kind:
        case RequestType.GET_VQ_STATE:
            return GetVqState(request_id, *_INDEX.unpack_from(data, at))
        case RequestType.SET_STATUS:
            return SetStatus(request_id, DeviceStatus(*_STATUS.unpack_from(data, at)))
        case RequestType.UPDATE_IOTLB:
            return UpdateIotlb(request_id, *_RANGE.unpack_from(data, at))
        case _:
            return Unknown(request_id, kind)


def build_response(request: Request, result: Result, avail_index: int = 0) -> bytes:
    """The answer; `avail_index` is that of the virtqueue whose state was asked for."""
    index = request.index if isinstance(request, GetVqState) else 0
    return _RESPONSE.pack(request.request_id, result, index, avail_index)
