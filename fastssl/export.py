"""Weights for other projects: `fastssl-export FORMAT CHECKPOINT OUT`, from a run or from another project's file."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fastssl import config
from fastssl.settings import EncoderConfig
from fastssl.weights import hub
from fastssl.weights.detectron2 import detectron2_configs, detectron2_file
from fastssl.weights.graphs import onnx_file, torch_export_file
from fastssl.weights.read import described
from fastssl.weights.source import Source, load
from fastssl.weights.state_dicts import detr_file, safetensors_file, torchvision_file
from shard_tools.disk import sync_folder, write_file

HELP = """
fastssl-export: write the backbone of a run, or of another project's weight file, for other projects

  fastssl-export FORMAT CHECKPOINT OUT [--overwrite]
  fastssl-export timm runs/first exported/                   then timm.create_model("local-dir:exported", ...)
  fastssl-export detectron2 moco_v2.pth.tar moco.pkl --with-config

  FORMAT      torchvision   OUT.pth            for torchvision.models.NAME(), without its fc
              timm          OUT/               model.safetensors and config.json
              huggingface   OUT/               the same and a README.md filled from the run
              detectron2    OUT.pkl            --with-config: MoCo's configs for VOC and COCO beside it
              detr          OUT.pth            for the ResNet with frozen batch norm inside DETR
              safetensors   OUT.safetensors    any encoder, under fastssl's own names
              torch-export  OUT.pt2            the network itself, for torch.export.load
              onnx          OUT.onnx           the network itself; needs fastssl-train[export]
  CHECKPOINT  a run, one of its checkpoint folders, or a .pth, .pth.tar, .pt or .safetensors file
              --encoder timm/NAME for a file whose keys do not show what it is
exit codes: 0 done, 2 the checkpoint, the format or OUT is wrong, 4 disk full
"""


@dataclass(frozen=True)
class File:
    suffixes: tuple[str, ...]
    content: Callable[[Source], bytes]


@dataclass(frozen=True)
class Folder:
    content: Callable[[Source], dict[str, bytes]]


FORMATS: dict[str, File | Folder] = {
    "torchvision": File((".pth", ".pt"), torchvision_file),
    "timm": Folder(hub.timm_folder),
    "huggingface": Folder(hub.huggingface_folder),
    "detectron2": File((".pkl",), detectron2_file),
    "detr": File((".pth", ".pt"), detr_file),
    "safetensors": File((".safetensors",), safetensors_file),
    "torch-export": File((".pt2",), torch_export_file),
    "onnx": File((".onnx",), onnx_file),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; fastssl-export --help shows how to call it")


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(arguments: list[str]) -> None:
    parser = _Parser(add_help=False)
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--encoder", metavar="NAME")
    parser.add_argument("--with-config", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(arguments)
    encoder = EncoderConfig(args.encoder) if args.encoder else None
    export(args.format, args.checkpoint, args.out, encoder, args.with_config, args.overwrite)


def export(
    form: str,
    path: Path,
    out: Path,
    encoder: EncoderConfig | None = None,
    with_config: bool = False,
    overwrite: bool = False,
) -> None:
    """Write `out`, whole or not at all, and print what went into it. Raises ValueError with the remedy."""
    target = FORMATS[form]
    if with_config and form != "detectron2":
        raise ValueError(f"--with-config is for format detectron2, not for {form}; leave it out")
    configs = {name: out.with_name(f"{out.stem}_{name}_c4.yaml") for name in ("voc", "coco")} if with_config else {}
    _check_out(form, out, overwrite)
    for beside in configs.values():
        _refuse_existing(beside, overwrite)
    source = load(path, encoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(target, File):
        texts = detectron2_configs(source, out.name) if configs else {}
        write_file(out, target.content(source))
        for name, text in texts.items():
            write_file(configs[name], text.encode())
    else:
        _write_folder(out, target.content(source))
    view = source.view
    print(f"{form}: {described(source.encoder)} from {source.origin}")
    resized = f" of {view.resize}" if view.resize else ""
    print(f"input: {view.size} px{resized}, mean {view.augment.mean}, std {view.augment.std}")
    print("\n".join(f"written: {written}" for written in (out, *configs.values())))


def _check_out(form: str, out: Path, overwrite: bool) -> None:
    """Before anything is read: whether `out` may be written. Only a folder that an export wrote is ever replaced."""
    target = FORMATS[form]
    _refuse_existing(out, overwrite)
    if isinstance(target, File):
        if out.suffix not in target.suffixes:
            raise ValueError(f"OUT is {out}, but format {form} is a file that ends in {' or '.join(target.suffixes)}")
        if out.is_dir():
            raise ValueError(f"OUT is {out}, a folder; give the name of a file")
    elif out.exists():
        foreign = out.is_file() or {path.name for path in out.iterdir()} - {hub.WEIGHTS, hub.CONFIG, hub.CARD}
        if foreign:
            raise ValueError(f"OUT is {out}, which holds more than an export; give another folder")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; add --overwrite to replace it, or give another name")


def _write_folder(out: Path, files: dict[str, bytes]) -> None:
    """Beside `out`, then renamed; what was there before goes last."""
    beside, before = (out.with_name(f".{word}-{out.name}") for word in ("writing", "replaced"))
    for leftover in (beside, before):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    for name, content in files.items():
        write_file(beside / name, content)
    if out.exists():
        os.rename(out, before)
    os.rename(beside, out)
    sync_folder(out.parent)
    shutil.rmtree(before, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
