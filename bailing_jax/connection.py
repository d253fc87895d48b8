"""A connection between two processes of a job: JSON objects, each behind its length.

The kernel closes the connections of a process that ends; a host that vanishes stops acknowledging,
which the kernel is asked to notice within seconds. No jax.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any

Message = dict[str, Any]

# A process without a sign of life for so long is stuck (stopped, or in one call of minutes that
# lets no other thread run).
STUCK_S = 60.0
# The kernel's patience with a host that acknowledges nothing any more.
VANISHED_S = 7
# A request of a million tokens is 8 MB.
_MAX_BYTES = 256_000_000
_LENGTH = struct.Struct(">I")


class Link:
    """One connection. Several threads may send; one receives."""

    def __init__(self, sock: socket.socket, silence_s: float | None = None) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        sock.settimeout(STUCK_S if silence_s is None else silence_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # By the names the system has.
        for option, value in (
            ("TCP_KEEPIDLE", VANISHED_S - 4),
            ("TCP_KEEPALIVE", VANISHED_S - 4),
            ("TCP_KEEPINTVL", 1),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", VANISHED_S * 1000),
        ):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            OSError: the other end is gone, or takes nothing any more.
        """
        data = json.dumps(message).encode()
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Message:
        """Wait for one message.

        Raises:
            EOFError: the other end is gone.
            OSError: so is its host, or nothing came for too long (TimeoutError).
            ValueError: what came is no message.
        """
        (length,) = _LENGTH.unpack(self._bytes(_LENGTH.size))
        if length > _MAX_BYTES:
            raise ValueError(f"a message of {length} bytes")
        message = json.loads(self._bytes(length))
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message

    def close(self) -> None:
        """Let go; the other end notices."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _bytes(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(min(count - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
