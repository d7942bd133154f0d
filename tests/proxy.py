"""A TCP relay that drops connections in the middle, for tests."""

import contextlib
import socket
import threading

CHUNK = 4096


class CuttingProxy:
    """Relays one port to another on the loopback.

    Args:
        target: Port of the server.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        """Connections that are still to be dropped."""
        self.up_to: int = 0
        """Bytes of either direction that a dropped connection carries."""
        self.dropped = 0
        """Connections that were dropped so far."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(one, other), daemon=True).start()

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while data := one.recv(CHUNK):
                carried += len(data)
                if self.cuts > 0 and carried > self.up_to:
                    self.cuts -= 1
                    self.dropped += 1
                    break
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
