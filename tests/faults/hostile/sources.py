"""What is packed or trained on: pickles of CIFAR-10, HDF5, FITS, and annotations."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.faults.hostile import (
    CALLS,
    ESCAPE,
    LONG,
    SHARDS,
    Call,
    Kind,
    Payload,
    Place,
    Trial,
    coco_folder,
    postscript,
    sparse_file,
)
from tests.shard_tools.builders import jpeg, plant


def cifar(place: Place) -> Kind:
    """Batches of the python version, which are pickles."""
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1], b"filenames": [b"a.png", b"b.png"]}
    meta = pickle.dumps({b"label_names": [b"class"] * 10}, protocol=2)
    good = pickle.dumps(batch, protocol=2)
    files: dict[str, bytes] = {
        "os.system": pickle.dumps(Payload(place.shell)),
        "beside data": pickle.dumps({**batch, b"x": Payload(place.shell)}, protocol=2),
        "protocol 0": pickle.dumps(Payload(place.shell), protocol=0),
        "eval": pickle.dumps(Call(eval, place.python)),
        "exec": pickle.dumps(Call(exec, place.python)),
        "getattr": pickle.dumps(Call(getattr, "x")),
        "open": pickle.dumps(Call(open, str(place.canary))),
        "numpy.load": pickle.dumps(Call(np.load, "x")),
        "compile": pickle.dumps(Call(__import__, "canary_maker")),
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x15ndarray.__reduce_ex__\x93)R.",
        "a builtin through numpy": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__init__\x93.",
        "numpy's own os": b"cnumpy\nos.system\n(S'" + place.shell.encode() + b"'\ntR.",
        "other encoding": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x07\x00\x00\x00charmaptR.",
        "array of objects": pickle.dumps(
            {**batch, b"data": np.array([Payload(place.shell)] * 3072, dtype=object)}, protocol=2
        ),
        "array of 10^12": good.replace(b"M\x00\x0c", b"\x8a\x06" + (10**12).to_bytes(6, "little")),
        "negative shape": good.replace(b"M\x00\x0c", b"J\xff\xff\xff\xff"),
        "string of 10^12": b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"x",
        "bytearray of 10^12": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"x",
        "frame of 10^18": b"\x80\x04\x95" + struct.pack("<Q", 10**18) + b"N.",
        "memo of 2^31": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
        "hash of 2^60 tuples": b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",
        "list in itself": b"]\x94h\x00a.",
        "60 MB of lists": b"\x80\x02(" + b"]" * (60 * 10**6) + b"l.",
        "60 MB of dicts": b"\x80\x02(" + b"}" * (60 * 10**6) + b"l.",
        "10^6 digits": b"I" + b"9" * 10**6 + b"\n.",
        "10^6 digits as long": b"L" + b"9" * 10**6 + b"L\n.",
        "deep lists": b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Px\n.",
        "build on a type": b"cnumpy\ndtype\n}X\x01\x00\x00\x00aNsb.",
        "instance": f"(S'{place.shell}'\nios\nsystem\n.".encode(),
        "object": f"(cos\nsystem\nS'{place.shell}'\no.".encode(),
        "newobj": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "out of band": b"\x80\x05\x97.",
        "no stop": good[:-1],
        "cut": good[: len(good) // 2],
        "empty": b"",
        "text": place.python.encode(),
        "joblib": zlib.compress(good),
        "labels of 10^12": pickle.dumps({**batch, b"labels": [10**12, 0]}, protocol=2),
        "labels of text": pickle.dumps({**batch, b"labels": ["a", ESCAPE]}, protocol=2),
        "names as numbers": pickle.dumps({**batch, b"filenames": [7, 8]}, protocol=2),
        "a list": pickle.dumps([1, 2], protocol=2),
        "a number": pickle.dumps(7, protocol=2),
        "65 MB": pickle.dumps(bytes(65 * 2**20), protocol=2),
    }
    hostile = []

    def add(name: str, content: bytes, labels: bytes = meta, may: bool = False) -> None:
        folder = {f"data_batch_{i}": good for i in range(2, 6)} | {"data_batch_1": content, "batches.meta": labels}
        src = plant(place.root / f"{len(hostile)}", folder)
        arguments = (
            "pack",
            "cifar10",
            str(src),
            str(place.out / f"cifar-{len(hostile)}"),
            "--split",
            "train",
            "--workers",
            "1",
        )
        hostile.append(Trial(name, SHARDS, arguments, may))

    for name, content in files.items():
        add(name, content)
    for name in ("os.system", "60 MB of lists", "hash of 2^60 tuples", "text"):
        add(f"batches.meta: {name}", good, files[name])
    add(
        "names that leave",
        pickle.dumps({**batch, b"filenames": [b"../../canary", b"/etc/passwd"]}, protocol=2),
        may=True,
    )
    add(
        "names of control characters",
        pickle.dumps({**batch, b"filenames": [ESCAPE.encode(), b"\xff\n"]}, protocol=2),
        may=True,
    )
    add("honest", good)
    honest = hostile.pop()
    return Kind(
        honest, hostile, memory=128 * 10**6, cpu_s=0.5
    )  # a batch may have 64 MiB, and its operations are counted


def hdf5(place: Place) -> Kind:
    """HDF5 files: links, other files' bytes, claims of size."""
    secret = place.root / "secret"
    secret.write_bytes(b"t0ps3cret" * 10_000)
    with h5py.File(place.root / "other.h5", "w") as file:
        file["images"] = np.ones((3, 1, 8, 8), np.float32)
    stamps = np.ones((3, 1, 8, 8), np.float32)

    def written(fill: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            with h5py.File(path, "w") as file:
                fill(file)

        return write

    def beside(name: str, value: Any) -> Callable[[h5py.File], Any]:
        def fill(file: h5py.File) -> None:
            file["images"] = stamps
            file[name] = value

        return fill

    def classes(value: Any) -> Callable[[h5py.File], Any]:
        def fill(file: h5py.File) -> None:
            beside("labels", [0, 1, 2])(file)
            file["labels"].attrs["classes"] = value

        return fill

    def claim(shape: tuple[int, ...], **more: Any) -> Callable[[h5py.File], Any]:
        return lambda file: file.create_dataset("images", shape, "f4", **{"chunks": (1, *shape[1:]), **more})

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((3, 1, 8, 8), "f4")
        layout[:] = h5py.VirtualSource(str(place.root / "other.h5"), "images", (3, 1, 8, 8))
        file.create_virtual_dataset("images", layout)

    def squeezed(file: h5py.File) -> None:
        made = file.create_dataset(
            "images", (500, 1, 500, 500), "f4", chunks=(500, 1, 500, 500), compression="gzip", compression_opts=9
        )
        made.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(500 * 500 * 500 * 4), 1))

    def ring(file: h5py.File) -> None:
        file["a"] = h5py.SoftLink("/b")
        file["b"] = h5py.SoftLink("/a")
        file["images"] = h5py.SoftLink("/a")

    files: dict[str, tuple[Callable[[Path], None], bool]] = {
        "external link": (
            written(lambda f: f.__setitem__("images", h5py.ExternalLink(str(place.root / "other.h5"), "/images"))),
            False,
        ),
        "external link to no HDF5": (
            written(lambda f: f.__setitem__("images", h5py.ExternalLink(str(secret), "/images"))),
            False,
        ),
        "external labels": (
            written(beside("labels", h5py.ExternalLink(str(place.root / "other.h5"), "/images"))),
            False,
        ),
        "soft link to nothing": (written(lambda f: f.__setitem__("images", h5py.SoftLink("/../../etc/passwd"))), False),
        "soft links in a ring": (written(ring), False),
        "bytes of another file": (
            written(lambda f: f.create_dataset("images", (3, 1, 8, 8), "f4", external=[(str(secret), 0, 768)])),
            False,
        ),
        "virtual": (written(virtual), False),
        "10^12 stamps": (written(claim((10**12, 1, 8, 8))), False),
        "10^9 stamps": (written(claim((10**9, 1, 8, 8))), False),
        "10^8 stamps": (written(claim((10**8, 1, 8, 8))), False),
        "10^6 px a side": (written(claim((3, 1, 10**6, 10**6), chunks=(1, 1, 1000, 1000))), False),
        "10^9 bands": (written(claim((3, 10**9, 1, 1), chunks=(1, 1, 1, 1))), False),
        "chunks of 500 MB": (written(squeezed), False),
        "no stamps": (written(claim((0, 1, 8, 8), chunks=(1, 1, 8, 8), maxshape=(None, 1, 8, 8))), False),
        "text": (written(lambda f: f.__setitem__("images", [place.python] * 3)), False),
        "a group": (written(lambda f: f.create_group("images")), False),
        "references": (written(lambda f: f.create_dataset("images", (3, 1, 8, 8), h5py.ref_dtype)), False),
        "a named type": (written(lambda f: f.__setitem__("images", np.dtype("f4"))), False),
        "labels a group": (written(lambda f: (f.__setitem__("images", stamps), f.create_group("labels"))), False),
        "labels of text": (written(beside("labels", ["a", "b", "c"])), False),
        "labels huge": (written(beside("labels", [2**60, 0, 1])), False),
        "labels negative": (written(beside("labels", [-5, 0, 1])), False),
        "names a group": (written(lambda f: (f.__setitem__("images", stamps), f.create_group("obj_ids"))), False),
        "names that leave": (written(beside("obj_ids", ["../../canary", "/etc/passwd", ESCAPE])), True),
        "names of 10^6": (written(beside("obj_ids", ["x" * 10**6] * 3)), False),
        "names of 1 GB each": (
            written(
                lambda f: (
                    f.__setitem__("images", stamps),
                    f.create_dataset("obj_ids", (3,), "S1000000000", chunks=(1,)),
                )
            ),
            False,
        ),
        "classes of control characters": (written(classes([ESCAPE, "\n", "$(x)"])), True),
        "classes a number": (written(classes(7)), False),
        "classes too few": (written(classes(["a"])), False),
        "a pickle": (lambda p: p.write_bytes(pickle.dumps(Payload(place.shell))) and None, False),
        "zeros of 1 TiB": (sparse_file, False),
        "header only": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n") and None, False),
    }
    hostile = []
    for number, (name, (write, may)) in enumerate(files.items()):
        path = place.root / f"{number}.h5"
        write(path)
        hostile.append(
            Trial(name, SHARDS, ("pack", "hdf5", str(path), str(place.out / f"h5-{number}"), "--workers", "1"), may)
        )
    for name in ("/../other", "a/../../b", "", "/", ".", ESCAPE, "x" * 10**5, "a\0b"):
        arguments = ("pack", "hdf5", str(place.root / "other.h5"), str(place.out / "h5"), f"--dataset={name}")
        hostile.append(Trial(f"--dataset {name[:10]!r}", SHARDS, arguments))
    honest = ("pack", "hdf5", str(place.root / "other.h5"), str(place.out / "h5-honest"), "--workers", "1")
    return Kind(Trial("honest", SHARDS, honest), hostile)


def fits(place: Place) -> Kind:
    """FITS files, each beside nothing else in its folder."""

    def cards(*lines: str) -> bytes:
        text = "".join(line.ljust(80) for line in (*lines, "END"))
        return text.encode().ljust(-(-len(text) // 2880) * 2880)

    def image(*axes: int, **more: Any) -> bytes:
        sizes = [f"NAXIS{i}  = {axis:>20}" for i, axis in enumerate(axes, 1)]
        return cards(
            "SIMPLE  =                    T",
            "BITPIX  =                  -32",
            f"NAXIS   = {len(axes):>20}",
            *sizes,
            *more.get("more", ()),
        )

    import gzip

    good = image(8, 8) + np.ones((8, 8), ">f4").tobytes().ljust(2880, b"\0")
    files: dict[str, bytes] = {
        "10^12 px": image(10**6, 10**6),
        "10^9 bands": image(8, 8, 10**9),
        "999 axes": image(*[1] * 999),
        "negative axes": image(-8, 8),
        "NAXIS 10^9": cards(
            "SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =           1000000000"
        ),
        "10^6 digits": cards(
            "SIMPLE  =                    T", "BITPIX  = " + "9" * 70, "NAXIS   =                    2"
        ),
        "cut": good[:3000],
        "header without end": b"SIMPLE  =                    T".ljust(80) * 100_000,
        "20,000 empty parts": image()
        + cards(
            "XTENSION= 'IMAGE   '",
            "BITPIX  =                    8",
            "NAXIS   =                    0",
            "PCOUNT  =                    0",
            "GCOUNT  =                    1",
        )
        * 20_000,
        "huge heap": image()
        + cards(
            "XTENSION= 'BINTABLE'",
            "BITPIX  =                    8",
            "NAXIS   =                    2",
            "NAXIS1  =                    8",
            "NAXIS2  =         100000000000",
            "PCOUNT  =         100000000000",
            "GCOUNT  =                    1",
            "TFIELDS =                    1",
            "TFORM1  = '1PB(100000000)'",
        ),
        "compressed claim": image()
        + cards(
            "XTENSION= 'BINTABLE'",
            "BITPIX  =                    8",
            "NAXIS   =                    2",
            "NAXIS1  =                    8",
            "NAXIS2  =                    8",
            "PCOUNT  =                    8",
            "GCOUNT  =                    1",
            "TFIELDS =                    1",
            "TTYPE1  = 'COMPRESSED_DATA'",
            "TFORM1  = '1PB(8)'",
            "ZIMAGE  =                    T",
            "ZCMPTYPE= 'RICE_1'",
            "ZBITPIX =                  -32",
            "ZNAXIS  =                    2",
            "ZNAXIS1 =              1000000",
            "ZNAXIS2 =              1000000",
            "ZTILE1  =              1000000",
            "ZTILE2  =              1000000",
        )
        + bytes(2880),
        "compressed tile claim": image()
        + cards(
            "XTENSION= 'BINTABLE'",
            "BITPIX  =                    8",
            "NAXIS   =                    2",
            "NAXIS1  =                    8",
            "NAXIS2  =                    1",
            "PCOUNT  =                    8",
            "GCOUNT  =                    1",
            "TFIELDS =                    1",
            "TTYPE1  = 'COMPRESSED_DATA'",
            "TFORM1  = '1PB(8)'",
            "ZIMAGE  =                    T",
            "ZCMPTYPE= 'GZIP_1'",
            "ZBITPIX =                  -32",
            "ZNAXIS  =                    2",
            "ZNAXIS1 =                    8",
            "ZNAXIS2 =                    8",
            "ZTILE1  =           1000000000",
            "ZTILE2  =           1000000000",
        )
        + struct.pack(">II", 8, 0).ljust(2880, b"\0"),
        "scaled to NaN": image(8, 8, more=("BZERO   =                  NaN", "BSCALE  =                1E999"))
        + bytes(2880),
        "control characters": image(8, 8, more=(f"OBJECT  = '{ESCAPE}'",)) + bytes(2880),
        "gzip bomb": gzip.compress(good + bytes(200 * 10**6), 1),
        "gzip of gzip": gzip.compress(gzip.compress(good)),
        "cut gzip": gzip.compress(good)[:50],
        "a pickle": pickle.dumps(Payload(place.shell)),
        "text": place.python.encode(),
        "empty": b"",
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(3000),
        "postscript": postscript(place.shell),
    }
    hostile = []
    for number, (name, content) in enumerate(files.items()):
        src = plant(place.root / f"{number}", {"x.fits": content})
        may = name in ("control characters",)
        hostile.append(
            Trial(name, SHARDS, ("pack", "fits", str(src), str(place.out / f"fits-{number}"), "--workers", "1"), may)
        )
    link_ = place.folder("link")
    (link_ / "x.fits").symlink_to("/dev/zero")
    hostile.append(
        Trial(
            "a link to /dev/zero", SHARDS, ("pack", "fits", str(link_), str(place.out / "fits-link"), "--workers", "1")
        )
    )
    pipe = place.folder("pipe")
    os.mkfifo(pipe / "x.fits")
    hostile.append(Trial("a fifo", SHARDS, ("pack", "fits", str(pipe), str(place.out / "fits-pipe"))))
    src = plant(place.root / "honest", {"x.fits": good})
    honest = ("pack", "fits", str(src), str(place.out / "fits"), "--workers", "1")
    # memory: an image may have 64 MiB, also unpacked; cpu_s: 20,000 parts took 0.3 s on a busy machine
    return Kind(Trial("honest", SHARDS, honest), hostile, memory=160 * 10**6, cpu_s=0.5)


def xml(place: Place) -> Kind:
    """PASCAL VOC's annotations and lists."""
    from tests.voc import annotation, devkit

    (place.root / "secret").write_text("cat")
    body = annotation((40, 30), [("cat", (1, 1, 9, 9), False, False)])
    levels = "".join(f'<!ENTITY l{i} "' + f"&l{i - 1};" * 10 + '">' for i in range(1, 10))
    lol = f'<!DOCTYPE a [<!ENTITY l0 "cat">{levels}]>'
    long = '<!DOCTYPE a [<!ENTITY a "' + "x" * 50_000 + '">]>'
    texts: dict[str, tuple[bytes, bool]] = {
        "billion laughs": ((lol + body.replace(">cat<", ">&l9;<")).encode(), False),
        "billion laughs in UTF-16": (
            ('<?xml version="1.0" encoding="UTF-16"?>' + lol + body.replace(">cat<", ">&l9;<")).encode("utf-16"),
            False,
        ),
        "quadratic": ((long + body.replace(">cat<", ">" + "&a;" * 50_000 + "<")).encode(), False),
        "external entity": (
            f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{place.root}/secret">]>{body.replace(">cat<", ">&x;<")}'.encode(),
            False,
        ),
        "external parameter": (
            f'<!DOCTYPE a [<!ENTITY % x SYSTEM "file://{place.root}/secret"> %x;]>{body}'.encode(),
            False,
        ),
        "external type": (f'<!DOCTYPE a SYSTEM "http://127.0.0.1:1/x.dtd">{body}'.encode(), False),
        "inclusion": (
            body.replace(
                "<name>cat</name>",
                f'<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file://{place.root}/secret"/>',
            ).encode(),
            False,
        ),
        "deep": (b"<a>" * 300_000, False),
        "deep and closed": (b"<a>" * 100_000 + b"</a>" * 100_000, False),
        "many": (b"<annotation>" + b"<a/>" * 250_000 + b"</annotation>", False),
        "many attributes": (b"<a " + b" ".join(b"x%d='1'" % i for i in range(80_000)) + b"/>", False),
        "2 MiB": (b"<a>" + b" " * 2**21 + b"</a>", False),
        "box NaN": (body.replace("<xmin>1<", "<xmin>nan<").encode(), False),
        "box 10^999": (body.replace("<xmax>9<", "<xmax>1e999<").encode(), False),
        "size 10^12": (body.replace("<width>40<", "<width>1000000000000<").encode(), False),
        "10^6 digits": (body.replace("<width>40<", f"<width>{'9' * 10**5}<").encode(), False),
        "class of control characters": (body.replace(">cat<", ">&#27;[2J<").encode(), False),
        "class a path": (body.replace(">cat<", ">../../canary<").encode(), False),
        "file name a path": (
            body.replace("<folder>VOC2007", "<filename>../../canary</filename><folder>/etc").encode(),
            True,
        ),
        "other encoding": (f"<?xml version='1.0' encoding='{ESCAPE}'?>{body}".encode(), False),
        "code": (place.python.encode(), False),
        "a pickle": (pickle.dumps(Payload(place.shell)), False),
        "processing": (f'<?xml-stylesheet href="file://{place.root}/secret"?>{body}'.encode(), True),
        "empty": (b"", False),
    }
    hostile = []
    for number, (name, (content, may)) in enumerate(texts.items()):
        kit = devkit(place.root / f"{number}", 2, 1, 1)
        (kit / "Annotations/000001.xml").write_bytes(content)
        arguments = ("pack", "voc07", str(kit), str(place.out / f"voc-{number}"), "--split", "train", "--workers", "1")
        hostile.append(Trial(name, SHARDS, arguments, may))
    names = [
        "../../../etc/passwd\n",
        f"{place.canary}\n",
        f"$({place.shell})\n",
        f"{ESCAPE}\n",
        "x" * 4096,
        "-rf\n",
        "\0\n",
        "000001\n" * 2,
    ]
    for number, text in enumerate(names):
        kit = devkit(place.root / f"list-{number}", 2, 1, 1)
        (kit / "ImageSets/Main/train.txt").write_text(text)
        arguments = ("pack", "voc07", str(kit), str(place.out / f"list-{number}"), "--split", "train", "--workers", "1")
        hostile.append(Trial(f"listed: {text[:20]!r}", SHARDS, arguments))
    kit = devkit(place.root / "zeros", 2, 1, 1)
    sparse_file(kit / "Annotations/000001.xml")
    hostile.append(
        Trial("1 TiB of zeros", SHARDS, ("pack", "voc07", str(kit), str(place.out / "voc-z"), "--split", "train"))
    )
    honest = (
        "pack",
        "voc07",
        str(devkit(place.root / "honest", 2, 1, 1)),
        str(place.out / "voc"),
        "--split",
        "train",
        "--workers",
        "1",
    )
    return Kind(Trial("honest", SHARDS, honest), hostile)


def coco(place: Place) -> Kind:
    """COCO's annotations, read with the first picture and its masks."""

    def image(**values: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda d: d["images"][0].update(values)

    def box(**values: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda d: d["annotations"][0].update(values)

    def crowd(size: Any, counts: Any) -> Callable[[dict[str, Any]], Any]:
        return box(segmentation={"size": size, "counts": counts})

    inf, nan = float("inf"), float("nan")
    changes: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
        "file above": (image(file_name="../../secret.jpg"), False),
        "file absolute": (image(file_name="/etc/passwd"), False),
        "file of a shell": (image(file_name=f"$({place.shell})"), False),
        "file of a URL": (image(file_name="http://127.0.0.1:1/x.jpg"), False),
        "file of control characters": (image(file_name=ESCAPE), False),
        "file with a zero byte": (image(file_name="a\0.jpg"), False),
        "file of 4,096": (image(file_name=LONG), False),
        "file a number": (image(file_name=7), False),
        "file empty": (image(file_name=""), False),
        "file a folder": (image(file_name="."), False),
        "width infinite": (image(width=inf), False),
        "height NaN": (image(height=nan), False),
        "width 10^12": (image(width=10**12), True),
        "width text": (image(width=place.python), False),
        "id a list": (image(id=[1]), False),
        "id infinite": (image(id=inf), False),
        "box of one": (box(bbox=[1]), False),
        "box of text": (box(bbox=["a"] * 4), False),
        "box NaN": (box(bbox=[nan] * 4), True),
        "box infinite": (box(bbox=[0, 0, inf, inf]), False),
        "box 10^300": (box(bbox=[0, 0, 1e300, 1e300]), False),
        "box a number": (box(bbox=7), False),
        "box null": (box(bbox=None), False),
        "of another image": (box(image_id=99), False),
        "of another class": (box(category_id=99), False),
        "class a list": (box(category_id=[5]), False),
        "area text": (box(area=ESCAPE), False),
        "area infinite": (box(area=inf), False),
        "crowd text": (box(iscrowd="0"), True),
        "annotation a number": (lambda d: d["annotations"].append(7), False),
        "categories text": (lambda d: d.update(categories="abc"), False),
        "ids of two kinds": (lambda d: d["categories"].append({"id": "x", "name": "y"}), False),
        "names of control characters": (lambda d: d["categories"][0].update(name=ESCAPE), True),
        "images a number": (lambda d: d.update(images=7), False),
        "no images": (lambda d: d.update(images=[]), False),
        "polygon of one": (box(segmentation=[[1]]), False),
        "polygon odd": (box(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), False),
        "polygon empty": (box(segmentation=[[]]), False),
        "polygon text": (box(segmentation=[["a"] * 6]), False),
        "polygon infinite": (box(segmentation=[[0, 0, inf, 0, inf, inf]]), False),
        "polygon NaN": (box(segmentation=[[nan] * 6]), False),
        "polygon 10^12": (box(segmentation=[[0, 0, 1e12, 0, 1e12, 1e12]]), False),
        "polygon far below": (box(segmentation=[[-1e9, -1e9, 1e9, 0, 0, 1e9]]), False),
        "no polygons": (box(segmentation=[]), False),
        "masks null": (box(segmentation=None), False),
        "masks text": (box(segmentation=place.python), False),
        "masks a number": (box(segmentation=7), False),
        "runs of another size": (crowd([10**6, 10**6], [10**12]), False),
        "runs beyond": (crowd([30, 40], [0, 10**9]), False),
        "runs short": (crowd([30, 40], [0, 5]), False),
        "runs negative": (crowd([30, 40], [-5, 1205]), False),
        "runs text": (crowd([30, 40], ["a"]), False),
        "runs packed beyond": (crowd([30, 40], "oooooooooooooooooooooooo0" * 20), False),
        "runs packed endless": (crowd([30, 40], "o" * 1000), False),
        "runs packed odd": (crowd([30, 40], "\x7f\u20ac" * 10), False),
        "runs packed empty": (crowd([30, 40], ""), False),
        "runs a number": (crowd([30, 40], 7), False),
        "runs without a size": (box(segmentation={"counts": [1200]}), False),
        "runs of a negative size": (crowd([-30, -40], [1200]), False),
    }
    hostile = []
    for number, (name, (change, may)) in enumerate(changes.items()):
        root = coco_folder(place.root / f"{number}", change)
        hostile.append(Trial(name, CALLS, ("picture", str(root)), may))
    plant(place.root, {"secret.jpg": jpeg(3)})
    for number, (name, content) in enumerate(
        {
            "deep": b"[" * 10**6,
            "10^6 digits": b'{"images": ' + b"9" * 10**6 + b"}",
            "code": place.python.encode(),
            "a pickle": pickle.dumps(Payload(place.shell)),
            "a list": b"[]",
            "empty": b"",
            "doubled keys": b'{"images": [], "images": [], "annotations": [], "categories": []}',
            "not UTF-8": b'{"\xff\xfe',
        }.items()
    ):
        root = coco_folder(place.root / f"text-{number}", lambda d: None)
        (root / "annotations/instances_train2017.json").write_bytes(content)
        hostile.append(Trial(name, CALLS, ("picture", str(root))))
    root = coco_folder(place.root / "zeros", lambda d: None)
    sparse_file(root / "annotations/instances_train2017.json")
    hostile.append(Trial("1 TiB of zeros", CALLS, ("picture", str(root))))
    other = str(place.root / "0")
    parts = ("../../etc/passwd", "/etc/passwd", ESCAPE, "a\0b", LONG)
    hostile += [Trial(f"part {part[:20]!r}", CALLS, ("picture", other, part)) for part in parts]
    honest = coco_folder(place.root / "honest", lambda d: None)
    return Kind(Trial("honest", CALLS, ("picture", str(honest))), hostile)
