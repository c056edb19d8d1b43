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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.record import REPOSITORY

KERNEL = "pipelines/native/libviews.so"  # built, so git does not list it


@dataclass(frozen=True)
class Safeguard:
    """The first of each of `changes` is once in `file`; with the second in its place one of `tests` must fail."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    def without(self, source: str) -> str:
        """The file's text with the safeguard taken out. Raises AssertionError if it is not what the list says."""
        for text, instead in self.changes:
            assert source.count(text) == 1, f"{self.name}: {text!r} is {source.count(text)} times in {self.file}"
            source = source.replace(text, instead)
        return source


CHECKPOINTS, DISK = "tests/faults/test_checkpoints.py", "tests/faults/test_safeguards.py"
PACK, VERIFY = "tests/shard_tools/test_interrupted.py", "tests/shard_tools/test_verify.py"
READER, TRAIN = "tests/pipelines/test_reader.py", "tests/fastssl/test_train.py"
TOGETHER, REJECTED = "tests/faults/test_failing_together.py", "tests/fastssl/test_rejected_steps.py"
SYNCED = f"{CHECKPOINTS}::test_every_file_is_synced_before_the_rename_and_the_folder_after_it"
PACK_SYNCED = f"{DISK}::test_a_pack_renames_nothing_that_is_not_on_the_disk"
PACK_KILLED = f"{PACK}::test_kill_9_at_any_step_and_a_rerun_give_the_bytes_of_an_uninterrupted_pack"

SAFEGUARDS = [
    Safeguard(
        "fsync of a checkpoint's file", "fastssl/checkpoint_files.py",
        (("            file.flush()\n            os.fsync(file.fileno())\n", "            file.flush()\n"),),
        (SYNCED,),
    ),
    Safeguard(
        "fsync of a checkpoint's folder", "fastssl/checkpoint.py",
        (("            sync_folder(beside)\n", ""),),
        (SYNCED,),
    ),
    Safeguard(
        "a checkpoint is written beside its place and renamed", "fastssl/checkpoint.py",
        (
            (', root / f".writing-step-{step:08d}"\n', ', root / f"step-{step:08d}"\n'),
            ("            _publish(beside, final)\n", ""),
        ),
        (f"{CHECKPOINTS}::test_a_kill_at_any_system_call_leaves_a_whole_checkpoint",),
    ),
    Safeguard(
        "the hash of a checkpoint's file", "fastssl/checkpoint_files.py",
        (("if sha256_of_open(file) != digest:", "if False:"),),
        (f"{CHECKPOINTS}::test_every_flipped_bit_is_found_and_the_one_before_is_taken",),
    ),
    Safeguard(
        "the walk back to the newest whole checkpoint", "fastssl/checkpoint.py",
        (("        fault = check(folder)\n", "        fault = None\n"),),
        (f"{CHECKPOINTS}::test_every_cut_file_is_found_and_the_one_before_is_taken",),
    ),
    Safeguard(
        "no new beginning where all checkpoints are damaged", "fastssl/checkpoint.py",
        (("    if faults:\n        raise DamagedError(", "    if False:\n        raise DamagedError("),),
        (f"{CHECKPOINTS}::test_a_run_of_which_nothing_is_whole_does_not_begin_anew",),
    ),
    Safeguard(
        "two whole checkpoints are kept", "fastssl/checkpoint.py",
        (("if num_kept >= keep and num_whole >= 2:", "if num_kept >= keep:"),),
        (f"{CHECKPOINTS}::test_two_whole_checkpoints_are_left_whatever_is_damaged",),
    ),
    Safeguard(
        "weights_only of torch.load", "fastssl/checkpoint_files.py",
        (("map_location=device, weights_only=True", "map_location=device, weights_only=False"),),
        ("tests/fastssl/test_checkpoint.py::test_a_checkpoint_that_carries_code_is_refused",),
    ),
    Safeguard(
        "the source check for what runs code", "fastssl/checkpoint_files.py",
        (("map_location=device, weights_only=True", "map_location=device, weights_only=False"),),
        ("tests/faults/test_source.py::test_no_module_can_run_what_it_reads",),
    ),
    Safeguard(
        "the lock of a run", "fastssl/run_lock.py",
        (("            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "            pass\n"),),
        (f"{CHECKPOINTS}::test_a_second_job_on_a_run_refuses",),
    ),
    Safeguard(
        "the fingerprint of the data at a resume", "fastssl/train.py",
        (('if meta["fingerprint"] != fingerprint:', "if False:"),),
        (f"{TRAIN}::test_a_resume_on_other_data_is_refused",),
    ),
    Safeguard(
        "the settings at a resume", "fastssl/train.py",
        (("    if changed:\n", "    if False:\n"),),
        (f"{TRAIN}::test_a_resume_with_other_settings_is_refused",),
    ),
    Safeguard(
        "the store's prefix of each start of the ranks", "fastssl/dist.py",
        (
            (
                """td.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)""",
                """td.PrefixStore("attempt", store)""",
            ),
        ),
        (f"{TOGETHER}::test_torchrun_recovers_from_a_killed_rank",),
    ),
    Safeguard(
        "the finite check of a step", "fastssl/rejection.py",
        (("self.rejected = found > 0", "self.rejected = found > 2"),),
        (f"{REJECTED}::test_a_spoilt_view_leaves_nothing_behind",),
    ),
    Safeguard(
        "the finite check of running statistics", "fastssl/rejection.py",
        (("factor = torch.where(finite, 1.0, torch.nan)", "factor = torch.where(finite, 1.0, 1.0)"),),
        (f"{REJECTED}::test_a_spoilt_view_leaves_nothing_behind",),
    ),
    Safeguard(
        "what a rejected step has moved is put back", "fastssl/rejection.py",
        (("        self._kept.put_back(self.rejected)\n", ""),),
        (f"{REJECTED}::test_a_spoilt_view_leaves_nothing_behind",),
    ),
    Safeguard(
        "the least loss scale", "fastssl/rejection.py",
        (("            self._scale.clamp_(min=1.0)\n", "            pass\n"),),
        (f"{REJECTED}::test_a_scale_has_a_floor",),
    ),
    Safeguard(
        "the end after many rejected steps in a row", "fastssl/train.py",
        (("if training.rejection.too_many():", "if False:"),),
        (f"{REJECTED}::test_twenty_in_a_row_stop_the_run",),
    ),
    Safeguard(
        "the finite check of a save", "fastssl/checkpoint.py",
        (('    refuse_not_finite({"model": model.state_dict(),', '    str({"model": model.state_dict(),'),),
        (f"{REJECTED}::test_a_tensor_that_is_not_finite_is_not_saved",),
    ),
    Safeguard(
        "the watchdog's timeout", "fastssl/watchdog.py",
        (("(self._timeout_s and stood_s > self.limit_s())", "False"),),
        (f"{TOGETHER}::test_a_sleeping_rank_ends_all_with_stacks",),
    ),
    Safeguard(
        "the signals that ask to stop", "fastssl/stopping.py",
        (("signal.signal(n, self._note) for n", "signal.getsignal(n) for n"),),
        (f"{TRAIN}::test_a_signal_saves_and_stops_and_the_rest_follows",),
    ),
    Safeguard(
        "the share of bad samples that is allowed", "fastssl/train.py",
        (("cfg.loader.max_bad * manifest.num_samples)", "float(manifest.num_samples))"),),
        ("tests/fastssl/test_bad_data.py::test_too_many_bad_samples_save_and_stop_the_run",),
    ),
    Safeguard(
        "the quick check at the start of a run", "pipelines/loader.py",
        (("if faults := manifest.check_quick():", "if faults := []:"),),
        ("tests/pipelines/test_loader.py::TestBadInput::test_all_faults_of_the_shards_are_listed_at_once",),
    ),
    Safeguard(
        "crc32 of a read", "pipelines/reader.py",
        (("if crc32(payload) != checksum:", "if False:"),),
        (f"{READER}::test_a_flipped_bit_is_named_with_shard_and_member",),
    ),
    Safeguard(
        "the length of a read", "pipelines/reader.py",
        (("if len(payload) != size:", "if False:"),),
        (f"{READER}::test_a_shard_cut_while_it_is_read_is_named",),
    ),
    Safeguard(
        "what the header of an image claims", "pipelines/renderer.py",
        (("(what := header_fault(file, size))", "(what := str())"),),
        ("tests/faults/test_bombs.py::test_bombs_are_refused_by_their_headers",),
    ),
    Safeguard(
        "the largest image of a pack", "shard_tools/images.py",
        (("    if width * height > MAX_PIXELS:\n", "    if False:\n"),),
        ("tests/shard_tools/test_bad_images.py::test_the_limit_of_pixels_holds_although_other_code_lifted_pillows",),
    ),
    Safeguard(
        "sha256 of a shard in verify", "shard_tools/verify.py",
        (("if digest != task.shard.sha256:", "if False:"),),
        (f"{VERIFY}::test_full_finds_any_flipped_bit",),
    ),
    Safeguard(
        "crc32 of an image in verify", "shard_tools/verify.py",
        (('        return "is damaged (its crc32 differs)"\n', '        return ""\n'),),
        (f"{VERIFY}::test_full_names_the_image_that_is_damaged",),
    ),
    Safeguard(
        "fsync of a written file", "shard_tools/disk.py",
        (
            (
                "        file.write(content)\n        file.flush()\n        os.fsync(file.fileno())\n",
                "        file.write(content)\n        file.flush()\n",
            ),
        ),
        (PACK_SYNCED,),
    ),
    Safeguard(
        "fsync of a shard", "shard_tools/disk.py",
        (('    with path.open("rb") as file:\n        os.fsync(file.fileno())\n', "    return\n"),),
        (PACK_SYNCED,),
    ),
    Safeguard(
        "fsync of a folder", "shard_tools/disk.py",
        (("        os.fsync(descriptor)\n", "        pass\n"),),
        (PACK_SYNCED,),
    ),
    Safeguard(
        "a file is written beside its place and renamed", "shard_tools/disk.py",
        (
            ("    partial = partial_path(path)\n    with partial.open(", "    with path.open("),
            ("        os.fsync(file.fileno())\n    put_in_place(path)\n", "        os.fsync(file.fileno())\n"),
        ),
        (PACK_KILLED,),
    ),
    Safeguard(
        "fsync of the journal", "shard_tools/journal.py",
        (("            file.flush()\n            os.fsync(file.fileno())\n", "            file.flush()\n"),),
        (PACK_SYNCED,),
    ),
    Safeguard(
        "the journal of a pack", "shard_tools/journal.py",
        (("            file.write(_line(document))\n", "            pass\n"),),
        (f"{PACK}::test_a_rerun_continues_behind_complete_shards_instead_of_starting_over",),
    ),
    Safeguard(
        "a torn line of the journal is no entry", "shard_tools/journal.py",
        (
            ('json.loads(line) if line.endswith(b"\\n") else None', "json.loads(line)"),
            ("    except ValueError:\n", "    except ZeroDivisionError:\n"),
        ),
        (f"{PACK}::test_a_torn_journal_line_costs_one_shard_only",),
    ),
    Safeguard(
        "the lock of a pack", "shard_tools/disk.py",
        (("fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))", "pass"),),
        (f"{PACK}::test_a_second_pack_into_the_same_split_is_refused",),
    ),
]  # fmt: skip


def matching(words: list[str]) -> list[Safeguard]:
    return [s for s in SAFEGUARDS if not words or any(word in s.name for word in words)]


def unnoticed(safeguards: list[Safeguard], say: Callable[[str], object] = str) -> list[str]:
    """Names of those whose removal no test notices, and why. Raises AssertionError if a test fails before."""
    with copied() as tree:
        tests = sorted({test for safeguard in safeguards for test in safeguard.tests})
        code, said = run(tree, tests)
        assert code == 0, f"the tests fail with all safeguards in place:\n{said}"
        missed = []
        for safeguard in safeguards:
            why = _why_unnoticed(tree, safeguard)
            say(f"{safeguard.name}: {why or 'noticed'}")
            missed += [f"{safeguard.name}: {why}"] if why else []
        return missed


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
    path.write_text(safeguard.without(before))
    try:
        code, said = run(tree, list(safeguard.tests))
    finally:
        path.write_text(before)
    if code == 0:
        return "its tests pass without it"
    # Killed by a signal that the safeguard would have caught: that is seen, too.
    return None if code == 1 or code < 0 else f"pytest ended with {code}, which is no failed test:\n{said[-2000:]}"


def main(words: list[str]) -> int:
    safeguards = matching(words)
    missed = unnoticed(safeguards, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{len(safeguards) - len(missed)} of {len(safeguards)} removals noticed", *missed, sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
