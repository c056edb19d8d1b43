"""Tars, indexes, manifests, and the pictures in them."""

from __future__ import annotations

import bz2
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shard_tools.manifest import Manifest
from tests.faults.hostile import (
    CALLS,
    ESCAPE,
    LONG,
    SHARDS,
    Kind,
    Payload,
    Place,
    Trial,
    coco_folder,
    npz,
    object_npy,
    postscript,
    tar,
)
from tests.shard_tools.builders import class_tree, jpeg, plant


def tars(place: Place) -> Kind:
    """Archives, given to `index` and to `pack webdataset`."""
    shell = place.shell
    code = pickle.dumps(Payload(shell))
    sample = [("a.jpg", jpeg(1)), ("a.cls", b"1")]
    files: dict[str, tuple[bytes, bool]] = {
        "climbing": (tar([("../canary", b"x"), *sample]), False),
        "climbing far": (tar([("a/../../../../canary.jpg", jpeg(1))]), False),
        "absolute": (tar([(str(place.canary), b"x"), *sample]), False),
        "symbolic link": (tar([link("a.jpg", tarfile.SYMTYPE, str(place.canary)), ("a.jpg", jpeg(1))]), False),
        "link to a folder": (tar([link("d", tarfile.SYMTYPE, "/"), ("d/canary.jpg", jpeg(1))]), False),
        "hard link": (tar([*sample, link("b.jpg", tarfile.LNKTYPE, "/etc/passwd")]), False),
        "character device": (tar([link("a.jpg", tarfile.CHRTYPE)]), False),
        "block device": (tar([link("a.jpg", tarfile.BLKTYPE)]), False),
        "fifo": (tar([link("a.jpg", tarfile.FIFOTYPE)]), False),
        "folder": (tar([link("../canary", tarfile.DIRTYPE), *sample]), True),
        "unknown type": (tar([link("a.jpg", b"Z")]), True),
        "sparse": (sparse_tar(), False),
        "pax sparse": (pax_tar({"GNU.sparse.map": "0,10,1000000000000,0", "GNU.sparse.size": "1000000000000"}), False),
        "pax size": (pax_tar({"size": str(10**12)}), False),
        "pax negative size": (pax_tar({"size": "-1536"}), False),
        "pax path": (pax_tar({"path": "../../canary.jpg"}), False),
        "pax link": (pax_tar({"linkpath": "/etc/passwd"}), True),
        "pax 10^6 digits": (pax_tar({"size": "9" * 10**6}), False),
        "octal size 8 GiB": (one_header(b"77777777777\0"), False),
        "size 10^12": (one_header(b"\x80" + (10**12).to_bytes(11, "big")), False),
        "negative size": (one_header(b"\xff" * 8 + (-1024 & 0xFFFFFFFF).to_bytes(4, "big")), False),
        "name of 5,000": (tar([("n" * 5000 + ".jpg", jpeg(1))]), True),
        "name of control characters": (tar([(f"{ESCAPE}\n.jpg", jpeg(1)), (f"{ESCAPE}\n.cls", b"x")]), False),
        "name of a shell": (tar([(f"$({shell});`{shell}`.jpg", jpeg(1))]), True),
        "pyd member": (tar([*sample, ("a.pyd", code)]), True),
        "pickle member": (tar([*sample, ("a.pickle", code)]), True),
        "pth member": (tar([*sample, ("a.pth", code)]), True),
        "npy with objects": (tar([("a.npy", object_npy(shell)), ("a.cls", b"1")]), False),
        "npy of 10^12 rows": (tar([("a.npy", npy_head("<f4", (10**12, 3, 8)))]), False),
        "code as label": (tar([("a.jpg", jpeg(1)), ("a.cls", place.python.encode())]), False),
        "label of 10^6 digits": (tar([("a.jpg", jpeg(1)), ("a.cls", b"9" * 10**6)]), False),
        "deep json": (tar([*sample, ("a.json", b"[" * 500_000)]), False),
        "json of many lists": (tar([*sample, ("a.json", b"[" + b"[]," * 340_000 + b"[]]")]), True),
        "json with a huge number": (tar([*sample, ("a.json", b'{"label": ' + b"9" * 10**6 + b"}")]), False),
        "json with NaN": (tar([*sample, ("a.json", b'{"label": NaN, "name": Infinity}')]), True),
        "json with a hostile name": (
            tar([*sample, ("a.json", json.dumps({"name": f"../../{ESCAPE}"}).encode())]),
            True,
        ),
        "json as code": (tar([*sample, ("a.json", place.python.encode())]), False),
        "bomb of pixels": (tar([("a.png", png_head(40_000, 40_000)), ("a.cls", b"1")]), False),
        "postscript": (tar([("a.jpg", postscript(shell)), ("a.cls", b"1")]), False),
        "gzip": (b"\x1f\x8b\x08\0" + bytes(100), False),
        "bzip2": (bz2.compress(tar(sample)), False),
        "a pickle": (code, False),
    }
    hostile = []
    for number, (name, (content, may_pass)) in enumerate(files.items()):
        for command in ("index", "pack"):
            folder = plant(place.root / f"{number}-{command}", {"x.tar": content})
            hostile.append(Trial(f"{name}, {command}", SHARDS, _taken(command, folder, place), may_pass))
    huge = place.folder("huge-long-name")
    with (huge / "x.tar").open("wb") as file:  # zeros that a header calls a name; no block of them is stored
        file.write(header("././@LongLink", 10**9, tarfile.GNUTYPE_LONGNAME))
        file.truncate(512 + 10**9 + 1024)
    hostile.append(Trial("long name of 1 GB", SHARDS, ("index", str(huge), "--workers", "1")))
    honest = plant(place.root / "honest", {"x.tar": tar([*sample, ("a.json", b'{"name": "a"}')])})
    return Kind(Trial("honest", SHARDS, _taken("pack", honest, place)), hostile)


def _taken(command: str, folder: Path, place: Place) -> tuple[str, ...]:
    if command == "index":
        return "index", str(folder), "--workers", "1"
    return "pack", "webdataset", str(folder), str(place.out / folder.name), "--workers", "1"


def link(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pax_tar(headers: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = len(jpeg(1)), headers
        archive.addfile(info, io.BytesIO(jpeg(1)))
    return buffer.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def one_header(size: bytes) -> bytes:
    """A header whose size field says `size`, and whose checksum is right."""
    block = bytearray(header("a.jpg", 0))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(2048)


def sparse_tar() -> bytes:
    """GNU's old sparse format: one block that stands for 2^40 bytes."""
    block = bytearray(header("a.jpg", 512, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"00000000000\0" + b"00000001000\0"
    block[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512) + bytes(1024)


def indexes(place: Place, shards: Path) -> Kind:
    """index.npy, labels.npy and .idx of a packed split; `shards` is one to copy."""
    rows = Manifest.load(shards).num_samples
    dtype = "[('shard', '<u4'), ('offset', '<u8')]"
    heads = {
        "objects": object_npy(place.shell),
        "code as type": npy_head(place.python, (rows,)),
        "code as shape": npy_head("'<u4'", (rows,), shape_text=f"({place.python},)"),
        "10^12 rows": npy_head(dtype, (10**12,)),
        "negative rows": npy_head(dtype, (-1,)),
        "deep header": npy_raw(b"(" * 60_000),
        "header of 4 GiB": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        "version 9": b"\x93NUMPY\x09\x00" + b"\xff" * 64,
        "a pickle": pickle.dumps(Payload(place.shell)),
        "a zip": npz(place.shell),
        "empty": b"",
    }
    hostile = []
    for number, ((name, content), command) in enumerate(itertools.product(heads.items(), ("info", "verify"))):
        copy = copied(shards, place.root / f"npy-{number}")
        (copy / "train/index.npy").write_bytes(content)
        hostile.append(Trial(f"index.npy: {name}, {command}", SHARDS, (command, str(copy))))
    for number, (name, content) in enumerate(heads.items()):
        copy = copied(shards, place.root / f"labels-{number}")
        changed(copy / "train/manifest.json", lambda d: d.update(labels_sha256="0" * 64))
        (copy / "train/labels.npy").write_bytes(content)
        hostile.append(Trial(f"labels.npy: {name}", SHARDS, ("info", str(copy))))
    sparse = copied(shards, place.root / "sparse")
    with (sparse / "train/index.npy").open("r+b") as file:
        file.truncate(2**40)
    hostile.append(Trial("index.npy of 1 TiB of zeros", SHARDS, ("info", str(sparse))))
    lines = {
        ".idx: 10^12 samples": b"v1.2 1000000000000\njpg 512 10 a.jpg\n",
        ".idx: huge numbers": b"v1.2 1\njpg 512 " + b"9" * 10**6 + b" a.jpg\n",
        ".idx: a path": f"v1.2 1\njpg 512 10 ../../{ESCAPE}\n".encode(),
        ".idx: code": place.python.encode(),
    }
    for number, (name, content) in enumerate(lines.items()):
        copy = copied(shards, place.root / f"idx-{number}")
        index = next((copy / "train").glob("*.tar")).with_suffix(".idx")
        index.write_bytes(content)
        hostile.append(Trial(name, SHARDS, ("verify", str(copy), "--full", "--workers", "1")))
    return Kind(Trial("honest", SHARDS, ("info", str(shards), "--stats", "--workers", "1")), hostile)


def npy_head(descr: str, shape: tuple[int, ...], shape_text: str = "") -> bytes:
    return npy_raw(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape_text or shape}, }}\n".encode())


def npy_raw(head: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(4096)


def copied(shards: Path, folder: Path) -> Path:
    shutil.copytree(shards, folder)
    return folder


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def manifests(place: Place, shards: Path) -> Kind:
    """manifest.json and _info.json. The digest is made to fit, as an attacker would."""
    hostile = []

    def shard(**values: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda d: d["shards"][0].update(values)

    changes: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
        "shard above": (shard(name="../../canary.tar"), False),
        "shard absolute": (shard(name=f"{place.canary}.tar"), False),
        "shard of a URL": (shard(name="http://127.0.0.1:1/x.tar"), False),
        "shard of a pipe": (shard(name=f"pipe:{place.shell}.tar"), False),
        "shard of control characters": (shard(name=f"{ESCAPE}\n.tar"), False),
        "shard of 4,096 characters": (shard(name=LONG + ".tar"), False),
        "shard with a zero byte": (shard(name="a\0.tar"), False),
        "shard a number": (shard(name=7), False),
        "negative bytes": (shard(num_bytes=-1), False),
        "10^18 bytes": (shard(num_bytes=10**18), False),
        "10^14 samples": (lambda d: (shard(num_samples=10**14)(d), d.update(num_samples=10**14)), False),
        "infinite samples": (lambda d: d.update(num_samples=float("inf")), False),
        "NaN samples": (lambda d: d.update(num_samples=float("nan")), False),
        "true samples": (lambda d: d.update(num_samples=True), False),
        "split above": (lambda d: d.update(split="../../canary"), False),
        "split of control characters": (lambda d: d.update(split=ESCAPE), False),
        "classes of control characters": (lambda d: d.update(classes=[ESCAPE + "\n"] * 4), True),
        "classes of markup": (lambda d: d.update(classes=["[/]", "[red]", "[link=x]", "{0.__class__}"]), True),
        "census of numbers": (lambda d: d.update(census={"formats": 7}), False),
        "census of control characters": (
            lambda d: d.update(census={"formats": {ESCAPE: 1}, "modes": {ESCAPE: ESCAPE}, "exif_orientation": {}}),
            True,
        ),
        "census of hostile files": (
            lambda d: d.update(census={"bad": [{"name": ESCAPE, "reason": ESCAPE, "action": ESCAPE}]}),
            True,
        ),
        "quantiles of text": (lambda d: d.update(census={"quantiles": {"width": {ESCAPE: ESCAPE}}}), True),
        "source of control characters": (lambda d: d.update(source={"kind": ESCAPE}), True),
        "index hash a path": (lambda d: d.update(index_sha256="../../canary"), False),
    }
    for number, (name, (change, may_pass)) in enumerate(changes.items()):
        copy = copied(shards, place.root / f"manifest-{number}")
        changed(copy / "train/manifest.json", lambda d, change=change: (change(d), _redigest(d)))
        for command in (("info",), ("verify",), ("extract", "--keys", "0")):
            rest = [str(place.out / f"{number}")] if command[0] == "extract" else []
            arguments = (command[0], str(copy), *command[1:], *rest)
            hostile.append(Trial(f"{name}, {command[0]}", SHARDS, arguments, may_pass or command[0] == "extract"))
    texts = {
        "deep lists": b"[" * 10**6,
        "deep groups": b'{"a":' * 10**6,
        "10^7 digits": b'{"num_samples": ' + b"9" * 10**7 + b"}",
        "doubled keys": b'{"format": "fastssl-shards", "format": "x", "version": 1}',
        "not UTF-8": b"\xff\xfe" + b'{"format"'.join([b"\0"] * 9),
        "code": place.python.encode(),
        "YAML": f"!!python/object/apply:os.system ['{place.shell}']".encode(),
        "a pickle": pickle.dumps(Payload(place.shell)),
    }
    for number, (name, content) in enumerate(texts.items()):
        copy = copied(shards, place.root / f"text-{number}")
        (copy / "train/manifest.json").write_bytes(content)
        hostile.append(Trial(name, SHARDS, ("info", str(copy))))
        copy = copied(shards, place.root / f"info-{number}")
        (copy / "_info.json").write_bytes(content)
        hostile.append(Trial(f"_info.json: {name}", SHARDS, ("verify", str(copy))))
    for name in ("train/manifest.json", "_info.json"):
        copy = copied(shards, place.root / f"sparse-{Path(name).stem}")
        with (copy / name).open("wb") as file:
            file.truncate(2**40)
        hostile.append(Trial(f"{name} of 1 TiB of zeros", SHARDS, ("verify", str(copy))))
    return Kind(Trial("honest", SHARDS, ("info", str(shards))), hostile)


def _redigest(document: dict[str, Any]) -> None:
    import hashlib

    shards = [[s["name"], s["num_bytes"], s["num_samples"], s["sha256"]] for s in document["shards"]]
    content = json.dumps([1, shards, document["index_sha256"], document["classes"]]).encode()
    document["digest"] = hashlib.sha256(content).hexdigest()


def png_head(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels, all of one zero each."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    chunks = [(b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def decoders(place: Place, shards: Path) -> Kind:
    """PostScript and bombs named as JPEG, where images are decoded; a `gs` that would run is first in PATH."""
    binaries = place.folder("bin")
    (binaries / "gs").write_text(f"#!/bin/sh\n{place.shell}\n")
    (binaries / "gs").chmod(0o755)
    path = {"PATH": f"{binaries}:{os.environ['PATH']}"}
    contents = {"postscript": postscript(place.shell), "bomb": png_head(40_000, 40_000)}
    hostile = []
    for name, content in contents.items():
        src = plant(class_tree(place.root / f"src {name}", 2), {"bee/x.jpg": content})
        pack = ("pack", "imagefolder", str(src), str(place.out / f"packed {name}"), "--workers", "1")
        hostile.append(Trial(f"{name}, pack", SHARDS, pack, environment=path))
        voc = place.root / f"voc {name}"
        coco = coco_folder(voc, lambda d: None)
        plant(coco, {"train2017/0.jpg": content})
        hostile.append(Trial(f"{name}, detection", CALLS, ("picture", str(coco)), environment=path))
        if name != "postscript":  # of a bomb the index says so, which tests of the loader cover
            continue
        kept = place.root / f"kept {name}"
        _packed_with(content, kept)
        for command in (
            ("shards", "info", str(kept), "--stats", "--workers", "1"),
            ("view", str(kept), str(place.out / f"{name}.png")),
            ("decode", str(kept)),
        ):
            module = SHARDS if command[0] == "shards" else CALLS
            hostile.append(
                Trial(
                    f"{name}, {command[1] if module == SHARDS else command[0]}",
                    module,
                    command[1:] if module == SHARDS else command,
                    environment=path,
                )
            )
    honest = (
        "pack",
        "imagefolder",
        str(class_tree(place.root / "honest", 2)),
        str(place.out / "honest"),
        "--workers",
        "1",
    )
    return Kind(Trial("honest", SHARDS, honest), hostile, cpu_s=1.0)


def _packed_with(content: bytes, folder: Path) -> None:
    """A split of which every image is `content`, and whose index calls it 40x30 px."""
    from tests.shards import write_split

    write_split(folder, [("jpg", content)] * 2, [0, 1])
