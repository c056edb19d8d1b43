"""One job at a time in a run directory: a lock of the kernel's, which ends with its holder, however that ends.

`<run>/lock` is locked with flock and says who holds it; what it says outlives the holder and means nothing then. On NFS
Linux turns flock into a lock at the server, which holds between hosts, unless the share is mounted with `nolock` or
`local_lock`: then each host sees its own jobs only. After a crash of a whole host the server keeps its locks until the
lease ends, as a rule 90 s. Where the file system knows no locks (Lustre without its option `flock`) there is a warning
and no more. Who only reads a run needs no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from fastssl import dist
from shard_tools.disk import Locked

FILE = "lock"
PATIENCE_S = 2.0  # for what is left of a job that was killed a moment ago

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_NOTE_BYTES = 1024


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the run alone, rank 0 for all ranks. A collective; nothing in the run may be written before it.

    Raises Locked on all ranks if another job holds it, ValueError if `run_dir` cannot be written.
    """
    descriptor, refusal, locked = None, "", False
    if dist.rank() == 0:
        try:
            descriptor = _open(run_dir / FILE)
            locked = not _lock(descriptor)
            refusal = _sentence(run_dir, descriptor) if locked else ""
        except OSError as error:
            refusal = f"run.dir={run_dir} cannot be written ({error.strerror}); give another run.dir"
    try:
        refusal, locked = dist.main_says((refusal, locked))  # type: ignore[misc]
        if refusal:
            raise Locked(refusal) if locked else ValueError(refusal)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_free(run_dir: Path) -> bool:
    """Whether there was a job, and none works on the run now. Takes the lock for a moment, which `held` waits for."""
    try:
        descriptor = os.open(run_dir / FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours; also if the file system has none to give."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: this file system has no locks ({error.strerror}): see to it that no other job has the same "
                "run.dir",
                file=sys.stderr,
            )
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        note = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note.encode() + b"\n", 0)
        return True


def _sentence(run_dir: Path, descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, _NOTE_BYTES, 0))
        who = f"process {int(note['pid'])} on host {str(note['host'])[:255]!r} since {str(note['since'])[:40]}"
    except (ValueError, LookupError, TypeError, RecursionError):
        who = "a process that has not said who it is"
    return f"run.dir={run_dir} is in use by {who}; wait for its end, stop it, or give another run.dir"
