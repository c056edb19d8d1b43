"""Safeguards that must not be removable unnoticed: each is taken out of a copy of the tree, and a test must fail there.

python -m tests.faults.safeguards           tries all, and says which of them no test misses
python -m tests.faults.safeguards WORD...   those with a WORD in their names
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.record import REPOSITORY

KERNEL = "pipelines/native/libviews.so"  # built, so git does not list it


@dataclass(frozen=True)
class Safeguard:
    """`text`, once in `file`, is what guards; with `without` in its place one of `tests` must fail, and none before."""

    name: str
    file: str
    text: str
    without: str
    tests: tuple[str, ...]

    def remove(self, tree: Path) -> None:
        path = tree / self.file
        source = path.read_text()
        assert source.count(self.text) == 1, f"{self.name}: {self.text!r} is {source.count(self.text)} times in {path}"
        path.write_text(source.replace(self.text, self.without))


CHECKPOINT, DISK = "tests/fastssl/test_checkpoint.py", "tests/faults/test_safeguards.py"
PACK, VERIFY = "tests/shard_tools/test_interrupted.py", "tests/shard_tools/test_verify.py"
READER, TRAIN = "tests/pipelines/test_reader.py", "tests/fastssl/test_train.py"

SAFEGUARDS = [
    Safeguard(
        "fsync of a written file", "shard_tools/disk.py",
        "        file.write(content)\n        file.flush()\n        os.fsync(file.fileno())\n",
        "        file.write(content)\n        file.flush()\n",
        (f"{DISK}::test_a_pack_renames_nothing_that_is_not_on_the_disk",),
    ),
    Safeguard(
        "fsync of a shard", "shard_tools/disk.py",
        '    with path.open("rb") as file:\n        os.fsync(file.fileno())\n', "    return\n",
        (f"{DISK}::test_a_pack_renames_nothing_that_is_not_on_the_disk",),
    ),
    Safeguard(
        "fsync of a folder", "shard_tools/disk.py", "        os.fsync(descriptor)\n", "        pass\n",
        (f"{DISK}::test_a_pack_renames_nothing_that_is_not_on_the_disk",),
    ),
    Safeguard(
        "a file is written beside its place and renamed", "shard_tools/disk.py",
        "    partial = partial_path(path)\n    with partial.open(", "    partial = path\n    with partial.open(",
        (f"{PACK}::test_kill_9_at_any_step_and_a_rerun_give_the_bytes_of_an_uninterrupted_pack",),
    ),
    Safeguard(
        "fsync of the journal", "shard_tools/journal.py",
        "            file.flush()\n            os.fsync(file.fileno())\n", "            file.flush()\n",
        (f"{DISK}::test_a_pack_renames_nothing_that_is_not_on_the_disk",),
    ),
    Safeguard(
        "the journal of a pack", "shard_tools/journal.py",
        '            file.write(_line(document))\n', "            pass\n",
        (f"{PACK}::test_a_rerun_continues_behind_complete_shards_instead_of_starting_over",),
    ),
    Safeguard(
        "a torn line of the journal is no entry",
        "shard_tools/journal.py",
        'json.loads(line) if line.endswith(b"\\n") else None\n    except ValueError:\n',
        "json.loads(line)\n    except ZeroDivisionError:\n",
        (f"{PACK}::test_a_torn_journal_line_costs_one_shard_only",),
    ),
    Safeguard(
        "crc32 of a read", "pipelines/reader.py", "if zlib.crc32(payload) != crc32:", "if False:",
        (f"{READER}::test_a_flipped_bit_is_named_with_shard_and_member",),
    ),
    Safeguard(
        "the length of a read", "pipelines/reader.py", "if len(payload) != size:", "if False:",
        (f"{READER}::test_a_shard_cut_while_it_is_read_is_named",),
    ),
    Safeguard(
        "the largest image", "shard_tools/images.py", "    if width * height > MAX_PIXELS:\n", "    if False:\n",
        ("tests/shard_tools/test_bad_images.py",),
    ),
    Safeguard(
        "the fingerprint of the data at a resume", "fastssl/train.py",
        'if meta["fingerprint"] != fingerprint:', "if False:",
        (f"{TRAIN}::test_a_resume_on_other_data_is_refused",),
    ),
]  # fmt: skip


def matching(words: list[str]) -> list[Safeguard]:
    return [s for s in SAFEGUARDS if not words or any(word in s.name for word in words)]


def unnoticed(safeguards: list[Safeguard]) -> list[str]:
    """Names of those whose removal no test notices, and why. Raises AssertionError if a test fails before."""
    with copied() as tree:
        tests = sorted({test for safeguard in safeguards for test in safeguard.tests})
        code, said = run(tree, tests)
        assert code == 0, f"the tests fail with all safeguards in place:\n{said}"
        return [f"{s.name}: {why}" for s in safeguards if (why := _why_unnoticed(tree, s))]


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """The tree as it stands, with what git does not ignore and the built kernel, in a folder that goes afterwards."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, check=True,
    )  # fmt: skip
    names = {name for name in listed.stdout.decode().split("\0") if name} | {KERNEL}
    with tempfile.TemporaryDirectory(prefix="fastssl-without-") as folder:
        for name in sorted(names):
            if (REPOSITORY / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, Path(folder) / name)
        yield Path(folder)


def run(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and what it said. The tests import the tree's packages, and so do processes they start."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSSL_", "PYTEST_"))}
    environment = {**kept, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def _why_unnoticed(tree: Path, safeguard: Safeguard) -> str | None:
    path = tree / safeguard.file
    before = path.read_text()
    safeguard.remove(tree)
    try:
        code, said = run(tree, list(safeguard.tests))
    finally:
        path.write_text(before)
    if code == 0:
        return "its tests pass without it"
    return None if code == 1 else f"pytest ended with {code}, which is no failed test:\n{said[-2000:]}"


def main(words: list[str]) -> int:
    safeguards = matching(words)
    missed = unnoticed(safeguards)
    print(f"{len(safeguards) - len(missed)} of {len(safeguards)} removals noticed", *missed, sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
