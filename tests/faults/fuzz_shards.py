"""A process that damages the files of a small split and reads them as every command does.

python -m tests.faults.fuzz_shards FOLDER STATUS FIRST COUNT

An input that ends in anything but good bytes or a typed error ends the process with its seed. What was damaged and not
signed again must be found by verify.
"""

from __future__ import annotations

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
from shard_tools.manifest import MANIFEST_NAME, Manifest, ShardError, _checksum
from shard_tools.verify import check, check_info, manifests_below
from tests.faults.memory import resident_mb
from tests.faults.mutations import mutated, mutated_tar
from tests.shard_tools.builders import sign_again

SLOW_S = 1.0  # CPU seconds that one input may take


def main(folder: Path, first: int, count: int, status: int) -> None:
    split = folder / "train"
    good = {path.name: path.read_bytes() for path in split.iterdir()}
    info = (folder / "_info.json").read_bytes()
    names = sorted(good)
    foreign = folder.with_name("foreign")
    foreign.mkdir()
    for seed in range(first, first + count):
        os.pwrite(status, b"%020d" % seed, 0)
        rng = random.Random(seed)
        started = time.process_time()
        name = rng.choice([*names, "_info.json"])
        try:
            if name == "_info.json":
                (folder / name).write_bytes(mutated(info, rng))
                assert check_info(folder, manifests_below(folder)), "the damage was not found"
                (folder / name).write_bytes(info)
            else:
                damage(split, name, good, foreign, rng)
        except Exception:
            traceback.print_exc()
            sys.exit(f"seed {seed}: {name}")
        for path in split.iterdir():  # only what was touched is written again
            if path.name not in good:
                path.unlink()
        (split / name).write_bytes(good[name]) if name in good else None
        (split / MANIFEST_NAME).write_bytes(good[MANIFEST_NAME])
        if time.process_time() - started > SLOW_S:
            sys.exit(f"seed {seed}: {name} took {time.process_time() - started:.1f} s")


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
