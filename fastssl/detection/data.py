"""Images with boxes from the layouts of PASCAL VOC and COCO, and the batches of a run, a function of seed and step."""

# n boxes of an image, H W its sides in px
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as pictures

from fastssl import dist
from fastssl.detection.settings import DetectionData
from shard_tools.documents import read_json
from shard_tools.headers import FORMATS
from shard_tools.manifest import MAX_PIXELS
from shard_tools.sources.voc07 import CLASSES, annotation_names, read_annotation

MAX_COCO_BYTES = 2**30  # instances_train2017.json has 449 MB
MAX_SIDE = 10**6  # px of an annotated image, as for VOC

Sample = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Picture:
    """boxes: (xmin, ymin, xmax, ymax) in px from 0, the far sides outside; labels from 1; difficult: VOC's difficult or
    COCO's crowd, not trained on and neither right nor wrong in a test; segmentations as COCO has them, or (); areas of
    these in px, or of the boxes."""

    path: Path
    number: int
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    difficult: tuple[bool, ...]
    segmentations: tuple[Any, ...] = ()
    size: tuple[int, int] = (0, 0)
    areas: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """All pictures of one or several parts. `digest` tells data of other pictures, boxes or classes apart."""

    classes: tuple[str, ...]
    items: tuple[Picture, ...]

    @property
    def digest(self) -> str:
        facts = [list(self.classes), [[p.path.name, p.boxes, p.labels, p.difficult] for p in self.items]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_train_on(self) -> Pictures:
        """Those with a box that is not difficult: without one there is nothing to match, as detectron2 has it too."""
        return Pictures(self.classes, tuple(p for p in self.items if not all(p.difficult)))


def read_pictures(data: DetectionData, parts: Sequence[str]) -> Pictures:
    """Raises ValueError or ShardError, with the remedy, for a part that is not of its layout."""
    read = [(_read_voc if data.format == "voc" else _read_coco)(Path(data.root), part) for part in parts]
    for other, part in zip(read, parts):
        if other.classes != read[0].classes:
            raise ValueError(f"{part} has other classes than {parts[0]}; give parts of one data set")
    items = [picture for pictures_ in read for picture in pictures_.items]
    if not items:
        raise ValueError(f"{', '.join(parts)} of {data.root} lists no images; check data.train and data.test")
    return Pictures(read[0].classes, tuple(items))


def _read_voc(root: Path, part: str) -> Pictures:
    folder, _, split = part.rpartition("/")
    items: list[Picture] = []
    for name in annotation_names(root / folder, split):
        annotation = read_annotation(root / folder / "Annotations" / f"{name}.xml")
        objects = annotation["objects"]
        # VOC counts pixels from 1 and has both ends inside
        boxes = tuple((o["box"][0] - 1.0, o["box"][1] - 1.0, float(o["box"][2]), float(o["box"][3])) for o in objects)
        labels = tuple(1 + CLASSES.index(o["class"]) for o in objects)
        items.append(
            Picture(root / folder / "JPEGImages" / f"{name}.jpg", len(items), boxes, labels,
                    tuple(o["difficult"] for o in objects), size=tuple(annotation["size"]))
        )  # fmt: skip
    return Pictures(CLASSES, tuple(items))


def _read_coco(root: Path, part: str) -> Pictures:
    path = root / "annotations" / f"instances_{part}.json"
    try:
        document = read_json(path, MAX_COCO_BYTES)
        categories = {c["id"]: str(c["name"]) for c in sorted(document["categories"], key=lambda c: c["id"])}
        numbers = {identity: number for number, identity in enumerate(categories, start=1)}
        found: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
        for annotation in document["annotations"]:
            found[annotation["image_id"]].append(annotation)
        items = [_coco_picture(root / part, image, found[image["id"]], numbers) for image in document["images"]]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); data.root must hold annotations/") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no COCO file of instances ({error!r}); restore it") from None
    return Pictures(tuple(categories.values()), tuple(items))


def _coco_picture(
    folder: Path, image: dict[str, Any], annotations: list[dict[str, Any]], numbers: dict[int, int]
) -> Picture:
    name = Path(image["file_name"])
    if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in str(name):
        raise ValueError(f"{image['file_name'][:80]!r} leaves the folder, or names none")
    size = int(image["width"]), int(image["height"])
    if not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"{str(name)[:80]!r} is said to have {size[0]} x {size[1]} px")
    kept = [a for a in annotations if a["bbox"][2] > 0 and a["bbox"][3] > 0]  # COCO has some boxes of no area
    return Picture(
        folder / name,
        int(image["id"]),
        tuple((_finite(x), _finite(y), _finite(x + w), _finite(y + h)) for x, y, w, h in (a["bbox"] for a in kept)),
        tuple(numbers[a["category_id"]] for a in kept),
        tuple(bool(a.get("iscrowd", 0)) for a in kept),
        tuple(a.get("segmentation") for a in kept),
        size,
        tuple(_finite(a.get("area", a["bbox"][2] * a["bbox"][3])) for a in kept),
    )


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) <= MAX_SIDE**2:  # nor is NaN
        raise ValueError(f"{value!r} is no number of a box")
    return number


class TrainingPictures(torch.utils.data.Dataset[Sample]):
    """Item (position, row): image (3, H, W) in [0, 1] and its boxes, mirrored or not as (seed, position) says."""

    def __init__(self, data: Pictures, seed: int, masks: bool) -> None:
        self.data, self.seed, self.masks = data, seed, masks

    def __getitem__(self, at: tuple[int, int]) -> Sample:
        position, row = at
        picture = self.data.items[row]
        image = load_image(picture)
        kept = [i for i, difficult in enumerate(picture.difficult) if not difficult]
        boxes = torch.tensor([picture.boxes[i] for i in kept])
        target = {"boxes": boxes, "labels": torch.tensor([picture.labels[i] for i in kept])}
        if self.masks:
            target["masks"] = _masks([picture.segmentations[i] for i in kept], image.shape[1], image.shape[2])
        if np.random.default_rng([self.seed, position]).random() < 0.5:
            image = image.flip(2)
            target["boxes"] = torch.stack(
                [image.shape[2] - boxes[:, 2], boxes[:, 1], image.shape[2] - boxes[:, 0], boxes[:, 3]], 1
            )
            if self.masks:
                target["masks"] = target["masks"].flip(2)
        return image, target


def load_image(picture: Picture) -> Tensor:
    """(3, H, W) in [0, 1]. Raises ValueError if it cannot be decoded."""
    try:
        with Image.open(picture.path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px")
            return pictures.to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, DecompressionBombError, ...
        raise ValueError(f"{picture.path} cannot be decoded ({error}); restore it") from None


def batches(
    data: Pictures, steps: range, batch_size: int, seed: int, workers: int, masks: bool
) -> Iterator[list[Sample]]:
    """This rank's part of each step's batch: every picture once an epoch, in an order that seed and epoch give."""
    share, num = batch_size // dist.world(), len(data.items)

    def positions() -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for step in steps:
            mine = []
            for position in range(
                step * batch_size + dist.rank() * share, step * batch_size + (dist.rank() + 1) * share
            ):
                if position // num != epoch:
                    epoch = position // num
                    order = dist.permutation(num, seed, epoch)
                mine.append((position, int(order[position % num])))
            yield mine

    return iter(
        torch.utils.data.DataLoader(
            TrainingPictures(data, seed, masks), batch_sampler=positions(), num_workers=workers, collate_fn=list,
            generator=torch.Generator(),  # its own, so that resuming does not disturb the run's random state
        )
    )  # fmt: skip


def _masks(segmentations: list[Any], height: int, width: int) -> Tensor:
    """(n, H, W) uint8 of polygons and run-length codes."""
    api = coco_masks()
    masks = []
    for segmentation in segmentations:
        _check_mask(segmentation, height, width)
        codes = api.frPyObjects(segmentation, height, width)
        masks.append(api.decode(api.merge(codes) if isinstance(codes, list) else codes))
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)


def _check_mask(segmentation: Any, height: int, width: int) -> None:
    """Raises ValueError for what is neither polygons nor run lengths of an image of this size.

    The library that draws them is C++, and believes what it is given.
    """
    if isinstance(segmentation, list):
        good = bool(segmentation) and all(map(_is_polygon, segmentation))
    else:
        good = isinstance(segmentation, dict) and segmentation.get("size") == [height, width]
        good = good and _is_run_lengths(segmentation.get("counts"), height * width)
    if not good:
        raise ValueError(
            f"a segmentation is neither polygons nor run lengths of {height} x {width} px ({str(segmentation)[:80]});"
            " restore the annotations, or set model.mask=false"
        )


def _is_polygon(points: Any) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    return all(isinstance(value, int | float) and abs(value) <= MAX_SIDE for value in points)


def _is_run_lengths(counts: Any, num_pixels: int) -> bool:
    """A list of runs that add up, or COCO's text of them: 5 bits a character, and from the third run on differences."""
    if isinstance(counts, str):
        runs: list[int] = []
        value = shift = 0
        for char in counts:
            code = ord(char) - 48
            if not 0 <= code < 64 or shift > 30:
                return False
            value |= (code & 31) << shift
            shift += 5
            if not code & 32:
                value -= 1 << shift if code & 16 else 0
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        counts = [] if shift else runs
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        return False
    return sum(counts) == num_pixels


def coco_masks() -> Any:
    """The mask functions of faster-coco-eval. Raises ValueError without it."""
    try:
        from faster_coco_eval import mask
    except ModuleNotFoundError as error:
        raise ValueError("detection needs faster-coco-eval; install fastssl-train[detection]") from error
    return mask
