"""An S3 endpoint over HTTP for tests, and what goes wrong between it and its clients."""

import http.client
import threading
import time
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

# A status to answer with; "close": end the connection halfway through; None: nothing goes wrong.
Fault = int | str | None


class FaultyS3:
    """moto's server behind a proxy. `faults`: what befalls the next requests, in turn.

    Each request is forwarded as it is: the signature covers the host that the client asked for, so
    the original `Host` goes along.
    """

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(port=0, verbose=False)
        self._server.start()
        self._upstream = self._server.get_host_and_port()
        self.faults: deque[Fault] = deque()
        self.is_down = False
        self.requests: list[tuple[str, str, Fault]] = []
        self._proxy = _Proxy(("127.0.0.1", 0), self)
        self.port = self._proxy.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()

    def down(self, seconds: float) -> None:
        """Refuse connections for a while, and answer none that is open."""
        self.is_down = True
        self._stop_proxy()

        def come_back() -> None:
            time.sleep(seconds)
            self.is_down = False
            self._proxy = _Proxy(("127.0.0.1", self.port), self)
            self._serve()

        threading.Thread(target=come_back, daemon=True).start()

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes):
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    def _stop_proxy(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()

    def stop(self) -> None:
        self._stop_proxy()
        self._server.stop()


class _Proxy(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address, owner: FaultyS3) -> None:
        self.owner = owner
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        owner = self.server.owner
        if owner.is_down:
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = owner.faults.popleft() if owner.faults else None
        owner.requests.append((self.command, self.path, fault))
        if isinstance(fault, int):
            self._send(fault, [], b"")
            return
        status, headers, content = owner.forward(
            self.command, self.path, dict(self.headers.items()), body
        )
        self._send(status, headers, content, cut=fault == "close")

    def _send(self, status, headers, content, cut=False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        head = self.command == "HEAD"
        self.send_header("Content-Length", length if head and length else str(len(content)))
        if cut:
            self.send_header("Connection", "close")
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            if not head:
                self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *arguments) -> None:
        """Nothing on the terminal."""
