"""Lines between the driver and its ranks: a JSON header with its length in front, then raw bytes if it says so."""

import json
import socket
import struct
from typing import Any

Message = dict[str, Any]


def send(connection: socket.socket, message: Message, blob: bytes = b"") -> None:
    """One message."""
    header = json.dumps(message | ({"blob": len(blob)} if blob else {})).encode()
    connection.sendall(struct.pack("!I", len(header)) + header + blob)


def receive(connection: socket.socket) -> tuple[Message, bytes]:
    """One message and its bytes; raises EOFError when the other side is gone."""
    (length,) = struct.unpack("!I", _exactly(connection, 4))
    message = json.loads(_exactly(connection, length))
    return message, _exactly(connection, message.pop("blob", 0))


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = connection.recv(min(count - len(parts), 1 << 20))
        except OSError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
