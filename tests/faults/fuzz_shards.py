"""A process that damages the files of a small split and reads them as every command does.

python -m tests.faults.fuzz_shards FOLDER STATUS COUNT EVERY

Each input goes through the code that reads its kind, every EVERYth through all that reads a split. One that ends in
anything but good bytes or a typed error ends the process with its seed. What was damaged and not signed again must be
found by verify; and of a tar the fast reading must say what `tarfile` says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from pipelines.reader import Reader
from shard_tools.adopt import AdoptOptions, adopt
from shard_tools.foreign import Sample, read_samples
from shard_tools.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, ShardError, _checksum
from shard_tools.stream import NotPlain, ShardStream
from shard_tools.verify import check, check_info, manifests_below
from tests.faults.memory import resident_mb
from tests.faults.mutations import mutated, mutated_tar
from tests.shard_tools.builders import sign_again

SLOW_S = 1.0  # CPU seconds that one input may take


def main(folder: Path, count: int, every: int, status: int) -> None:
    split = folder / "train"
    good = {path.name: path.read_bytes() for path in split.iterdir()}
    info = (folder / "_info.json").read_bytes()
    names = sorted(good)
    alone = [name for name in names if name.endswith(".tar") or name in (INDEX_NAME, MANIFEST_NAME)]
    foreign = folder.with_name("foreign")
    foreign.mkdir()
    for seed in range(count):
        os.pwrite(status, b"%020d" % seed, 0)
        rng = random.Random(seed)
        started = time.process_time()
        name = rng.choice(alone if seed % every else [*names, "_info.json"])
        try:
            if seed % every:
                read_alone(split, name, good, rng)
            elif name == "_info.json":
                (folder / name).write_bytes(mutated(info, rng))
                assert check_info(folder, manifests_below(folder)), "the damage was not found"
                (folder / name).write_bytes(info)
            else:
                damage(split, name, good, foreign, rng)
        except Exception:
            traceback.print_exc()
            sys.exit(f"seed {seed}: {name}")
        if seed % every == 0:
            for path in split.iterdir():
                if path.name not in good:
                    path.unlink()
            (split / MANIFEST_NAME).write_bytes(good[MANIFEST_NAME])
        if name in good:
            (split / name).write_bytes(good[name])
        if time.process_time() - started > SLOW_S:
            sys.exit(f"seed {seed}: {name} took {time.process_time() - started:.1f} s")


def read_alone(split: Path, name: str, good: dict[str, bytes], rng: random.Random) -> None:
    """One damaged file through the code for its kind. The good bytes are written again by the caller."""
    if not name.endswith(".tar"):
        (split / name).write_bytes(mutated(good[name], rng))
        try:
            found = Manifest.load(split).check_quick()
        except ShardError:
            return
        assert found or name != INDEX_NAME, "the damage was not found"
        return
    path = split / name
    path.write_bytes(mutated_tar(good[name], rng))
    try:
        with ShardStream(path) as stream:
            fast: list[Sample] | str | None = [dataclasses.replace(s, crc32={}) for s in stream.samples()]
    except NotPlain:
        fast = None  # for `tarfile` to judge
    except ShardError as error:
        fast = str(error)
    try:
        expected: list[Sample] | str = read_samples(path)
    except ShardError as error:
        expected = str(error)
    assert fast is None or fast == expected, f"{fast}\n{expected}"


def damage(split: Path, name: str, good: dict[str, bytes], foreign: Path, rng: random.Random) -> None:
    make = mutated_tar if name.endswith(".tar") else mutated
    content = make(good[name], rng)
    (split / name).write_bytes(content)
    signed = rng.random() < 0.5
    if signed:
        sign(split, name, content)
    found = read_everything(split)
    assert signed or found, "the damage was not found"
    if name.endswith(".tar"):
        (foreign / "x.tar").write_bytes(content)
        try:
            (manifest,) = adopt(foreign, AdoptOptions(on_bad="quarantine", overwrite=True))
        except ShardError:
            return
        assert check(manifest, full=True) == []


def sign(split: Path, name: str, content: bytes) -> None:
    """Make the manifest agree with the damaged file, so that it is not refused for its hash alone."""
    if name == MANIFEST_NAME:
        try:
            document = json.loads(content)
            document["checksum"] = _checksum(document)
        except (ValueError, TypeError, RecursionError, AttributeError):
            return
        (split / name).write_bytes(json.dumps(document, indent=1).encode() + b"\n")
        return
    sign_again(split)


def read_everything(split: Path) -> list[str]:
    """What is wrong, by all that reads a split; raises nothing where errors are typed."""
    try:
        manifest = Manifest.load(split)
        quick = manifest.check_quick()
        faults = check(manifest, full=True)
        assert not quick or faults
        if quick:
            return faults
        reader = Reader(manifest, threads=1)
        try:
            read = [file for part in reader.request(np.arange(manifest.num_samples)) for file in part.result()]
        finally:
            reader.close()
        return faults + [str(file) for file in read if isinstance(file, ShardError)]
    except ShardError as error:
        return [str(error)]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
    main(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), os.open(sys.argv[2], os.O_WRONLY))
    print(round(resident_mb("VmHWM")))
