"""google.rpc.Status with RetryInfo, as gRPC libraries of every language read it from a trailer.

Three fixed fields are written by hand, so that no service needs the messages' package.
(https://github.com/googleapis/googleapis: google/rpc/status.proto, error_details.proto)
"""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration

STATUS_DETAILS_METADATA_KEY = "grpc-status-details-bin"
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"


def retry_status(code: int, message: str, retry_after_s: float) -> bytes:
    """Status{code = 1, message = 2, details = 3: [RetryInfo{retry_delay = 1}]}."""
    delay = Duration()
    delay.FromNanoseconds(round(retry_after_s * 1e9))
    retry_info = Any(type_url=_RETRY_INFO, value=_field(1, delay.SerializeToString()))
    return (
        _varint(1 << 3)
        + _varint(code)
        + _field(2, message.encode())
        + _field(3, retry_info.SerializeToString())
    )


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
