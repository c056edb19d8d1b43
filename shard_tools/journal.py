"""The memory of an unfinished pack: one line a complete shard, appended and flushed after the shard is in place.

A kill can only tear the last line, and a torn line is a shard that is written again; so a re-run continues behind the
last complete shard. The file goes when the manifest is there.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools import disk
from shard_tools.census import Census
from shard_tools.manifest import INDEX_DTYPE, Shard, ShardError

JOURNAL_NAME = "pack.journal"


@dataclass(frozen=True)
class Entry:
    """A complete shard, the rows of its samples, the census of what it took from the source, and the source items
    consumed when it was closed."""

    shard: Shard
    rows: np.ndarray
    census: Census
    consumed: int


class Journal:
    """The journal of one split folder; `entries` are the complete shards in order."""

    def __init__(self, folder: Path, fingerprint: str, on_bad: str):
        """Open or begin it. Raises ShardError where it belongs to a pack of other files or options."""
        self.path = folder / JOURNAL_NAME
        self.entries: list[Entry] = []
        head = {"fingerprint": fingerprint, "on_bad": on_bad}
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        found = _parse(lines[0]) if lines else None
        if found is None:
            disk.write_file(self.path, _line(head))
            return
        self.entries = _complete_entries(folder, lines[1:])
        quarantined = any(entry.census.bad for entry in self.entries)
        if found.get("fingerprint") != fingerprint or (quarantined and found.get("on_bad") != on_bad):
            raise ShardError(
                f"{folder} holds an unfinished pack of other files or options; finish that one, or add --overwrite"
            )
        disk.write_file(self.path, b"".join((_line(head), *lines[1 : 1 + len(self.entries)])))

    def append(self, entry: Entry) -> None:
        """Note a shard that is in place; durable when this returns."""
        document = {
            "shard": asdict(entry.shard),
            "rows": base64.b64encode(entry.rows.tobytes()).decode(),
            "census": entry.census.to_json(),
            "consumed": entry.consumed,
        }
        with self.path.open("ab") as file:
            file.write(_line(document))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The line's document, or None if it is torn."""
    try:
        document = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _complete_entries(folder: Path, lines: list[bytes]) -> list[Entry]:
    """Entries up to the first that is torn, or whose shard is not there in its full size."""
    entries = []
    for line in lines:
        if (document := _parse(line)) is None:
            break
        entry = Entry(
            shard=Shard(**document["shard"]),
            rows=np.frombuffer(base64.b64decode(document["rows"]), INDEX_DTYPE),
            census=Census.from_json(document["census"]),
            consumed=document["consumed"],
        )
        path = folder / entry.shard.name
        if not path.is_file() or path.stat().st_size != entry.shard.num_bytes:
            break
        if not (folder / entry.shard.idx_name).is_file():
            break
        entries.append(entry)
    return entries
