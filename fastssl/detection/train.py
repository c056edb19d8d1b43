"""Transfer to detection: `fastssl-detect detection=voc_c4 checkpoint=RUN data.root=VOCdevkit`, also under torchrun."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastssl import __version__, checkpoint, config, dist, run_lock
from fastssl.checkpoint import CheckpointError
from fastssl.detection.data import Pictures, Sample, batches, coco_masks, load_image, read_pictures
from fastssl.detection.metrics import Detection, summary, voc_ap
from fastssl.detection.models import build_detector, settle_norms
from fastssl.detection.settings import DetectionConfig, load
from fastssl.evaluate.subject import is_foreign
from fastssl.evaluate.task import percent
from fastssl.nn.encoder import build_encoder
from fastssl.precision import autocast
from fastssl.settings import EncoderConfig, require
from fastssl.weights import read
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD

HELP = """
fastssl-detect: Faster and Mask R-CNN from a pre-trained ResNet (= torchrun -m fastssl.detection ...)

  fastssl-detect detection=voc_c4 checkpoint=runs/moco data.root=VOCdevkit
  torchrun --nproc-per-node 8 -m fastssl.detection detection=coco_fpn checkpoint=runs/moco data.root=COCO

settings are key=value; the same command resumes; after the last step it tests, and writes detection.json
  detection=voc_c4|voc_fpn|coco_c4|coco_fpn    the published schedules: VOC07+12 24k steps, COCO 2x with masks
  checkpoint=RUN|RUN/checkpoints/step-N|FILE.pth|random    FILE: a released checkpoint of MoCo, SwAV, timm, ...
  encoder=resnet50 for checkpoint=random, or where FILE leaves it open
  data.root=FOLDER   data.format=voc|coco      data.train=[VOC2007/trainval]  data.test=[VOC2007/test]
  optim.batch_size=16 (of all GPUs)  optim.lr=0.02  optim.steps=24000  optim.milestones=[18000,22000]
  model.norm=batch|frozen  model.mask=true|false   run.dir=DIR (else RUN/detection/PRESET)   run.device=auto|cpu|cuda
exit codes: 0 done, 2 a setting, the checkpoint or the data is wrong, 4 disk full, 5 another job has run.dir,
            7 a checkpoint is damaged, 8 the loss is not finite
"""


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(overrides: list[str]) -> int:
    try:
        run(load(overrides))
    finally:
        dist.teardown()
    return 0


@dataclass(frozen=True)
class Transfer:
    """What is transferred: label such as "resnet50 at step 7"; run_dir of its run, None if it is of none of ours."""

    encoder: nn.Module
    label: str
    run_dir: Path | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def run(cfg: DetectionConfig) -> dict[str, float]:
    """One process's part, from settings to the result file. Returns the metrics, {} if run.stop_after came first."""
    coco_masks()  # a missing library is to be said before a day of training
    device, world = dist.setup(cfg.run.device), dist.world()
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    require(cfg.optim.batch_size % world == 0, "optim.batch_size", cfg.optim.batch_size, f"a multiple of {world} ranks")
    transfer = load_transfer(cfg)
    run_dir = Path(cfg.run.dir) if cfg.run.dir else transfer.run_dir and transfer.run_dir / "detection" / cfg.preset
    if run_dir is None:
        raise ValueError(
            f"run.dir is missing, and checkpoint={cfg.checkpoint} has no run to put it beside; give run.dir=DIR"
        )
    train, test = read_pictures(cfg.data, cfg.data.train).to_train_on(), read_pictures(cfg.data, cfg.data.test)
    _check_data(cfg, train, test)
    torch.manual_seed(cfg.run.seed)
    model: nn.Module = build_detector(transfer.encoder, cfg.model, len(train.classes), transfer.mean, transfer.std)
    if cfg.model.norm == "batch" and device.type == "cuda" and world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    optimizer = _optimizer(cfg, model)
    torch.manual_seed(cfg.run.seed * world + dist.rank())  # of the regions and sizes, which ranks draw apart
    with run_lock.held(run_dir):
        start = _resume(cfg, run_dir, model, optimizer, train, device)
        until = min(cfg.optim.steps, cfg.run.stop_after or cfg.optim.steps)
        fit(cfg, model, optimizer, train, range(start, until), run_dir, device)
        if until < cfg.optim.steps:
            return {}
        found = detect(cfg, model, train, test, device)
        metrics = summary(found, test, cfg.model.mask) if dist.rank() == 0 else {}
        if dist.rank() == 0:
            _report(cfg, transfer, run_dir, metrics, found, train, test)
        return dict(dist.main_says(metrics))  # type: ignore[call-overload]


def load_transfer(cfg: DetectionConfig) -> Transfer:
    """Raises CheckpointError or ValueError, with the remedy, if there is no such checkpoint or weight file."""
    if cfg.checkpoint == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.run.seed)
            encoder = build_encoder(**dataclasses.asdict(cfg.encoder))
        return Transfer(encoder, f"untrained {cfg.encoder.name}", None, IMAGENET_MEAN, IMAGENET_STD)
    if is_foreign(Path(cfg.checkpoint)):
        told = None if cfg.encoder == EncoderConfig() else cfg.encoder
        encoder, found, _ = read.load_backbone(Path(cfg.checkpoint), told)
        return Transfer(encoder, f"{found.name} of {Path(cfg.checkpoint).name}", None, IMAGENET_MEAN, IMAGENET_STD)
    path = Path(cfg.checkpoint)
    encoder, meta = checkpoint.load_backbone(path.parent if path.is_file() else path)
    data, label = meta["config"]["data"], f"{meta['config']['encoder']['name']} at step {meta['step']}"
    return Transfer(
        encoder, label, Path(meta["folder"]).resolve().parent.parent, tuple(data["mean"]), tuple(data["std"])
    )


def fit(
    cfg: DetectionConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Pictures,
    steps: range,
    run_dir: Path,
    device: torch.device,
) -> None:
    """Train over `steps`, saving every run.save_every and at the end. Raises FloatingPointError if the loss is not
    finite."""
    model.train()
    wrapped, began, seen = dist.wrap(model), time.perf_counter(), 0
    for step, samples in zip(steps, _batches(cfg, train, steps)):
        for group in optimizer.param_groups:
            group["lr"] = cfg.optim.lr_at(step)
        losses = _losses(cfg, wrapped, samples, device)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        if cfg.optim.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        optimizer.step()
        seen += cfg.optim.batch_size
        if (step + 1) % cfg.run.log_every == 0 or step + 1 == steps.stop:
            _log(run_dir, step + 1, losses, cfg.optim.lr_at(step), seen / (time.perf_counter() - began))
            began, seen = time.perf_counter(), 0
        if (step + 1) % cfg.run.save_every == 0 or step + 1 == steps.stop:
            meta = {"detection": config.plain(cfg), "data": train.digest, "version": __version__}
            checkpoint.save(run_dir, step + 1, model, {"optimizer": optimizer.state_dict()}, meta, cfg.run.keep)


@torch.no_grad()
def detect(
    cfg: DetectionConfig, model: nn.Module, train: Pictures, test: Pictures, device: torch.device
) -> list[Detection]:
    """All detections on `test`, on every rank in the same order; batch norm is settled on `train` before."""
    if cfg.model.norm == "batch":
        more = range(cfg.optim.steps, cfg.optim.steps + cfg.model.precise_batches)
        coming = _batches(cfg, train, more)
        settle_norms(model, lambda: _losses(cfg, model, next(coming), device), len(more))
    model.eval()
    transform: Any = model.transform
    sizes, transform.min_size = transform.min_size, (cfg.model.test_size,)
    mine: list[Detection] = []
    for row in range(dist.rank(), len(test.items), dist.world()):
        with autocast(cfg.run.precision, device):
            (output,) = model([load_image(test.items[row]).to(device)])
        mine += _plain(row, {key: value.float().cpu() for key, value in output.items()})
    transform.min_size = sizes
    return sorted(_gathered(mine, device), key=lambda d: d["image"])  # stable: each image's own order stays


def _losses(
    cfg: DetectionConfig, model: nn.Module, samples: Sequence[Sample], device: torch.device
) -> dict[str, Tensor]:
    images = [image.to(device, non_blocking=True) for image, _ in samples]
    targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for _, target in samples]
    with autocast(cfg.run.precision, device):
        return model(images, targets)


def _batches(cfg: DetectionConfig, train: Pictures, steps: range) -> Iterator[list[Sample]]:
    return batches(train, steps, cfg.optim.batch_size, cfg.run.seed, cfg.run.workers, cfg.model.mask)


def _optimizer(cfg: DetectionConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD without weight decay on batch norm, as detectron2 has it."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for p in m.parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if id(p) not in norms], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in learning if id(p) in norms], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=cfg.optim.lr, momentum=cfg.optim.momentum)


def _resume(
    cfg: DetectionConfig,
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Pictures,
    device: torch.device,
) -> int:
    """The step to go on from, 0 for a new run. Raises CheckpointError where run_dir holds another one."""
    folder = checkpoint.newest(run_dir)
    if folder is None:
        return 0
    meta, mine = checkpoint.load_meta(folder), config.plain(cfg)
    same = ("checkpoint", "encoder", "model", "optim")
    changed = [key for key in same if meta.get("detection", {}).get(key) != mine[key]]
    if changed or meta.get("data") != train.digest:
        what = f"other settings of {', '.join(changed)}" if changed else "other training data"
        raise CheckpointError(f"{folder} is of a run with {what}; give another run.dir, or remove that one")
    state = checkpoint.restore(folder, model, device)
    with checkpoint.fitting(folder, "training.pt"):
        optimizer.load_state_dict(state["optimizer"])
    return int(meta["step"])


def _check_data(cfg: DetectionConfig, train: Pictures, test: Pictures) -> None:
    if train.classes != test.classes:
        raise ValueError(f"{cfg.data.train} and {cfg.data.test} have different classes; give parts of one data set")
    for key, data in (("train", train), ("test", test.to_train_on())):
        if not data.items:
            raise ValueError(f"no image of data.{key} {getattr(cfg.data, key)} has a box that is not difficult")
    if cfg.model.mask and not all(p.segmentations for p in train.items):
        raise ValueError("model.mask is True, but the data has no segmentations; say model.mask=false")


def _plain(row: int, output: dict[str, Tensor]) -> list[Detection]:
    """One image's detections as plain data; masks as COCO's run lengths."""
    found = [
        {"image": row, "box": box, "score": score, "label": int(label)}
        for box, score, label in zip(*(output[key].tolist() for key in ("boxes", "scores", "labels")))
    ]
    if "masks" in output:
        shapes = (output["masks"][:, 0] > 0.5).permute(1, 2, 0).to(torch.uint8).numpy()
        for detection, code in zip(found, coco_masks().encode(shapes.copy(order="F"))):
            detection["mask"] = {"size": list(code["size"]), "counts": bytes(code["counts"]).decode("ascii")}
    return found


def _gathered(mine: list[Detection], device: torch.device) -> list[Detection]:
    """Every rank's detections, as JSON in a padded tensor of bytes: no object of another process is unpickled."""
    if dist.world() == 1:
        return mine
    data = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8).to(device)
    sizes = dist.all_gather(torch.tensor([len(data)], device=device)).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = dist.all_gather(padded).cpu().split(max(sizes))
    return [d for part, size in zip(parts, sizes) for d in json.loads(bytes(part[:size].tolist()))]


def _log(run_dir: Path, step: int, losses: dict[str, Tensor], lr: float, speed: float) -> None:
    """One line in the terminal and in metrics.jsonl, of rank 0's own losses."""
    values = {name: float(value.detach()) for name, value in losses.items()}
    total = sum(values.values())
    if dist.any_rank(not math.isfinite(total)):
        raise FloatingPointError(f"the loss is {total:g} at step {step}; lower optim.lr, or say run.precision=fp32")
    if dist.rank() == 0:
        parts = "  ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in values.items())
        print(f"step {step}  loss {total:.4f}  {parts}  lr {lr:g}  {speed:.1f} images/s", file=sys.stderr, flush=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": total, **values, "lr": lr, "images_per_s": speed}) + "\n")


def _report(
    cfg: DetectionConfig,
    transfer: Transfer,
    run_dir: Path,
    metrics: dict[str, float],
    found: list[Detection],
    train: Pictures,
    test: Pictures,
) -> None:
    (per_class,) = voc_ap(found, test)
    protocol = (
        f"{'Mask' if cfg.model.mask else 'Faster'} R-CNN {cfg.model.form} of {transfer.label}, {cfg.model.norm} norm, "
        f"{cfg.optim.steps:,} steps of {cfg.optim.batch_size} images, lr {cfg.optim.lr:g}, {cfg.run.precision}; "
        f"{len(train.items):,} images of {', '.join(cfg.data.train)}, {len(test.items):,} of {', '.join(cfg.data.test)}"
    )
    table = Table("metric", "value", title=f"detection: {transfer.label}")
    for key, value in metrics.items():
        table.add_row(key.removeprefix("detection/"), "no such box" if value < 0 else percent(value))
    Console().print(table)
    print(protocol)
    result = {
        "metrics": metrics,
        "protocol": protocol,
        "voc_ap50_of_class": {name: dataclasses.asdict(ap) for name, ap in per_class.items()},
        "step": cfg.optim.steps,
        "data": {"train": train.digest, "test": test.digest},
        "config": config.plain(cfg),
        "versions": {"fastssl": __version__, "torch": torch.__version__},
    }
    path = run_dir / "detection.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"result: {path}")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run_dir)) as board:
        for key, value in metrics.items():
            board.add_scalar(key, value, cfg.optim.steps)


if __name__ == "__main__":
    sys.exit(main())
