"""A loopback HTTP proxy in front of an S3 server that injects the faults real networks have."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FaultProxy:
    """Forwards to `port`; `fault(method, path, number)` names a fault for a request, or None.

    Faults: "500", "503", "reset" (close in mid-body), "short" (half the body, honest length), "stall" (no answer for
    `stall_seconds`), "forget" (do it, then answer 500: the lost reply), "stale" (listings without their last entry).
    """

    def __init__(self, port: int, *, stall_seconds: float = 3.0) -> None:
        self.target, self.stall_seconds = port, stall_seconds
        self.fault: Callable[[str, str, int], str | None] = lambda method, path, number: None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        number = len(self.requests)
        self.requests.append((handler.command, handler.path, dict(handler.headers)))
        fault = self.fault(handler.command, handler.path, number)
        if fault == "stall":
            time.sleep(self.stall_seconds)
        if fault in ("500", "503"):
            self.answer(handler, int(fault), {}, SLOW_DOWN)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=20)
        try:
            connection.request(handler.command, handler.path, body, dict(handler.headers))
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if fault == "forget":
            self.answer(handler, 500, {}, SLOW_DOWN)
            return
        if fault == "stale":
            start, end = data.rfind(b"<Contents>"), data.rfind(b"</Contents>")
            data = data[:start] + data[end + len(b"</Contents>") :] if start >= 0 else data
        self.answer(handler, response.status, dict(response.getheaders()), data, fault)

    def answer(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        data: bytes,
        fault: str | None = None,
    ) -> None:
        handler.send_response(status)
        length = headers.get("Content-Length", str(len(data))) if handler.command == "HEAD" else str(len(data))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                handler.send_header(name, value)
        if fault == "short":
            length = str(len(data) // 2)
        handler.send_header("Content-Length", length)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault in ("reset", "short"):
            data = data[: len(data) // 2]
        handler.wfile.write(data)
        if fault == "reset":
            handler.close_connection = True
            handler.wfile.flush()
            handler.connection.close()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)
