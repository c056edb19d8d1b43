"""Storage on loopback that behaves as badly as the real one: an HTTP server with faults on demand, and an S3 server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.range_server import RangeHandler, RangeServer

Fault = int | str  # an HTTP status, or one of cut, hang, flip, ignore_range


class FaultyServer(RangeServer):
    """faults    file name -> what its next answers suffer, the last one for ever after if `lasting`
    requests    file name -> GET requests so far
    sent        file name -> bytes of its content sent so far
    on_request  called at the start of each GET
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, handler=_FaultyHandler)
        self.faults: dict[str, list[Fault]] = {}
        self.lasting = False
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.on_request: Callable[[], Any] = lambda: None
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def next_fault(self, name: str) -> Fault | None:
        with self.lock:
            faults = self.faults.get(name) or self.faults.get("*.tar" if name.endswith(".tar") else "", [])
            if not faults:
                return None
            return faults[0] if self.lasting and len(faults) == 1 else faults.pop(0)


class _FaultyHandler(RangeHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.requested()
        name = path.name if path else self.path
        with self.server.lock:
            self.server.requests[name] += 1
        self.server.on_request()
        self.fault = self.server.next_fault(name)
        if isinstance(self.fault, int):
            self.refuse(self.fault)
            return
        if self.fault == "hang":
            self.server.closing.wait(30)
            self.close_connection = True
            return
        if self.fault == "ignore_range":
            del self.headers["Range"]
        self.answer()

    def send_part(self, descriptor: int, start: int, end: int) -> None:
        content = bytearray(os.pread(descriptor, end - start, start))
        if getattr(self, "fault", None) == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if getattr(self, "fault", None) == "flip":
            content[len(content) // 2] ^= 4
        with self.server.lock:
            self.server.sent[Path(self.path.partition("?")[0]).name] += len(content)
        self.wfile.write(content)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """A FaultyServer on the files below `folder`."""
    with FaultyServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def s3_serving(folder: Path) -> Iterator[str]:
    """The URL of a bucket that holds the files below `folder`, on a server that speaks S3 (moto's)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            _wait_for(port, process)
            import s3fs

            store = s3fs.S3FileSystem()
            store.mkdir("bucket")
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    store.put_file(str(path), f"bucket/photos/{path.relative_to(folder).as_posix()}")
            yield "s3://bucket/photos"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError("the S3 server did not start; install moto[s3,server]")
