"""The contract on disk: what `DST/<split>/manifest.json` and `index.npy` say, checked before anything is trusted.

Layout of a packed data set, DST:
    _info.json                        timm's index of all splits
    <split>/manifest.json             written last: without it the split is not there
    <split>/<split>-000000.tar        USTAR; members %09d.jpg|.png|.webp|.bmp|.npy (see stamps.py), %09d.cls
                                      (ASCII integer), %09d.json
    <split>/<split>-000000.idx        DALI's index, v1.2
    <split>/index.npy                 INDEX_DTYPE, one row a sample, in shard order; the row number is the sample's id
    <split>/labels.npy                only where a sample may have several classes: int8 (samples, classes), 1 present,
                                      -1 present only as a difficult object, 0 absent; as "labels" of %09d.json has it
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from shard_tools import exit_codes

if TYPE_CHECKING:
    from shard_tools.remote import Access, RemoteFolder

FORMAT = "fastssl-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
LABELS_NAME = "labels.npy"
INFO_NAME = "_info.json"

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb (twice its MAX_IMAGE_PIXELS)
MAX_MANIFEST_BYTES = 64 * 2**20  # of 250,000 shards
MAX_MEMBER_BYTES = 64 * 2**20  # of one image; a claim above it is a damaged or hostile archive
MAX_BANDS = 64  # of a stamp
_MAX_NPY_HEAD = 10 + 2**16
_HEADER_BYTES = 512  # of a member in a tar
_PIECE = 2**16  # rows of the index checked at a time, so that what is computed of them stays in the cache

# offset, size   of the image's bytes inside the tar
# label          class number, -1 for none
# crc32          of the image's bytes
# width, height  in px as stored in the file: an EXIF orientation is not applied
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("label", "<i4"),
        ("crc32", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
    ]
)


class ShardError(ValueError):
    """Shards, or what should become shards, are not usable; the message is one sentence with the remedy."""


class Damaged(ShardError):
    """Files of a split that are not there as they were written."""

    exit_code = exit_codes.DAMAGED


@dataclass(frozen=True)
class Shard:
    """One tar: file name (no folder), size in bytes, samples, sha256 of the tar and of its .idx."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    idx_sha256: str = ""

    @property
    def idx_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(frozen=True)
class Manifest:
    """One split. `root` is the folder of its shards; `classes` is None where the data has no labels.

    remote   the folder behind a URL that the split was loaded from; `root` then holds copies: the index, and those
             shards that the cache keeps (see cache.py)
    census   what the images are, from their content (see census.py)
    source   what they were packed from; no absolute path
    options  the options of `pack` that shaped the bytes
    digest   sha256 of what defines the data: shards, index and classes
    labels_sha256   of labels.npy, "" where there is none. The digest knows these labels from the shards, which hold
                    them too, so that readers of the time before labels.npy accept the split, as one without labels
    """

    root: Path
    split: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    num_samples: int
    census: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, Any]
    digest: str = ""
    index_sha256: str = ""
    labels_sha256: str = ""
    remote: RemoteFolder | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _digest(self))

    @classmethod
    def load(cls, path: str | Path, split: str = "train", access: Access | None = None) -> Manifest:
        """The manifest of DST's `split`, or of the split folder DST/<split> itself.

        path    a folder, or the URL of one (see remote.py): its index is then copied to the cache
        access  how the shards behind a URL are read
        Raises ShardError where there is none, or where it is not what `pack` or `index` wrote.
        """
        if "://" in str(path):  # on this machine alone, none of the code for others is loaded
            manifest = _load_url(str(path), split, access)
        else:
            manifest = _load(_locate(Path(path), split))
        if split not in (manifest.split, "train"):  # "train" may be the default beside a path to another split's folder
            raise ShardError(
                f"{manifest.place} holds the split {manifest.split!r}, not {split!r}; give the folder above it"
            )
        return manifest

    @property
    def place(self) -> str:
        """Where the split is, for messages: its folder, or its URL without credentials."""
        return str(self.remote or self.root)

    @property
    def labelled(self) -> bool:
        """Whether every sample has one class."""
        return self.classes is not None and not self.multi_label

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have several classes, or none: see `labels`."""
        return bool(self.labels_sha256)

    @property
    def bands(self) -> int:
        """Bands of every stamp where the split holds arrays of floats (`.npy`, see stamps.py); 0 for photographs."""
        return self.census.get("bands", 0)

    @property
    def channels(self) -> int:
        """Channels of a view: the bands of a stamp, or 3."""
        return self.bands or 3

    def index(self) -> np.ndarray:
        """index.npy, read-only; raises Damaged if it is missing or of another shape.

        Read into memory, 36 bytes a sample: were it mapped, a file that is cut or unreadable later would end the
        process by a signal, without a message.
        """
        (rows,) = _rows(*self._index_array(), [range(self.num_samples)])
        return rows

    def entry(self, row: int) -> np.void:
        """One row of the index, without reading the others."""
        (rows,) = _rows(*self._index_array(), [range(row, row + 1)])
        return rows[0]

    def labels(self) -> np.ndarray:
        """labels.npy of a multi-label split, int8 (num_samples, classes), read-only; raises Damaged likewise."""
        (rows,) = _rows(*self._labels_array(), [range(self.num_samples)])
        return rows

    def shard_path(self, i: int) -> Path:
        """Shard i; of a remote split its copy in the cache, fetched and checked if it is not there."""
        if self.remote is None:
            return self.root / self.shards[i].name
        from shard_tools.cache import ShardCache

        return ShardCache(self).path(i)

    def member_name(self, row: int, entry: np.void | None = None) -> str:
        """`train-000003.tar:000003017.jpg`: where sample `row` is, for messages; never raises for a damaged shard.

        entry   the index's row, where the caller has it; read from the file otherwise
        """
        entry = self.entry(row) if entry is None else entry
        shard = int(entry["shard"])
        header = self._header_before(shard, int(entry["offset"]))
        return f"{self.shards[shard].name}:{_name_in(header) or f'{row:09d}'}"

    def check_quick(self) -> list[str]:
        """All faults that sizes, the index's hash and its ranges show, one each; [] is good. Reads no shard.

        Of a remote split, not the sizes of its shards, each of which would be a request: see verify.py.
        """
        sizes = _shard_faults(self) if self.remote is None else ()
        return [*sizes, *_index_faults(self), *_labels_faults(self)]

    def to_bytes(self) -> bytes:
        """What manifest.json holds: the same for the same data, whatever the machine or the day.

        Raises ShardError for more than `Manifest.load` would read.
        """
        document = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "split": self.split,
            "num_samples": self.num_samples,
            "digest": self.digest,
            "index_sha256": self.index_sha256,
            **({"labels_sha256": self.labels_sha256} if self.multi_label else {}),
            "classes": None if self.classes is None else list(self.classes),
            "source": self.source,
            "options": self.options,
            "census": self.census,
            "shards": [asdict(shard) for shard in self.shards],
        }
        content = _json({**document, "checksum": _checksum(document)})
        if len(content) > MAX_MANIFEST_BYTES:
            raise ShardError(
                f"the manifest of {self.split!r} would have {len(content)} bytes, more than {MAX_MANIFEST_BYTES},"
                f" for its {len(self.shards)} shards and {len(self.census.get('bad', []))} bad files; pack larger"
                " shards (--shard-size N --overwrite), or remove the bad files"
            )
        return content

    def manifest_faults(self) -> list[str]:
        """What loading manifest.json does not tell: that it is not, byte for byte, what was written."""
        path, content = self.root / MANIFEST_NAME, self.to_bytes()
        document = json.loads(content)
        del document["checksum"]
        same = path.read_bytes() in (content, _json(document))
        return [] if same else [f"{path} is not as it was written; restore it, or pack the split again"]

    def _index_array(self) -> tuple[Path, np.dtype, tuple[int, ...]]:
        return self.root / INDEX_NAME, INDEX_DTYPE, (self.num_samples,)

    def _labels_array(self) -> tuple[Path, np.dtype, tuple[int, ...]]:
        if not self.multi_label:
            raise ShardError(f"{self.place} has no labels.npy of several classes a sample; pack it with such a source")
        return self.root / LABELS_NAME, np.dtype(np.int8), (self.num_samples, len(self.classes or ()))

    def _header_before(self, shard: int, offset: int) -> bytes:
        """The tar header that ends at byte `offset`, or what can be read of it."""
        name = self.shards[shard].name
        try:
            if self.remote and not (self.root / name).is_file():
                return (self.remote / name).read(offset - _HEADER_BYTES, _HEADER_BYTES)
            with (self.root / name).open("rb") as file:
                file.seek(offset - _HEADER_BYTES)
                return file.read(_HEADER_BYTES)
        except (OSError, ValueError):  # ShardError among them
            return b""


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb", buffering=0) as file:
        return sha256_of_open(file)


def sha256_of_open(file: BinaryIO) -> str:
    """Hex sha256 of the rest of an open file, read in pieces of 1 MiB."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(2**20))
    while count := file.readinto(piece):  # type: ignore[attr-defined]
        digest.update(piece[:count])
    return digest.hexdigest()


def splits(path: str | Path, access: Access | None = None) -> list[str]:
    """Names of the packed splits below DST, sorted; of a URL, which cannot always be listed, those in _info.json."""
    if "://" not in str(path):
        return sorted(found.parent.name for found in Path(path).glob(f"*/{MANIFEST_NAME}"))
    from shard_tools import remote

    folder = remote.locate(path, access)
    if isinstance(folder, Path):
        return splits(folder)
    try:
        content = (folder / INFO_NAME).read_small()
    except remote.NotThere:
        return []
    try:
        return sorted(_plain_name(name) for name in json.loads(content)["splits"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{folder / INFO_NAME} lists no splits ({error}); name one with its own URL") from None


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _checksum(document: dict[str, Any]) -> str:
    """Of all that manifest.json says; the digest is of what defines the data."""
    return hashlib.sha256(_json({key: value for key, value in document.items() if key != "checksum"})).hexdigest()


def _digest(manifest: Manifest) -> str:
    document = [
        FORMAT_VERSION,
        [[shard.name, shard.num_bytes, shard.num_samples, shard.sha256] for shard in manifest.shards],
        manifest.index_sha256,
        None if manifest.classes is None else list(manifest.classes),
    ]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _locate(path: Path, split: str) -> Path:
    if (path / MANIFEST_NAME).is_file():
        return path / MANIFEST_NAME
    if (path / split / MANIFEST_NAME).is_file():
        return path / split / MANIFEST_NAME
    if not path.is_dir():
        raise ShardError(f"no such folder of shards: {path}; pack one with `shard_tools pack`")
    if found := splits(path):
        raise ShardError(f"{path} has no split {split!r}, only {', '.join(found)}; name one of these, or pack it")
    raise ShardError(
        f"no manifest.json in {path} or {path / split}; finish `shard_tools pack`, or adopt foreign shards with"
        " `shard_tools index`"
    )


def _load(path: Path) -> Manifest:
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise Damaged(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes, so not a manifest; pack the split again")
    return _read(path.read_bytes(), path, path.parent)


def _load_url(url: str, split: str, access: Access | None) -> Manifest:
    """The manifest behind a URL, with its index, and labels if it has them, in the cache."""
    from shard_tools import cache, remote

    folder = remote.locate(url, access)
    if isinstance(folder, Path):
        return _load(_locate(folder, split))
    folder, content = _fetch_manifest(folder, split)
    manifest = _read(content, folder / MANIFEST_NAME, Path())
    root = cache.mirror(folder.access, manifest.split, manifest.digest)
    manifest = replace(manifest, root=root, remote=folder)
    most = _MAX_NPY_HEAD + manifest.num_samples * max(INDEX_DTYPE.itemsize, len(manifest.classes or ()))
    for name, sha256 in ((INDEX_NAME, manifest.index_sha256), (LABELS_NAME, manifest.labels_sha256)):
        if sha256:
            cache.fetch_file(folder / name, root / name, most, sha256)
    return manifest


def _fetch_manifest(folder: RemoteFolder, split: str) -> tuple[RemoteFolder, bytes]:
    """The split's folder, and its manifest.json."""
    from shard_tools.remote import NotThere

    inside = folder / split
    with suppress(NotThere):
        return folder, (folder / MANIFEST_NAME).read_small()
    with suppress(NotThere):
        return inside, (inside / MANIFEST_NAME).read_small()
    raise NotThere(
        f"neither {folder / MANIFEST_NAME} nor {inside / MANIFEST_NAME} is there, or may be read with the credentials"
        f" found; check data.root and data.split, and docs/remote.md for credentials"
    )


def _read(content: bytes, place: object, root: Path) -> Manifest:
    """Raises ShardError, naming `place`, unless `content` is a manifest."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{place} is not valid JSON ({error}); restore it, or pack the split again") from None
    if isinstance(document, dict) and document.get("format") != FORMAT:
        raise ShardError(f"{place} is no manifest of shards (its format is not {FORMAT!r}); pack the split again")
    if isinstance(document, dict) and document.get("version") != FORMAT_VERSION:
        raise ShardError(
            f"{place} is no manifest of version {FORMAT_VERSION} (its version is {document.get('version')!r});"
            " use the release of fastssl that wrote it, or pack the split again"
        )
    try:
        manifest, digest = _parse(document, root)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"{place} is no manifest of version {FORMAT_VERSION} ({error}); restore it, or pack the split again"
        ) from None
    # the first packs had no checksum
    if manifest.digest != digest or ("checksum" in document and document["checksum"] != _checksum(document)):
        raise Damaged(
            f"{place} was changed after packing (its checksum does not match); restore it, or pack the split again"
        )
    return manifest


def _parse(document: Any, root: Path) -> tuple[Manifest, str]:
    shards = tuple(_parse_shard(entry) for entry in _typed(document, "shards", list))
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("a shard is listed twice")
    num_samples = _count(document, "num_samples")
    if sum(shard.num_samples for shard in shards) != num_samples:
        raise ValueError("its shards do not add up to num_samples")
    classes = document.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("classes is not a list of names")
    manifest = Manifest(
        root=root,
        split=_plain_name(_typed(document, "split", str)),
        shards=shards,
        classes=None if classes is None else tuple(classes),
        num_samples=num_samples,
        census=_parse_census(_typed(document, "census", dict)),
        source=_typed(document, "source", dict),
        options=_typed(document, "options", dict),
        index_sha256=_typed(document, "index_sha256", str),
        labels_sha256=_typed(document, "labels_sha256", str) if "labels_sha256" in document else "",
    )
    if manifest.multi_label and not manifest.classes:
        raise ValueError("it has labels, but no classes")
    return manifest, _typed(document, "digest", str)


def _parse_shard(entry: Any) -> Shard:
    name = _plain_name(_typed(entry, "name", str))
    if not name.endswith(".tar"):
        raise ValueError(f"the shard {name!r} is not a .tar")
    return Shard(
        name=name,
        num_bytes=_count(entry, "num_bytes"),
        num_samples=_count(entry, "num_samples"),
        sha256=_typed(entry, "sha256", str),
        idx_sha256=_typed(entry, "idx_sha256", str),
    )


def _parse_census(census: dict[str, Any]) -> dict[str, Any]:
    """The census if what `info` and `verify` read of it has its shape; what is absent is counted as nothing."""
    for key in {"formats", "modes", "exif_orientation", "quantiles"} & census.keys():
        _typed(census, key, dict)
    for key in {"corrupt_exif", "reencoded", "num_oddities"} & census.keys():
        _count(census, key)
    for key in {"oddities", "bad"} & census.keys():
        _typed(census, key, list)
    if "bands" in census and not 1 <= _count(census, "bands") <= MAX_BANDS:
        raise ValueError(f"its bands are {census['bands']}")
    if not all(isinstance(entry, dict) for entry in census.get("quantiles", {}).values()):
        raise ValueError("its quantiles are no table")
    for oddity in census.get("oddities", []):
        if not (isinstance(oddity, list) and len(oddity) == 2 and all(isinstance(text, str) for text in oddity)):
            raise ValueError("its oddities are no list of names")
    for bad in census.get("bad", []):
        for key in ("name", "reason", "action"):
            _typed(bad, key, str)
        if bad["action"] == "kept":
            _count(bad, "row")
    return census


def _typed(document: Any, key: str, kind: type) -> Any:
    if not isinstance(document, dict) or not isinstance(document.get(key), kind):
        raise ValueError(f"{key!r} is missing or no {kind.__name__}")
    return document[key]


def _count(document: Any, key: str) -> int:
    value = _typed(document, key, int)
    if isinstance(value, bool) or not 0 <= value < 2**48:
        raise ValueError(f"{key} is {value!r}")
    return value


def _plain_name(name: str) -> str:
    """A file name that cannot leave its folder: a manifest may come from elsewhere."""
    if not re.fullmatch(r"[^/\\\0.][^/\\\0]*", name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _rows(path: Path, dtype: np.dtype, shape: tuple[int, ...], wanted: Iterable[range]) -> Iterator[np.ndarray]:
    """Rows of a .npy without NumPy's own reader, which would evaluate the header of a damaged or hostile file."""
    descr, num_rows, row_bytes = dtype.descr if dtype.names else repr(dtype.str), shape[0], _row_bytes(dtype, shape)
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    try:
        with path.open("rb") as file:
            start = file.read(_MAX_NPY_HEAD)
            offset = 10 + int.from_bytes(start[8:10], "little")
            if not start.startswith(b"\x93NUMPY\x01\x00") or start[10:offset].rstrip(b" \n") != head:
                raise Damaged(
                    f"{path} is no {path.stem} of {num_rows} rows, as its manifest says; pack the split again"
                )
            if not num_rows or os.fstat(file.fileno()).st_size != offset + num_rows * row_bytes:
                raise Damaged(f"{path} does not hold {num_rows} rows, as its manifest says; pack the split again")
            for part in wanted:
                rows = np.empty((len(part), *shape[1:]), dtype)
                file.seek(offset + part.start * row_bytes)
                if file.readinto(rows.reshape(-1).view(np.uint8).data) != rows.nbytes:
                    raise Damaged(f"{path} was cut while it was read; restore it, or pack the split again")
                rows.flags.writeable = False
                yield rows
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror}); restore it, or pack the split again") from None


def _row_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape[1:])


def _pieces(num_rows: int) -> Iterator[range]:
    return (range(first, min(first + _PIECE, num_rows)) for first in range(0, num_rows, _PIECE))


def _name_in(header: bytes) -> str:
    """The member's name in a tar header, or "" if it is none."""
    return header[:100].rstrip(b"\0").decode("utf-8", "backslashreplace") if header[257:262] == b"ustar" else ""


def _shard_faults(manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        path = manifest.root / shard.name
        try:
            found = path.stat()  # once: on a network's file system each is a request
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            yield f"{path} is missing"
        elif found.st_size != shard.num_bytes:
            yield f"{path} has {found.st_size} bytes, but its manifest says {shard.num_bytes}"


def _index_faults(manifest: Manifest) -> Iterator[str]:
    """In pieces, so that the memory that this takes does not grow with the split."""
    path, dtype, shape = manifest._index_array()
    try:
        wrong = list(_range_faults(manifest, _rows(path, dtype, shape, _pieces(manifest.num_samples)), path))
    except ShardError as error:
        yield str(error)
        return
    if sha256_of(path) != manifest.index_sha256:
        yield f"{path} is not the index that was packed with these shards (its sha256 differs)"
    yield from wrong


def _labels_faults(manifest: Manifest) -> Iterator[str]:
    if not manifest.multi_label:
        return
    path, dtype, shape = manifest._labels_array()
    pieces = _rows(path, dtype, shape, _pieces(manifest.num_samples))
    try:
        are_labels = all(np.isin(labels, (-1, 0, 1)).all() for labels in pieces)
    except ShardError as error:
        yield str(error)
        return
    if sha256_of(path) != manifest.labels_sha256:
        yield f"{path} is not the labels that were packed with these shards (its sha256 differs)"
    if not are_labels:
        yield f"{path} holds values other than -1, 0 and 1"


def _range_faults(manifest: Manifest, pieces: Iterable[np.ndarray], path: Path) -> Iterator[str]:
    """What is wrong with the rows of the index, which come in pieces."""
    num_bytes = np.array([entry.num_bytes for entry in manifest.shards], np.uint64)
    ends = np.cumsum([entry.num_samples for entry in manifest.shards])
    in_order, first = True, 0
    wrong: dict[str, tuple[int, int]] = {}  # what -> the first such row, how many
    for rows in pieces:
        if rows["shard"].max() >= len(num_bytes):
            yield f"{path} names shard {rows['shard'].max()}, but there are only {len(num_bytes)}"
            return
        expected = np.searchsorted(ends, np.arange(first, first + len(rows)), "right")
        in_order = in_order and bool((rows["shard"] == expected).all())
        for what, mask in _out_of_range(rows, num_bytes[rows["shard"]], len(manifest.classes or ())).items():
            if count := int(mask.sum()):
                row, before = wrong.get(what, (first + int(mask.argmax()), 0))
                wrong[what] = (row, before + count)
        first += len(rows)
    if not in_order:
        yield f"{path} does not list the shards' samples in their order and number"
    for what, (row, count) in wrong.items():
        more = f" and {count - 1} more" if count > 1 else ""
        yield f"{path}: sample {row}{more} {what}"


def _out_of_range(rows: np.ndarray, num_bytes: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """What may be wrong with a row of the index -> whether it is, of each; num_bytes are those of each row's shard."""
    offset, size = rows["offset"], rows["size"]
    pixels = rows["width"].astype(np.uint64) * rows["height"]
    return {
        "lies outside its shard": (offset < 512)
        | (offset > num_bytes)
        | (size > num_bytes - np.minimum(offset, num_bytes)),
        "has an impossible size": (size == 0) | (size > MAX_MEMBER_BYTES),
        "has impossible dimensions": (pixels == 0) | (pixels > MAX_PIXELS),
        "has a label without a class": (rows["label"] < -1) | (rows["label"] >= num_classes),
    }
