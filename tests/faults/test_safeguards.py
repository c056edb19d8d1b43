"""Nothing gets its name before it is on the disk; and whoever removes a safeguard is told so by a test."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastssl import config, train
from shard_tools import cli
from tests.fastssl.runs import settings
from tests.faults.record import REPOSITORY
from tests.faults.safeguards import SAFEGUARDS, unnoticed


class Disk:
    """Watches what is renamed: a file must have been synced as it is, and the folder it came to must be afterwards.

    fsync cannot be seen to work without a power cut, but it can be seen to be asked for, in the right order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, tuple[int, int]] = {}  # inode -> size and time of change when it was last synced
        self.renamed: list[Path] = []
        self.faults: list[str] = []
        self._unsynced_folders: set[Path] = set()
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)
        for name in ("rename", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda source, to, real=real: self._rename(real, Path(source), Path(to)))

    def fsync(self, handle: int) -> None:
        self._fsync(handle)
        self._note(os.fstat(handle))
        self._unsynced_folders.discard(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def is_synced(self, path: Path) -> bool:
        status = path.stat()
        return self.synced.get(status.st_ino) == (status.st_size, status.st_mtime_ns)

    def close(self) -> list[str]:
        return self.faults + [f"{folder} is not synced after a rename" for folder in sorted(self._unsynced_folders)]

    def _note(self, status: os.stat_result) -> None:
        self.synced[status.st_ino] = (status.st_size, status.st_mtime_ns)

    def _rename(self, real, source: Path, to: Path) -> None:
        inside = sorted(source.iterdir()) if source.is_dir() else []
        self.faults += [f"{path} is renamed unsynced" for path in (source, *inside) if not self.is_synced(path)]
        real(source, to)
        self.renamed.append(to)
        if not to.name.startswith(".deleting-"):  # what goes may come back: a retention is repeated
            self._unsynced_folders.add(to.parent.resolve())


@pytest.fixture
def disk(monkeypatch) -> Iterator[Disk]:
    with monkeypatch.context() as patch:
        yield Disk(patch)


def test_a_run_renames_nothing_that_is_not_on_the_disk(tiny_shards, tmp_path, disk):
    run_dir = tmp_path / "run"
    assert train.run(config.load(settings(tiny_shards, run_dir, "run.duration=6steps"))) == 0
    assert {"step-00000002", "step-00000006", "LAST"} <= {path.name for path in disk.renamed}
    assert not disk.close()


def test_a_pack_renames_nothing_that_is_not_on_the_disk(tiny_files, tmp_path, disk, monkeypatch):
    source = tmp_path / "images"
    for i, (suffix, payload) in enumerate(tiny_files[:12]):
        (source / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        (source / f"class-{i % 2}" / f"{i}.{suffix}").write_bytes(payload)
    journal, unlink = [], Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.name == "pack.journal":
            journal.append(disk.is_synced(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    out = tmp_path / "shards"
    assert cli.main(["pack", "imagefolder", str(source), str(out), "--shard-size", "5", "--workers", "1"]) == 0
    assert {"train-000000.tar", "train-000002.tar", "manifest.json"} <= {path.name for path in disk.renamed}
    assert journal == [True]
    assert not disk.close()


def test_every_safeguard_is_where_the_list_says_and_has_tests():
    assert len({safeguard.name for safeguard in SAFEGUARDS}) == len(SAFEGUARDS)
    for safeguard in SAFEGUARDS:
        source = (REPOSITORY / safeguard.file).read_text()
        without = safeguard.without(source)
        assert without != source, safeguard.name
        ast.parse(without)
        assert safeguard.tests, safeguard.name
        for test in safeguard.tests:
            path, *_, name = test.split("::")
            tree = ast.parse((REPOSITORY / path).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in functions, (safeguard.name, test)


@pytest.mark.slow
@pytest.mark.fault("a safeguard is taken out of the code", "a test fails")
def test_no_safeguard_is_removed_unnoticed(record_property):
    missed = unnoticed(SAFEGUARDS)
    record_property("seen", f"{len(SAFEGUARDS) - len(missed)} of {len(SAFEGUARDS)} removals noticed")
    assert not missed, "\n".join(missed)
