"""A plain HTTP file server that knows Range and can be as slow as a distant one: `python -m bench.range_server FOLDER`.

Python's own (`python -m http.server`) ignores Range. This one prints its URL, and serves until it is ended.
"""

from __future__ import annotations

import argparse
import os
import re
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves the files below `folder` on loopback; `latency_s` passes before each answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, latency_s: float = 0.0, handler: type[RangeHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or RangeHandler)
        self.folder, self.latency_s = folder.resolve(), latency_s

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class RangeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as with an object store
    disable_nagle_algorithm = True
    server: RangeServer

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        time.sleep(self.server.latency_s)
        path = self.requested()
        if path is None:
            self.refuse(404)
            return
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2] or size), size - 1)) if wanted else (0, size - 1)
        if first > last:
            self.refuse(416)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                self.send_part(file.fileno(), first, last + 1)

    def requested(self) -> Path | None:
        """The file asked for, if it lies below the folder."""
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        path = (self.server.folder / name).resolve()
        return path if path.is_file() and self.server.folder in path.parents else None

    def refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_part(self, descriptor: int, start: int, end: int) -> None:
        self.wfile.flush()
        while start < end:
            start += os.sendfile(self.connection.fileno(), descriptor, start, end - start)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line a request would be slower than the request."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="before each answer (default: 0)")
    arguments = parser.parse_args()
    with RangeServer(arguments.folder, arguments.latency_ms / 1000) as server:
        print(server.url, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
