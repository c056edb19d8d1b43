"""Folders that are not on this machine: which URLs are understood, and reads from them that outlast a bad network.

fsspec (the extra `remote`) speaks the protocols and finds credentials where each protocol's own tools look for them.
Its own retries are off where they can be, so that one policy holds for all: exponential back-off with jitter for what
may pass (429, 5xx, cut connections, time-outs), none for what will not (403, 404 and the other 4xx). No message holds
more of a URL than host and path: what comes before `@` or after `?` is a secret.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from shard_tools.manifest import MAX_MANIFEST_BYTES, ShardError

PROTOCOLS = {"s3": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}  # of a URL -> of fsspec

_EXTRA = 'pip install "fastssl-train[remote]"'
_PIECE_BYTES = 8 * 2**20  # of one request for a part of a shard: what a cut connection costs, and a download's memory
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 15.0
_PASSING_4XX = (408, 429)

T = TypeVar("T")


class RemoteError(ShardError):
    """A remote folder could not be read, after all retries: no fault of a sample, and no reason to replace it."""


class NotThere(RemoteError):
    """The server says that a file is not there or must not be seen, which stores do not always tell apart."""


@dataclass(frozen=True)
class Access:
    """How shards behind a URL are read; nothing here matters to a folder on this machine.

    read        "shards": whole shards, kept in `cache`; "ranges": the bytes of each sample, and only the index is kept
    cache       folder on a local disk; "" takes $FASTSSL_CACHE, or fastssl in the user's cache folder. The ranks of one
                host share it, and several runs may
    cache_gb    most that all shards in `cache` take, in GB (1e9 bytes); the longest unused make room
    attempts    tries of a request before it is given up; the waits between them double, from a quarter of a second
    timeout_s   for the answer to a request, of at most 8 MiB
    """

    read: Literal["shards", "ranges"] = "shards"
    cache: str = ""
    cache_gb: float = 32.0
    attempts: int = 8
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for key, value, least in (("cache_gb", self.cache_gb, 0), ("timeout_s", self.timeout_s, 0)):
            if value <= least:
                raise ValueError(f"data.remote.{key} is {value!r}, but must be above 0")
        if self.attempts < 1:
            raise ValueError(f"data.remote.attempts is {self.attempts!r}, but must be 1 or more")


def is_url(root: str | Path) -> bool:
    return "://" in str(root)


def locate(root: str | Path, access: Access | None = None) -> Path | RemoteFolder:
    """The folder that `root` means. Raises ShardError for a URL of an unknown protocol, or without a host or bucket."""
    if not is_url(root):
        return Path(root)
    parts = urllib.parse.urlsplit(str(root))
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ShardError(f"{shown(str(root))} names another host, but file:// is for this one; write file:///PATH")
        return Path(urllib.parse.unquote(parts.path))
    if parts.scheme not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in ("file", *PROTOCOLS))
        raise ShardError(f"{shown(str(root))} is of an unknown protocol; use a folder, or one of {known}")
    if not parts.hostname:
        raise ShardError(f"{shown(str(root))} names no host or bucket; write {parts.scheme}://NAME/PATH")
    return RemoteFolder(str(root), access or Access())


def shown(url: str) -> str:
    """What may be printed of a URL: protocol, host or bucket, and path. Anything else is returned as it is."""
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0].partition("#")[0]
    authority, slash, path = place.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}".rstrip("/")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. Holds no connection, so it can be sent to another process; threads may share it.

    A query in `url`, such as the token of a signed address, is repeated for every file of the folder.
    """

    url: str = field(repr=False)
    access: Access = field(default_factory=Access, repr=False)

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> RemoteFolder:
        return replace(self, url=self._join(lambda path: path.rstrip("/").rpartition("/")[0]))

    def __truediv__(self, name: str) -> RemoteFolder:
        """A file or folder in this one; `name` is a plain file name."""
        quoted = urllib.parse.quote(name) if self._protocol == "http" else name
        return replace(self, url=self._join(lambda path: f"{path.rstrip('/')}/{quoted}"))

    def size(self) -> int:
        """Of the file that this is, in bytes. Raises RemoteError."""
        size = self._retried(lambda: self._filesystem().size(self._address, **self._limits))
        if size is None:
            raise RemoteError(f"{self} has no size that its server would tell; serve it with a Content-Length")
        return int(size)

    def read_small(self) -> bytes:
        """A whole file no larger than a manifest may be. Raises RemoteError: NotThere if it is absent."""
        if self.size() > MAX_MANIFEST_BYTES:
            raise ShardError(f"{self} is larger than {MAX_MANIFEST_BYTES} bytes, so no manifest; pack the split again")
        return self._retried(lambda: self._filesystem().cat_file(self._address, **self._limits))

    def read(self, start: int, size: int, stopping: threading.Event | None = None) -> bytes:
        """`size` bytes from byte `start` on. Raises RemoteError; `stopping` ends the retries."""
        content = self._read_range(start, size, stopping)
        if len(content) > size:
            raise RemoteError(
                f"the server of {self} ignores the Range of a request; use data.remote.read=shards, or another server"
            )
        return content

    def pieces(self, num_bytes: int, stopping: threading.Event | None = None) -> Iterator[bytes]:
        """A file of `num_bytes` in pieces, so that what a cut connection costs is one of them. Raises RemoteError."""
        for start in range(0, num_bytes, _PIECE_BYTES):
            content = self._read_range(start, min(_PIECE_BYTES, num_bytes - start), stopping)
            yield content
            if len(content) > _PIECE_BYTES:  # a server that ignores Range sent it all; the caller judges the whole
                return

    def _read_range(self, start: int, size: int, stopping: threading.Event | None) -> bytes:
        def attempt() -> bytes:
            filesystem = self._filesystem()
            content = filesystem.cat_file(self._address, start=start, end=start + size, **self._limits)
            if len(content) < size:
                raise _Short(f"it sent {len(content)} of {size} bytes from byte {start} on")
            return content

        return self._retried(attempt, stopping)

    def _retried(self, attempt: Callable[[], T], stopping: threading.Event | None = None) -> T:
        stopping, wait_s = stopping or threading.Event(), _FIRST_WAIT_S
        for number in itertools.count(1):
            outcome = _outcome(attempt)
            if not isinstance(outcome, Exception):
                return outcome
            if isinstance(outcome, ShardError):
                raise outcome
            if not _may_pass(outcome):
                raise self._refusal(outcome)
            if number == self.access.attempts or stopping.wait(wait_s * random.uniform(0.5, 1.0)):
                raise RemoteError(
                    f"{self} cannot be read: {_cause(outcome)}, in {number} attempts; check the network and the server,"
                    " or raise data.remote.attempts or data.remote.timeout_s"
                )
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        raise AssertionError("the loop counts without end")

    def _refusal(self, error: Exception) -> RemoteError:
        if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
            return NotThere(f"{self} does not exist; check data.root")
        if isinstance(error, PermissionError) or _status(error) in (401, 403) or "Credentials" in type(error).__name__:
            return NotThere(
                f"{self} must not be read with the credentials found; docs/remote.md says where to put them"
            )
        return RemoteError(f"{self} cannot be read: {_cause(error)}; check data.root and the server")

    def _filesystem(self) -> Any:
        try:
            import fsspec

            # fsspec keeps one instance of these options a process, with its connections
            filesystem = fsspec.filesystem(self._protocol, **_OPTIONS[self._protocol])
        except (ImportError, ValueError) as error:  # ValueError: a protocol whose package is missing
            raise RemoteError(f"{self} needs the extra `remote` ({error}); run `{_EXTRA}`") from None
        if self._protocol == "s3":
            filesystem.retries = 1
        return filesystem

    @property
    def _limits(self) -> dict[str, Any]:
        return {"timeout": self.access.timeout_s}  # fsspec cancels what takes longer

    @property
    def _protocol(self) -> str:
        return PROTOCOLS[self.url.partition("://")[0]]

    @property
    def _address(self) -> str:
        return self.url if self._protocol == "http" else self.url.partition("://")[2]

    def _join(self, change: Callable[[str], str]) -> str:
        base, mark, query = self.url.partition("?") if self._protocol == "http" else (self.url, "", "")
        scheme, _, rest = base.partition("://")
        authority, _, path = rest.partition("/")
        return f"{scheme}://{authority}/{change('/' + path).lstrip('/')}{mark}{query}"


# The proxy and .netrc of the environment are honoured; a compressed body would have other offsets than its file.
_OPTIONS: dict[str, dict[str, Any]] = {
    "http": {"encoded": True, "client_kwargs": {"trust_env": True, "headers": {"Accept-Encoding": "identity"}}},
    "s3": {"config_kwargs": {"retries": {"max_attempts": 0}}, "use_listings_cache": False},
    "gs": {"use_listings_cache": False},
}


def _outcome(attempt: Callable[[], T]) -> T | Exception:
    """Each protocol has errors of its own; what they mean is found by their status and kind."""
    try:
        return attempt()
    except Exception as error:
        return error


class _Short(OSError):
    """Fewer bytes came than the file must have: a connection cut unseen, or a file that was cut."""


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError)) or "Credentials" in type(error).__name__:
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in _PASSING_4XX


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp or gcsfs, or in botocore's behind an error of s3fs."""
    for key in ("status", "code"):
        value = getattr(error, key, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    # Of other causes none is asked: a body that was cut has one of code 400, the parser's own.
    response = getattr(error.__cause__, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None


def _cause(error: Exception) -> str:
    """Why, without the error's own text, which may hold the whole URL or a signature."""
    if isinstance(error, _Short):
        return str(error)
    if status := _status(error):
        return f"HTTP {status}"
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return "no answer in time"
    reason = error.strerror if isinstance(error, OSError) and error.strerror and "://" not in error.strerror else ""
    return f"the connection failed ({reason or type(error).__name__})"
