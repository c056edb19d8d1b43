"""The command `shard_tools pack | verify | info | index | extract | simulate`: arguments to functions."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from shard_tools import exit_codes, info
from shard_tools.adopt import AdoptOptions, adopt
from shard_tools.census import counted, table
from shard_tools.documents import MAX_LIST_BYTES, read_limited
from shard_tools.engines import Engine, local, on_cluster
from shard_tools.extract import extract
from shard_tools.galaxies import simulate
from shard_tools.images import Resize
from shard_tools.manifest import Damaged, Manifest, ShardError
from shard_tools.pack import Packed, PackOptions, pack
from shard_tools.printing import sentence
from shard_tools.remote import locate, shown
from shard_tools.sources import Source, cifar10, demo, files, fits, hdf5, imagefolder, imagenet, voc07, webdataset
from shard_tools.verify import check, check_info, manifests_below

_KEY = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")  # a sample's number, or a range of them

_SOURCES = {
    "imagenet": "ImageNet-1k: SRC/train/<wnid>/*.JPEG; val in class folders, or flat with --val-labels",
    "imagefolder": "class folders SRC/<class>/..., or SRC/<split>/<class>/...",
    "files": "any tree of images, without labels",
    "cifar10": "CIFAR-10: the python version's pickles, or train/<class>/ and test/<class>/",
    "voc07": "PASCAL VOC 2007 (or 2012): SRC is VOCdevkit/VOC2007; several classes an image, difficult objects, boxes",
    "webdataset": "WebDataset shards to be packed again: a folder, a .tar, or a path like x-{000..012}.tar",
    "hdf5": "stamps of an HDF5 file SRC: images (N, bands, height, width), and labels and obj_ids if it has them",
    "fits": "stamps, one a FITS file, anywhere below SRC: (bands, height, width), or (height, width) of one band",
    "demo": "patches of the photographs that scikit-image and scikit-learn ship; no SRC, no download",
}

_VAL_LABELS = (
    "ground truth of a flat val: a wnid or number a line, `FILE wnid` lines, LOC_val_solution.csv, or the kit's"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, one of shard_tools/exit_codes.py."""
    args = _parser().parse_args(_out_apart(sys.argv[1:] if argv is None else argv))
    try:
        return args.run(args)
    except ValueError as error:  # ShardError among them
        return _fail(error, exit_codes.code_of(error))
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted; run the same command again", exit_codes.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `shard_tools info DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or "a file"
        return _fail(
            f"{where} cannot be used ({error.strerror}); check the path and its permissions", exit_codes.BAD_INPUT
        )


def _fail(message: object, code: int) -> int:
    print(f"error: {sentence(str(message))}", file=sys.stderr)
    return code


def _pack(args: argparse.Namespace) -> int:
    options = PackOptions(
        shard_size=args.shard_size,
        shard_bytes=args.shard_bytes,
        resize=_resize(args),
        workers=args.workers,
        seed=args.seed,
        limit=args.limit,
        on_bad=args.on_bad,
        subset=None if args.subset_file is None else _names(args.subset_file, "--subset-file"),
        overwrite=args.overwrite,
    )
    if args.engine == "dask" and args.source != "demo":
        args.src = os.path.abspath(args.src)  # workers have other working directories
    splits = [args.split] if args.split else _splits(args)
    for split in splits:
        _check_split(split)
    opened = [
        _source(args, split) for split in splits
    ]  # all of them, so that a wrong one is said before the first is packed
    report = [line for source in opened for line in _report(pack(source, args.dst, options, _engine(args)))]
    _print_lines(report)
    return 0


def _print_lines(lines: Iterable[str]) -> None:
    print("\n".join(map(sentence, lines)))


def _engine(args: argparse.Namespace) -> AbstractContextManager[Engine]:
    if args.engine == "local":
        if args.scheduler is not None:
            raise ShardError("--scheduler only matters to --engine dask; add that, or leave --scheduler out")
        return local(args.workers)
    if args.scheduler is None:
        raise ShardError("--engine dask needs --scheduler ADDRESS, such as tcp://10.0.0.1:8786")
    return on_cluster(args.scheduler)


def _splits(args: argparse.Namespace) -> Sequence[str]:
    """The splits that are packed where --split does not choose: all that the source has, or train for one subset."""
    if args.source == "demo":
        return ("train", "test")
    if args.subset_file is None and Path(args.src).is_dir():
        if args.source == "cifar10":
            return cifar10.splits(Path(args.src)) or ("train",)
        if args.source == "voc07":
            return voc07.splits(Path(args.src)) or ("trainval",)
        if args.source in ("imagenet", "imagefolder"):
            known = ("train", "val") if args.source == "imagenet" else imagefolder.SPLIT_NAMES
            return imagefolder.splits(Path(args.src), known) or ("train",)
    return ("train",)


def _source(args: argparse.Namespace, split: str) -> Source:
    if args.source == "demo":
        return demo.open_source(split, seed=args.seed)
    _check_apart(Path(args.src), args.dst / split)
    if args.source == "webdataset":
        return webdataset.open_source(args.src, split, args.classes and _names(args.classes, "--classes"))
    src = Path(args.src)
    if args.source == "hdf5":
        return hdf5.open_source(src, split, args.dataset)
    if not src.is_dir():
        raise ShardError(f"no such folder: {src}; give the one that holds the images as SRC")
    if args.source == "imagenet":
        labels = None if split == "train" and not args.split else args.val_labels
        return imagenet.open_source(src, split, labels)
    modules = {"imagefolder": imagefolder, "files": files, "cifar10": cifar10, "fits": fits, "voc07": voc07}
    return modules[args.source].open_source(src, split)


def _check_apart(src: Path, folder: Path) -> None:
    """Shards inside their source would be listed with it the next time, or replace it."""
    source = (src if src.is_dir() else src.parent).resolve()
    if source == folder.resolve() or (src.is_dir() and source in folder.resolve().parents):
        raise ShardError(f"DST {folder} lies inside SRC {src}; choose a folder outside of it")


def _resize(args: argparse.Namespace) -> Resize | None:
    if args.max_side is None and args.short_side is None:
        if args.quality is not None:
            raise ShardError("--quality only matters to a resize; add --max-side or --short-side, or leave it out")
        return None
    side = args.max_side or args.short_side or 0
    quality = 90 if args.quality is None else args.quality
    if side < 1 or not 1 <= quality <= 100:
        raise ShardError("--max-side and --short-side must be at least 1 px, and --quality between 1 and 100")
    return Resize(args.max_side or 0, args.short_side or 0, quality)


def _report(packed: Packed) -> list[str]:
    manifest = packed.manifest
    if packed.progress is None:
        return [f"{_summary(manifest)}: already packed with these options in {manifest.root}; nothing to do"]
    size = sum(shard.num_bytes for shard in manifest.shards) / 1e6
    kept = f", continued behind {counted(packed.num_shards_kept, 'complete shard')}" if packed.num_shards_kept else ""
    rates = f"{packed.progress.seconds:.1f} s, {packed.progress.rates()}"
    lines = [f"{_summary(manifest)}, {size:.1f} MB in {manifest.root}; {rates}{kept}"]
    if manifest.classes is not None:
        lines.append(f"  classes    {len(manifest.classes)}")
    if ignored := manifest.source.get("num_ignored"):
        lines.append(f"  ignored    {counted(ignored, 'file')} not named as images")
    return [*lines, *table(manifest.census)]


def _summary(manifest: Manifest) -> str:
    return f"{manifest.split}: {counted(manifest.num_samples, 'image')} in {counted(len(manifest.shards), 'shard')}"


def _verify(args: argparse.Namespace) -> int:
    manifests = manifests_below(args.dir)
    faults = check_info(args.dir, manifests)
    for manifest in manifests:
        found = check(manifest, full=args.full, decode=args.decode, workers=args.workers)
        faults += found
        how = "sizes and indexes; --full reads every byte"
        if args.full or args.decode:
            how = "hashes, structure and decoding" if args.decode else "hashes and structure, of every byte"
        what = counted(len(found), "fault") if found else f"good ({how})"
        print(f"{_summary(manifest)}: {what}")
    for fault in faults:
        print(sentence(fault), file=sys.stderr)
    if faults:
        number = counted(len(faults), "fault")
        raise Damaged(f"{shown(str(args.dir))} has {number}; restore the files named above, or pack the split again")
    return 0


def _info(args: argparse.Namespace) -> int:
    if args.limit and not args.stats:
        raise ShardError("--limit only matters to --stats; add --stats, or leave --limit out")
    documents = []
    for manifest in manifests_below(args.dir):
        document = info.describe(manifest)
        if args.stats:
            document["pixels"] = info.pixel_statistics(manifest, limit=args.limit, workers=args.workers)
        documents.append(document)
    if args.json:
        print(json.dumps({"splits": documents}, indent=1))
        return 0
    for document in documents:
        _print_lines(info.lines(document))
        if args.stats:
            print("\n".join(info.pixel_lines(document["pixels"])))
    return 0


def _index(args: argparse.Namespace) -> int:
    _check_split(args.split)
    classes = None if args.classes is None else _names(args.classes, "--classes")
    options = AdoptOptions(args.split, classes, args.on_bad, args.workers, args.overwrite)
    for manifest in adopt(args.dir, options):
        _print_lines(info.lines(info.describe(manifest)))
    return 0


def _extract(args: argparse.Namespace) -> int:
    manifest = Manifest.load(args.dir, args.split)
    rows = [row for key in args.keys for row in _rows(key, manifest.num_samples)]
    for path in extract(manifest, rows, args.out):
        print(sentence(str(path)))
    return 0


def _simulate(args: argparse.Namespace) -> int:
    simulate(args.out, num=args.num, size=args.size, seed=args.seed, workers=args.workers)
    print(f"{counted(args.num, 'stamp')} of galaxies in {args.out}")
    return 0


def _rows(key: str, num_samples: int) -> range:
    """One sample number, or an inclusive range a-b of them."""
    match = _KEY.fullmatch(key)
    if not match:
        raise ShardError(f"the key {key!r} is neither a sample's number nor a range such as 100-120")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < num_samples:
        raise ShardError(f"the key {key!r} is out of range: samples go from 0 to {num_samples - 1}")
    return range(first, last + 1)


def _check_split(split: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", split):
        raise ShardError(f"--split is {split!r}, but may only hold letters, digits, - and _")


def _names(path: Path, option: str) -> tuple[str, ...]:
    """The lines of a list, empty ones left out."""
    try:
        text = read_limited(path, MAX_LIST_BYTES).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}); check {option}") from None
    except ValueError as error:
        raise ShardError(f"{error}; check {option}") from None
    names = tuple(line for line in (line.strip() for line in text.splitlines()) if line)
    if not names:
        raise ShardError(f"{path} holds no names; check {option}")
    return names


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {sentence(message)}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(exit_codes.BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shard_tools",
        description="Pack images into WebDataset tar shards, and check, describe and read them.",
        epilog="example: shard_tools pack imagefolder photos/ shards/ && shard_tools verify shards/ --full",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shard_tools {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pack(commands)
    _add_verify(commands)
    _add_info(commands)
    _add_index(commands)
    _add_extract(commands)
    _add_simulate(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: {example}", formatter_class=formatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_pack(commands: Any) -> None:
    summary = "pack images into shards; an interrupted pack continues when the same command is run again"
    example = "shard_tools pack imagenet /data/imagenet shards/ --on-bad quarantine"
    more = "options of a source: shard_tools pack SOURCE --help"
    parser = _command(commands, "pack", _pack, summary, f"{example}\n{more}")
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, what in _SOURCES.items():
        paths = "DST" if name == "demo" else "SRC DST --workers 8"
        sub = _command(sources, name, _pack, what, f"shard_tools pack {name} {paths}")
        if name != "demo":
            sub.add_argument("src", metavar="SRC", help="where the images are")
        sub.add_argument("dst", metavar="DST", type=Path, help="folder of the shards; the split gets one inside it")
        if name == "imagenet":
            sub.add_argument("--val-labels", type=Path, metavar="FILE", help=_VAL_LABELS)
        if name == "webdataset":
            sub.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, from class 0")
        if name == "hdf5":
            sub.add_argument("--dataset", default="images", metavar="NAME", help="of the stamps (default: images)")
        _add_pack_options(sub)


def _add_pack_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", help="train, val, test, ... (default: every split that SRC has as a folder, else train)")
    add("--shard-size", type=int, default=1000, metavar="N", help="most samples in a shard (default: 1000)")
    add("--shard-bytes", type=_bytes, default=0, metavar="SIZE", help="most bytes in a shard, such as 500MB")
    resize = parser.add_mutually_exclusive_group()
    resize.add_argument("--max-side", type=int, metavar="PX", help="shrink until the longer side has PX px at most")
    resize.add_argument("--short-side", type=int, metavar="PX", help="shrink until the shorter side has PX px")
    add("--quality", type=int, metavar="1-100", help="JPEG quality of shrunk images (default: 90)")
    add("--seed", type=int, default=0, help="of the shuffle over all images (default: 0)")
    add("--limit", type=int, default=0, metavar="N", help="pack only N images, chosen at random")
    add("--subset-file", type=Path, metavar="FILE", help="pack only the images listed, one file name a line")
    bad = "bad images: fail at the first (default), quarantine: leave out and list, keep: pack if the header is good"
    add("--on-bad", default="fail", choices=("fail", "quarantine", "keep"), help=bad)
    add("--overwrite", action="store_true", help="remove an earlier pack of this split from DST first")
    _add_workers(parser)
    engine = "local: --workers processes (default); dask: the workers of a dask.distributed cluster that share SRC, DST"
    add("--engine", default="local", choices=("local", "dask"), help=engine)
    add("--scheduler", metavar="ADDRESS", help="of the dask cluster, such as tcp://10.0.0.1:8786")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands, "verify", _verify, "check shards against their manifest", "shard_tools verify shards/ --full"
    )
    parser.add_argument("dir", metavar="DIR", type=_place, help="a packed data set, or one split of it; or its URL")
    full = "read every byte: hashes, tar structure, labels; finds whatever changed since the pack"
    parser.add_argument("--full", action="store_true", help=full)
    decode = "also decode every image, which `pack` did before it stored them: needed only for images kept with"
    decode += " --on-bad keep, or after another Pillow or libjpeg was installed"
    parser.add_argument("--decode", action="store_true", help=decode)
    _add_workers(parser)


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", _info, "say what shards hold", "shard_tools info shards/ --json")
    parser.add_argument("dir", metavar="DIR", type=_place, help="a packed data set, or one split of it; or its URL")
    parser.add_argument("--json", action="store_true", help="for programs")
    stats = "also mean and std of red, green and blue over all pixels of all images, as settings for a training"
    parser.add_argument("--stats", action="store_true", help=stats)
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="--stats of N images, chosen at random")
    _add_workers(parser)


def _add_index(commands: Any) -> None:
    summary = "adopt WebDataset shards without packing them again: writes .idx, index.npy, manifest.json, _info.json"
    parser = _command(commands, "index", _index, summary, "shard_tools index /data/cc3m --split train")
    parser.add_argument("dir", metavar="DIR", type=Path, help="a folder of .tar files, or of split folders of them")
    parser.add_argument("--split", default="train", help="name of the split, if DIR holds the tars (default: train)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, from class 0")
    bad = "bad images: fail (default), or quarantine: leave them out of the index"
    parser.add_argument("--on-bad", default="fail", choices=("fail", "quarantine"), help=bad)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier index")
    _add_workers(parser)


def _add_extract(commands: Any) -> None:
    parser = _command(
        commands,
        "extract",
        _extract,
        "write samples as image files",
        "shard_tools extract shards/ --keys 0 17 100-120 pictures/",
    )
    parser.add_argument("dir", metavar="DIR", type=_place, help="a packed data set, or one split of it; or its URL")
    parser.add_argument("--split", default="train", help="of DIR, if it holds several (default: train)")
    parser.add_argument("--keys", nargs="+", required=True, metavar="KEY", help="numbers of samples, or ranges a-b")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")


def _add_simulate(commands: Any) -> None:
    summary = "draw a survey of galaxies with GalSim into an HDF5 file, to be packed with `shard_tools pack hdf5`"
    example = "shard_tools simulate galaxies galaxies.h5 --num 4000 --workers 2"
    parser = _command(commands, "simulate", _simulate, summary, example)
    parser.add_argument("what", choices=("galaxies",), help="stamps in the bands g, r, i, z, y, sky-subtracted")
    parser.add_argument("out", metavar="OUT", type=Path, help="the HDF5 file to write")
    parser.add_argument("--num", type=int, default=4000, metavar="N", help="galaxies (default: 4000)")
    parser.add_argument("--size", type=int, default=96, metavar="PX", help="side of a stamp (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other galaxies (default: 0)")
    _add_workers(parser)


def _out_apart(argv: Sequence[str]) -> list[str]:
    """In `extract DIR --keys 1 2 OUT`, part OUT from the keys, for which argparse would take it."""
    words = list(argv)
    if words[:1] == ["extract"] and "--keys" in words:
        tail = words[words.index("--keys") + 1 :]
        if len(tail) > 1 and not any(word.startswith("-") for word in tail) and not _KEY.fullmatch(tail[-1]):
            words.insert(-1, "--")
    return words


def _add_workers(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: cores, {cores})")


def _place(text: str) -> Path | str:
    """DIR: a folder, or the URL of one."""
    try:
        place = locate(text)
    except ShardError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return place if isinstance(place, Path) else text


def _bytes(text: str) -> int:
    """500MB, 1GiB, 12345: a number with a decimal or binary unit, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?))?B?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 1GiB")
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _version() -> str:
    try:
        return importlib.metadata.version("fastssl-train")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
