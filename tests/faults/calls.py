"""What users call as functions, as commands: `main(["picture", FOLDER])`; errors end as those of every command do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastssl import config


def main(arguments: list[str]) -> int:
    return config.run_command(_run, "", arguments)


def _run(arguments: list[str]) -> int:
    _CALLS[arguments[0]](*arguments[1:])
    return 0


def _train(configs: str, *overrides: str) -> None:
    """fastssl-train, its YAML files from another folder."""
    from fastssl import train

    config.config_dir = lambda: Path(configs)
    train._command(list(overrides))


def _picture(root: str, part: str = "train2017") -> None:
    """fastssl-detect's reading of COCO's layout, and of its first picture and masks."""
    from fastssl.detection import data
    from fastssl.detection.settings import DetectionData

    pictures = data.read_pictures(DetectionData(root, "coco", (part,), (part,)), (part,))
    repr(pictures.digest)
    print(pictures.classes)
    data.TrainingPictures(pictures, 0, True)[0, 0]


def _record(path: str) -> None:
    """fastssl-bench's bench.against."""
    from rich.console import Console

    from fastssl.bench import compare, tables
    from fastssl.bench.record import Record, machine

    old = Record.load(Path(path))
    compare.require_comparable(old, "step", {**machine(), "gpu": None})
    tables.show_comparison(compare.compare(old, old, 0.03), compare.differing(old, old), path, Console())


def _view(shards: str, out: str) -> None:
    """fastssl-views of two samples."""
    from fastssl import show_views

    show_views._command([f"data.root={shards}", f"views.out={out}", "views.ids=[0,1]", "loader.backend=exact"])


def _decode(shards: str) -> None:
    """What a training decodes, by the backend that takes every format."""
    import torch

    from fastssl.config import load
    from fastssl.train import open_loader
    from pipelines.loader import Loader  # noqa: F401

    cfg = load(
        [
            f"data.root={shards}",
            "run.dir=x",
            "run.batch_size=2",
            "loader.backend=exact",
            "loader.on_bad=fail",
            "loader.threads=1",
            "run.device=cpu",
        ]
    )
    manifest = cfg.data.manifest()
    with open_loader(cfg, manifest, torch.device("cpu")) as loader:
        next(iter(loader.batches(0)))


_CALLS: dict[str, Callable[..., None]] = {
    "train": _train,
    "picture": _picture,
    "record": _record,
    "view": _view,
    "decode": _decode,
}
